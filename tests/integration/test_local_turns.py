"""Threads of the local transport take turns: who answers small calls, and which calls keep no others waiting."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

import poolrpc_server
from poolrpc import InvalidArgumentError, LPPool2d, MaxPool2d, PoolClient, RoIAlign
from poolrpc._wire.local_packets import MAX_PACKET_BYTES, decode_answer, encode_call
from poolrpc_server import Config, Server
from poolrpc_server.calls import dispatch
from poolrpc_server.compute.engine import Engine
from poolrpc_server.transports.local.calls import LocalCalls
from tests.integration.local_calls import HELD, POOL, X, halved, packet_socket, request_of, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from poolrpc import PoolResult
    from poolrpc_server.compute.kernels.eager import Operator
    from tests.integration.conftest import Gate

if sys.platform != "linux":
    pytest.skip("the arena socket needs Linux", allow_module_level=True)

CALLERS, CALLS = 8, 50


@pytest.fixture
def never_relieved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls have the turn for any time, unless they make way by themselves."""
    monkeypatch.setattr(LocalCalls, "relieve", lambda _: None)


@pytest.mark.usefixtures("never_relieved")
def test_small_calls_are_answered_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, patch_operation: Callable[..., None]
) -> None:
    """Many callers of a known request need one thread, though the server may compute four calls at a time."""
    monkeypatch.setattr(dispatch, "LONG_SECONDS", 60.0)
    threads, counted = set(), threading.Lock()
    running = most = 0

    def watch(run: Operator) -> Operator:
        def watched(*arguments: Any) -> Any:
            nonlocal running, most
            with counted:
                threads.add(threading.get_ident())
                running += 1
                most = max(most, running)
            try:
                return run(*arguments)
            finally:
                with counted:
                    running -= 1

        return watched

    patch_operation("max_pool", watch)
    with poolrpc_server.embedded(threads=4) as client, ThreadPoolExecutor(CALLERS) as callers:
        client.pool(X, MaxPool2d(2))
        threads.clear()
        results = callers.map(lambda _: [client.pool(X, MaxPool2d(2)) for _ in range(CALLS)], range(CALLERS))
        for result in [each for of_caller in results for each in of_caller]:
            assert result.transport == "local"
            np.testing.assert_array_equal(result.output, halved(X))
    assert (len(threads), most) == (1, 1)


