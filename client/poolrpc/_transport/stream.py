"""A stream's call: its messages sent and received, and begun again where the server was full or went away.

gRPC would begin a stream again by itself, but was seen to lose a message as it did (1.85.1, two refusals and messages
of 4 MB, with nothing but grpcio on both sides). So streams have no retry policy there, but this one.
"""

from __future__ import annotations

import time
from math import inf
from threading import TIMEOUT_MAX, Event
from typing import TYPE_CHECKING, Any

import grpc

from poolrpc._transport.transfer import StreamReader
from poolrpc._wire.status import translated
from poolrpc.tensors import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from poolrpc._transport.transfer import PoolResult, Progress, Transfer

ATTEMPTS = 5
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
"""Seconds, of which each pause takes a random part: the same as unary calls have in their service config."""

GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""What a server says that is full or stopping, the second to calls that it hasn't begun."""


class CallOptions:
    """What goes with a call, of whatever it takes to make it: a deadline, from now on, and metadata."""

    __slots__ = ("_deadline", "_metadata")

    def __init__(self, timeout: float | None, metadata: tuple[tuple[str, str], ...]) -> None:
        self._deadline = None if timeout is None or timeout == inf else time.monotonic() + timeout
        self._metadata = metadata

    def carry(self, metadata: Mapping[str, str]) -> None:
        """Have this go with it too."""
        self._metadata += tuple(metadata.items())

    def left(self) -> float | None:
        """Give the seconds that are left, None for no limit."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def now(self) -> dict[str, Any]:
        """Give gRPC's arguments for what begins now."""
        return {"timeout": self.left(), "metadata": self._metadata}


class StreamCall:
    """One tensor's way through a stream, which blocks; another thread may cancel it."""

    def __init__(
        self,
        method: grpc.StreamStreamMultiCallable[bytes, bytes],
        transfer: Transfer,
        call: CallOptions,
        closed: Callable[[], bool],
    ) -> None:
        """Make a call of that method, of a client that says whether it is closed."""
        self._closed = closed
        self._method = method
        self._transfer = transfer
        self._call = call
        self._cancelled = Event()
        self._answers: Any = None
        self._begun = False  # the server took something of it

    def run(self, progress: Progress | None) -> list[PoolResult]:
        """Send the tensor and take what comes of it.

        Raises:
            grpc.RpcError: The call failed.
            InternalError: What came is no answer to what was asked.

        """
        keep_freed_memory()  # of the blocks, one after the other
        for attempt in range(ATTEMPTS):
            try:
                return self._attempt(progress)
            except grpc.RpcError as error:
                left_by_us = self._closed() or self._cancelled.is_set()
                if error.code() not in GONE or left_by_us or attempt == ATTEMPTS - 1:
                    raise
                if self._begun and not self._transfer.repeatable:
                    raise
                import random  # noqa: PLC0415 - import poolrpc is to be quick

                pause = random.uniform(0, min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE))  # noqa: S311 - no secret
                # What a server asks for may be more than a clock can wait for.
                pause = min(max(pause, getattr(translated(error), "retry_delay", None) or 0), TIMEOUT_MAX)
                left = self._call.left()
                if (left is not None and pause >= left) or self._cancelled.wait(pause) or self._closed():
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def cancel(self) -> None:
        """End the call, wherever it is; one that has ended stays as it ended."""
        self._cancelled.set()
        if self._answers is not None:
            self._answers.cancel()

    def _attempt(self, progress: Progress | None) -> list[PoolResult]:
        answers = self._answers = self._method(self._transfer.messages(), **self._call.now())
        if self._cancelled.is_set():
            answers.cancel()
        try:
            first = next(answers, b"")
            self._begun = True
            arrival = StreamReader(self._transfer, first, progress)
            for message in answers:
                arrival.take(message)
            return arrival.finish()
        finally:
            answers.cancel()  # which does nothing to what has ended
