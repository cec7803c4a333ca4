"""Calls as packets on the arena socket: results, ends, loss, tokens, and peers that don't keep to the protocol."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import poolrpc
import poolrpc_server
from poolrpc import AvgPool2d, FractionalMaxPool2d, MaxPool2d, PoolClient
from poolrpc._wire.arena_packets import SUFFIX, encode_attach_request
from poolrpc._wire.local_packets import MAX_PACKET_BYTES, decode_answer, encode_call
from poolrpc.v1 import pool_pb2
from poolrpc_server import Config, Server
from scripts.server_process import serving
from tests.scrape import Scrape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.conftest import Connect, Gate

if sys.platform != "linux":
    pytest.skip("the arena socket needs Linux", allow_module_level=True)

RNG = np.random.default_rng(7)
X = RNG.standard_normal((2, 3, 16, 16), np.float32)
LARGE = RNG.standard_normal((2, 3, 256, 256), np.float32)
HELD = FractionalMaxPool2d(2, output_size=8)
"""A layer that the gate holds."""
INFO = "poolrpc.v1.PoolService/GetServerInfo"
TOKEN = "alices-token-0123456789"  # noqa: S105 - of the test
POOL = "poolrpc.v1.PoolService/Pool"


def halved(x: np.ndarray) -> np.ndarray:
    """Return MaxPool2d(2) of a tensor with even height and width."""
    *lead, h, w = x.shape
    return x.reshape(*lead, h // 2, 2, w // 2, 2).max((-3, -1))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Return a server on a unix socket, with metrics."""
    made = Server(Config(listen=(f"unix:{tmp_path / 'pool.sock'}",), threads=1, metrics="127.0.0.1:0"))
    made.start()
    yield made
    made.stop(0)


def packet_socket(address: str) -> socket.socket:
    """Return a connection that carries calls."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(60)
    connection.connect(address.removeprefix("unix:") + SUFFIX)
    connection.send(encode_attach_request(0))
    assert pool_pb2.AttachResponse.FromString(connection.recv(1000)).calls
    return connection


def wait_for(server: Server, name: str, value: float) -> None:
    """Wait until a metric has a value."""
    while Scrape(server.metrics_address)(name) != value:
        pass


@pytest.mark.parametrize("x", [X, LARGE, X[:0]], ids=["inline", "in an arena", "empty"])
def test_it_is_the_default_on_a_unix_socket(connect: Connect, server: Server, x: np.ndarray) -> None:
    """Calls are packets, small tensors in them and large ones in an arena, and have the results of any other call."""
    client = connect(server.addresses[0])
    result = client.pool(x, MaxPool2d(2))
    np.testing.assert_array_equal(result.output, halved(x))
    assert result.transport == "local"
    if x.size:
        both = client.pool_each(x, [MaxPool2d(2), [AvgPool2d(2), MaxPool2d(2)]])
        assert {each.transport for each in both} == {"local"}
    assert client.server_info().version == poolrpc.__version__
    assert client.output_shape((1, 1, 8, 8), MaxPool2d(2)) == (1, 1, 4, 4)
    assert all(each.transport == "local" for each in client.map([X] * 5, MaxPool2d(2)))
    assert Scrape(server.metrics_address)("poolrpc_calls_total", transport="local") >= 4


def test_no_grpc_connection_is_needed(server: Server) -> None:
    """The methods that go by packets make no call by gRPC: the server's pipeline alone sees them."""
    with PoolClient(server.addresses[0], options={"grpc.enable_retries": 0}) as client:
        client.pool(X, MaxPool2d(2))
        client.server_info()
        pids = {f"unix:pid={os.getpid()}"}
        assert {each.peer for each in server.local_connections()} == pids


def test_without_local_calls_everything_goes_by_grpc(connect: Connect, tmp_path: Path) -> None:
    """With --disable-local-calls the default is as over TCP and through the arena, and "local" is rejected."""
    with serving("--disable-local-calls", listen=f"unix:{tmp_path / 'pool.sock'}") as process:
        client = connect(process.address)
        assert client.pool(X, MaxPool2d(2)).transport == "unary"
        assert client.pool(LARGE, MaxPool2d(2)).transport == "arena"
        with pytest.raises(poolrpc.UnavailableError):
            client.pool(X, MaxPool2d(2), transport="local")
    with pytest.raises(poolrpc.UnavailableError):
        connect("127.0.0.1:1").pool(X, MaxPool2d(2), transport="local")


def test_errors_are_those_of_grpc(connect: Connect, server: Server) -> None:
    """A rejected call raises the same error, and the connection is used again."""
    client = connect(server.addresses[0])
    for layer, x in ((MaxPool2d(2), X.astype(np.int32)[:, :, :1]), (AvgPool2d(2), X.astype(np.int32))):
        errors = []
        for transport in ("local", "unary"):
            with pytest.raises(poolrpc.PoolError) as caught:
                client.pool(x, layer, transport=transport)
            errors.append((type(caught.value), caught.value.message))
        assert errors[0] == errors[1]
    with pytest.raises(poolrpc.InvalidArgumentError, match=r"expected indices in 0\.\.1023"):
        client.pool(X, poolrpc.MaxUnpool2d(2), indices=np.full(X.shape, 2**40), transport="local")
    assert client.pool(X, MaxPool2d(2)).transport == "local"
    assert len(server.local_connections()) == 1


