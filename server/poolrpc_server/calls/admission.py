"""Admission control: calls and bytes in flight, counted before anything is allocated, and their limits."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from poolrpc.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

RETRY_DELAY = 0.1
"""Seconds that a rejected caller is asked to wait, without a better estimate: about what a large request takes."""


def rejection(reason: str, what: str, limit: float, actual: float, delay: float = RETRY_DELAY) -> UnavailableError:
    """Return the error of a call that is rejected temporarily because a limit of the server is reached.

    Args:
        reason: Reason of the error, for programs.
        what: What the limit counts, for the message.
        limit: The limit.
        actual: The count with this call included.
        delay: Seconds that the caller is asked to wait before it tries again.

    """
    message = f"expected at most {limit:g} {what}, got {actual:g}; try again"
    limits = {"limit": f"{limit:g}", "actual": f"{actual:g}"}
    return UnavailableError(message, reason=reason, metadata=limits, retry_delay=delay)


class Ticket:
    """The place of one admitted call, and the bytes that its message was announced with.

    Both are returned once, whatever happens to the call: the bytes when the message has arrived, the place at the end.

    Attributes:
        announced: Bytes that are reserved until the message has arrived; 0 from then on.

    """

    __slots__ = ("_admission", "_released", "announced")

    def __init__(self, admission: AdmissionControl, announced: int) -> None:
        self._admission = admission
        self.announced = announced
        self._released = False

    def message_arrived(self) -> None:
        """Return the announced bytes: the message is in memory, and counted from now on as what it is."""
        announced, self.announced = self.announced, 0
        if announced:
            self._admission.release(announced)

    def release(self) -> None:
        """Return the place, and the announced bytes of a message that never arrived; a second time does nothing."""
        self.message_arrived()
        if not self._released:
            self._released = True
            self._admission.end_call()


class IdleMemory(Protocol):
    """Memory that is kept between calls to be used again."""

    @property
    def idle_limit(self) -> int: ...  # noqa: D102 - its largest size in bytes
    @property
    def idle_bytes(self) -> int: ...  # noqa: D102 - its size in bytes

    def drop_idle(self) -> None:
        """Return all of it to the system."""


class AdmissionControl:
    """Counts of the calls and the bytes in flight, and their limits.

    Args:
        max_bytes: Bytes of inputs, outputs and announced messages in flight.
        max_calls: Calls in flight. None: any number.
        idle: Memory that is kept between calls. It counts too, and gives way to calls: it is dropped when the two
            together exceed `max_bytes`.

    """

    def __init__(self, max_bytes: int, max_calls: int | None = None, idle: IdleMemory | None = None) -> None:
        self._max_bytes = max_bytes
        self._max_calls = max_calls
        self._idle = idle
        self._bytes = 0
        self._calls = 0
        self._lock = threading.Lock()

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of inputs, outputs and announced messages in flight."""
        return self._bytes

    def admit(self, announced: int = 0) -> Ticket:
        """Admit a call before its message is read; the ticket is to be released when the call ends.

        Args:
            announced: Bytes to count until the message has arrived; 0 if its size is not known.

        Raises:
            UnavailableError: Too many calls, or too many bytes, are in flight.

        """
        with self._lock:
            if self._max_calls is not None and self._calls >= self._max_calls:
                raise rejection("CALLS", "calls at a time", self._max_calls, self._calls + 1)
            if self._bytes >= self._max_bytes:
                raise self._out_of_bytes(0)
            self._reserve(announced)
            self._calls += 1
        self._make_room()
        return Ticket(self, announced)

    def end_call(self) -> None:
        """Stop counting an admitted call."""
        with self._lock:
            self._calls -= 1

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Reserve bytes for as long as the context lasts; raises as `reserve` does."""
        self.reserve(nbytes)
        try:
            yield
        finally:
            self.release(nbytes)

    def reserve(self, nbytes: int) -> None:
        """Count bytes until they are released.

        Raises:
            UnavailableError: They do not fit together with those of other calls; a single call of any size fits.

        """
        with self._lock:
            self._reserve(nbytes)
        self._make_room()

    def release(self, nbytes: int) -> None:
        """Stop counting bytes."""
        with self._lock:
            self._bytes -= nbytes

    def _reserve(self, nbytes: int) -> None:
        # Under the lock.
        if self._bytes and self._bytes + nbytes > self._max_bytes:
            raise self._out_of_bytes(nbytes)
        self._bytes += nbytes

    def _make_room(self) -> None:
        # The size of idle memory takes a lock to read, and seldom matters.
        idle = self._idle
        if idle is None or self._bytes + idle.idle_limit <= self._max_bytes:
            return
        if self._bytes + idle.idle_bytes > self._max_bytes:
            idle.drop_idle()

    def _out_of_bytes(self, nbytes: int) -> UnavailableError:
        message = f"expected at most {self._max_bytes} bytes in flight, got {self._bytes} and {nbytes} more; try again"
        limits = {"limit": str(self._max_bytes), "actual": str(self._bytes + nbytes)}
        return UnavailableError(message, reason="IN_FLIGHT_BYTES", metadata=limits, retry_delay=RETRY_DELAY)
