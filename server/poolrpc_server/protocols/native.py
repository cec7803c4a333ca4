"""poolrpc.v1.PoolService: the native protocol."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from poolrpc._shapes.rules import clip
from poolrpc._wire import codec, framing
from poolrpc.errors import InternalError, InvalidArgumentError
from poolrpc.v1 import pool_pb2
from poolrpc_server.calls import facts
from poolrpc_server.calls.dispatch import Caller
from poolrpc_server.calls.streams import Leaving
from poolrpc_server.transports.grpc.interceptor import NO_MESSAGE, note, priority, timeline

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from google.protobuf.message import Message

    from poolrpc.tensors import Bytes
    from poolrpc_server.calls.dispatch import Dispatcher
    from poolrpc_server.calls.streams import Streams
    from poolrpc_server.calls.validate import CheckedRequest

SERVICE = pool_pb2.DESCRIPTOR.services_by_name["PoolService"].full_name

KNOWN_BYTES = 1024
KNOWN = 4096
"""How many headers of up to KNOWN_BYTES are remembered with what was found of them."""

BLOCKS_AHEAD = 1
"""Blocks of a stream that are read while one is computed."""

M = TypeVar("M", pool_pb2.PoolRequest, pool_pb2.PoolStreamRequest)


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found of a request: it depends on the header alone, and callers repeat themselves.

    Attributes:
        checked: The request.
        ranges: Where its tensors are in an arena, where they are.
        facts: What the log says of it.
        answer: The answer, without its payload.
        head: The answer, up to its payload.

    """

    checked: CheckedRequest
    ranges: codec.ArenaRanges | None
    facts: dict[str, str]
    answer: bytes
    head: bytes

    def answered(self, outputs: Sequence[memoryview]) -> bytes:
        """Give the answer with its payload."""
        return b"".join((self.head, *outputs))


class PoolDoor:
    """The servicer of PoolService; messages with payloads come and go as bytes, the others as protobuf has them."""

    def __init__(self, dispatcher: Dispatcher, streams: Streams) -> None:
        """Make a door to a dispatcher; streams are let in by `streams`."""
        self._dispatcher = dispatcher
        self._streams = streams
        self._known: dict[bytes, _Known] = {}

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Give gRPC's handlers of the service's methods."""
        unary = grpc.unary_unary_rpc_method_handler
        return {
            "Pool": unary(self.Pool),
            "PoolStream": grpc.stream_stream_rpc_method_handler(self.PoolStream),
            "InferShape": unary(
                self.InferShape,
                pool_pb2.InferShapeRequest.FromString,
                pool_pb2.InferShapeResponse.SerializeToString,
            ),
            "GetServerInfo": unary(
                self.GetServerInfo,
                pool_pb2.GetServerInfoRequest.FromString,
                pool_pb2.GetServerInfoResponse.SerializeToString,
            ),
        }

    def is_quick(self, data: bytes) -> bool:
        """Tell whether Pool takes so little for a message, by what is known of its like, that other calls can wait."""
        try:
            header, _ = framing.split_payload(data, pool_pb2.PoolRequest)
        except DecodeError:
            return False
        known = self._known.get(header)
        return known is not None and self._dispatcher.is_quick(known.checked)

    def Pool(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        """Run every branch of the request on its input."""
        header, payload = _cut(data, pool_pb2.PoolRequest)
        known = self._known.get(header) or self._find(header)
        note(known.facts)
        caller = _caller(context)
        if known.ranges is None:
            return self._dispatcher.pool(known.checked, payload, caller, known.answered)
        self._dispatcher.pool_in_arena(known.checked, known.ranges, caller)
        return known.answer  # in the arena

    def PoolStream(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Run every branch on the input's blocks, as they come."""
        caller = replace(_caller(context), add_done_callback=Leaving(context.add_callback).tell)
        with self._streams.opened(messages, BLOCKS_AHEAD, context.cancel) as (ahead, watch):
            header, _ = _cut(next(ahead, b""), pool_pb2.PoolStreamRequest)
            message = _parsed(header, pool_pb2.PoolStreamRequest)
            if not message.HasField("request"):
                raise InvalidArgumentError("expected the request in the first message, got none", field="request")
            request = codec.decode_request(message.request)
            note(facts.asked(request))
            with self._dispatcher.stream(request, caller) as stream:
                note(facts.answered(stream.results))
                yield pool_pb2.PoolStreamResponse(results=codec.encode_results(stream.results)).SerializeToString()
                for block in _blocks(ahead, stream.max_planes * stream.plane_bytes):
                    for answer in self._dispatcher.pool_block(stream, block, caller, _pieces):
                        watch.moved()
                        yield answer
                    watch.moved()
                stream.finish()

    def InferShape(self, request: pool_pb2.InferShapeRequest, _: grpc.ServicerContext) -> pool_pb2.InferShapeResponse:
        """Give the shapes that Pool would give."""
        shape, branches, layout = codec.decode_shape_request(request)
        note({"layers": clip(branches, facts.FACT_CHARS), "shape": clip(shape, facts.FACT_CHARS)})
        return codec.encode_shape_response(self._dispatcher.shapes(shape, branches, layout))

    def GetServerInfo(
        self, _: pool_pb2.GetServerInfoRequest, __: grpc.ServicerContext
    ) -> pool_pb2.GetServerInfoResponse:
        """Tell what the server is."""
        return codec.encode_info(self._dispatcher.info)

    def _find(self, header: bytes) -> _Known:
        message = _parsed(header, pool_pb2.PoolRequest)
        request = codec.decode_request(message)
        note(noted := facts.asked(request))  # before the checks: the log tells what was refused
        checked = self._dispatcher.check(request)
        answer = pool_pb2.PoolResponse(results=codec.encode_results(checked.results)).SerializeToString()
        head = framing.message_prefix(answer, checked.output_bytes)
        ranges = codec.decode_ranges(message)
        if ranges is None:
            self._dispatcher.check_answer(len(head) + checked.output_bytes)
        known = _Known(checked, ranges, noted | facts.answered(checked.results), answer, head)
        if len(header) <= KNOWN_BYTES:
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[header] = known
        return known


