"""Limits of connections: metadata, calls at a time, age and idle time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import poolrpc
from poolrpc import MaxPool2d, PoolClient
from poolrpc._wire.codec import Request, encode_request
from poolrpc.tensors import TensorSpec
from tests.integration.connections import OWN_CONNECTION, server
from tests.integration.stream_messages import METHOD, OpenStream, block, header


def test_metadata_is_bounded() -> None:
    """A call with more metadata than the limit is RESOURCE_EXHAUSTED, and one with a little less is served."""
    with server(max_metadata_bytes=4096) as address:
        with PoolClient(address, metadata=[("x", "y" * 3000)]) as client:
            assert client.server_info()
        with PoolClient(address, metadata=[("x", "y" * 5000)]) as client, pytest.raises(poolrpc.LimitExceededError):
            client.server_info()


def test_calls_of_a_connection_are_bounded() -> None:
    """A call over the limit waits at its client; other connections are not affected."""
    with server(max_connection_calls=1) as address, grpc.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        with PoolClient(address, options=OWN_CONNECTION) as client:
            assert client.server_info()
        with pytest.raises(grpc.RpcError) as caught:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=0.5)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        watch.cancel()
        assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30).status


@pytest.mark.parametrize("cancelled", [False, True], ids=["answered", "cancelled"])
def test_a_client_that_keeps_the_limit_on_calls_is_never_rejected(cancelled: bool) -> None:  # noqa: FBT001 - a case
    """Four times as many callers as calls wait at their client, also while others of its calls are cancelled."""
    with (
        server(max_connection_calls=4) as address,
        grpc.insecure_channel(address, [*OWN_CONNECTION.items()]) as channel,
    ):
        get_info = channel.unary_unary("/poolrpc.v1.PoolService/GetServerInfo")

        def call(_: int) -> None:
            for number in range(50):
                future = get_info.future(b"", timeout=60)
                if cancelled and number % 2:
                    future.cancel()
                else:
                    assert future.result()

        with ThreadPoolExecutor(16) as threads:
            list(threads.map(call, range(16)))


@pytest.mark.parametrize("limit", ["max_connection_age_seconds", "max_connection_idle_seconds"])
def test_a_connection_ends_by_its_age_or_idle_time(limit: str) -> None:
    """The server ends an old connection, and one without calls; the next call opens another."""
    with server(**{limit: 1.0}) as address, grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        ended, ready = threading.Event(), threading.Event()

        def on_state(state: grpc.ChannelConnectivity) -> None:
            if state == grpc.ChannelConnectivity.READY:
                ready.set()
            elif ready.is_set():
                ended.set()

        channel.subscribe(on_state)
        assert check(health_pb2.HealthCheckRequest(), timeout=30).status
        assert ended.wait(60)
        assert check(health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True).status


def test_a_connection_that_ends_by_its_age_loses_no_call() -> None:
    """Callers without retries keep their connection busy while it ends many times: each call gets its answer."""
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    request = encode_request(Request(TensorSpec("float32", (1, 4, 64, 64)), ((MaxPool2d(2),),)))
    request.payload = bytes(4 * 4 * 64 * 64)
    message = request.SerializeToString()
    connections = threading.Semaphore(0)
    enough = threading.Event()
    with (
        server(max_connection_age_seconds=0.2, shutdown_grace=0.0) as address,
        grpc.insecure_channel(address, own_connection) as channel,
    ):
        channel.subscribe(lambda state: connections.release() if state == grpc.ChannelConnectivity.READY else None)
        pool = channel.unary_unary("/poolrpc.v1.PoolService/Pool")

        def call(_: int) -> None:
            while not enough.is_set():
                assert pool(message, timeout=60)

        with ThreadPoolExecutor(4) as threads:
            calls = threads.map(call, range(4))
            try:
                assert all(connections.acquire(timeout=60) for _ in range(8))
            finally:
                enough.set()
            list(calls)


def test_a_call_that_takes_longer_than_the_age_is_finished() -> None:
    """A stream that is open while its connection reaches its age gets its answer, with no grace for a shutdown."""
    with (
        server(max_connection_age_seconds=0.5, shutdown_grace=0.0) as address,
        grpc.insecure_channel(address, [*OWN_CONNECTION.items()]) as channel,
    ):
        connected, ended = threading.Event(), threading.Event()

        def on_state(state: grpc.ChannelConnectivity) -> None:
            if state == grpc.ChannelConnectivity.READY:
                connected.set()
            elif connected.is_set():
                ended.set()

        channel.subscribe(on_state)
        stream = OpenStream(header((2, 3, 4, 4)))
        responses = channel.stream_stream(METHOD)(stream, timeout=60)
        assert ended.wait(60)
        stream.put(block(6 * 64))
        stream.end()
        assert list(responses)
