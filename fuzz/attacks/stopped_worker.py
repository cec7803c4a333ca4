"""Processes of the server that stop answering without ending."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from fuzz.attacks.attack import Target, attack

if TYPE_CHECKING:
    from threading import Event

REPLACED_SECONDS = 15.0
"""Seconds within which a stopped worker must have been replaced, and every call that it held must have an answer."""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@attack(variants=("workers",), wait_seconds=REPLACED_SECONDS, alone=True, new_connections_fail=True, watchdog_seconds=5)
def stopped_worker(target: Target, until: Event) -> list[str]:
    """Stop one of two workers with SIGSTOP (row M2: half of new connections hung, /readyz said 200, no restart).

    Sent: SIGSTOP. Until the worker is replaced, connections that the kernel gives to it wait: calls may take 15 s.
    Aims at: clients whose connection is that worker's.
    """
    pid, stopped = target.pids[0], time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    try:
        while _is_alive(pid) and time.monotonic() < stopped + REPLACED_SECONDS:
            time.sleep(0.1)  # beyond the end of the attack: what counts is that the worker is replaced
        until.wait()
        return [f"expected the worker to be replaced within {REPLACED_SECONDS:g} s"] if _is_alive(pid) else []
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
