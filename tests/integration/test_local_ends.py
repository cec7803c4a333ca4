"""Local calls that end early: timeouts, cancellation, clients and servers that are gone, and servers that are full."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest

import poolrpc
from poolrpc import MaxPool2d, PoolClient
from poolrpc._wire.arena_packets import SUFFIX
from poolrpc._wire.local_packets import MAX_PACKET_BYTES, decode_answer, encode_call
from poolrpc_server import Config, Server
from scripts.server_process import serving
from tests.integration.local_calls import HELD, LARGE, POOL, SERVER_INFO, X, halved, packet_socket, request_of, wait_for
from tests.scrape import Scrape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.integration.conftest import Connect, Gate

if sys.platform != "linux":
    pytest.skip("the arena socket needs Linux", allow_module_level=True)


@pytest.mark.parametrize("x", [X, LARGE], ids=["inline", "in an arena"])
def test_a_timeout_frees_what_the_call_holds(gate: Gate, connect: Connect, local_server: Server, x: np.ndarray) -> None:
    """After its timeout a call holds nothing, and its late answer reaches no other call."""
    client = connect(local_server.addresses[0])
    with pytest.raises(poolrpc.DeadlineExceededError):
        client.pool(x, HELD, timeout=0.5)
    wait_for(local_server, "poolrpc_inflight_bytes", 0)
    gate.opened.set()
    results = [client.pool(x, MaxPool2d(2)) for _ in range(20)]
    for result in results:
        assert result.transport == "local"
        np.testing.assert_array_equal(result.output, halved(x))


async def test_a_cancelled_task_frees_what_its_call_holds(gate: Gate, local_server: Server) -> None:
    """The same holds for a task that is cancelled."""
    async with poolrpc.AsyncPoolClient(local_server.addresses[0]) as client:
        task = asyncio.create_task(client.pool(X, HELD))
        assert await asyncio.to_thread(gate.entered.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_for, local_server, "poolrpc_inflight_bytes", 0)
        gate.opened.set()
        for _ in range(20):
            np.testing.assert_array_equal((await client.pool(X, MaxPool2d(2))).output, halved(X))


def test_a_queued_call_whose_client_is_gone_is_not_computed(gate: Gate, local_server: Server) -> None:
    """A queued call whose connection has ended is never computed, and holds nothing."""
    with PoolClient(local_server.addresses[0]) as client, ThreadPoolExecutor(1) as threads:
        held = threads.submit(client.pool, X, HELD)
        assert gate.entered.wait(60)
        with PoolClient(local_server.addresses[0]) as gone, pytest.raises(poolrpc.DeadlineExceededError):
            gone.pool(X, MaxPool2d(2), timeout=0.5)
        while len(local_server.local_connections()) > 1:
            pass
        computed = gate.computed
        gate.opened.set()
        held.result(60)
        wait_for(local_server, "poolrpc_inflight_bytes", 0)
        assert gate.computed == computed


def test_a_stopping_server_answers_what_it_has(gate: Gate, tmp_path: Path) -> None:
    """A call in flight is answered while the server stops, and idle connections end at once.

    The next call goes to the server that replaces it.
    """
    address = f"unix:{tmp_path / 'pool.sock'}"
    first = Server(Config(listen=(address,), threads=2))
    first.start()
    with PoolClient(address) as client, ThreadPoolExecutor(2) as threads:
        assert client.pool(X, MaxPool2d(2)).transport == "local"
        call = threads.submit(client.pool, X, HELD)
        assert gate.entered.wait(60)
        client.pool(X, MaxPool2d(2))  # on a second connection, which is idle then
        stopping = threads.submit(first.stop, 600)
        while len(first.local_connections()) > 1:
            pass
        gate.opened.set()
        assert call.result(60).transport == "local"
        stopping.result(60)
        second = Server(Config(listen=(address,), threads=2))
        second.start()
        np.testing.assert_array_equal(client.pool(X, MaxPool2d(2)).output, halved(X))
        second.stop(0)


def test_a_call_is_repeated_if_its_server_was_killed(connect: Connect, tmp_path: Path) -> None:
    """Connections of a server that was killed are replaced by those of the next one, within the call."""
    address = f"unix:{tmp_path / 'pool.sock'}"
    with ExitStack() as servers:
        process = servers.enter_context(serving(listen=address))
        client = connect(address)
        assert client.pool(X, MaxPool2d(2)).transport == "local"
        process.process.kill()
        process.wait()
        servers.enter_context(serving(listen=address))
        for x in (X, LARGE):
            np.testing.assert_array_equal(client.pool(x, MaxPool2d(2)).output, halved(x))


def test_a_client_that_is_closed_during_a_call(gate: Gate, local_server: Server) -> None:
    """Closing the client ends its calls."""
    client = PoolClient(local_server.addresses[0])
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(client.pool, X, HELD)
        assert gate.entered.wait(60)
        client.close()
        with pytest.raises(poolrpc.PoolError) as caught:
            call.result(60)
        assert caught.value.reason == "CLOSED"
        gate.opened.set()
    wait_for(local_server, "poolrpc_inflight_bytes", 0)
    while local_server.local_connections():
        pass


@pytest.mark.parametrize("shape", ["(2, 3, 16, 16)", "(2, 3, 256, 256)"], ids=["inline", "in an arena"])
def test_what_a_killed_client_held_is_free(gate: Gate, local_server: Server, shape: str) -> None:
    """SIGKILL of a client during its call frees its bytes and its connection, though the call is still computed."""
    program = (
        "import sys, numpy, poolrpc\n"
        f"layer = poolrpc.FractionalMaxPool2d(2, output_size=8)\nx = numpy.ones({shape}, numpy.float32)\n"
        "poolrpc.PoolClient(sys.argv[1]).pool(x, layer, transport='local')\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, local_server.addresses[0]]) as process:  # noqa: S603 - ours
        assert gate.entered.wait(60)
        process.kill()
    wait_for(local_server, "poolrpc_inflight_bytes", 0)
    wait_for(local_server, "poolrpc_arenas", 0)
    gate.opened.set()
    while local_server.local_connections():
        pass


def test_a_client_that_leaves_after_it_has_sent_a_call(gate: Gate, local_server: Server) -> None:
    """A client whose calls follow each other is noticed to be gone, though it left before its last call was read."""
    with PoolClient(local_server.addresses[0]) as client, ThreadPoolExecutor(1) as threads:
        held = threads.submit(client.pool, X, HELD)
        assert gate.entered.wait(60)
        for _ in range(100):
            with packet_socket(local_server.addresses[0]) as peer:
                for _ in range(8):
                    peer.sendmsg(encode_call(SERVER_INFO, None, (), ()))
                    assert decode_answer(peer.recv(MAX_PACKET_BYTES))
                peer.sendmsg(encode_call(POOL, None, (), request_of(client, X)))
        while len(local_server.local_connections()) > 1:
            pass
        assert gate.computed == 0
        gate.opened.set()
        held.result(60)
    wait_for(local_server, "poolrpc_inflight_bytes", 0)


def test_a_deadline_passes_though_the_peer_stays(gate: Gate, local_server: Server) -> None:
    """A queued call is answered when its deadline passes, also if its client does not close the connection."""
    with PoolClient(local_server.addresses[0]) as client, ThreadPoolExecutor(1) as threads:
        held = threads.submit(client.pool, X, HELD)
        assert gate.entered.wait(60)
        with packet_socket(local_server.addresses[0]) as peer:
            peer.sendmsg(encode_call(POOL, 0.2, (), request_of(client, X)))
            with pytest.raises(poolrpc.DeadlineExceededError):
                decode_answer(peer.recv(MAX_PACKET_BYTES))
        assert gate.computed == 0
        gate.opened.set()
        assert held.result(60).transport == "local"


def test_a_full_server_is_asked_again(gate: Gate, tmp_path: Path) -> None:
    """A call that the server has no room for is sent again, as by gRPC; without retries it is an error."""
    server = Server(
        Config(listen=(f"unix:{tmp_path / 'pool.sock'}",), threads=1, max_queue=1, metrics="127.0.0.1:0"),
    )
    server.start()
    options = {"grpc.enable_retries": 0}
    with (
        PoolClient(server.addresses[0]) as client,
        PoolClient(server.addresses[0], options=options) as once,
        ThreadPoolExecutor(3) as threads,
    ):
        calls = [threads.submit(client.pool, X, HELD)]
        assert gate.entered.wait(60)
        calls.append(threads.submit(client.pool, X, MaxPool2d(2)))
        while not Scrape(server.metrics_address)("poolrpc_queue_oldest_seconds"):
            pass
        with pytest.raises(poolrpc.UnavailableError):
            once.pool(X, MaxPool2d(2))
        calls.append(threads.submit(client.pool, X, MaxPool2d(2)))
        while Scrape(server.metrics_address)("poolrpc_rejects_total", reason="QUEUE") == 1:
            pass
        gate.opened.set()
        assert {call.result(60).transport for call in calls} == {"local"}
    server.stop(0)


class Relay:
    """A socket for local calls in front of a server's, which ends some connections instead of sending their calls on.

    Attributes:
        address: The address of a client; no gRPC server is there.
        ended: The number of calls whose connections it has ended.

    """

    def __init__(self, server: str, path: Path, ends: int) -> None:
        self.address, self.ended = f"unix:{path}", 0
        self._server, self._ends = server.removeprefix("unix:") + SUFFIX, ends
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"{path}{SUFFIX}")
        self._listener.listen()
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self._listener.accept()[:1], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server, suppress(OSError):
            server.connect(self._server)
            attached = False
            while packet := client.recv(MAX_PACKET_BYTES):
                if attached and self.ended < self._ends:
                    self.ended += 1
                    return
                server.send(packet)
                client.send(server.recv(MAX_PACKET_BYTES))
                attached = True


@pytest.fixture
def relay(local_server: Server, tmp_path: Path) -> Iterator[Callable[[int], Relay]]:
    """Return a function that makes a relay which ends so many calls."""
    with ExitStack() as stack:

        def start(ends: int) -> Relay:
            made = Relay(local_server.addresses[0], tmp_path / "relay.sock", ends)
            stack.callback(made.close)
            return made

        yield start


def test_a_call_is_sent_again_once_if_its_connection_ends(relay: Callable[[int], Relay], connect: Connect) -> None:
    """The caller receives the result on another connection, and no error."""
    front = relay(1)
    result = connect(front.address).pool(X, MaxPool2d(2), transport="local")
    np.testing.assert_array_equal(result.output, halved(X))
    assert front.ended == 1


@pytest.mark.parametrize(("options", "attempts"), [({}, 2), ({"grpc.enable_retries": 0}, 1)])
def test_a_call_is_sent_again_only_once_and_only_with_retries(
    relay: Callable[[int], Relay], connect: Connect, options: dict[str, int], attempts: int
) -> None:
    """If every connection ends, the call is an error; without retries there is one attempt."""
    front = relay(100)
    client = connect(front.address, options=options)
    with pytest.raises(poolrpc.UnavailableError, match="the end of the connection"):
        client.pool(X, MaxPool2d(2), transport="local")
    assert front.ended == attempts
