"""Peers that ask and do not read: their answers stay in the server's memory."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import h2.exceptions

from fuzz.attacks.attack import Target, attack, in_threads, repeat
from fuzz.attacks.messages import (
    INFER_SHAPE,
    MODEL_INFER,
    MODEL_STREAM,
    POOL,
    POOL_STREAM,
    SERVER_INFO,
    growing,
    growing_infer,
    stream_block,
    stream_header,
)
from fuzz.attacks.raw_peer import RawPeer, framed
from poolrpc import AdaptiveMaxPool2d, MaxPool2d
from poolrpc._wire import codec
from poolrpc.chains import as_chain

if TYPE_CHECKING:
    from threading import Event


@attack()
def unread_answers(target: Target, until: Event) -> None:
    """Ask for answers of 4 MiB with requests of 29 bytes, and never read (row C4: 3.4 GiB for 41 kB, counted as 0).

    Sent: 400 calls of Pool and ModelInfer on a connection with a window of 0; kept for as long as the server lets them.
    Aims at: memory of answers that flow control holds back.
    """
    calls = ((POOL, framed(growing())), (MODEL_INFER, framed(growing_infer())))

    def flood() -> None:
        with RawPeer(target.address, window=0, timeout=0.5) as peer:
            for number in range(400):
                method, message = calls[number % len(calls)]
                peer.send(peer.open(method, *target.headers), message)
            _wait(peer, until, 400)

    in_threads(*[partial(repeat, until, flood)] * target.connections)


@attack()
def unread_streams(target: Target, until: Event) -> None:
    """Send streams whose answers are not read (of the kind of C4).

    Sent: PoolStream with blocks that grow to 4 MiB, and a ModelStreamInfer with a hundred such requests, eight of each
    on a connection with a window of 0.
    Aims at: memory of answers, and the call threads that wait to send them.
    """
    header = framed(stream_header((1000, 1, 1, 1), [AdaptiveMaxPool2d(1024)]))
    blocks = framed(stream_block(4)) * 100
    infers = framed(growing_infer()) * 100

    def flood() -> None:
        with RawPeer(target.address, window=0, timeout=0.5) as peer:
            for _ in range(8):
                peer.send(peer.open(POOL_STREAM, *target.headers), header + blocks, end=False)
                peer.send(peer.open(MODEL_STREAM, *target.headers), infers, end=False)
            _wait(peer, until, 16)

    in_threads(*[partial(repeat, until, flood)] * target.connections)


@attack()
def unread_control_answers(target: Target, until: Event) -> None:
    """Ask for many answers of calls that compute nothing, and never read them (of the kind of C4).

    Sent: 500 GetServerInfo, and 500 InferShape of 32 branches of 32 layers each, on a connection with a window of 0.
    Aims at: memory of answers of methods that are not limited by bytes in flight.
    """
    chain = as_chain([MaxPool2d(1, stride=1)] * 32)
    shapes = framed(codec.encode_shape_request((1, 1, 64, 64), (chain,) * 32, "NCHW").SerializeToString())

    def flood() -> None:
        with RawPeer(target.address, window=0, timeout=0.5) as peer:
            for _ in range(500):
                peer.send(peer.open(SERVER_INFO, *target.headers), framed(b""))
                peer.send(peer.open(INFER_SHAPE, *target.headers), shapes)
            _wait(peer, until, 1000)

    in_threads(*[partial(repeat, until, flood)] * target.connections)


@attack()
def frame_floods(target: Target, until: Event) -> None:
    """Send floods of HTTP/2 control frames, and read nothing (of the kind of C4: CVE-2019-9512, 9515).

    Sent: pings, and calls of unknown methods, without reading an acknowledgement.
    Aims at: memory of acknowledgements and trailers, and the CPU of the HTTP/2 layer.
    """

    def pings() -> None:
        with RawPeer(target.address, timeout=0.5) as peer:
            while not until.wait(0.01):
                for _ in range(20):
                    peer.ping()
                peer.flush()

    def unknown() -> None:
        with RawPeer(target.address, timeout=0.5) as peer:
            for _ in range(100):
                peer.send(peer.open("/poolrpc.v1.PoolService/Nothing", *target.headers), framed(b""))

    in_threads(partial(repeat, until, pings), partial(repeat, until, unknown, 0.2))


def _wait(peer: RawPeer, until: Event, count: int) -> None:
    """Keep a connection until the attack ends, or until the server has ended so many of its streams."""
    peer.socket.settimeout(0.2)
    while not until.is_set() and len(peer.ended) < count:
        try:
            peer.receive()
        except TimeoutError:
            continue
        except h2.exceptions.ProtocolError:
            return
