"""Health by grpc.health.v1, as clients other than this project's call it."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import poolrpc
import poolrpc_server
from poolrpc._wire.status import translate_rpc_error
from poolrpc_server.transports.grpc import health_watch
from tests.integration.connections import OWN_CONNECTION
from tests.scrape import Scrape

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVICE = "/grpc.health.v1.Health"


SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


@contextmanager
def running(call_threads: int = 8) -> Iterator[poolrpc_server.Server]:
    """Yield a server in this process."""
    server = poolrpc_server.Server(poolrpc_server.Config(listen=("127.0.0.1:0",), threads=1, call_threads=call_threads))
    server.start()
    try:
        yield server
    finally:
        server.stop(grace=0)


@contextmanager
def serving(call_threads: int = 8) -> Iterator[str]:
    """Yield the address of a server in this process."""
    with running(call_threads) as server:
        yield server.addresses[0]


def watch(channel: grpc.Channel, service: str = "") -> Any:
    """Watch a service."""
    return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)


def test_health_is_watched_after_another_server_of_the_process_ended() -> None:
    """Servers of one process share nothing: the first answers Watch when a later one has been stopped."""
    with serving() as address:
        with serving():
            pass
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watched = health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
            assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
            watched.cancel()
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=30).status == 1


def test_bytes_that_are_not_a_message_are_internal() -> None:
    """Watch answers them as every other method does."""
    with serving() as address, grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as raised:
        next(channel.unary_stream(f"{SERVICE}/Watch")(b"\xff", timeout=30))
    error = translate_rpc_error(raised.value)
    assert (error.code, error.reason) == ("INTERNAL", "NO_MESSAGE")


def test_methods_of_health_that_are_not_served_take_no_threads() -> None:
    """A call of a method that health does not serve, such as List, ends before its message arrives."""
    ended = threading.Event()

    def nothing() -> Iterator[bytes]:
        ended.wait()
        yield from ()

    with serving(call_threads=2) as address, grpc.insecure_channel(address) as channel:
        for call in [channel.stream_stream(f"{SERVICE}/List")(nothing(), timeout=30) for _ in range(4)]:
            assert call.code() == grpc.StatusCode.UNIMPLEMENTED
        with poolrpc.PoolClient(address, timeout=30) as client:
            assert client.pool(np.ones((1, 1, 4, 4), np.float32), poolrpc.MaxPool2d(2)).shape == (1, 1, 2, 2)
        ended.set()


def test_watchers_learn_of_the_drain_and_end_with_the_server() -> None:
    """Every watcher gets NOT_SERVING once, also one that comes during the drain, and the stop ends them all."""
    with running() as server, grpc.insecure_channel(server.addresses[0]) as channel:
        watchers = [watch(channel, service) for service in ("", "poolrpc.v1.PoolService", *[""] * 20)]
        assert [next(each).status for each in watchers] == [SERVING] * len(watchers)
        server.drain()
        assert [next(each).status for each in watchers] == [NOT_SERVING] * len(watchers)
        late = watch(channel)
        assert next(late).status == NOT_SERVING
        stop = threading.Thread(target=server.stop, args=(60,))
        stop.start()
        assert [list(each) for each in (*watchers, late)] == [[]] * (len(watchers) + 1)
        stop.join(60)  # long before the grace is over
        assert not stop.is_alive()


def test_watchers_over_the_limit_are_rejected_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many gets UNAVAILABLE with the reason, which the metrics count as for any other call."""
    monkeypatch.setattr(health_watch, "MAX_WATCHERS", 2)
    config = poolrpc_server.Config(listen=("127.0.0.1:0",), threads=1, metrics="127.0.0.1:0")
    server = poolrpc_server.Server(config)
    server.start()
    try:
        with grpc.insecure_channel(server.addresses[0]) as channel:
            watchers = [watch(channel) for _ in range(2)]
            assert [next(each).status for each in watchers] == [SERVING] * 2
            with pytest.raises(grpc.RpcError) as rejected:
                next(watch(channel))
            assert translate_rpc_error(rejected.value).reason == "WATCHERS"
            assert Scrape(server.metrics_address)("poolrpc_rejects_total", reason="WATCHERS") == 1
    finally:
        server.stop(grace=0)


def test_a_service_that_does_not_exist_is_unknown_to_watchers() -> None:
    """The stream stays open, as the protocol says, and Check is NOT_FOUND."""
    with serving() as address, grpc.insecure_channel(address) as channel:
        watcher = watch(channel, "no.Such")
        assert next(watcher).status == SERVICE_UNKNOWN
        assert watcher.is_active()
        with pytest.raises(grpc.RpcError) as raised:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="no.Such"), timeout=30)
        assert raised.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("method", ["Watch", "Check"])
def test_a_message_that_is_too_large_is_rejected(method: str) -> None:
    """Health takes small messages alone."""
    message = health_pb2.HealthCheckRequest(service="x" * 2**20).SerializeToString()
    with serving() as address, grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as raised:
            next(channel.stream_stream(f"{SERVICE}/{method}")(iter([message]), timeout=30))
        error = translate_rpc_error(raised.value)
        assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
        assert next(watch(channel)).status == SERVING


def test_health_is_answered_with_calls_that_send_nothing() -> None:
    """Any number of Checks, Watches and other control calls without a message keep no one from an answer."""
    ended = threading.Event()

    def nothing() -> Iterator[bytes]:
        ended.wait()
        yield from ()

    methods = (
        f"{SERVICE}/Check",
        f"{SERVICE}/Watch",
        "/poolrpc.v1.PoolService/GetServerInfo",
        "/inference.GRPCInferenceService/ServerLive",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    )
    with (
        serving() as address,
        grpc.insecure_channel(address) as channel,
        grpc.insecure_channel(address, [*OWN_CONNECTION.items()]) as attacker,
    ):
        calls = [attacker.stream_stream(method)(nothing(), timeout=60) for method in methods * 60]
        for _ in range(5):
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30).status == 1
            watcher = watch(channel)
            assert next(watcher).status == SERVING
            watcher.cancel()
        for call in calls:
            call.cancel()
        ended.set()


def test_watches_that_are_cancelled_at_once_leave_nothing() -> None:
    """Watches that are opened and cancelled by several clients at once leave a server that answers and stops."""
    with serving() as address:

        def flood() -> None:
            with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                for _ in range(50):
                    watcher = watch(channel)
                    next(watcher)
                    watcher.cancel()

        clients = [threading.Thread(target=flood) for _ in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
        with grpc.insecure_channel(address) as channel:
            assert next(watch(channel)).status == SERVING
