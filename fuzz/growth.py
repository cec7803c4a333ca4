"""What a process has: memory, threads and descriptors, before and after; and whether a server is at rest."""

from __future__ import annotations

from urllib.request import urlopen

import psutil

MIB = 2**20
MOST_GROWTH = {"rss_mib": 64, "threads": 16, "descriptors": 4}
"""After warming up: what is remembered of requests takes memory up to its bound, and threads end in their time."""

AT_REST = ("poolrpc_inflight_bytes", "poolrpc_queue_length", "poolrpc_streams ", "poolrpc_validator_escapes_total")


def measured(pid: int) -> dict[str, int]:
    """Give what a process has."""
    process = psutil.Process(pid)
    return {
        "rss_mib": process.memory_info().rss // MIB,
        "threads": process.num_threads(),
        "descriptors": process.num_fds(),
    }


def check_growth(before: dict[str, int], after: dict[str, int]) -> None:
    """See that a process has what it had.

    Raises:
        AssertionError: It has more.

    """
    grown = {name: after[name] - had for name, had in before.items() if after[name] - had > MOST_GROWTH[name]}
    if grown:
        raise AssertionError(f"expected growth of at most {MOST_GROWTH}, got {grown}")


def check_at_rest(metrics_address: str) -> None:
    """See in a server's metrics that nothing is under way, and that no call failed although it passed the checks.

    Raises:
        AssertionError: Something is.

    """
    with urlopen(f"http://{metrics_address}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    busy = [line for line in lines if line.startswith(AT_REST) and float(line.rpartition(" ")[2])]
    if busy:
        raise AssertionError(f"expected nothing under way, got {busy}")