def hold(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> tuple[threading.Event, threading.Event]:
    """Hold the calls of a method; return the events that one has begun, and that lets them go on."""
    entered, opened = threading.Event(), threading.Event()
    original = getattr(owner, method)

    def held(*arguments: Any) -> Any:
        entered.set()
        assert opened.wait(60)
        return original(*arguments)

    monkeypatch.setattr(owner, method, held)
    return entered, opened


@contextmanager
def held_with_the_turn(gate: Gate, client: PoolClient, *, known: bool = False) -> Iterator[Future[PoolResult]]:
    """Hold a call of a known header in the engine, and let it end after the block.

    Args:
        gate: Holds it.
        client: Makes it.
        known: Whether its header is known already; otherwise another call is made first.

    """
    if not known:
        gate.opened.set()
        client.pool(X, HELD)
        gate.opened.clear()
    gate.entered.clear()
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(client.pool, X, HELD)
        try:
            assert gate.entered.wait(60)
            yield call
        finally:
            gate.opened.set()


@pytest.mark.usefixtures("never_relieved")
def test_a_long_call_keeps_no_others_waiting(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call whose estimate is long lets others be answered, and be computed."""
    monkeypatch.setattr(dispatch, "LONG_SECONDS", 0.0)
    with poolrpc_server.embedded(threads=2) as client:
        with held_with_the_turn(gate, client) as call:
            np.testing.assert_array_equal(client.pool(X, MaxPool2d(2)).output, halved(X))
            assert client.server_info().device == "cpu"
        assert call.result(60).transport == "local"


@pytest.mark.usefixtures("never_relieved")
def test_boxes_keep_no_others_waiting(monkeypatch: pytest.MonkeyPatch, local_server: Server) -> None:
    """How long a call with boxes takes depends on their sizes, which no estimate knows before."""
    monkeypatch.setattr(dispatch, "LONG_SECONDS", 60.0)
    boxes = np.array([[0, 0, 0, 8, 8]], np.float32)
    with PoolClient(local_server.addresses[0]) as client, ThreadPoolExecutor(1) as threads:
        client.pool(X, RoIAlign(2), boxes=boxes)  # its header is known then
        entered, opened = hold(monkeypatch, Engine, "execute")
        call = threads.submit(client.pool, X, RoIAlign(2), boxes=boxes)
        assert entered.wait(60)
        assert client.server_info().device == "cpu"
        opened.set()
        assert call.result(60).transport == "local"


@pytest.mark.usefixtures("never_relieved")
@pytest.mark.parametrize(
    ("step", "call"),
    [
        ("check", lambda client: client.pool(X, LPPool2d(2, 2))),
        ("shapes", lambda client: client.output_shape(X.shape, LPPool2d(2, 2))),
    ],
    ids=["a new request", "another method"],
)
def test_long_checks_keep_no_others_waiting(
    monkeypatch: pytest.MonkeyPatch, local_server: Server, step: str, call: Callable[[PoolClient], object]
) -> None:
    """While a new request is decoded and checked, or a method computes shapes, others are answered."""
    with PoolClient(local_server.addresses[0]) as client, ThreadPoolExecutor(1) as threads:
        client.pool(X, MaxPool2d(2))
        entered, opened = hold(monkeypatch, dispatch.Dispatcher, step)
        held = threads.submit(call, client)
        assert entered.wait(60)
        np.testing.assert_array_equal(client.pool(X, MaxPool2d(2)).output, halved(X))
        opened.set()
        held.result(60)


@pytest.mark.usefixtures("never_relieved")
def test_a_queued_call_keeps_no_others_waiting(gate: Gate, local_server: Server) -> None:
    """While small calls wait for the only slot, which a call by gRPC has, other methods are answered."""
    with PoolClient(local_server.addresses[0]) as client, ThreadPoolExecutor(4) as threads:
        held = threads.submit(client.pool, X, HELD, transport="unary")
        assert gate.entered.wait(60)
        queued = [threads.submit(client.pool, X, MaxPool2d(2)) for _ in range(3)]
        wait_for(local_server, "poolrpc_queue_length", len(queued), priority="1")
        assert client.server_info().device == "cpu"
        gate.opened.set()
        assert held.result(60).transport == "unary"
        for each in queued:
            assert each.result(60).transport == "local"
            np.testing.assert_array_equal(each.result().output, halved(X))


def test_a_call_that_takes_longer_than_expected_keeps_no_others_waiting(gate: Gate, local_server: Server) -> None:
    """Others are answered after a while, and a client that leaves meanwhile is noticed."""
    with PoolClient(local_server.addresses[0]) as client:
        leaving = PoolClient(local_server.addresses[0])
        with held_with_the_turn(gate, leaving) as call:
            assert client.server_info().device == "cpu"
            leaving.close()
            assert call.exception(60) is not None
            wait_for(local_server, "poolrpc_inflight_bytes", 0)
        np.testing.assert_array_equal(client.pool(X, MaxPool2d(2)).output, halved(X))


def test_a_call_makes_way_while_the_server_stops(gate: Gate, tmp_path: Path) -> None:
    """Then idle connections end before it does, though a thread has to be started for that."""
    server = Server(Config(listen=(f"unix:{tmp_path / 'pool.sock'}",), threads=2))
    server.start()
    idle, one, other = (PoolClient(server.addresses[0]) for _ in range(3))
    with idle, one, other, ThreadPoolExecutor(1) as threads:
        idle.pool(X, MaxPool2d(2))
        with held_with_the_turn(gate, one) as first, held_with_the_turn(gate, other, known=True) as second:
            stopping = threads.submit(server.stop, 600)
            while len(server.local_connections()) > 2:
                pass
            assert not first.done()
            assert not second.done()
        assert {first.result(60).transport, second.result(60).transport} == {"local"}
        stopping.result(60)


@pytest.mark.usefixtures("never_relieved")
def test_packets_of_clients_that_are_gone_are_not_computed(gate: Gate, local_server: Server) -> None:
    """Clients that leave while their packets wait for the call that has the turn get no answer, and need none."""
    address = local_server.addresses[0]
    with PoolClient(address) as client:
        client.pool(X, MaxPool2d(2))
        peers = [packet_socket(address) for _ in range(5)]
        while len(local_server.local_connections()) < 1 + len(peers):
            pass
        with held_with_the_turn(gate, client):
            before = gate.computed
            for peer in peers:
                peer.sendmsg(encode_call(POOL, None, (), request_of(client, X)))
                peer.close()
        while len(local_server.local_connections()) > 1:
            pass
        assert gate.computed == before


def test_a_failed_thread_goes_on(monkeypatch: pytest.MonkeyPatch, local_server: Server) -> None:
    """Whatever a call raises, and although it cannot be logged, its thread answers the next ones."""
    failing = LocalCalls._answer  # noqa: SLF001 - what a call raises outside of the pipeline
    left = 8

    def fail(*arguments: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise SystemExit
        return failing(*arguments)

    def fail_to_log(*_: object, **__: object) -> None:
        raise ValueError

    monkeypatch.setattr(LocalCalls, "_answer", fail)
    monkeypatch.setattr("poolrpc_server.transports.local.calls.log.exception", fail_to_log)
    address = local_server.addresses[0]
    with PoolClient(address) as client:
        while left:
            with packet_socket(address) as peer:
                peer.sendmsg(encode_call(POOL, None, (), request_of(client, X)))
                assert not peer.recv(1)
        for _ in range(20):
            assert client.pool(X, MaxPool2d(2)).transport == "local"


def test_a_connection_that_cannot_be_watched_is_closed(tmp_path: Path) -> None:
    """An epoll that takes no more connections leaves neither an open one nor one that is waited for."""

    class Unwatchable(socket.socket):
        def fileno(self) -> int:
            return file.fileno()  # an epoll takes no files

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    calls = LocalCalls(cast("Any", None), max_threads=1, max_connections=1)
    with (tmp_path / "file").open("w") as file, theirs:
        calls.adopt(Unwatchable(fileno=ours.detach()))
        assert not theirs.recv(1)
    assert calls.connections == ()
    calls.close()


def test_a_copy_of_a_descriptor_keeps_no_client_waiting(local_server: Server) -> None:
    """A client whose connection the server ends sees its end, although a child process may have a copy."""
    with packet_socket(local_server.addresses[0]) as peer:
        while not local_server.local_connections():
            pass
        (connection,) = local_server.local_connections()
        copy = os.dup(connection.socket.fileno())
        peer.send(b"nonsense")
        with pytest.raises(InvalidArgumentError):
            decode_answer(peer.recv(MAX_PACKET_BYTES))
        assert not peer.recv(1)
    os.close(copy)


def test_a_child_leaves_an_embedded_server_as_it_is() -> None:
    """A child after a fork that ends stops neither the server of its parent nor its transport."""
    program = """
import os, sys, numpy, poolrpc, poolrpc_server
with poolrpc_server.embedded(threads=1) as client:
    x = numpy.ones((1, 1, 4, 4), numpy.float32)
    client.pool(x, poolrpc.MaxPool2d(2))
    if not (child := os.fork()):
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
    for _ in range(10):
        assert client.pool(x, poolrpc.MaxPool2d(2)).transport == "local"
    print("answered")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)  # noqa: S603 - ours
    assert done.stdout == "answered\n", done.stderr


def test_a_copy_of_a_descriptor_keeps_no_connection(local_server: Server) -> None:
    """A child process may have copies of the server's descriptors: a connection that is closed is forgotten anyway."""
    address = local_server.addresses[0]
    with PoolClient(address) as client:
        client.pool(X, MaxPool2d(2))
        (connection,) = local_server.local_connections()
        copy = os.dup(connection.socket.fileno())
    try:
        while local_server.local_connections():
            pass
        with PoolClient(address) as client:
            client.pool(X, MaxPool2d(2))
            (connection,) = local_server.local_connections()
            for _ in range(20):
                assert client.pool(X, MaxPool2d(2)).transport == "local"
            assert local_server.local_connections() == (connection,)
    finally:
        os.close(copy)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_calls_are_answered_though_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch, local_server: Server, error: type[Exception]
) -> None:
    """Then the next packet is received after the call that has made way."""

    def fail(_: LocalCalls) -> None:
        raise error("can't start new thread")

    monkeypatch.setattr(dispatch, "LONG_SECONDS", 0.0)
    monkeypatch.setattr(LocalCalls, "_start_thread", fail)
    with PoolClient(local_server.addresses[0]) as client, ThreadPoolExecutor(4) as threads:
        for result in threads.map(lambda _: client.pool(X, MaxPool2d(2)), range(20)):
            assert result.transport == "local"
            np.testing.assert_array_equal(result.output, halved(X))
