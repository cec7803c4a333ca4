"""poolrpc.v1.PoolService: the native protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import DecodeError

from poolrpc._shapes.rules import clip
from poolrpc._wire import codec, framing
from poolrpc.errors import InvalidArgumentError
from poolrpc.v1 import pool_pb2
from poolrpc_server.calls.call import MAX_FACT_CHARS, request_facts, result_facts, shape_fact
from poolrpc_server.calls.method import Method
from poolrpc_server.protocols.messages import decoding, header_too_large, not_a_message, parse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from poolrpc.tensors import Bytes
    from poolrpc_server.calls.call import CallContext
    from poolrpc_server.calls.dispatch import Dispatcher
    from poolrpc_server.calls.streams import OpenStreams
    from poolrpc_server.calls.validate import CheckedRequest

POOL_SERVICE = pool_pb2.DESCRIPTOR.services_by_name["PoolService"].full_name

REMEMBERED_HEADERS = 1024
"""Maximum number of request headers whose decoded and validated form is cached."""

REMEMBERED_HEADER_BYTES = 1024
"""Maximum size of a header that is cached, in bytes."""

BLOCKS_AHEAD = 1
"""Blocks of a stream that are read while one is computed."""

M = TypeVar("M", pool_pb2.PoolRequest, pool_pb2.PoolStreamRequest)


@dataclass(frozen=True, slots=True)
class _PreparedPool:
    """A decoded and validated request header, cached because clients repeat requests.

    Attributes:
        checked: The request.
        ranges: The ranges of an arena that hold its tensors; None if they are in the payload.
        facts: Its fields of the log line.
        answer: The answer without its payload.
        head: The answer up to its payload.

    """

    checked: CheckedRequest
    ranges: codec.ArenaRanges | None
    facts: dict[str, object]
    answer: bytes
    head: bytes

    def encode(self, outputs: Sequence[memoryview]) -> bytes:
        """Return the answer with its payload."""
        return b"".join((self.head, *outputs))


class PoolServicer:
    """The methods of PoolService. Messages with payloads are framed without protobuf, all others with it."""

    def __init__(self, dispatcher: Dispatcher, streams: OpenStreams) -> None:
        """Create a servicer that passes requests to `dispatcher` and opens streams with `streams`."""
        self._dispatcher = dispatcher
        self._streams = streams
        self._prepared: dict[bytes, _PreparedPool] = {}
        self._splits: dict[int, tuple[bytes, bytes]] = {}  # by length, what precedes the payload, and the header
        self._info = codec.encode_info(dispatcher.info).SerializeToString()

    def methods(self) -> tuple[Method, ...]:
        """Return the methods of the service."""
        return (
            Method(f"/{POOL_SERVICE}/Pool", unary=self.pool, computes=True, short=True),
            Method(f"/{POOL_SERVICE}/PoolStream", stream=self.pool_stream, computes=True),
            Method(f"/{POOL_SERVICE}/InferShape", unary=self.infer_shape),
            Method(f"/{POOL_SERVICE}/GetServerInfo", unary=self.get_server_info, short=True),
        )

    def pool(self, message: bytes, call: CallContext) -> bytes:
        """Run every branch of the request on its input."""
        header, payload = self._split_again(message)
        prepared = self._prepared.get(header)
        if prepared is None:
            call.make_way()
            with decoding(header, call):
                prepared = self._prepare(header, call)
        call.record.note(prepared.facts)
        if prepared.ranges is None:
            return self._dispatcher.pool(prepared.checked, payload, call, prepared.encode)
        self._dispatcher.pool_in_arena(prepared.checked, prepared.ranges, call)
        return prepared.answer  # the outputs are in the arena

    def pool_stream(self, messages: Iterator[bytes], call: CallContext) -> Iterator[bytes]:
        """Run every branch on the input's blocks, as they arrive."""
        record = call.record
        with self._streams.open(messages, BLOCKS_AHEAD, call) as (reader, context):
            header, operand = _split(next(reader, b""), pool_pb2.PoolStreamRequest)
            with decoding(header, call):
                message = parse(pool_pb2.PoolStreamRequest, header)
                if not message.HasField("request"):
                    raise InvalidArgumentError("expected the request in the first message, got none", field="request")
                request = codec.decode_request(message.request)
                record.note(request_facts(request))
            stream = self._dispatcher.stream(request, context, operand)
            record.note(result_facts(stream.results))
            yield pool_pb2.PoolStreamResponse(results=codec.encode_results(stream.results)).SerializeToString()
            for block in _blocks(reader, stream.max_planes * stream.plane_bytes):
                for answer in self._dispatcher.pool_block(stream, block, context, _pieces):
                    context.sends()
                    yield answer
                context.progressed()
            stream.finish()

    def infer_shape(self, message: bytes, call: CallContext) -> bytes:
        """Return the shapes that Pool would return."""
        with decoding(message, call):
            request = parse(pool_pb2.InferShapeRequest, message)
            shape, branches, layout, outputs, operand_shape = codec.decode_shape_request(request)
            call.record.note({"layers": clip(branches, MAX_FACT_CHARS), "shape": shape_fact(shape)})
            shapes = self._dispatcher.shapes(shape, branches, layout, outputs, operand_shape)
            return codec.encode_shape_response(shapes).SerializeToString()

    def get_server_info(self, message: bytes, _: CallContext) -> bytes:
        """Return the description of the server."""
        parse(pool_pb2.GetServerInfoRequest, message)
        return self._info

    def _split_again(self, message: bytes) -> tuple[bytes, memoryview]:
        """Return the header and the payload of a request, without reading the fields of one like an earlier one."""
        start, header = self._splits.get(len(message), (b"", b""))
        if start and message.startswith(start):
            return header, memoryview(message)[len(start) :]
        header, payload = _split(message, pool_pb2.PoolRequest)
        start = framing.message_prefix(header, len(payload))
        # A message of the same length that starts with the same bytes has the same header, and a payload that ends it.
        if (
            len(start) <= REMEMBERED_HEADER_BYTES
            and message.startswith(start)
            and len(start) + len(payload) == len(message)
        ):
            if len(self._splits) >= REMEMBERED_HEADERS:
                self._splits.clear()
            self._splits[len(message)] = start, header
        return header, payload

    def _prepare(self, header: bytes, call: CallContext) -> _PreparedPool:
        message = parse(pool_pb2.PoolRequest, header)
        request = codec.decode_request(message)
        facts = request_facts(request)
        call.record.note(facts)  # before the checks, so that the log shows what was rejected
        checked = self._dispatcher.check(request)
        answer = pool_pb2.PoolResponse(results=codec.encode_results(checked.results)).SerializeToString()
        head = framing.message_prefix(answer, checked.output_bytes)
        ranges = codec.decode_ranges(message)
        if ranges is None:
            self._dispatcher.check_answer(len(head) + checked.output_bytes)
        prepared = _PreparedPool(checked, ranges, facts | result_facts(checked.results), answer, head)
        if len(header) <= REMEMBERED_HEADER_BYTES:
            if len(self._prepared) >= REMEMBERED_HEADERS:
                self._prepared.clear()
            self._prepared[header] = prepared
        return prepared


