"""What may be under way at a time: bytes of inputs and outputs, counted before they are allocated."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from poolrpc.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

RETRY_DELAY = 0.1
"""Seconds that a refused caller is asked to wait: about what a large request takes."""


class Admission:
    """A count of the bytes under way, and its limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._lock = threading.Lock()

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
                msg = f"expected at most {self._limit} bytes under way, got {self._held} and {nbytes} more; try again"
                limits = {"limit": str(self._limit), "actual": str(self._held + nbytes)}
                raise UnavailableError(msg, reason="IN_FLIGHT_BYTES", metadata=limits, retry_delay=RETRY_DELAY)
            self._held += nbytes

    def give_back(self, nbytes: int) -> None:
        """Count bytes no more."""
        with self._lock:
            self._held -= nbytes
