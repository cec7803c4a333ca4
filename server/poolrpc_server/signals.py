"""Waiting for signals, and restoring their handlers."""

from __future__ import annotations

import signal
import socket
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""The signals that stop a server.

Both are handled even if the parent process ignored SIGINT, as a shell does for the background jobs of a script: uvicorn
and gunicorn do the same, so `kill -INT` stops a server however it was started. `preserved_handlers` puts the parent's
choice back afterwards.
"""


class SignalEvent:
    """An event like threading.Event that a signal is certain to wake.

    Python runs the handlers of signals in the main thread. If the kernel delivers a signal to another thread, a main
    thread that waits for a lock does not wake up: a SIGTERM was seen to have no effect until the next signal arrived.
    A main thread that waits for a socket wakes up, because Python writes to the socket of `set_wakeup_fd`.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._sender, self._receiver = socket.socketpair()
        self._sender.setblocking(False)

    def set(self) -> None:
        """Set the event and wake the thread that waits for it; safe in any thread and in a signal's handler."""
        self._is_set = True
        with suppress(OSError):  # the buffer is full, so the waiting thread wakes up anyway, or the event is closed
            self._sender.send(b"\0")

    def wait(self) -> None:
        """Wait until the event is set."""
        while not self._is_set:
            self._receiver.recv(64)

    def close(self) -> None:
        """Close the sockets; later calls of `set` wake no thread."""
        self._sender.close()
        self._receiver.close()

    @contextmanager
    def wake_on_signals(self) -> Iterator[None]:
        """Interrupt `wait` for every signal that has a handler, so that the handler runs; for the main thread."""
        before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)


@contextmanager
def preserved_handlers() -> Iterator[None]:
    """Restore the handlers of STOP_SIGNALS at the end of the block; for the main thread.

    asyncio's event loop does not: it sets its own defaults, which turn an ignored SIGINT into KeyboardInterrupt.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: a handler that Python did not install and can't install again
                signal.signal(number, handler)
