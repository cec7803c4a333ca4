"""Calls that have ended: nothing of them waits for Python's garbage collection, which may come much later."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Queue
from typing import TYPE_CHECKING, Literal

import grpc
import numpy as np
import pytest

from poolrpc import AsyncPoolClient, LPPool2d, MaxPool2d, PoolClient, PoolError
from poolrpc._wire.framing import MESSAGE_BYTES_KEY
from poolrpc_server.calls.admission import Ticket
from poolrpc_server.transports.grpc.interceptor import GrpcContext
from tests.integration.connections import server, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POOL, STREAM = "/poolrpc.v1.PoolService/Pool", "/poolrpc.v1.PoolService/PoolStream"
WATCH = "/grpc.health.v1.Health/Watch"
CALLS = 10


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Return the address of a server in this process."""
    with server() as address:
        yield address


@pytest.fixture(scope="module")
def channel(address: str) -> Iterator[grpc.Channel]:
    """Return a channel to it."""
    with grpc.insecure_channel(address) as channel:
        yield channel


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Keep Python from looking for garbage."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def kept() -> int:
    """Return the number of calls in this process's memory, by the parts of which each has one."""
    return sum(type(each) in {Ticket, GrpcContext} for each in gc.get_objects())


def unary(method: str, message: bytes = b"", **options: object) -> Callable[[grpc.Channel], object]:
    """Return a function that makes a call of one message."""
    return lambda channel: channel.unary_unary(method)(message, **options)


def stream(method: str, message: bytes) -> Callable[[grpc.Channel], object]:
    """Return a function that sends a stream of one message and reads all answers."""
    return lambda channel: list(channel.stream_stream(method)(iter([message])))


def watched(channel: grpc.Channel) -> None:
    """Watch the health, and leave."""
    call = channel.unary_stream(WATCH)(b"")
    next(call)
    call.cancel()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(unary(POOL, b"\xff"), id="not a message"),
        pytest.param(unary(POOL, b"\x0a\x02\x08\x01"), id="invalid"),
        pytest.param(unary(POOL, metadata=[("priority", "9")]), id="rejected for its metadata"),
        pytest.param(unary(POOL, metadata=[(MESSAGE_BYTES_KEY, "999999999999")]), id="rejected for its size"),
        pytest.param(unary(POOL, timeout=0.0001), id="deadline"),
        pytest.param(unary("/no.Such/Method"), id="unknown method"),
        pytest.param(unary("/poolrpc.v1.PoolService/GetServerInfo"), id="server info"),
        pytest.param(unary("/grpc.health.v1.Health/Check"), id="health"),
        pytest.param(unary("/inference.GRPCInferenceService/ModelInfer", b"\x0a\x01z"), id="unknown model"),
        pytest.param(stream(STREAM, b"\xff"), id="stream of no message"),
        pytest.param(stream(STREAM, b"\x0a\x00"), id="stream of an invalid request"),
        pytest.param(watched, id="watch"),
    ],
)
def test_a_call_is_freed_when_it_has_ended(channel: grpc.Channel, call: Callable[[grpc.Channel], object]) -> None:
    """Whatever its status, it is in no cycle of references: gRPC would keep its stream and its message as well."""
    before = kept()
    for _ in range(CALLS):
        with suppress(grpc.RpcError):
            call(channel)
    until(lambda: kept() <= before)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("transport", ["unary", "stream"])
def test_a_call_that_succeeded_is_freed(address: str, transport: str) -> None:
    """The same for calls of the client."""
    x = np.ones((4, 1, 8, 8), np.float32)
    before = kept()
    with PoolClient(address) as client:
        for _ in range(CALLS):
            client.pool(x, MaxPool2d(2), transport=transport)
        until(lambda: kept() <= before)


def errors() -> int:
    """Return the number of errors of calls in this process's memory; their tracebacks have frames with tensors."""
    return sum(issubclass(type(each), PoolError | grpc.RpcError) for each in gc.get_objects())


@pytest.fixture(scope="module")
def unix_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a server in this process with one compute thread, for which calls wait."""
    with server(listen=(f"unix:{tmp_path_factory.mktemp('ended') / 'pool.sock'}",), threads=1) as address:
        yield address


X = np.ones((4, 8, 128, 128), np.float32)
INVALID, SLOW = MaxPool2d(300), [LPPool2d(1.7, 3, stride=1)] * 16
SECONDS = 0.1
"""A deadline within which the slow layers are not computed."""


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("transport", ["unary", "stream", "arena", "local"])
def test_an_error_is_freed_when_it_was_handled(unix_address: str, transport: Literal["unary"]) -> None:
    """Calls that are invalid, or end in the queue or in the computation, leave no error in client and server.

    Its traceback would keep their tensors, and a client's whole shared memory after the client is gone.
    """
    before = errors(), kept()

    def fail(client: PoolClient) -> None:
        with suppress(PoolError):
            client.pool(X, INVALID, transport=transport)
        with suppress(PoolError):
            client.pool(X, SLOW, transport=transport, timeout=SECONDS)

    with PoolClient(unix_address) as client, ThreadPoolExecutor(4) as threads:
        list(threads.map(fail, [client] * 8))
        until(lambda: errors() <= before[0] and kept() <= before[1])


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("transport", ["unary", "stream", "arena", "local"])
async def test_an_error_of_the_async_client_is_freed(unix_address: str, transport: Literal["unary"]) -> None:
    """The same for AsyncPoolClient, and if calls are cancelled."""
    before = errors(), kept()
    async with AsyncPoolClient(unix_address) as client:

        async def fail() -> None:
            with suppress(PoolError):
                await client.pool(X, INVALID, transport=transport)
            with suppress(PoolError):
                await client.pool(X, SLOW, transport=transport, timeout=SECONDS)
            with suppress(TimeoutError, PoolError):  # a cancelled call may end the arena of the others
                await asyncio.wait_for(client.pool(X, SLOW, transport=transport), SECONDS)

        await asyncio.gather(*(fail() for _ in range(8)))
        await asyncio.to_thread(until, lambda: errors() <= before[0] and kept() <= before[1])


@pytest.mark.slow
@pytest.mark.usefixtures("uncollected")
def test_a_call_that_is_cancelled_while_it_sends_is_freed(channel: grpc.Channel) -> None:
    """Its wait for the message ends with an error that grpcio keeps."""
    before = kept()
    for _ in range(CALLS):
        sent = Queue[bytes | None]()
        call = channel.stream_unary(POOL).future(iter(sent.get, None))
        until(lambda: kept() > before)
        call.cancel()
        sent.put(None)
        until(lambda: kept() <= before)
