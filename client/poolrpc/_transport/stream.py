"""Calls that stream their tensors in blocks of whole planes, and receive blocks of results meanwhile.

gRPC's own retries were seen to lose a message of a stream (1.85.1, after two rejections, with messages of 4 MB and
nothing but grpcio on both sides). So streams have no retry policy in gRPC's service config; this module retries them.
"""

from __future__ import annotations

import logging
from threading import TIMEOUT_MAX, Event
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from poolrpc._transport.channel import FIRST_BACKOFF, MAX_ATTEMPTS, MAX_BACKOFF
from poolrpc._transport.request import not_an_answer
from poolrpc._transport.result import make_results
from poolrpc._wire import codec, framing
from poolrpc._wire.status import translate_rpc_error
from poolrpc.chains import Planes
from poolrpc.errors import CancelledError, InternalError
from poolrpc.tensors import array_bytes, keep_freed_memory, numpy_dtype
from poolrpc.v1 import pool_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from poolrpc._transport.options import CallOptions
    from poolrpc._transport.request import Transfer
    from poolrpc._transport.result import PoolResult, Progress

STREAM_BLOCK_BYTES = 2 * 2**20
"""Approximate size of a block of a stream, in bytes: whole planes, at least one."""

log = logging.getLogger("poolrpc")

RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""The status codes of a server that is full or stopping; CANCELLED is for calls that it has not started."""


class StreamCall:
    """A stream and its retries. It blocks; another thread may cancel it.

    Args:
        method: The method of a channel.
        transfer: The tensors.
        options: The options of the call.
        is_closed: Returns whether the client is closed.

    """

    def __init__(
        self,
        method: grpc.StreamStreamMultiCallable[bytes, bytes],
        transfer: Transfer,
        options: CallOptions,
        is_closed: Callable[[], bool],
    ) -> None:
        self._is_closed = is_closed
        self._method = method
        self._transfer = transfer
        self._options = options
        self._cancelled = Event()
        self._responses: Any = None
        self._failure: Exception | None = None

    def run(self, progress: Progress | None) -> list[PoolResult]:
        """Send the tensors and return the results.

        Raises:
            grpc.RpcError: The call failed.
            CancelledError: The client was closed.
            Exception: A message could not be made; the error is the one that its tensors raised.
            InternalError: The messages received are not an answer to the request.

        """
        keep_freed_memory()  # one block after the other is freed
        for attempt in range(MAX_ATTEMPTS):
            try:
                return self._attempt(progress)
            except grpc.RpcError as error:
                error.with_traceback(None)  # the error is the call, which its traceback would keep with the tensors
                if self._failure is not None:
                    raise self._failure from None
                ended_here = self._is_closed() or self._cancelled.is_set()
                if error.code() not in RETRYABLE or ended_here or attempt == MAX_ATTEMPTS - 1:
                    raise
                import random  # noqa: PLC0415 - keeps `import poolrpc` fast

                pause = random.uniform(0, min(FIRST_BACKOFF * 2**attempt, MAX_BACKOFF))  # noqa: S311 - not a secret
                # The delay that a server requests may be longer than a clock can wait.
                pause = min(max(pause, getattr(translate_rpc_error(error), "retry_delay", None) or 0), TIMEOUT_MAX)
                remaining = self._options.time_remaining()
                cause = f"{error.code()}: {error.details()}"
                log.debug("attempt %d of a stream failed (%s), the next is in %.2f s", attempt + 1, cause, pause)
                if (remaining is not None and pause >= remaining) or self._cancelled.wait(pause) or self._is_closed():
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Cancel the call, unless it has ended."""
        self._cancelled.set()
        if (responses := self._responses) is not None:
            responses.cancel()

    def _attempt(self, progress: Progress | None) -> list[PoolResult]:
        try:
            responses = self._responses = self._method(self._messages(), **self._options.arguments())
        except ValueError:  # gRPC's error for a channel that is closed
            if self._is_closed():
                raise CancelledError("the client was closed during the call", reason="CLOSED") from None
            raise
        if self._cancelled.is_set():
            responses.cancel()
        try:
            first = next(responses, b"")
            reader = StreamReader(self._transfer, first, progress)
            for message in responses:
                reader.read(message)
            return reader.finish()
        finally:
            responses.cancel()  # no effect on a call that has ended
            self._responses = None

    def _messages(self) -> Iterator[bytes]:
        # gRPC reads the messages in a thread of its own, and would replace an error by "Exception iterating requests!".
        try:
            yield from stream_messages(self._transfer, STREAM_BLOCK_BYTES)
        except Exception as error:
            self._failure = error
            raise


