"""A bell wakes who waits for it, whoever rings, and a signal does whichever thread gets it."""

import signal
import subprocess
import sys
import threading
from contextlib import closing

from poolrpc_server.signals import SignalEvent


def test_it_is_heard_whenever_it_is_rung():
    """Ringing before or during the wait, once or very often, ends it."""
    with closing(SignalEvent()) as early, closing(SignalEvent()) as late:
        for _ in range(100_000):
            early.ring()
        early.wait()
        early.wait()
        ringing = threading.Thread(target=late.ring)
        ringing.start()
        late.wait()
        ringing.join()
    late.ring()


def test_a_signal_that_another_thread_gets_is_heard():
    """The handler runs in the main thread, which waits, although the kernel gave the signal to another one."""
    program = """
import signal, threading
from poolrpc_server.signals import SignalEvent
bell, waiting = SignalEvent(), threading.Event()
signal.signal(signal.SIGTERM, lambda *_: (print("heard", threading.current_thread().name), bell.ring()))
def other():
    waiting.wait()
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
threading.Thread(target=other).start()
with bell.hearing_signals():
    waiting.set()
    bell.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)  # noqa: S603 - ours
    assert done.stdout == "heard MainThread\n"


def test_what_heard_signals_before_does_so_again():
    """After the block, signals wake what they woke before."""
    before = signal.set_wakeup_fd(-1)
    try:
        with closing(SignalEvent()) as bell, bell.hearing_signals():
            pass
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.set_wakeup_fd(before)
