"""Signals: an event that a signal wakes whichever thread receives it, and handlers that are restored."""

import asyncio
import signal
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from poolrpc_server.signals import STOP_SIGNALS, SignalEvent, preserved_handlers


def test_setting_the_event_ends_the_wait():
    """`wait` returns if the event is set before or while it waits, once or very often; `set` works after `close`."""
    with closing(SignalEvent()) as early, closing(SignalEvent()) as late:
        for _ in range(100_000):
            early.set()
        early.wait()
        early.wait()
        setter = threading.Thread(target=late.set)
        setter.start()
        late.wait()
        setter.join()
    late.set()


def test_a_signal_that_another_thread_receives_wakes_the_main_thread():
    """The handler runs in the waiting main thread although the kernel delivered the signal to another thread."""
    program = """
import signal, threading
from poolrpc_server.signals import SignalEvent
event, waiting = SignalEvent(), threading.Event()
signal.signal(signal.SIGTERM, lambda *_: (print("handled in", threading.current_thread().name), event.set()))
def other():
    waiting.wait()
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
threading.Thread(target=other).start()
with event.wake_on_signals():
    waiting.set()
    event.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)  # noqa: S603 - ours
    assert done.stdout == "handled in MainThread\n"


def test_the_wakeup_descriptor_is_restored():
    """After the block, signals write to the file descriptor to which they wrote before."""
    before = signal.set_wakeup_fd(-1)
    try:
        with closing(SignalEvent()) as event, event.wake_on_signals():
            pass
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.set_wakeup_fd(before)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler])
def test_handlers_are_restored(handler):
    """After the block, SIGTERM and SIGINT have the handlers they had before, although asyncio resets both."""

    async def handle():
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, print)

    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        with preserved_handlers():
            asyncio.run(handle())
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == [handler] * 2
    finally:
        for number, each in before.items():
            signal.signal(number, each)
