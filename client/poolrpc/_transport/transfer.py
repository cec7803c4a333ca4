"""How a call's tensors travel: by which path, in what messages, and where what comes back goes.

A Transfer is one call, without its I/O: the clients move the messages that it gives and hand it those that come.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from poolrpc._shapes.rules import check_shape, clip
from poolrpc._wire import codec, framing
from poolrpc._wire.status import RAISE_HINT, translated
from poolrpc.chains import Chain, Planes, Shape, spatial_dims
from poolrpc.errors import (
    InternalError,
    InvalidArgumentError,
    LimitExceededError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from poolrpc.tensors import Array, TensorSpec, align, aligned_ranges, array_bytes, numpy_dtype
from poolrpc.v1 import pool_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from google.protobuf.message import Message

    from poolrpc._transport.arena_memory import Arenas, Span
    from poolrpc.tensors import Bytes

TRANSPORTS = ("unary", "stream", "arena")

STREAM_BYTES = 16 * 2**20
"""Tensors of at least this go as a stream: measured, python -m benchmarks transport."""

ARENA_BYTES = 256 * 2**10
"""Tensors of at least this go by an arena where there is one."""

ARENA_MOST_BYTES = 256 * 2**20
"""Tensors of more than this don't, unless they lie there: an arena's memory stays taken."""

ANNOUNCED_BYTES = 2**20
"""Messages of at least this are announced, so that a server which has no room for one refuses it before it is sent."""

BLOCK_BYTES = 2 * 2**20
"""Of a stream's blocks, about: whole planes, at least one."""

Progress = Callable[[int, int], object]
"""Called with how many planes are done, and how many there are."""

