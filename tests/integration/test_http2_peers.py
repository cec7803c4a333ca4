"""Peers that speak HTTP/2 without gRPC: decompression bombs, invalid bytes, resets; the server goes on."""

from __future__ import annotations

import re
import socket
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

import poolrpc
from fuzz.attacks.raw_peer import MIB, RawPeer, framed
from scripts.server_process import ServerProcess, serving
from tests.integration.raw_requests import SERVICE, pool_request, stream_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OK, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL = "0", "3", "8", "12", "13"


CALL_THREADS = 32
MOST_THREADS = 2 * CALL_THREADS
"""The threads for calls, and about twenty others."""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """Return a server process for all tests of this file, so that a crash fails every later test."""
    # With several of glibc's heaps the memory would take long to settle, and leaks would be hidden.
    flags = ["--max-streams", "30", "--threads", "1", "--call-threads", str(CALL_THREADS), "--watchdog-seconds", "0"]
    with serving(*flags, env={"MALLOC_ARENA_MAX": "1"}) as made:
        yield made
        assert made.process.poll() is None
        assert not [each for each in made.log if each["event"] == "unexpected error"]


@pytest.fixture(autouse=True)
def still_serving(server: ServerProcess) -> Iterator[None]:
    """Check after each test that a call and a stream of our client are answered."""
    yield
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8), np.float32)
    with poolrpc.PoolClient(server.address) as client:
        for transport in ("unary", "stream"):
            output = client.pool(x, poolrpc.MaxPool2d(2), transport=transport, timeout=30).output
            np.testing.assert_array_equal(output, x.reshape(2, 3, 4, 2, 4, 2).max((3, 5)))


@contextmanager
def memory_is_bounded(server: ServerProcess, most: int = 32 * MIB) -> Iterator[None]:
    """Check that the server's memory never grows by more than that, and that no thread or descriptor stays."""
    process, folder = psutil.Process(server.process.pid), Path(f"/proc/{server.process.pid}")

    def peak() -> int:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", (folder / "status").read_text())[1])

    (folder / "clear_refs").write_text("5")  # resets the peak
    before, descriptors = peak(), process.num_fds()
    yield
    with poolrpc.PoolClient(server.address) as client:
        client.server_info()
        assert peak() < before + most
        assert process.num_threads() <= MOST_THREADS
        assert process.num_fds() <= descriptors + 2


def gzip_bomb() -> bytes:
    """Return 4 GiB of zeros as a gzip file of 4 MB: the code of one chunk, repeated, as a full flush allows."""
    chunk, count = bytes(16 * MIB), 256
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    code = coder.compress(chunk) + coder.flush(zlib.Z_FULL_FLUSH)
    crc = 0
    for _ in range(count):
        crc = zlib.crc32(chunk, crc)
    head = bytes([0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 2, 255])
    end = coder.flush(zlib.Z_FINISH) + struct.pack("<II", crc, (count * len(chunk)) % 2**32)
    return head + code * count + end


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """Return the bomb, after a check that the beginning of it decompresses to zeros."""
    made = gzip_bomb()
    assert 2**21 < len(made) < 2**23
    inflated = zlib.decompressobj(31).decompress(made, 64 * MIB)
    assert inflated == bytes(64 * MIB)
    return made


@pytest.mark.parametrize("method", ["Pool", "PoolStream", "InferShape"])
def test_a_gzip_bomb(server: ServerProcess, bomb: bytes, method: str) -> None:
    """4 MB that would decompress to 4 GiB are rejected as they are, without any memory."""
    with memory_is_bounded(server), RawPeer(server.address) as peer:
        stream = peer.open(SERVICE + method, ("grpc-encoding", "gzip"))
        peer.send(stream, framed(bomb, compressed=True))
        assert peer.status(stream) in (RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL)


