"""Messages that cost the server more to read than the peer to write: many empty fields, unknown fields, padding."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

from fuzz.attacks.attack import MIB, Target, attack, in_threads, repeat
from fuzz.attacks.messages import (
    CHECK,
    INFER_SHAPE,
    MODEL_CONFIG,
    MODEL_INFER,
    MODEL_STREAM,
    POOL,
    POOL_STREAM,
    SERVER_INFO,
    SERVER_READY,
    WATCH,
    infer,
    stream_block,
    stream_header,
)
from fuzz.attacks.raw_peer import RawPeer, framed
from poolrpc import MaxPool2d
from poolrpc.v1 import pool_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from threading import Event

    import grpc

LARGE_MESSAGES = (("grpc.max_send_message_length", -1),)
THREADS = 4
PLANE = (1, 1, 64, 64)
PLANE_BYTES = 4 * 64 * 64


def _unary(target: Target, until: Event, messages: Iterable[tuple[str, bytes]]) -> None:
    """Send messages in turn, each to its method, from four threads, which leave when an answer takes long."""
    items = list(messages)

    def calls(first: int, channel: grpc.Channel) -> None:
        for method, message in items[first:] + items[:first]:
            if until.is_set():
                return
            call = channel.unary_unary(method).future(message, metadata=target.headers, timeout=3)
            while not call.done() and not until.wait(0.02):
                pass
            call.cancel()  # a caller that has left: what it costs from now on is for no caller

    with target.channel(*LARGE_MESSAGES) as channel:
        in_threads(
            *(partial(repeat, until, partial(calls, len(items) * part // THREADS, channel)) for part in range(THREADS))
        )


@attack()
def empty_payload_fields(target: Target, until: Event) -> None:
    """Send messages of millions of empty payload fields (row C3: 10 to 22 s of CPU, 235 times the message in memory).

    Sent: 4 to 32 MiB of `7a 00` to Pool and PoolStream, and of `3a 00`, empty raw tensors, to ModelInfer.
    Aims at: CPU and memory of whatever scans a message before a limit.
    """
    sizes = (4, 8, 32)
    messages = [(POOL, b"\x7a\x00" * (size * MIB // 2)) for size in sizes]
    messages += [(MODEL_INFER, b"\x3a\x00" * (size * MIB // 2)) for size in sizes]
    messages += [(method, b"\x7a\x00" * (8 * MIB // 2)) for method in (POOL_STREAM, MODEL_STREAM)]
    _unary(target, until, messages)


@attack()
def unknown_fields(target: Target, until: Event) -> None:
    """Send messages of millions of small unknown fields (row C3: as expensive as empty payloads).

    Sent: 4 to 32 MiB of fields that the method's message does not have, as a varint and as empty bytes, to every
    method that reads a message.
    Aims at: CPU and memory of scanning and parsing.
    """
    varint, empty = b"\xf8\x07\x01", b"\xfa\x07\x00"  # field 127
    methods = (POOL, MODEL_INFER, INFER_SHAPE, SERVER_INFO, SERVER_READY, MODEL_CONFIG, CHECK, WATCH, POOL_STREAM)
    _unary(
        target,
        until,
        [
            *((POOL, b"\x08\x01" * (size * MIB // 2)) for size in (4, 16, 32)),
            *((method, field * (4 * MIB // 3)) for method in methods for field in (varint, empty)),
        ],
    )


@attack()
def empty_branches(target: Target, until: Event) -> None:
    """Send millions of empty branches, layers and shapes (row C3: 64 MiB of them to InferShape, 4.2 GiB of objects).

    Sent: repeated empty messages to InferShape, Pool and ModelInfer: branches, layers of a branch, inputs, outputs;
    and a packed list of numbers for a shape.
    Aims at: memory of the objects that protobuf builds.
    """
    layers = b"\x0a\x00" * (8 * MIB // 2)
    length = _varint(len(layers))
    shape = b"\x01" * (16 * MIB)
    messages = [
        (INFER_SHAPE, b"\x1a\x00" * (64 * MIB // 2)),
        (INFER_SHAPE, b"\x1a" + length + layers),
        (INFER_SHAPE, b"\x0a" + _varint(len(shape) + 5) + b"\x0a" + _varint(len(shape)) + shape),
        (POOL, b"\x1a\x00" * (16 * MIB // 2)),
        (POOL, b"\x1a" + length + layers),
        (MODEL_INFER, b"\x2a\x00" * (8 * MIB // 2)),
        (MODEL_INFER, b"\x32\x00" * (8 * MIB // 2)),
        (MODEL_INFER, b"\x22\x00" * (8 * MIB // 2)),
    ]
    _unary(target, until, messages)


@attack()
def typed_numbers(target: Target, until: Event) -> None:
    """Send ModelInfer's inputs as lists of numbers (of the kind of C3: eight times the message in memory).

    Sent: 15 MiB of packed booleans, integers and unpacked integers as the contents of an input.
    Aims at: memory of the objects that protobuf builds.
    """
    messages = []
    for field, data in ((1, b"\x01" * 15 * MIB), (3, b"\x01" * 15 * MIB)):
        contents = bytes([field << 3 | 2]) + _varint(len(data)) + data
        messages.append(contents)
    messages.append(b"\x18\x01" * (15 * MIB // 2))
    _unary(
        target,
        until,
        (
            (MODEL_INFER, b"\x0a\x04pool\x2a" + _varint(len(each) + 5) + b"\x2a" + _varint(len(each)) + each)
            for each in messages
        ),
    )


def _streams(target: Target, until: Event, *streams: tuple[str, Callable[[], Iterator[bytes]]]) -> None:
    """Send streams on one connection, each again when it has failed, and read their answers."""

    def send(channel: grpc.Channel, method: str, messages: Callable[[], Iterator[bytes]]) -> None:
        call = channel.stream_stream(method)(messages(), metadata=target.headers)

        def leave() -> None:
            while call.is_active() and not until.wait(0.05):
                pass
            call.cancel()

        threading.Thread(target=leave, daemon=True).start()
        for _ in call:
            pass

    with target.channel(*LARGE_MESSAGES) as channel:
        in_threads(*(partial(repeat, until, partial(send, channel, *stream)) for stream in streams))


@attack()
def padded_streams(target: Target, until: Event) -> None:
    """Send streams whose messages are mostly padding (row H3: messages were kept whole, 2.2 GiB counted as 13 MB).

    Sent: PoolStream with small blocks in messages that have 200 MiB of padding, in three streams at a time;
    ModelStreamInfer likewise with an unknown field of 200 MiB.
    Aims at: memory of messages that are held while their small blocks are computed.
    """
    padding = bytes(200 * MIB)

    def native() -> Iterator[bytes]:
        yield stream_header((10**6, 1, 64, 64), [MaxPool2d(2)])
        message = pool_pb2.PoolStreamRequest(padding=padding, payload=bytes(PLANE_BYTES)).SerializeToString()
        while True:
            yield message

    def triton() -> Iterator[bytes]:
        message = infer("MaxPool2d(2)", PLANE, "FP32", bytes(PLANE_BYTES))
        message = b"\xfa\x07" + _varint(len(padding)) + padding + message
        while True:
            yield message

    _streams(target, until, (POOL_STREAM, native), (POOL_STREAM, native), (MODEL_STREAM, triton))


@attack()
def empty_unfinished_pieces(target: Target, until: Event) -> None:
    """Send a block in endless empty pieces (row H3: every piece was counted again, in quadratic time).

    Sent: two streams' headers, then messages that say `unfinished` and have no payload, a thousand in a write.
    Aims at: CPU, and the list of pieces.
    """
    header = framed(stream_header((10**6, 1, 64, 64), [MaxPool2d(2)]))
    pieces = framed(pool_pb2.PoolStreamRequest(unfinished=True).SerializeToString()) * 1000

    def flood() -> None:
        with RawPeer(target.address, timeout=1) as peer:
            streams = [peer.open(POOL_STREAM, *target.headers) for _ in range(2)]
            for stream in streams:
                peer.send(stream, header, end=False)
            while not until.is_set() and len(peer.ended) < len(streams):
                for stream in streams:
                    peer.send(stream, pieces, end=False)

    repeat(until, flood)


@attack()
def stream_block_sizes(target: Target, until: Event) -> None:
    """Send a stream in blocks of thousands of sizes (row L: each size left a cached plan, 137 MiB for 8,000).

    Sent: PoolStream of planes of 4 x 4, in blocks of 1, 2, 3 ... planes, with two layers.
    Aims at: memory of caches.
    """

    def blocks(size: int) -> Iterator[bytes]:
        yield stream_header((10**8, 1, 4, 4), [MaxPool2d(size)])
        for planes in range(1, 10**4):
            yield stream_block(planes * 64)

    _streams(target, until, *((POOL_STREAM, partial(blocks, size)) for size in (2, 3)))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
