"""All targets in turn for some seconds, against a server process, by mutation alone. CI runs this."""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from random import Random
from typing import Any

from fuzz import arena_sockets, client_responses
from fuzz.findings import Report
from fuzz.mutate import Case, mutated
from fuzz.resource_usage import check_at_rest, check_growth, measured
from fuzz.seeds import LIMITS, MODELS, SEEDS, SHARES, seeds
from fuzz.server_calls import Peer
from scripts.server_process import ServerProcess, serving

THREADS = 16
"""Concurrent callers: a stream that ends too early takes the server a tenth of a second, which others can use."""

RANDOM_EVERY = 32
"""One case in so many is random bytes instead of a mutation."""

REGISTER_EVERY = 512
WARM = 0.25
"""The part of the duration after which memory is measured, to compare it with the end."""


class Run:
    """The cases of a seed: each number is always the same case, in whichever thread it runs."""

    def __init__(self, seed: int, peer: Peer, arena_socket: str) -> None:
        self.report = Report()
        self._seed = seed
        self._peer = peer
        self._arena_socket = arena_socket
        self._starts = {target: seeds(target, seed) for target in SEEDS}
        self._numbers = itertools.count()
        self._hostile = arena_sockets.HostileArenas()
        self._one_at_a_time = threading.Lock()

    def until(self, end: float) -> None:
        """Run cases until a time."""
        while time.monotonic() < end:
            number = next(self._numbers)
            if number % REGISTER_EVERY == 0:
                self._peer.register()
            target, case = self._drawn(Random(f"{self._seed} {number}"))
            try:
                self.report.ended(target, self._judged(target, case))
            except Exception as error:  # noqa: BLE001 - every exception is a finding
                self.report.found(target, case, error)

    def close(self) -> None:
        """Release everything."""
        self._hostile.close()

    def _drawn(self, rng: Random) -> tuple[str, Case]:
        (target,) = rng.choices(list(SHARES), list(SHARES.values()))
        if rng.randrange(RANDOM_EVERY) == 0:
            return target, tuple(rng.randbytes(rng.randrange(200)) for _ in range(rng.randrange(1, 4)))
        starts = self._starts[target]
        return target, mutated(rng.choice(starts), starts, rng)

    def _judged(self, target: str, case: Case) -> str:
        if target == "answers":
            return client_responses.judge(case)
        if target == "attach":
            return arena_sockets.converse(self._arena_socket, case)
        if target == "local":
            return self._peer.converse(case)
        if target == "attached":
            with self._one_at_a_time:
                return self._hostile.judge(case)
        return self._peer.judge(target, case)


def fuzz(seconds: float, seed: int) -> dict[str, Any]:
    """Run cases of a seed for some seconds, and return the row."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in LIMITS.items()]
    flags += [*itertools.chain(*(("--model", model) for model in MODELS)), "--allow-client-shm"]
    flags += [
        "--listen",
        "127.0.0.1:0",
        "--metrics",
        "127.0.0.1:0",
        "--explorer",
        "127.0.0.1:0",
        "--threads",
        "1",
        "--max-streams",
        "64",
    ]
    with (
        tempfile.TemporaryDirectory(prefix="poolrpc-fuzz-") as folder,
        # With several of glibc's heaps the memory would take long to settle.
        serving(*flags, listen=f"unix:{folder}/pool.sock", env={"MALLOC_ARENA_MAX": "1"}) as server,
    ):
        return _fuzzed(server, f"{folder}/pool.sock", seconds, seed)


def check_log(server: ServerProcess) -> None:
    """Check that the server has logged no unexpected error.

    Raises:
        AssertionError: It has logged one, or it has ended.

    """
    if server.process.poll() is not None or (lines := server.lines("unexpected error")):
        raise AssertionError(f"expected a server without errors, got {server.process.poll() or lines[:3]}")


def _fuzzed(server: ServerProcess, path: str, seconds: float, seed: int) -> dict[str, Any]:
    _, tcp = server.start_line["addresses"]
    with (
        closing(Peer(tcp, path, server.start_line["explorer"], crowded=True)) as peer,
        closing(Run(seed, peer, f"{path}.arena")) as run,
    ):
        started = time.monotonic()
        samples = []
        for end in (WARM * seconds, seconds):
            with ThreadPoolExecutor(THREADS) as threads:
                list(threads.map(run.until, [started + end] * THREADS))
            samples.append(measured(server.process.pid))
        cases, duration = run.report.cases, time.monotonic() - started
        try:
            peer.check_calls()
            check_at_rest(server.start_line["metrics"])
            check_growth(*samples)
            check_log(server)
        except Exception as error:  # noqa: BLE001 - every exception is a finding
            run.report.found("server", (), error)
        return {
            "target": "all, of a server process",
            "cases": cases,
            "seconds": round(duration, 1),
            "warm": samples[0],
            "end": samples[1],
            "endings": {target: dict(counts) for target, counts in sorted(run.report.endings.items())},
            "findings": run.report.findings,
        }
