"""The services of the compose file: health, limits, a clean stop, and memory shared between two containers."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import poolrpc

if TYPE_CHECKING:
    from collections.abc import Callable

SLOW = poolrpc.AvgPool2d(31, stride=1)  # takes seconds for the shape below on any machine, because of its large kernel
SLOW_SHAPE = (1, 2, 1200, 1200)


@pytest.mark.parametrize("profile", ["", "gpu", "cluster", "observe", "client"])
def test_each_profile_is_valid(project: Callable[..., Any], profile: str) -> None:
    """Compose accepts the file with each profile."""
    with project("config", COMPOSE_PROFILES=profile) as running:
        running.compose("config", "-q")


def test_a_client_on_the_host_pools(project: Callable[..., Any], server_image: str) -> None:
    """`up --wait` returns when the server is healthy; a client on the host gets torch's result; the limits are set."""
    assert server_image
    x = np.random.default_rng(0).standard_normal((2, 8, 64, 64), np.float32)
    with project("outside", POOLRPC_MEMORY="1g", POOLRPC_CPUS="1") as running:
        running.up("server")
        with poolrpc.PoolClient(running.address("server")) as client:
            output = client.pool(x, poolrpc.MaxPool2d(3, stride=2)).output
            info = client.server_info()
        assert np.array_equal(output, torch.nn.functional.max_pool2d(torch.from_numpy(x), 3, 2).numpy())
        assert info.threads == 1
        assert info.limits["max_inflight_bytes"].value < 2**30
        assert running.address("server").startswith("127.0.0.1:")
        container = running.containers("server")[0]
        assert container["State"]["Health"]["Status"] == "healthy"
        host = container["HostConfig"]
        assert (host["ReadonlyRootfs"], host["CapDrop"], host["Init"]) == (True, ["ALL"], True)
        assert host["SecurityOpt"] == ["no-new-privileges:true"]
        assert (host["Memory"], host["NanoCpus"], host["PidsLimit"]) == (2**30, 10**9, 1024)


def test_sigterm_finishes_a_call_in_flight(project: Callable[..., Any], server_image: str) -> None:
    """If the container is stopped, a call that takes longer than the drain still gets its result; the status is 0."""
    assert server_image
    shapes: list[Any] = []
    calling = threading.Event()
    with project("sigterm", POOLRPC_CPUS="1") as running:
        running.up("server")
        # Without retries, so that the result is that of the call in flight, and not of a second one.
        with poolrpc.PoolClient(running.address("server"), options={"grpc.enable_retries": 0}) as client:
            client.health()

            def call() -> None:
                calling.set()
                shapes.append(client.pool(np.ones(SLOW_SHAPE), SLOW, transport="unary").output.shape)

            caller = threading.Thread(target=call)
            caller.start()
            assert calling.wait(60)
            running.compose("stop", "server")  # SIGTERM; the call arrives within --drain-seconds, and ends afterwards
            caller.join(60)
        assert shapes == [SLOW.output_shape(SLOW_SHAPE)]
        state = running.containers("server")[0]["State"]
        assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
        log = running.log("server")
        stopping = next(index for index, line in enumerate(log) if line["event"] == "stopping")
        assert any(line.get("method", "").endswith("/Pool") and line["status"] == "OK" for line in log[stopping:])
        assert log[-1]["event"] == "stopped"


def test_a_hostile_request_is_rejected_and_nothing_is_killed(project: Callable[..., Any], server_image: str) -> None:
    """Messages, outputs and work over the container's limits are RESOURCE_EXHAUSTED; the server keeps running."""
    assert server_image
    x = np.ones((1, 100, 1000, 1000), np.float32)  # 400 MB, and as many for the output
    with project("hostile", POOLRPC_MEMORY="1g", POOLRPC_CPUS="1") as running:
        running.up("server")
        before = running.containers("server")[0]["State"]
        with poolrpc.PoolClient(running.address("server")) as client:
            for hostile, layer, transport in (
                (x, poolrpc.MaxPool2d(1), "unary"),
                (x[:, :1], poolrpc.AdaptiveAvgPool2d(30_000), "unary"),
                (x[:, :1], poolrpc.AvgPool2d(255, stride=1), "unary"),
                (x[:, :1], poolrpc.AdaptiveAvgPool2d(30_000), "stream"),
            ):
                with pytest.raises(poolrpc.LimitExceededError):
                    client.pool(hostile, layer, transport=transport)
            assert client.pool(x, poolrpc.MaxPool2d(10)).output.shape == (1, 100, 100, 100)  # as a stream, in blocks
            assert client.health() == "SERVING"
        after = running.containers("server")[0]
        assert (after["State"]["OOMKilled"], after["RestartCount"]) == (False, 0)
        assert after["State"]["StartedAt"] == before["StartedAt"]


def test_the_arena_works_across_containers(project: Callable[..., Any], server_image: str, client_image: str) -> None:
    """A client in a container without a network pools in shared memory, through the volume of sockets."""
    assert server_image
    assert client_image
    with project("arena") as running:
        running.up("server")
        assert running.compose("run", "--rm", "demo").split() == ["arena", "(1,", "64,", "112,", "112)", "802816.0"]
        assert not any(each["HostConfig"]["IpcMode"] == "host" for each in running.containers("server"))
