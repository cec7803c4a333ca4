"""The memory, threads and descriptors of a server's processes, sampled while it is attacked."""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from fuzz.attacks.attack import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzz.attacks.server import AttackedServer

INTERVAL = 0.05
"""Seconds between two samples."""

GUARD_MIB, KILL_MIB = 3072, 5120
"""Memory at which the attack is ended, and at which the server is killed, to protect the machine."""


def rss_mib(pid: int) -> int:
    """Return the resident memory of a process in MiB, without the memory that it shares.

    Arenas are shared memory, for which the server has a limit of its own. Returns 0 if there is no such process.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    sizes = {name: int(size) for name, size in re.findall(r"^(VmRSS|RssShmem):\s+(\d+) kB", status, re.MULTILINE)}
    return (sizes.get("VmRSS", 0) - sizes.get("RssShmem", 0)) * 1024 // MIB


def usage(server: AttackedServer) -> dict[str, int]:
    """Return the memory, threads and descriptors of all serving processes."""
    total = {"rss_mib": 0, "threads": 0, "descriptors": 0}
    for process in server.serving():
        with suppress(Exception):  # the process has ended meanwhile
            total["rss_mib"] += rss_mib(process.pid)
            total["threads"] += process.num_threads()
            total["descriptors"] += process.num_fds()
    return total


class Sampler:
    """A thread that samples a server until the context ends.

    Args:
        server: The server.
        guard: Called once if the memory passes GUARD_MIB.

    Attributes:
        peak_mib: The most memory that was seen.
        guarded: Whether the memory has passed GUARD_MIB.

    """

    def __init__(self, server: AttackedServer, guard: Callable[[], object]) -> None:
        self._server = server
        self._guard = guard
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak_mib = 0
        self.guarded = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL):
            now = sum(rss_mib(process.pid) for process in self._server.serving())
            self.peak_mib = max(self.peak_mib, now)
            if now > GUARD_MIB and not self.guarded:
                self.guarded = True
                self._guard()
            if now > KILL_MIB:
                self._server.kill()