@pytest.mark.parametrize("encoding", ["identity", "deflate", "br", None])
def test_a_bomb_of_another_encoding(server: ServerProcess, bomb: bytes, encoding: str | None) -> None:
    """A message flagged as compressed, with no encoding or an unknown one, is rejected the same way."""
    with memory_is_bounded(server), RawPeer(server.address) as peer:
        stream = peer.open(SERVICE + "Pool", *([("grpc-encoding", encoding)] if encoding else []))
        peer.send(stream, framed(bomb, compressed=True))
        assert peer.status(stream) in (RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL)


@pytest.mark.parametrize("method", ["Pool", "PoolStream", "InferShape"])
@pytest.mark.parametrize(
    "data",
    [framed(b"\xff" * 100), framed(b"\x0a\xff\xff\xff\xff\x0f"), framed(b"\x08"), framed(bytes(MIB))],
    ids=["ones", "length", "cut", "zeros"],
)
def test_bytes_that_are_not_a_message(server: ServerProcess, method: str, data: bytes) -> None:
    """Bytes that do not parse are INTERNAL for every method, unless it takes no message as large."""
    with memory_is_bounded(server), RawPeer(server.address) as peer:
        stream = peer.open(SERVICE + method)
        peer.send(stream, data)
        too_large = method == "InferShape" and len(data) > MIB
        assert peer.status(stream) == (RESOURCE_EXHAUSTED if too_large else INTERNAL)


@pytest.mark.parametrize(
    "method",
    [
        SERVICE + "InferShape",
        "/grpc.health.v1.Health/Watch",
        *(
            pytest.param(method, marks=pytest.mark.slow)
            for method in (
                SERVICE + "Pool",
                "/inference.GRPCInferenceService/ModelReady",
                "/grpc.health.v1.Health/Check",
            )
        ),
    ],
)
def test_many_messages_that_do_not_parse(server: ServerProcess, method: str) -> None:
    """Such a call leaves no memory, and does not count among the calls of its connection."""
    with memory_is_bounded(server, 8 * MIB), RawPeer(server.address) as peer:
        for _ in range(1500):  # gRPC's own rejection keeps 20 KB of each, and this connection has 1024 calls at most
            stream = peer.open(method)
            peer.send(stream, framed(b"\xff"))
            assert peer.status(stream) == INTERNAL
        stream = peer.open(SERVICE + "GetServerInfo")
        peer.send(stream, framed(b""))
        assert peer.status(stream) == OK


@pytest.mark.parametrize("method", ["Pool", "PoolStream", "InferShape", "GetServerInfo"])
@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        # gRPC treats a cut message as none; a method that expects one then has another kind.
        (framed(bytes(100))[:50], {INVALID_ARGUMENT, UNIMPLEMENTED}),
        (b"\x00\x00", {INVALID_ARGUMENT, UNIMPLEMENTED}),
        (b"\x07\x00\x00\x00\x01x", {OK, INVALID_ARGUMENT, UNIMPLEMENTED, INTERNAL}),
        (b"\x00\xff\xff\xff\xff" + bytes(100), {RESOURCE_EXHAUSTED}),
    ],
    ids=["cut", "no length", "flags", "4 GiB promised"],
)
def test_invalid_frames(server: ServerProcess, method: str, data: bytes, statuses: set[str]) -> None:
    """A frame that ends early, has unknown flags or promises 4 GiB ends its call and takes no memory."""
    with memory_is_bounded(server), RawPeer(server.address) as peer:
        stream = peer.open(SERVICE + method)
        peer.send(stream, data)
        assert peer.status(stream) in statuses


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", bytes(MIB)]
)
def test_other_protocols(server: ServerProcess, data: bytes) -> None:
    """The server closes the connection of a peer that speaks HTTP/1, TLS or nothing known."""
    host, _, port = server.address.rpartition(":")
    with memory_is_bounded(server), socket.create_connection((host, int(port)), timeout=30) as peer:
        try:
            peer.sendall(data)
            while peer.recv(65536):
                pass
        except ConnectionError:
            pass  # closed while the peer was sending


