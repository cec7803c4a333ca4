"""Health by grpc.health.v1, as clients other than this project's call it."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import poolrpc
import poolrpc_server
from poolrpc._wire.status import translate_rpc_error

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVICE = "/grpc.health.v1.Health"


@contextmanager
def serving(call_threads: int = 8) -> Iterator[str]:
    """Yield the address of a server in this process."""
    server = poolrpc_server.Server(poolrpc_server.Config(listen=("127.0.0.1:0",), threads=1, call_threads=call_threads))
    server.start()
    try:
        yield server.addresses[0]
    finally:
        server.stop(grace=0)


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
