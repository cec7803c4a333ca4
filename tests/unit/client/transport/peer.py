"""A server without gRPC: it answers messages in this process, which it parses by protobuf alone."""

import numpy as np

from poolrpc import ServerInfo
from poolrpc._transport.request import PreparedRequest, Transfer
from poolrpc._transport.stream import StreamReader, stream_messages
from poolrpc._transport.unary import decode_message, encode_message
from poolrpc._wire import framing
from poolrpc._wire.codec import Request, decode_request, encode_results
from poolrpc.tensors import spec_of
from poolrpc.v1 import pool_pb2
from poolrpc_server.calls.dispatch import Dispatcher
from poolrpc_server.calls.validate import Limits
from poolrpc_server.compute.engine import Engine
from tests.unit.server.context import Context

WIDE = Limits(2**40, 2**40, 2**40, 2**50)


class Peer:
    """The server.

    Attributes:
        calls: The requests that were answered, as protobuf parsed them.
        blocks: The size of each block of a stream, in bytes.

    """

    def __init__(self, limits=WIDE):
        self.calls, self.blocks = [], []
        self._engine = Engine("cpu", 1)
        self._dispatcher = Dispatcher(limits, 1, self._engine, ServerInfo("0", "0", "cpu", 1, {}, {}))

    def close(self):
        """Close the engine."""
        self._engine.close()

    def unary(self, data):
        """Answer a unary call."""
        message = pool_pb2.PoolRequest.FromString(data)
        self.calls.append(message)
        checked = self._dispatcher.check(decode_request(message))
        payload = self._dispatcher.pool(checked, message.payload, Context(), b"".join)
        return pool_pb2.PoolResponse(results=encode_results(checked.results), payload=payload).SerializeToString()

    def stream(self, messages):
        """Answer a stream, message by message."""
        message = pool_pb2.PoolStreamRequest.FromString(next(messages))
        self.calls.append(message.request)
        call = Context()
        stream = self._dispatcher.stream(decode_request(message.request), call)
        yield pool_pb2.PoolStreamResponse(results=encode_results(stream.results)).SerializeToString()
        block = b""
        for data in messages:
            message = pool_pb2.PoolStreamRequest.FromString(data)
            assert not message.HasField("request")
            block += message.payload
            if not message.unfinished:
                self.blocks.append(len(block))
                yield from self._dispatcher.pool_block(stream, block, call, lambda out: list(framing.chunks(out)))
                block = b""
        assert not block
        stream.finish()


def make_transfer(x, *branches, out=(), indices=None, layout="NCHW"):
    """Return the transfer of a call; a branch may be a single layer."""
    chains = tuple(each if isinstance(each, tuple) else (each,) for each in branches)
    second = None if indices is None else spec_of(indices, layout)
    return Transfer(PreparedRequest(Request(spec_of(x, layout), chains, second)), [x], out, indices)


def call_unary(peer, transfer, progress=None):
    """Return the results of a unary call."""
    return decode_message(transfer, peer.unary(encode_message(transfer, 2**30)), progress)


def call_stream(peer, transfer, progress=None, block_bytes=2**20):
    """Return the results of a stream."""
    responses = peer.stream(stream_messages(transfer, block_bytes))
    reader = StreamReader(transfer, next(responses), progress)
    for message in responses:
        reader.read(message)
    return reader.finish()


def assert_same(results, expected):
    """Check that results are equal, whatever transport they came through."""
    assert [each.shapes for each in results] == [each.shapes for each in expected]
    for result, other in zip(results, expected, strict=True):
        for name in ("output", "indices"):
            array, other_array = getattr(result, name), getattr(other, name)
            assert (array is None) == (other_array is None)
            if array is not None:
                assert array.dtype == other_array.dtype
                assert np.array_equal(array, other_array)
