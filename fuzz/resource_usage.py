"""The memory, threads and descriptors of a process, and whether a server is idle."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING
from urllib.request import urlopen

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 2**20
MAX_GROWTH = {"rss_mib": 64, "threads": 16, "descriptors": 4}
"""Growth after warming up: bounded caches fill, and threads end after a while."""

REST_SECONDS = 10.0
"""Seconds within which everything must be back when everybody has left: a call has its answer a moment before the
server has ended it, and a server returns freed memory a second after the last call."""

AT_REST = ("poolrpc_inflight_bytes", "poolrpc_queue_length", "poolrpc_streams ", "poolrpc_validator_escapes_total")


def measured(pid: int) -> dict[str, int]:
    """Return the memory, threads and descriptors of a process."""
    process = psutil.Process(pid)
    return {
        "rss_mib": process.memory_info().rss // MIB,
        "threads": process.num_threads(),
        "descriptors": process.num_fds(),
    }


def check_growth(before: dict[str, int], after: dict[str, int]) -> None:
    """Check that a process has not grown by more than MAX_GROWTH.

    Raises:
        AssertionError: It has grown by more.

    """
    grown = {name: after[name] - value for name, value in before.items() if after[name] - value > MAX_GROWTH[name]}
    if grown:
        raise AssertionError(f"expected growth of at most {MAX_GROWTH}, got {grown}")


def check_soon(check: Callable[[], object]) -> None:
    """Repeat a check of a server at rest until it passes.

    Raises:
        AssertionError: The check still raised it after REST_SECONDS.

    """
    until = time.monotonic() + REST_SECONDS
    while True:
        try:
            check()
        except AssertionError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
        else:
            return


def check_at_rest(metrics_address: str) -> None:
    """Check in a server's metrics that nothing is in flight soon, and that no call failed after it passed validation.

    Raises:
        AssertionError: Something is in flight, or a call failed.

    """
    check_soon(partial(_check_idle, metrics_address))  # the end of a call reaches its client before it is counted


def _check_idle(metrics_address: str) -> None:
    with urlopen(f"http://{metrics_address}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    busy = [line for line in lines if line.startswith(AT_REST) and float(line.rpartition(" ")[2])]
    if busy:
        raise AssertionError(f"expected nothing in flight, got {busy}")