def test_tokens_are_checked(connect: Connect, tmp_path: Path) -> None:
    """A call without a valid token is rejected, and priority 0 needs one that allows it."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
    with serving("--token-file", str(tokens), listen=f"unix:{tmp_path / 'pool.sock'}") as process:
        good = connect(process.address, token=TOKEN)
        assert good.pool(X, MaxPool2d(2), transport="local").transport == "local"
        with pytest.raises(poolrpc.UnauthenticatedError):
            connect(process.address).pool(X, MaxPool2d(2), transport="local")
        with pytest.raises(poolrpc.UnauthenticatedError):
            connect(process.address).server_info()


@pytest.mark.parametrize("x", [X, LARGE], ids=["inline", "in an arena"])
def test_a_timeout_frees_what_the_call_holds(gate: Gate, connect: Connect, server: Server, x: np.ndarray) -> None:
    """After its timeout a call holds nothing, and its late answer reaches no other call."""
    client = connect(server.addresses[0])
    with pytest.raises(poolrpc.DeadlineExceededError):
        client.pool(x, HELD, timeout=0.5)
    gate.opened.set()
    results = [client.pool(x, MaxPool2d(2)) for _ in range(20)]
    for result in results:
        np.testing.assert_array_equal(result.output, halved(x))
    wait_for(server, "poolrpc_inflight_bytes", 0)


async def test_a_cancelled_task_frees_what_its_call_holds(gate: Gate, server: Server) -> None:
    """The same holds for a task that is cancelled."""
    async with poolrpc.AsyncPoolClient(server.addresses[0]) as client:
        task = asyncio.create_task(client.pool(X, HELD))
        assert await asyncio.to_thread(gate.entered.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()
        for _ in range(20):
            np.testing.assert_array_equal((await client.pool(X, MaxPool2d(2))).output, halved(X))
        await asyncio.to_thread(wait_for, server, "poolrpc_inflight_bytes", 0)


def test_a_queued_call_whose_client_is_gone_is_not_computed(gate: Gate, server: Server) -> None:
    """A queued call whose connection has ended is never computed, and holds nothing."""
    with PoolClient(server.addresses[0]) as client, ThreadPoolExecutor(1) as threads:
        held = threads.submit(client.pool, X, HELD)
        assert gate.entered.wait(60)
        with PoolClient(server.addresses[0]) as gone, pytest.raises(poolrpc.DeadlineExceededError):
            gone.pool(X, MaxPool2d(2), timeout=0.5)
        while len(server.local_connections()) > 1:
            pass
        computed = gate.computed
        gate.opened.set()
        held.result(60)
        wait_for(server, "poolrpc_inflight_bytes", 0)
        assert gate.computed == computed


def test_a_stopping_server_answers_what_it_has(gate: Gate, tmp_path: Path) -> None:
    """A call in flight is answered while the server stops, and the next one goes to the server that replaces it."""
    address = f"unix:{tmp_path / 'pool.sock'}"
    first = Server(Config(listen=(address,), threads=2))
    first.start()
    with PoolClient(address) as client, ThreadPoolExecutor(2) as threads:
        assert client.pool(X, MaxPool2d(2)).transport == "local"
        call = threads.submit(client.pool, X, HELD)
        assert gate.entered.wait(60)
        stopping = threads.submit(first.stop, 60)
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


def test_a_client_that_is_closed_during_a_call(gate: Gate, server: Server) -> None:
    """Closing the client ends its calls."""
    client = PoolClient(server.addresses[0])
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(client.pool, X, HELD)
        assert gate.entered.wait(60)
        client.close()
        with pytest.raises(poolrpc.PoolError) as caught:
            call.result(60)
        assert caught.value.reason == "CLOSED"
        gate.opened.set()
    wait_for(server, "poolrpc_inflight_bytes", 0)
    while server.local_connections():
        pass


def test_threads_do_not_wait_for_each_other(gate: Gate) -> None:
    """Each concurrent call of a client has a connection of its own."""
    with poolrpc_server.embedded(threads=2) as client, ThreadPoolExecutor(2) as threads:
        held = threads.submit(client.pool, X, HELD)
        assert gate.entered.wait(60)
        np.testing.assert_array_equal(client.pool(X, MaxPool2d(2)).output, halved(X))
        gate.opened.set()
        assert held.result(60).transport == "local"


def test_idle_connections_take_no_thread(server: Server) -> None:
    """64 clients that have called and are idle share the few threads that their calls needed."""
    before = threading.active_count()
    with ExitStack() as clients:
        for _ in range(64):
            clients.enter_context(PoolClient(server.addresses[0])).pool(X, MaxPool2d(2))
        assert len(server.local_connections()) == 64
        mine = [thread for thread in threading.enumerate() if thread.name == "poolrpc-local"]
        assert len(mine) < 16
        assert threading.active_count() - before < 32


def test_workers(tmp_path: Path) -> None:
    """With several workers a connection belongs to one of them, and an arena's calls go to the worker that has it."""
    address = f"unix:{tmp_path / 'pool.sock'}"
    with serving("--workers", "2", listen=address), PoolClient(address) as client:
        for x in (X, LARGE, X, LARGE):
            result = client.pool(x, MaxPool2d(2))
            np.testing.assert_array_equal(result.output, halved(x))
            assert result.transport == "local"


