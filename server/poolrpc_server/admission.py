"""What may be under way at a time: bytes of inputs and outputs, counted before they are allocated."""

from __future__ import annotations

import threading

from poolrpc.errors import UnavailableError

RETRY_DELAY = 0.1
"""Seconds that a refused caller is asked to wait: about what a large request takes."""


class Admission:
    """A count of the bytes under way, and its limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._lock = threading.Lock()

    def hold(self, nbytes: int) -> Held:
        """Give a context in which `nbytes` are counted; a call of any size fits alone.

        Entering it raises UnavailableError where they don't fit beside other calls.
        """
        return Held(self, nbytes)

    def take(self, nbytes: int) -> None:
        """Count bytes; the rest is as in hold."""
        with self._lock:
            if self._held and self._held + nbytes > self._limit:
                msg = f"expected at most {self._limit} bytes under way, got {self._held} and {nbytes} more; try again"
                limits = {"limit": str(self._limit), "actual": str(self._held + nbytes)}
                raise UnavailableError(msg, reason="IN_FLIGHT_BYTES", metadata=limits, retry_delay=RETRY_DELAY)
            self._held += nbytes

    def give_back(self, nbytes: int) -> None:
        """Count bytes no more."""
        with self._lock:
            self._held -= nbytes


class Held:
    """Bytes that are counted for as long as the context lasts."""

    __slots__ = ("_admission", "_nbytes")

    def __init__(self, admission: Admission, nbytes: int) -> None:
        self._admission = admission
        self._nbytes = nbytes

    def __enter__(self) -> None:
        """Count them."""
        self._admission.take(self._nbytes)

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        self._admission.give_back(self._nbytes)
