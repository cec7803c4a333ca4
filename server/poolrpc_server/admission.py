"""What may be under way at a time: bytes of inputs and outputs, counted before they are allocated."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from poolrpc.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RETRY_DELAY = 0.1
"""Seconds that a refused caller is asked to wait: about what a large request takes."""


class Admission:
    """A count of the bytes under way, and its limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[Callable[[int], None]]:
        """Count `nbytes` for as long as the context lasts, and give the way to count more for the same call.

        Raises:
            UnavailableError: They don't fit beside other calls; so too from what the context gives. A call of any size
                fits alone.

        """
        own = 0

        def more(nbytes: int) -> None:
            nonlocal own
            with self._lock:
                if self._held > own and self._held + nbytes > self._limit:
                    msg = (
                        f"expected at most {self._limit} bytes under way, got {self._held} and {nbytes} more; try again"
                    )
                    limits = {"limit": str(self._limit), "actual": str(self._held + nbytes)}
                    raise UnavailableError(msg, reason="IN_FLIGHT_BYTES", metadata=limits, retry_delay=RETRY_DELAY)
                self._held += nbytes
                own += nbytes

        more(nbytes)
        try:
            yield more
        finally:
            with self._lock:
                self._held -= own
