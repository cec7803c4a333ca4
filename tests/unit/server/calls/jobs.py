"""Jobs and calls for tests of the queue and the batcher."""

import threading
from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class NamedJob:
    """A job whose result is its name."""

    name: str
    key: str | None = "key"
    nbytes: int = 1
    seconds: float = 0.0
    durations: list[float] = field(default_factory=list)

    def record_duration(self, seconds):
        """Keep the duration."""
        self.durations.append(seconds)


class Cancelled(Exception):  # noqa: N818 - the outcome that a test expects, not a failure
    """Raised for a call that was cancelled."""


class FakeCall:
    """The context of a call that tests cancel.

    Attributes:
        queued: Set when the batcher registers its callback, which it does for queued jobs only.
        made_way: Whether the batcher has said that the call's thread is about to wait.

    """

    made_way = False

    def __init__(self, remaining=None, error=None):
        self.queued = threading.Event()
        self._remaining, self._error, self._callbacks = remaining, error, []
        self._lock = threading.Lock()

    def make_way(self):
        """Note that the call's thread is about to wait."""
        self.made_way = True

    def time_remaining(self):
        """Return the seconds until the deadline."""
        return self._remaining

    def raise_if_cancelled(self):
        """Raise the error of a call that has ended."""
        if self._error is not None:
            raise self._error

    def add_done_callback(self, callback):
        """Register a callback; return whether the call is still active."""
        with self._lock:
            self._callbacks.append(callback)
            active = self._error is None
        self.queued.set()
        return active

    def cancel(self):
        """End the call and run the callbacks."""
        with self._lock:
            self._error = Cancelled()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()