def _caller(context: grpc.ServicerContext) -> Caller:
    return Caller(context.time_remaining, context.is_active, context.add_callback, priority(), timeline())


def _cut(data: bytes, cls: type[M]) -> tuple[bytes, memoryview]:
    try:
        return framing.split_payload(data, cls)
    except DecodeError:
        raise _no_message(cls) from None


def _parsed(header: bytes, cls: type[M]) -> M:
    try:
        return cls.FromString(header)
    except DecodeError:
        raise _no_message(cls) from None


def _no_message(cls: type[Message]) -> InternalError:
    # The status that gRPC itself has for what it can't parse.
    return InternalError(f"expected a {cls.DESCRIPTOR.full_name}, got bytes that are none", reason=NO_MESSAGE)


def _blocks(messages: Iterator[bytes], most: int) -> Iterator[Bytes]:
    """Give the blocks of a stream's messages, each in one piece."""
    parts: list[memoryview] = []
    for data in messages:
        header, payload = _cut(data, pool_pb2.PoolStreamRequest)
        # Without padding, a block in one message has no header to parse.
        message = _parsed(header, pool_pb2.PoolStreamRequest) if header else None
        if message is not None and message.HasField("request"):
            raise InvalidArgumentError("expected the request in the first message alone, got it again", field="request")
        parts.append(payload)
        if (size := sum(map(len, parts))) > most:
            raise InvalidArgumentError(f"expected a block of at most {most} bytes, got {size}", field="payload")
        if message is None or not message.unfinished:
            yield parts[0] if len(parts) == 1 else b"".join(parts)
            parts = []
    if parts:
        msg = f"expected the rest of a block, got the end of the stream after {sum(map(len, parts))} bytes of it"
        raise InvalidArgumentError(msg, field="payload")


def _pieces(outputs: Sequence[memoryview]) -> list[bytes]:
    return list(framing.chunks(outputs))