# Peers that don't keep to the protocol


def header(**fields: object) -> bytes:
    """Return the packet of a call without a message."""
    call = pool_pb2.LocalCall(**fields).SerializeToString()
    return struct.pack("<H", len(call)) + call


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (b"\1", "expected the packet of a call"),
        (b"\xff\xff", "expected a header of 65535 bytes, got 0"),
        (b"\2\0\xff\xff", "expected the packet of a call"),
        (header(method="/a", metadata=[b"key"]), "expected keys and values, got 1 texts"),
        (bytes(MAX_PACKET_BYTES + 1), "expected a packet of at most"),
        (os.urandom(1000), "expected "),
    ],
    ids=["short", "header beyond the end", "no header", "odd metadata", "too large", "random"],
)
def test_a_packet_that_is_not_a_call_ends_its_connection(server: Server, packet: bytes, message: str) -> None:
    """The peer learns why, and others are served."""
    with packet_socket(server.addresses[0]) as peer:
        peer.send(packet)
        with pytest.raises(poolrpc.InvalidArgumentError, match=message):
            decode_answer(peer.recv(MAX_PACKET_BYTES))
        assert peer.recv(1) == b""
    with PoolClient(server.addresses[0]) as client:
        assert client.pool(X, MaxPool2d(2)).transport == "local"


@pytest.mark.parametrize(
    ("method", "message", "error"),
    [
        ("poolrpc.v1.PoolService/PoolStream", b"", poolrpc.UnsupportedError),
        ("no.Such/Method", b"", poolrpc.UnsupportedError),
        (POOL, b"\xff\xff", poolrpc.InternalError),
        (POOL, b"", poolrpc.InvalidArgumentError),
    ],
)
def test_calls_that_cannot_be_answered(
    server: Server, method: str, message: bytes, error: type[poolrpc.PoolError]
) -> None:
    """A stream, an unknown method and a wrong message are errors of the call alone: the connection goes on."""
    with packet_socket(server.addresses[0]) as peer:
        for _ in range(3):
            peer.sendmsg(encode_call(method, 60, (), (message,)))
            with pytest.raises(error):
                decode_answer(peer.recv(MAX_PACKET_BYTES))
        peer.sendmsg(encode_call(INFO, None, (), (b"",)))
        assert pool_pb2.GetServerInfoResponse.FromString(decode_answer(peer.recv(MAX_PACKET_BYTES))).version


def test_a_deadline_that_has_passed(server: Server) -> None:
    """A call without time left is not computed."""
    with packet_socket(server.addresses[0]) as peer, PoolClient(server.addresses[0]) as client:
        transfer = client._transfer(X, (MaxPool2d(2),), None, "NCHW", None)  # noqa: SLF001 - a real request's bytes
        peer.sendmsg(encode_call(POOL, 0.0, (), (transfer.prepared.head, X.tobytes())))
        with pytest.raises(poolrpc.DeadlineExceededError):
            decode_answer(peer.recv(MAX_PACKET_BYTES))


def test_a_peer_that_never_reads(server: Server) -> None:
    """A peer whose answers fill its buffer is disconnected, and no thread waits for it."""
    with packet_socket(server.addresses[0]) as peer:
        peer.setblocking(False)
        call = b"".join(encode_call(INFO, None, (), (b"",)))
        while server.local_connections():
            with suppress(OSError):  # its buffer is full, and then it is disconnected
                peer.send(call)
    with PoolClient(server.addresses[0]) as client:
        assert client.pool(X, MaxPool2d(2)).transport == "local"
    wait_for(server, "poolrpc_inflight_bytes", 0)


def test_descriptors_that_nobody_asked_for_are_closed(server: Server) -> None:
    """A descriptor that comes with a call ends the connection, and does not stay in the server."""
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        with packet_socket(server.addresses[0]) as peer:
            socket.send_fds(peer, [b"".join(encode_call(INFO, None, (), (b"",)))], [0])
            with pytest.raises(poolrpc.InvalidArgumentError, match="got a descriptor"):
                decode_answer(peer.recv(MAX_PACKET_BYTES))
            assert peer.recv(1) == b""
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 1


def test_connections_are_limited(tmp_path: Path) -> None:
    """One connection too many is rejected, and its client calls by gRPC."""
    address = f"unix:{tmp_path / 'pool.sock'}"
    with (
        serving("--max-connections", "2", listen=address),
        packet_socket(address),
        packet_socket(address),
        PoolClient(address) as client,
    ):
        assert client.pool(X, MaxPool2d(2)).transport == "unary"
