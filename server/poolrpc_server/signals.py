"""What one thread waits for, and signals and other threads ring."""

from __future__ import annotations

import signal
import socket
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class SignalEvent:
    """A threading.Event that a signal is sure to wake.

    Python runs a signal's handler in the main thread, which isn't woken from a lock where the kernel gave the signal to
    another thread: a SIGTERM was seen to go unheard until the next. What Python writes to a socket always wakes.
    """

    def __init__(self) -> None:
        """Make one that nobody rang."""
        self._rung = False
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)

    def ring(self) -> None:
        """Wake who waits, now or later; for any thread, and for the handler of a signal."""
        self._rung = True
        with suppress(OSError):  # it is full of what wakes, or closed
            self._wake.send(b"\0")

    def wait(self) -> None:
        """Wait until it was rung."""
        while not self._rung:
            self._woken.recv(64)

    def close(self) -> None:
        """Be rung no more."""
        self._wake.close()
        self._woken.close()

    @contextmanager
    def hearing_signals(self) -> Iterator[None]:
        """Let every signal that has a handler wake who waits, so that the handler runs; in the main thread."""
        before = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
