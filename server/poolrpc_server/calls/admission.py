"""What may be under way at a time: bytes of inputs and outputs, counted before they are allocated; and its refusals."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from poolrpc.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

RETRY_DELAY = 0.1
"""Seconds that a refused caller is asked to wait, where nothing says better: about what a large request takes."""


def refused(reason: str, what: str, limit: float, actual: float, delay: float = RETRY_DELAY) -> UnavailableError:
    """Give the error of a call for which there is no room at the moment.

    Args:
        reason: Which room.
        what: What the limit counts.
        limit: The limit.
        actual: What it would be with this call.
        delay: Seconds to wait before the next try.

    """
    msg = f"expected at most {limit:g} {what}, got {actual:g}; try again"
    limits = {"limit": f"{limit:g}", "actual": f"{actual:g}"}
    return UnavailableError(msg, reason=reason, metadata=limits, retry_delay=delay)


class AdmissionControl:
    """A count of the bytes under way, and its limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """The bytes under way."""
        return self._held

    def check_room(self) -> None:
        """See that there is room for more, before it is known for how much.

        Raises:
            UnavailableError: There is none.

        """
        if self._held >= self._limit:
            raise self._refused(0)

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Count bytes for as long as the context lasts; the rest is as in take."""
        self.take(nbytes)
        try:
            yield
        finally:
            self.give_back(nbytes)

    def take(self, nbytes: int) -> None:
        """Count bytes, until they are given back.

        Raises:
            UnavailableError: They don't fit beside other calls; a call of any size fits alone.

        """
        with self._lock:
            if self._held and self._held + nbytes > self._limit:
                raise self._refused(nbytes)
            self._held += nbytes

    def give_back(self, nbytes: int) -> None:
        """Count bytes no more."""
        with self._lock:
            self._held -= nbytes

    def _refused(self, nbytes: int) -> UnavailableError:
        msg = f"expected at most {self._limit} bytes under way, got {self._held} and {nbytes} more; try again"
        limits = {"limit": str(self._limit), "actual": str(self._held + nbytes)}
        return UnavailableError(msg, reason="IN_FLIGHT_BYTES", metadata=limits, retry_delay=RETRY_DELAY)
