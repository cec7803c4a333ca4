"""Ctrl-C while a command is imported."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""The exit status of a command that Ctrl-C ends: what a shell has for SIGINT."""


@contextmanager
def interrupt_ends_process() -> Iterator[None]:
    """End the process with INTERRUPTED, and without a traceback, at a SIGINT in the block; for the main thread.

    A KeyboardInterrupt would not do in a block of imports: extension modules turn it into an ImportError, and leave
    packages half imported. A SIGINT that is ignored or has another handler is left alone.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