def _split(data: bytes, cls: type[M]) -> tuple[bytes, memoryview]:
    try:
        return framing.split_payload(data, cls)
    except framing.HeaderError as error:
        raise header_too_large(str(error)) from None
    except DecodeError:
        raise not_a_message(cls) from None


def _blocks(messages: Iterator[bytes], limit: int) -> Iterator[Bytes]:
    """Yield the blocks of a stream's messages, each in one piece of at most `limit` bytes."""
    begun = bytearray()
    for data in messages:
        header, payload = _split(data, pool_pb2.PoolStreamRequest)
        # Without padding, a block in one message has no header to parse.
        message = parse(pool_pb2.PoolStreamRequest, header) if header else None
        if message is not None and message.HasField("request"):
            raise InvalidArgumentError("expected the request in the first message alone, got it again", field="request")
        if (size := len(begun) + len(payload)) > limit:
            raise InvalidArgumentError(f"expected a block of at most {limit} bytes, got {size}", field="payload")
        if message is not None and message.unfinished:
            if not payload:
                raise InvalidArgumentError("expected a part of the block, got no bytes of it", field="payload")
            begun += payload
        elif begun:
            begun += payload
            yield begun
            begun = bytearray()
        else:
            yield payload
    if begun:
        msg = f"expected the rest of a block, got the end of the stream after {len(begun)} bytes of it"
        raise InvalidArgumentError(msg, field="payload")


def _pieces(outputs: Sequence[memoryview]) -> list[bytes]:
    return list(framing.chunks(outputs))
