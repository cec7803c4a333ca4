"""Health: the state of each service, and its observers."""

import pytest

from poolrpc import NotFoundError
from poolrpc.v1 import standard_pb2
from poolrpc_server.protocols.health import Health
from tests.unit.server.context import Context

SERVING, NOT_SERVING = (
    standard_pb2.HealthCheckResponse.SERVING_STATUS_SERVING,
    standard_pb2.HealthCheckResponse.SERVING_STATUS_NOT_SERVING,
)


def check(health, service):
    """Return the status of a service."""
    answer = health.check(standard_pb2.HealthCheckRequest(service=service).SerializeToString(), Context())
    return standard_pb2.HealthCheckResponse.FromString(answer).status


def test_every_service_has_the_state_of_the_server():
    """A server does not serve before `set_serving`, and only its own services are known."""
    health = Health(["a.B"])
    for serving in (None, True, False, True):
        if serving is not None:
            health.set_serving(serving)
        assert {check(health, name) for name in ("", "a.B")} == {SERVING if serving else NOT_SERVING}
        for name in ("a", "a.b", "x" * 100_000):
            with pytest.raises(NotFoundError) as raised:
                check(health, name)
            assert raised.value.reason == "SERVICE"
            assert len(raised.value.message) < 300
    assert health.services == ("", "a.B")


def test_observers_are_called_after_each_change():
    """An observer gets the new state each time it is set, in their order, and nothing when it is added."""
    health, seen = Health([]), []
    health.set_serving(True)
    for name in ("first", "second"):
        health.add_observer(lambda serving, name=name: seen.append((name, serving, health.serving)))
    assert seen == []
    health.set_serving(False)
    assert seen == [("first", False, False), ("second", False, False)]


def test_observers_are_not_called_under_a_lock():
    """An observer may itself add another one or set the state."""
    health, seen = Health([]), []

    def observe(serving):
        seen.append(serving)
        if serving:
            health.add_observer(seen.append)
            health.set_serving(False)

    health.add_observer(observe)
    health.set_serving(True)
    assert seen == [True, False, False]


@pytest.mark.parametrize("public", [True, False])
def test_only_a_public_check_needs_no_token(public):
    """The operator decides whether health checks need a token; they are probes, and do not compute."""
    (method,) = Health([], public=public).methods()
    assert (method.name, method.public, method.probe, method.computes) == (
        "/grpc.health.v1.Health/Check",
        public,
        True,
        False,
    )
