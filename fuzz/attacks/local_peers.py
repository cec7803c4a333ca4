"""Peers of the local transport: connections, packets and descriptors that serve no purpose, and answers left unread."""

from __future__ import annotations

import os
import random
import socket
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

from fuzz.attacks.attack import Target, attack, in_threads, repeat
from fuzz.attacks.messages import growing
from poolrpc._wire.arena_packets import SUFFIX, encode_attach_request
from poolrpc._wire.local_packets import MAX_PACKET_BYTES, encode_call

if TYPE_CHECKING:
    from threading import Event

POOL, INFO = "poolrpc.v1.PoolService/Pool", "poolrpc.v1.PoolService/GetServerInfo"
CONNECTIONS = 2000
"""More than a server has at a time."""


def _connect(target: Target) -> socket.socket:
    """Return a connection that carries calls, if the server accepts it."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(0.5)
        connection.connect(target.path + SUFFIX)
        connection.send(encode_attach_request(0))
        connection.recv(MAX_PACKET_BYTES)
    except BaseException:
        connection.close()
        raise
    return connection  # one that was rejected has ended, as its first packet shows


def _call(method: str, message: bytes, timeout: float | None = None) -> bytes:
    return b"".join(encode_call(method, timeout, (), (message,)) or ())


@attack(variants=("local",))
def local_connections(target: Target, until: Event) -> None:
    """Open as many connections for calls as the server lets, and call on none (of the kind of M3).

    Sent: connections that ask for calls, and others that ask for nothing; all are kept, and opened again.
    Aims at: descriptors, threads and memory for each connection.
    """

    def hold() -> None:
        with ExitStack() as held:
            for number in range(CONNECTIONS):
                if until.is_set():
                    return
                if number % 8:
                    with suppress(OSError):
                        held.enter_context(_connect(target))
                        continue
                silent = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                silent.setblocking(False)
                with suppress(OSError):
                    silent.connect(target.path + SUFFIX)
            until.wait(5)

    in_threads(*[partial(repeat, until, hold)] * 4)


@attack(variants=("local",))
def local_unread_answers(target: Target, until: Event) -> None:
    """Send local calls without a pause, and never read an answer (of the kind of C4).

    Sent: GetServerInfo, and calls of Pool whose answers are a thousand times as large, on eight connections.
    Aims at: memory of answers, and the threads that send them.
    """
    packets = (_call(INFO, b""), _call(POOL, growing()))

    def flood() -> None:
        with _connect(target) as peer:
            while not until.is_set():
                for packet in packets:
                    peer.send(packet)

    in_threads(*[partial(repeat, until, flood)] * 8)


@attack(variants=("local",))
def local_packets_that_are_not_calls(target: Target, until: Event) -> None:
    """Send packets of every wrong kind, with descriptors that no one asked for (of the kind of M3).

    Sent: halves of calls, wrong lengths, random bytes, packets that are too large, and descriptors.
    Aims at: descriptors that stay open, and threads that fail.
    """
    good, chance = _call(INFO, b""), random.Random(1)
    packets = (b"\0", good[:7], b"\xff" * 64, good[:-1] + b"\xff", chance.randbytes(1000), bytes(MAX_PACKET_BYTES + 1))

    def wrong() -> None:
        with _connect(target) as peer:
            descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(chance.randrange(3))]
            try:
                socket.send_fds(peer, [chance.choice(packets)], descriptors)
            finally:
                for each in descriptors:
                    os.close(each)
            if chance.randrange(2):
                peer.recv(MAX_PACKET_BYTES)

    in_threads(*[partial(repeat, until, wrong)] * 4)


@attack(variants=("local",))
def local_calls_that_are_left(target: Target, until: Event) -> None:
    """Send calls, and close the connection before they are answered (of the kind of C4).

    Sent: calls of Pool with answers of 4 MiB, with a deadline of a millisecond or none, from eight threads.
    Aims at: the slots, bytes and places in the queue of calls that no one waits for.
    """

    def leave() -> None:
        with _connect(target) as peer:
            peer.send(_call(POOL, growing(), random.choice((0.001, None))))
            until.wait(random.random() / 500)

    in_threads(*[partial(repeat, until, leave)] * 8)
