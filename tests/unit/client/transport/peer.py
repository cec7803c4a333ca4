"""A server without gRPC: what answers messages in this process, by protobuf's own reading of them."""

from poolrpc import ServerInfo
from poolrpc._wire import framing
from poolrpc._wire.codec import decode_request, encode_results
from poolrpc.v1 import pool_pb2
from poolrpc_server.calls.admission import AdmissionControl
from poolrpc_server.calls.dispatch import Caller, Dispatcher
from poolrpc_server.calls.validate import Limits
from poolrpc_server.compute.engine import Engine

CALLER = Caller(time_remaining=lambda: None, active=lambda: True)
WIDE = Limits(2**40, 2**40, 2**40, 2**50)


class Peer:
    """What a client speaks with.

    Attributes:
        calls: The requests that were answered, as protobuf parsed them.
        blocks: Bytes of each block that came in a stream.

    """

    def __init__(self, limits=WIDE):
        self.calls, self.blocks = [], []
        self._engine = Engine("cpu", 1)
        self._dispatcher = Dispatcher(
            limits, AdmissionControl(2**40), self._engine, ServerInfo("0", "0", "cpu", 1, {}, {})
        )

    def close(self):
        """End the engine."""
        self._engine.close()

    def unary(self, data):
        """Answer a unary call."""
        message = pool_pb2.PoolRequest.FromString(data)
        self.calls.append(message)
        checked = self._dispatcher.check(decode_request(message))
        payload = self._dispatcher.pool(checked, message.payload, CALLER, b"".join)
        return pool_pb2.PoolResponse(results=encode_results(checked.results), payload=payload).SerializeToString()

    def stream(self, messages):
        """Answer a stream, message by message."""
        message = pool_pb2.PoolStreamRequest.FromString(next(messages))
        self.calls.append(message.request)
        with self._dispatcher.stream(decode_request(message.request), CALLER) as stream:
            yield pool_pb2.PoolStreamResponse(results=encode_results(stream.results)).SerializeToString()
            block = b""
            for data in messages:
                message = pool_pb2.PoolStreamRequest.FromString(data)
                assert not message.HasField("request")
                block += message.payload
                if not message.unfinished:
                    self.blocks.append(len(block))
                    yield from self._dispatcher.pool_block(stream, block, CALLER, lambda out: list(framing.chunks(out)))
                    block = b""
            assert not block
            stream.finish()