def stream_messages(transfer: Transfer, block_bytes: int) -> Iterator[bytes]:
    """Yield the messages of a stream: the request, then the blocks of the tensors, each of about `block_bytes`."""
    first = pool_pb2.PoolStreamRequest(request=codec.encode_request(transfer.prepared.request)).SerializeToString()
    arrays, whole = transfer.every, []
    if transfer.operand is not None and transfer.prepared.request.operand_name != "indices":
        arrays, whole = transfer.arrays, [array_bytes(transfer.operand)]
    yield framing.join(first, whole)
    count, flat = transfer.prepared.planes.count, [array.reshape(-1).view(np.uint8) for array in arrays]
    if not count:
        return
    step = max(1, block_bytes // sum(len(each) // count for each in flat))
    for start in range(0, count, step):
        stop = min(start + step, count)
        parts = [each[len(each) // count * start : len(each) // count * stop].data for each in flat]
        yield from framing.chunks(parts, padded=True)


class StreamReader:
    """The answer to a stream, written to its arrays block by block.

    Args:
        transfer: The tensors of the call.
        first: The first message of the answer.
        progress: Called after each block.

    Raises:
        InternalError: The first message does not describe the results of the request.

    """

    def __init__(self, transfer: Transfer, first: bytes, progress: Progress | None) -> None:
        prepared = transfer.prepared
        try:
            prepared.check_results(pool_pb2.PoolStreamResponse.FromString(first).results)
        except DecodeError:
            raise not_an_answer(pool_pb2.PoolStreamResponse) from None
        self._results = prepared.results
        self._arrays = [
            np.empty(spec.shape, numpy_dtype(spec.dtype)) if array is None else array
            for spec, array in zip(prepared.outputs, transfer.out or [None] * len(prepared.outputs), strict=True)
        ]
        self._flat = [array.reshape(-1).view(np.uint8) for array in self._arrays]
        self._count = prepared.planes.count
        self._plane_bytes = [Planes(spec, prepared.spatial_dims).plane_bytes for spec in prepared.outputs]
        self._parts: list[memoryview] = []
        self._progress = progress
        self._done = 0

    def read(self, message: bytes) -> None:
        """Write the tensors of the next message to the arrays.

        Raises:
            InternalError: The message is not a part of the answer.

        """
        try:
            header, payload = framing.split_payload(message, pool_pb2.PoolStreamResponse)
            unfinished = bool(header) and pool_pb2.PoolStreamResponse.FromString(header).unfinished
        except DecodeError:
            raise not_an_answer(pool_pb2.PoolStreamResponse) from None
        self._parts.append(payload)
        if unfinished:
            return
        block = self._parts[0] if len(self._parts) == 1 else memoryview(b"".join(self._parts))
        self._parts = []
        count, remainder = divmod(len(block), sum(self._plane_bytes))
        if remainder or self._done + count > self._count:
            raise InternalError(f"expected whole planes of the output, got a block of {len(block)} bytes")
        start = 0
        for flat, nbytes in zip(self._flat, self._plane_bytes, strict=True):
            end = start + count * nbytes
            flat[self._done * nbytes : (self._done + count) * nbytes] = np.frombuffer(block[start:end], np.uint8)
            start = end
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._count)

    def finish(self) -> list[PoolResult]:
        """Return the results, after the last message.

        Raises:
            InternalError: Planes are missing.

        """
        if self._done != self._count:
            raise InternalError(f"expected {self._count} planes of output, got {self._done}")
        return make_results(self._results, self._arrays, "stream")
