"""Calls whose tensors are in memory shared with the server: the message holds only their position in it."""

from __future__ import annotations

from functools import partial
from itertools import accumulate, repeat
from typing import TYPE_CHECKING

import numpy as np

from poolrpc._transport.channel import POOL
from poolrpc._transport.local_connections import LostError, NotLocalError
from poolrpc._transport.result import make_results
from poolrpc._transport.steps import RunBlocking
from poolrpc._transport.unary import announced, decode_response
from poolrpc._wire import codec
from poolrpc.errors import (
    InvalidArgumentError,
    LimitExceededError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from poolrpc.tensors import align, size_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from poolrpc._transport.arena_memory import Arenas, Span
    from poolrpc._transport.options import CallOptions, Transport
    from poolrpc._transport.request import Transfer
    from poolrpc._transport.result import PoolResult, Progress
    from poolrpc._transport.steps import Steps
    from poolrpc.tensors import Array, Bytes

    SendSteps: TypeAlias = Callable[[str, Sequence[Bytes], CallOptions, str], Steps[bytes]]

_REJECTED = (
    InvalidArgumentError,
    UnsupportedError,
    LimitExceededError,
    UnauthenticatedError,
    PermissionDeniedError,
)
"""Errors of calls that a server does not compute, or not any more."""


def arena_steps(  # noqa: PLR0913 - the call, and what its caller chose
    transfer: Transfer,
    arenas: Arenas | None,
    options: CallOptions,
    progress: Progress | None,
    *,
    copy: bool,
    required: bool,
    send: SendSteps | None = None,
    transport: Transport = "arena",
) -> Steps[list[PoolResult] | None]:
    """Pool tensors through an arena; return None if there is none, or its process is gone.

    Args:
        transfer: The tensors.
        arenas: The arenas of the client; None if its address is not a unix socket.
        options: The options of the call.
        progress: Called when all planes are done.
        copy: Whether the results are copied out of the arena.
        required: Whether to raise an error instead of returning None.
        send: The steps that send the message and return the response. None: by gRPC.
        transport: The transport that the results name.

    """
    call = None
    if arenas is not None:
        # Attaching another arena is the only step that may block, because the server has to answer.
        call = ArenaCall.prepare(transfer, arenas, attach=False)
        call = call or (yield RunBlocking(partial(ArenaCall.prepare, transfer, arenas)))
    if call is None:
        if required and transfer.prepared.nbytes:
            reason = "the address is not a unix socket" if arenas is None else str(arenas.rejection or "no room")
            raise UnavailableError(f"expected an arena, got none: {reason}", reason="ARENA")
        return None
    try:
        if send is None:
            response = yield announced(call.message, options, call.socket)
        else:
            response = yield from send(POOL, (call.message,), options, call.socket)
    except BaseException as error:
        call.release(error)
        if required and isinstance(error, NotLocalError):
            msg = f"expected a server that takes local calls, got none: {error.message}"
            raise UnavailableError(msg, reason=error.reason) from error.__cause__
        if required or not (isinstance(error, NotLocalError) or call.lost(error)):
            raise
        return None
    return call.results(response, copy=copy, progress=progress, transport=transport)


class ArenaCall:
    """A call whose input and output tensors are in an arena.

    Args:
        transfer: The tensors of the call.
        arenas: The arenas of the client.
        inputs: The span that contains the input tensors, their offset in the arena, and their length in bytes.
        output: The span for the output tensors.

    Attributes:
        message: The message of the unary call, which says where the tensors are.
        socket: The name of the socket of the process that has the arena, in the directory of the client's own address;
            empty if it is that address.

    """

    def __init__(self, transfer: Transfer, arenas: Arenas, inputs: tuple[Span, int, int], output: Span) -> None:
        self._transfer = transfer
        self._arenas = arenas
        self._input, start, length = inputs  # keeps the span reserved
        self._output = output
        ranges = codec.ArenaRanges(output.arena_id, (start, length), (output.offset, output.nbytes))
        # Two concatenated protobuf messages are one message with the fields of both.
        self.message = transfer.prepared.header + codec.encode_ranges(ranges)
        self.socket = output.arena.socket

    @classmethod
    def prepare(cls, transfer: Transfer, arenas: Arenas, *, attach: bool = True) -> ArenaCall | None:
        """Copy the input tensors to an arena, unless they are in one already, and reserve memory for the outputs.

        Args:
            transfer: The tensors of the call.
            arenas: The arenas of the client.
            attach: Whether another arena may be attached.

        Returns:
            The call; None if no arena has room, or there is no output.

        """
        ranges = transfer.prepared.arena_inputs
        size, output_size = size_of(ranges), size_of(transfer.prepared.arena_outputs)
        if not output_size:
            return None
        found = arenas.find(transfer.arrays[0]) if len(transfer.every) == 1 else None
        if found is not None:
            span, start = found
            output = _span_of_out(transfer.out, span, arenas) or arenas.allocate(output_size, same_arena_as=span)
            if output is not None:
                return cls(transfer, arenas, (span, start, size), output)
        both = arenas.allocate(align(size) + output_size, attach=attach)
        if both is None:
            return None
        span, output = both.split(align(size))
        starts = [*accumulate((array.nbytes for array in transfer.arrays), initial=0)][:-1]
        starts += [each.start for each in ranges[1:]]
        for array, start in zip(transfer.every, starts, strict=True):
            span.part(array.dtype, array.shape, start)[...] = array
        return cls(transfer, arenas, (span, span.offset, size), output)

    def results(
        self, message: bytes, *, copy: bool, progress: Progress | None = None, transport: Transport = "arena"
    ) -> list[PoolResult]:
        """Return the results, given the response.

        Args:
            message: The response.
            copy: Whether the results are copied to arrays of their own, rather than left in the arena.
            progress: Called when all planes are done.
            transport: The transport that the results name.

        Raises:
            InternalError: The message is not an answer to the request.

        """
        prepared = self._transfer.prepared
        if message != prepared.response_header:  # the usual encoding is recognised by its bytes
            decode_response(prepared, message)
        arrays = []
        for (dtype, shape, _, start, _), array in zip(
            prepared.arena_outputs, self._transfer.out or repeat(None), strict=False
        ):
            if array is None and not copy:
                arrays.append(self._output.array(dtype, shape, start))
                continue
            view = self._output.part(dtype, shape, start)
            if array is None:
                arrays.append(view.copy())
            else:
                if not np.shares_memory(array, view):
                    array[...] = view
                arrays.append(array)
        self._transfer.report_done(progress)
        return make_results(prepared.results, arrays, transport)

    def lost(self, error: BaseException) -> bool:
        """Return whether an error means that the process that had the arena is gone, or was replaced by another."""
        if isinstance(error, NotFoundError):
            return True
        # A call that names its process (one of several) may be sent to the others. A process that is only full gives a
        # retry delay.
        return bool(self.socket) and isinstance(error, UnavailableError) and error.retry_delay is None

    def release(self, error: BaseException) -> None:
        """Detach, after the call failed, the arenas of a process that is gone, or one that may still be written to."""
        if self.lost(error):
            self._arenas.forget(self.socket)
        elif _may_be_written(error):
            self._arenas.retire(self._output)


def _may_be_written(error: BaseException) -> bool:
    """Return whether the server may still write the output of a failed call: unless it never got it, or rejected it."""
    if isinstance(error, NotLocalError):
        return isinstance(error, LostError)
    if isinstance(error, UnavailableError):
        # A server that is full gives a retry delay. A call that it ended has one as well, but may be computed.
        return error.reason != "STOPPING" and (error.retry_delay is None or error.reason == "ENDED")
    return not isinstance(error, _REJECTED)


def _span_of_out(out: Sequence[Array | None], span: Span, arenas: Arenas) -> Span | None:
    """Return the span of the one output array, if it starts there and is in the same arena as the input."""
    found = arenas.find(out[0]) if len(out) == 1 and out[0] is not None else None
    if found is None or found[0].arena is not span.arena or found[0] is span:
        return None
    return found[0] if found[1] == found[0].offset else None
