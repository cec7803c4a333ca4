"""Who answers a call: a thread of its own or, where it is alone and quick, the one that read its message."""

from __future__ import annotations

import threading
from concurrent import futures
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from poolrpc import AvgPool2d, MaxPool2d, PoolClient
from poolrpc_server.app import Server
from poolrpc_server.compute.engine import Engine
from poolrpc_server.config import Config
from poolrpc_server.transports.grpc import threads
from poolrpc_server.transports.grpc.threads import CallThreads

if TYPE_CHECKING:
    from collections.abc import Iterator

METHOD, HELD = "/test.Names/Mine", "/test.Names/Held"
SECONDS = 20


class ReloadingFile(CallThreads):
    """Tells of each call that begins and ends."""

    def __init__(self, most: int) -> None:
        """Make so many threads, without a dispatcher: nothing is announced here."""
        super().__init__(most, None)  # type: ignore[arg-type]
        self.begun, self.ended = threading.Semaphore(0), threading.Semaphore(0)

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        """Have something called."""
        future = super().submit(*args, **kwargs)
        self.begun.release()
        return future

    def _done(self, future: object) -> None:
        super()._done(future)
        self.ended.release()


@contextmanager
def naming(held: threading.Event) -> Iterator[tuple[ReloadingFile, grpc.Channel]]:
    """Run gRPC's server with our threads; its methods give the name of the thread that answers."""
    pool = ReloadingFile(4)
    pool.quick = {METHOD.encode(): lambda message: message == b"quick"}

    def name(_: bytes, __: grpc.ServicerContext) -> bytes:
        return threading.current_thread().name.encode()

    def hold(_: bytes, __: grpc.ServicerContext) -> bytes:
        held.wait(SECONDS)
        return b""

    unary = grpc.unary_unary_rpc_method_handler
    server = grpc.server(pool)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Names", {"Mine": unary(name), "Held": unary(hold)}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield pool, channel
    finally:
        held.set()
        server.stop(0).wait(SECONDS)
        pool.shutdown()


def in_a_thread(name: bytes) -> bool:
    """Tell whether it is the name of a call's thread."""
    return name.startswith(b"poolrpc-call")


def test_grpcs_server_is_inside_as_we_know_it() -> None:
    """A gRPC that is otherwise would serve as well, and slower: whoever updates it should know."""
    assert threads.INSIDE is not None


def test_who_is_alone_and_quick_needs_no_thread() -> None:
    """Such a call is answered where its message was read, any other by a thread of its own."""
    with naming(threading.Event()) as (pool, channel):
        for message, threaded in ((b"quick", False), (b"slow", True), (b"quick", False), (b"", True)):
            assert in_a_thread(channel.unary_unary(METHOD)(message, timeout=SECONDS)) is threaded
            assert pool.ended.acquire(timeout=SECONDS)


def test_who_is_not_alone_has_a_thread() -> None:
    """While another call is under way every call has a thread; afterwards it is as before."""
    held = threading.Event()
    with naming(held) as (pool, channel):
        ask = channel.unary_unary(METHOD)
        other = channel.unary_unary(HELD).future(b"", timeout=SECONDS)
        assert pool.begun.acquire(timeout=SECONDS)
        assert in_a_thread(ask(b"quick", timeout=SECONDS))
        held.set()
        other.result()
        for _ in range(2):
            assert pool.ended.acquire(timeout=SECONDS)
        assert not in_a_thread(ask(b"quick", timeout=SECONDS))


def test_another_call_comes_before_the_message() -> None:
    """A call that was alone when it began, and isn't when its message comes, has a thread."""
    held, message = threading.Event(), threading.Event()
    with naming(held) as (pool, channel):

        def messages() -> Iterator[bytes]:
            message.wait(SECONDS)
            yield b"quick"

        late = channel.stream_unary(METHOD).future(messages(), timeout=SECONDS)
        assert pool.begun.acquire(timeout=SECONDS)
        other = channel.unary_unary(HELD).future(b"", timeout=SECONDS)
        assert pool.begun.acquire(timeout=SECONDS)
        message.set()
        assert in_a_thread(late.result())
        held.set()
        other.result()


def test_a_call_without_a_message_is_refused() -> None:
    """It ends with gRPC's own status, and the next call is answered."""
    with naming(threading.Event()) as (pool, channel):
        with pytest.raises(grpc.RpcError) as error:
            channel.stream_unary(METHOD)(iter(()), timeout=SECONDS)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "exactly one request message" in error.value.details()
        assert pool.ended.acquire(timeout=SECONDS)
        assert not in_a_thread(channel.unary_unary(METHOD)(b"quick", timeout=SECONDS))


def test_who_leaves_before_the_message_is_counted_no_more() -> None:
    """A caller that goes without having sent its message leaves nothing behind."""
    left = threading.Event()
    with naming(threading.Event()) as (pool, channel):

        def messages() -> Iterator[bytes]:
            left.wait(SECONDS)
            yield from ()

        call = channel.stream_unary(METHOD).future(messages(), timeout=SECONDS)
        assert pool.begun.acquire(timeout=SECONDS)
        call.cancel()
        assert pool.ended.acquire(timeout=SECONDS)
        left.set()
        assert not in_a_thread(channel.unary_unary(METHOD)(b"quick", timeout=SECONDS))


def test_a_grpc_that_is_otherwise_inside_serves_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where messages can't be read ahead every call has a thread."""
    monkeypatch.setattr(threads, "INSIDE", None)
    with naming(threading.Event()) as (_, channel):
        assert in_a_thread(channel.unary_unary(METHOD)(b"quick", timeout=SECONDS))


def test_many_callers_of_quick_calls() -> None:
    """Calls that come at once, some alone and most not, are all answered."""
    with naming(threading.Event()) as (pool, channel), futures.ThreadPoolExecutor(3) as callers:
        ask = channel.unary_unary(METHOD)
        names = list(callers.map(lambda _: ask(b"quick", timeout=SECONDS), range(600)))
        assert len(names) == 600
        for _ in names:
            assert pool.ended.acquire(timeout=SECONDS)
        assert not in_a_thread(ask(b"quick", timeout=SECONDS))


def test_the_server_knows_quick_calls_by_their_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick call has a thread the first time, and is later computed where its message was read; a long never is."""
    names: list[str] = []
    execute = Engine.execute

    def told(engine: Engine, runs: Any) -> list[Any]:
        names.append(threading.current_thread().name)
        return execute(engine, runs)

    monkeypatch.setattr(Engine, "execute", told)
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    server = Server(Config(listen=("127.0.0.1:0",), threads=1))
    server.start()
    try:
        with PoolClient(server.addresses[0]) as client:
            for _ in range(30):
                np.testing.assert_array_equal(client.pool(x, MaxPool2d(2)).output.ravel(), [5, 7, 13, 15])
            small, names[:] = names[:], []
            for _ in range(3):
                client.pool(np.zeros((1, 8, 128, 128), np.float32), AvgPool2d(7, stride=1))  # milliseconds
    finally:
        server.stop(0)
    assert small[0].startswith("poolrpc-call")
    assert any(not name.startswith("poolrpc-call") for name in small[1:])
    assert all(name.startswith("poolrpc-call") for name in names)