@pytest.mark.parametrize(
    "method",
    [
        SERVICE + "Nothing",
        SERVICE + "pool",
        SERVICE,
        "/poolrpc.v1.PoolService",
        "/poolrpc.v2.PoolService/Pool",
        "/",
        "/" + "x" * 4000,
        "/%00/\u00e9",
    ],
    ids=["method", "case", "empty method", "no method", "version", "slash", "long", "odd"],
)
def test_unknown_methods(server: ServerProcess, method: str) -> None:
    """An unknown method is UNIMPLEMENTED."""
    with RawPeer(server.address) as peer:
        stream = peer.open(method)
        peer.send(stream, framed(b""))
        assert peer.status(stream) == UNIMPLEMENTED


def open_alone(peer: RawPeer) -> int:
    """Open a stream and send nothing."""
    return peer.open(SERVICE + "PoolStream")


def with_header(peer: RawPeer) -> int:
    """Open a stream and send its header."""
    stream = open_alone(peer)
    peer.send(stream, stream_header(64, 1, 64, 64), end=False)
    return stream


def inside_a_block(peer: RawPeer) -> int:
    """Open a stream and leave its first block, of 1 MiB, unfinished."""
    stream = with_header(peer)
    peer.send(stream, struct.pack(">BI", 0, MIB + 4) + bytes(10_000), end=False)
    return stream


def whole_call(peer: RawPeer) -> int:
    """Send a whole call, whose response has no stream any more."""
    stream = peer.open(SERVICE + "Pool")
    request = pool_request(1, 4, 64, 64)
    request.payload = bytes(4 * 4 * 64 * 64)
    peer.send(stream, framed(request.SerializeToString()))
    return stream


@pytest.mark.slow
@pytest.mark.parametrize("begin", [open_alone, with_header, inside_a_block, whole_call], ids=lambda each: each.__name__)
def test_a_thousand_resets(server: ServerProcess, begin: Callable[[RawPeer], int]) -> None:
    """A thousand calls that are opened and reset leave no memory, threads or descriptors."""

    def reset(times: int) -> None:
        count = 0
        while count < times:
            # The server may close the connection of a peer that does nothing but reset: then another one is opened.
            with RawPeer(server.address) as peer:
                try:
                    while count < times:
                        stream = begin(peer)
                        if stream not in peer.ended:
                            peer.reset(stream)
                        peer.flush()
                        count += 1
                        if count % 5 == 0:
                            probe = peer.open(SERVICE + "GetServerInfo")
                            peer.send(probe, framed(b""))
                            assert peer.status(probe) == OK
                except ConnectionError:
                    count += 1

    reset(200)
    with memory_is_bounded(server):
        reset(1000)


def test_responses_that_are_not_read(server: ServerProcess) -> None:
    """Callers that leave while their response is sent leave nothing; others are answered meanwhile."""
    request = pool_request(1, 4, 512, 512)
    request.payload = bytes(4 * 4 * 512 * 512)
    message = framed(request.SerializeToString())

    def leave() -> None:
        with RawPeer(server.address) as peer, poolrpc.PoolClient(server.address) as client:
            streams = [peer.open(SERVICE + "Pool") for _ in range(4)]
            for stream in streams:
                peer.send(stream, message)
            # The streams' windows stay at 64 KiB, so that responses of 1 MiB begin and cannot end.
            while not peer.answering.issuperset(streams):
                peer.receive()
            assert client.pool(np.ones((1, 1, 2, 2), np.float32), poolrpc.MaxPool2d(2)).output == 1
            for stream in streams:
                peer.reset(stream)
            peer.flush()

    for _ in range(30):
        leave()
    # Four requests and responses are 20 MiB; two hundred responses that stayed would be 200 MiB.
    with memory_is_bounded(server, 64 * MIB):
        for _ in range(50):
            leave()