REMEMBERED_BYTES = 4096
"""What is remembered of an answer, at most: of one with results by the dozen, nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class PoolResult:
    """What one branch gave.

    Attributes:
        output: The output, of the input's dtype and layout.
        shapes: The shape after every layer of the chain.
        indices: The places of the maxima (int64, the output's shape) where the last layer has return_indices, as torch
            counts them: in the flattened channels-first input plane. None elsewhere.
        transport: How the tensors travelled: "unary", "stream" or "arena".

    """

    output: Array
    shapes: tuple[Shape, ...]
    indices: Array | None = None
    transport: str = "unary"

    @property
    def shape(self) -> Shape:
        """The shape of the output."""
        return self.shapes[-1]

    def __repr__(self) -> str:
        """Describe the result without its contents."""
        indices = "" if self.indices is None else ", with indices"
        return f"<PoolResult {self.output.dtype.name} {' -> '.join(map(str, self.shapes))}{indices}>"


def check_transport(transport: str | None) -> None:
    """Check that `transport` is None or one of TRANSPORTS."""
    if transport not in (None, *TRANSPORTS):
        msg = f"expected one of {', '.join(TRANSPORTS)} or None, got {clip(transport)}"
        raise InvalidArgumentError(msg, field="transport")


def announcement(message: bytes) -> dict[str, str]:
    """Give the metadata that says how large a unary call's message is; none of a small one."""
    return {framing.MESSAGE_BYTES_KEY: str(len(message))} if len(message) >= ANNOUNCED_BYTES else {}


def by_size(transfer: Transfer, most: int) -> str:
    """Give the path for a transfer's size where there is no arena, messages being of at most `most` bytes."""
    outline = transfer.outline
    if outline.nbytes < STREAM_BYTES:
        return "unary"
    splits = all(layer.splittable for chain in outline.request.branches for layer in chain)
    return "stream" if splits or outline.nbytes > most else "unary"


class PreparedRequest:
    """What a call is apart from its tensors' contents; calls repeat themselves, so it is worked out once.

    Attributes:
        request: What is asked.
        nbytes: Bytes of the inputs.
        head: The message of a unary call, up to its payload.

    """

    def __init__(self, request: codec.Request) -> None:
        self.request = request
        self.nbytes = sum(spec.nbytes for spec in request.specs)
        self._header = codec.encode_request(request).SerializeToString()
        self.head = framing.message_prefix(framing.pad(self._header, self.nbytes), self.nbytes)
        self._answered: Answer | None = None

    @cached_property
    def results(self) -> Sequence[codec.BranchResult]:
        """What comes of it, worked out here.

        Raises:
            InvalidArgumentError: The layers don't fit the input.

        """
        return self.request.results()

    @cached_property
    def spatial_dims(self) -> int:
        """How many axes of the tensors are spatial."""
        return check_shape(self.request.input.shape, spatial_dims(self.request.branches))

    @property
    def planes(self) -> Planes:
        """The planes of the input."""
        return Planes(self.request.input, self.spatial_dims)

    def in_arena(self, ranges: codec.ArenaRanges) -> bytes:
        """Give the message of a unary call whose tensors lie in an arena."""
        # Two messages end to end are one of both's fields.
        return self._header + codec.encode_ranges(ranges)

    def understood(self, messages: Iterable[pool_pb2.BranchResult]) -> Sequence[codec.BranchResult]:
        """Give what the server says that it did, which is what was asked.

        Raises:
            InternalError: It isn't.

        """
        try:
            results = tuple(codec.decode_results(messages))
            if results == tuple(self.results):
                return results
            got = clip([each.shapes for each in results])
        except InvalidArgumentError as error:
            got = error.message
        raise InternalError(f"expected an answer to {clip(self.request.branches)}, got {got}", reason="ANSWER")

    def answer(self, message: bytes) -> tuple[Answer, Bytes]:
        """Give what a unary call's answer says, and what its tensors' bytes are in."""
        # The same question had an answer before, which began like this, the length of its payload included.
        known = self._answered
        if known is not None and len(message) == known.nbytes and message.startswith(known.start):
            return known, message
        try:
            header, payload = framing.split_payload(message, pool_pb2.PoolResponse)
            results = self.understood(pool_pb2.PoolResponse.FromString(header).results)
        except DecodeError:
            raise _no_answer(pool_pb2.PoolResponse) from None
        start = framing.message_prefix(header, len(payload))
        if not message.startswith(start):  # as another encoder may write it
            return Answer(results, b""), payload
        answer = Answer(results, start)
        if payload and len(start) <= REMEMBERED_BYTES:
            self._answered = answer
        return answer, message


class Answer:
    """What a unary call's answer says.

    Attributes:
        results: What comes of each branch.
        specs: The tensors of all of them, in order.
        start: What the message begins with, up to its payload.
        nbytes: The message's.

    """

    def __init__(self, results: Sequence[codec.BranchResult], start: bytes) -> None:
        self.results = results
        self.specs = codec.payload_specs(results)
        self.start = start
        ends = accumulate((spec.nbytes for spec in self.specs), initial=len(start))
        self.nbytes = len(start) + sum(spec.nbytes for spec in self.specs)
        self._places = [
            (numpy_dtype(spec.dtype), spec.shape, spec.numel, place)
            for spec, place in zip(self.specs, ends, strict=False)
        ]

    def arrays(self, data: Bytes, out: Sequence[Array | None]) -> list[Array]:
        """Take the tensors out of the message: to where they go, or, where `out` is empty or has None, to new arrays.

        Raises:
            InternalError: There are more or fewer bytes than the answer says.

        """
        if len(data) != self.nbytes:
            msg = f"expected an answer of {self.nbytes} bytes, got {len(data)}"
            raise InternalError(msg, reason="ANSWER")
        arrays = []
        for (dtype, shape, numel, place), goal in zip(self._places, out or [None] * len(self._places), strict=True):
            there = np.frombuffer(data, dtype, numel, place).reshape(shape) if numel else np.empty(shape, dtype)
            if goal is None:
                arrays.append(there.copy())
            else:
                goal[...] = there
                arrays.append(goal)
        return arrays


outline = lru_cache(4096)(PreparedRequest)


@lru_cache(4096)
def outline_of(dtype: str, shape: Shape, layout: str, branches: tuple[Chain, ...]) -> PreparedRequest:
    """Give the outline of a call on one tensor."""
    return outline(codec.Request(TensorSpec(dtype, shape, layout), branches))


class Transfer:
    """One call's tensors on their way.

    Attributes:
        outline: What the call is.
        arrays: The inputs.
        out: Where each tensor of the outputs goes, in order; empty: to arrays of their own.

    """

    def __init__(self, outline: PreparedRequest, arrays: Sequence[Array], out: Sequence[Array | None] = ()) -> None:
        """Make a transfer.

        Args:
            outline: What the call is.
            arrays: The tensors of the request, as as_array gives them; or several, whose bytes together are one's.
            out: Where each tensor of the outputs goes, in order, or None; empty: all None.

        Raises:
            InvalidArgumentError: Something of `out` doesn't fit.

        """
        self.outline = outline
        self.arrays = arrays
        self.out = out
        if out:
            _check_out(codec.payload_specs(outline.results), out)

    @property
    def repeatable(self) -> bool:
        """Whether the inputs are what they were, after some of the outputs came."""
        goals = [each for each in self.out if each is not None]
        return not any(np.may_share_memory(array, goal) for array in self.arrays for goal in goals)

    def message(self, most: int) -> bytes:
        """Give the message of a unary call.

        Raises:
            LimitExceededError: It would be of more than `most` bytes.

        """
        if self.outline.nbytes > most:
            msg = f"expected tensors of at most {most} bytes in a message, got {self.outline.nbytes}; {RAISE_HINT}"
            limits = {"limit": str(most), "actual": str(self.outline.nbytes)}
            raise LimitExceededError(msg, reason="MESSAGE_TOO_LARGE", metadata=limits)
        return b"".join((self.outline.head, *map(array_bytes, self.arrays)))

    def results(self, message: bytes, progress: Progress | None = None) -> list[PoolResult]:
        """Give what a unary call's answer says."""
        answer, data = self.outline.answer(message)
        arrays = answer.arrays(data, self.out)
        _report(self, progress)
        return gathered(answer.results, arrays, "unary")

    def messages(self) -> Iterator[bytes]:
        """Give the messages of a stream: the request, then the tensors' blocks."""
        yield pool_pb2.PoolStreamRequest(request=codec.encode_request(self.outline.request)).SerializeToString()
        count, flat = self.outline.planes.count, [array.reshape(-1).view(np.uint8) for array in self.arrays]
        if not count:
            return
        step = max(1, BLOCK_BYTES // sum(len(each) // count for each in flat))
        for start in range(0, count, step):
            stop = min(start + step, count)
            parts = [each[len(each) // count * start : len(each) // count * stop].data for each in flat]
            yield from framing.chunks(parts, padded=True)


class ArenaCall:
    """A transfer by way of an arena: its tensors lie there, and what comes back does too.

    Attributes:
        message: The message of the unary call that says where.
        socket: The name of the socket that the call goes to, in the folder of the server's; empty: the server's.

    """

    def __init__(self, transfer: Transfer, arenas: Arenas, inputs: tuple[Span, int, int], outputs: Span) -> None:
        """Make one of an input range (the span, where it begins in the arena, its length) and a span for outputs."""
        self._transfer = transfer
        self._arenas = arenas
        self._input, start, length = inputs
        self._output = outputs
        ranges = codec.ArenaRanges(outputs.arena_id, (start, length), (outputs.offset, outputs.nbytes))
        self.message = transfer.outline.in_arena(ranges)
        self.socket = outputs.region.socket

    @classmethod
    def begin(cls, transfer: Transfer, arenas: Arenas, *, attach: bool = True) -> ArenaCall | None:
        """Bring a transfer's tensors to an arena, unless they lie there; None where no arena has room.

        Args:
            transfer: The transfer.
            arenas: The client's.
            attach: Whether the server may be asked for a further arena.

        Raises:
            InvalidArgumentError: The layers don't fit the input.

        """
        places, size = aligned_ranges(transfer.outline.request.specs)
        _, out_size = aligned_ranges(codec.payload_specs(transfer.outline.results))
        if not out_size:
            return None
        found = arenas.find(transfer.arrays[0]) if len(transfer.arrays) == 1 else None
        if found is not None:
            span, start = found
            into = _inside(transfer.out, span, arenas) or arenas.allocate(out_size, beside=span)
            if into is not None:
                return cls(transfer, arenas, (span, start, size), into)
        whole = arenas.allocate(align(size) + out_size, attach=attach)
        if whole is None:
            return None
        span, into = whole.split(align(size))
        memory = np.asarray(span)
        if len(places) == len(transfer.arrays):
            starts = [start for start, _ in places]
        else:  # several tensors as one, end to end
            starts = list(accumulate((array.nbytes for array in transfer.arrays), initial=0))
        for array, start in zip(transfer.arrays, starts, strict=False):
            memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        return cls(transfer, arenas, (span, span.offset, size), into)

    def results(self, message: bytes, *, copy: bool, progress: Progress | None = None) -> list[PoolResult]:
        """Give what the answer says, in arrays of their own or, where not `copy`, as they lie in the arena."""
        answer, _ = self._transfer.outline.answer(message)
        places, _ = aligned_ranges(answer.specs)
        out = self._transfer.out or [None] * len(places)
        arrays = []
        for spec, (start, _), array in zip(answer.specs, places, out, strict=True):
            there = self._output.array(numpy_dtype(spec.dtype), spec.shape, start)
            if array is None:
                arrays.append(there.copy() if copy else there)
            else:
                if not np.shares_memory(array, there):
                    array[...] = there
                arrays.append(array)
        _report(self._transfer, progress)
        return gathered(answer.results, arrays, "arena")

    def lost(self, error: BaseException) -> bool:
        """Tell whether an error means that the arena's process is gone, or is another one by now."""
        if isinstance(error, NotFoundError):
            return True
        # Where there are several, others still serve. One that is full says when to try again.
        return bool(self.socket) and isinstance(error, UnavailableError) and error.retry_delay is None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Translate a call's errors; let go of an arena to which the server may still write, and of unknown ones."""
        try:
            yield
        except BaseException as caught:
            error = translated(caught) if isinstance(caught, grpc.RpcError) else caught
            if self.lost(error):
                self._arenas.forget(self.socket)
            elif not isinstance(error, InvalidArgumentError | UnsupportedError | LimitExceededError):
                self._arenas.retire(self._output)
            if error is caught:
                raise
            raise error from caught


def _inside(out: Sequence[Array | None], span: Span, arenas: Arenas) -> Span | None:
    """Give the span that the one array to write to lies in, if it is all of it and in the same arena."""
    found = arenas.find(out[0]) if len(out) == 1 and out[0] is not None else None
    if found is None or found[0].region is not span.region or found[0] is span:
        return None
    return found[0] if found[1] == found[0].offset else None


class StreamReader:
    """What comes of a stream, put where it goes, block by block."""

    def __init__(self, transfer: Transfer, first: bytes, progress: Progress | None) -> None:
        """Begin with the first message of the answer."""
        try:
            self._results = transfer.outline.understood(pool_pb2.PoolStreamResponse.FromString(first).results)
        except DecodeError:
            raise _no_answer(pool_pb2.PoolStreamResponse) from None
        specs = codec.payload_specs(self._results)
        out = transfer.out or [None] * len(specs)
        self._arrays = [
            np.empty(spec.shape, numpy_dtype(spec.dtype)) if array is None else array
            for spec, array in zip(specs, out, strict=True)
        ]
        self._flat = [array.reshape(-1).view(np.uint8) for array in self._arrays]
        self._count = transfer.outline.planes.count
        self._plane_bytes = [Planes(spec, transfer.outline.spatial_dims).plane_bytes for spec in specs]
        self._parts: list[memoryview] = []
        self._progress = progress
        self._seen = 0

    def take(self, message: bytes) -> None:
        """Put the next message where it goes."""
        try:
            header, payload = framing.split_payload(message, pool_pb2.PoolStreamResponse)
            unfinished = bool(header) and pool_pb2.PoolStreamResponse.FromString(header).unfinished
        except DecodeError:
            raise _no_answer(pool_pb2.PoolStreamResponse) from None
        self._parts.append(payload)
        if unfinished:
            return
        block = self._parts[0] if len(self._parts) == 1 else memoryview(b"".join(self._parts))
        self._parts = []
        count, rest = divmod(len(block), sum(self._plane_bytes))
        if rest or self._seen + count > self._count:
            raise InternalError(f"expected whole planes of the output, got a block of {len(block)} bytes")
        start = 0
        for flat, nbytes in zip(self._flat, self._plane_bytes, strict=True):
            end = start + count * nbytes
            flat[self._seen * nbytes : (self._seen + count) * nbytes] = np.frombuffer(block[start:end], np.uint8)
            start = end
        self._seen += count
        if self._progress is not None:
            self._progress(self._seen, self._count)

    def finish(self) -> list[PoolResult]:
        """Give the results, once all messages have come."""
        if self._seen != self._count:
            raise InternalError(f"expected {self._count} planes of output, got {self._seen}")
        return gathered(self._results, self._arrays, "stream")


def _no_answer(cls: type[Message]) -> InternalError:
    return InternalError(f"expected a {cls.DESCRIPTOR.name}, got bytes that are none", reason="ANSWER")


def _report(transfer: Transfer, progress: Progress | None) -> None:
    if progress is not None:
        count = transfer.outline.planes.count
        progress(count, count)


def _check_out(specs: Sequence[TensorSpec], out: Sequence[object]) -> None:
    if len(out) != len(specs):
        msg = f"expected {len(specs)} arrays, for each branch an output or (output, indices), got {len(out)}"
        raise InvalidArgumentError(msg, field="out")
    for spec, array in zip(specs, out, strict=True):
        if array is None:
            continue
        if not isinstance(array, np.ndarray):
            got = clip(type(array).__name__)
        else:
            fits = array.shape == spec.shape and array.dtype == numpy_dtype(spec.dtype)
            if fits and array.flags.c_contiguous and array.flags.writeable:
                continue
            got = f"{array.dtype} {clip(array.shape)}{'' if array.flags.c_contiguous else ', strided'}"
            got += "" if array.flags.writeable else ", read-only"
        msg = f"expected a writable, C-contiguous array of {spec.dtype} {spec.shape}, got {got}"
        raise InvalidArgumentError(msg, field="out")


def gathered(results: Sequence[codec.BranchResult], arrays: Sequence[Array], transport: str) -> list[PoolResult]:
    """Give each branch its arrays."""
    if len(arrays) == len(results):
        return [PoolResult(array, each.shapes, None, transport) for each, array in zip(results, arrays, strict=True)]
    left = iter(arrays)
    return [
        PoolResult(next(left), each.shapes, None if each.indices is None else next(left), transport) for each in results
    ]
