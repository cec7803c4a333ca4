"""A process next to the server: the attacker, the good client or the probes. It reads the phase from standard input."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CALM, ATTACK = "calm", "attack"
"""The phases: before the attack, and from its beginning on."""

MAX_ERRORS = 5
END_SECONDS = 30.0
"""Seconds that a process may take to end when it is asked to: a call of the good client may take 10 of them."""


class Recorder:
    """What a process measures: attempts of several kinds, by phase.

    Attributes:
        phase: The present phase.
        until: Set when the process is to end.

    """

    def __init__(self) -> None:
        self.phase = CALM
        self.until = threading.Event()
        self._lock = threading.Lock()
        self._seconds: dict[str, dict[str, list[float]]] = {CALM: {}, ATTACK: {}}
        self._failures: dict[str, Counter[str]] = {CALM: Counter(), ATTACK: Counter()}
        self._errors: list[str] = []

    def measure(self, kind: str, attempt: Callable[[], str]) -> None:
        """Run an attempt, and record how long it took and how it failed.

        Args:
            kind: The kind of the attempt.
            attempt: Returns a name for what was wrong with the answer, or an empty string; an exception counts as lost.

        """
        started = time.monotonic()
        failure, error = "", ""
        try:
            failure = attempt()
        except Exception as raised:  # noqa: BLE001 - whatever it is, the call is lost
            failure, error = "lost", _describe(raised)
        ended = time.monotonic()
        with self._lock:
            self._seconds[self.phase].setdefault(kind, []).append(ended - started)
            if failure:
                self._failures[self.phase][failure] += 1
                if len(self._errors) < MAX_ERRORS:
                    self._errors.append(f"{kind}, after {ended - started:.2f} s: {error or failure}")

    def repeat(self, kind: str, attempt: Callable[[], str], pause: float) -> None:
        """Measure attempts until the end, with a pause after each."""
        while not self.until.is_set():
            self.measure(kind, attempt)
            self.until.wait(pause)

    def report(self) -> dict[str, Any]:
        """Return the report."""
        with self._lock:
            return {
                phase: {
                    "count": sum(map(len, kinds.values())),
                    **{name: self._failures[phase][name] for name in ("wrong", "lost")},
                    "max_s": round(max((max(each) for each in kinds.values()), default=0.0), 3),
                    "p99_s": round(max((_p99(each) for each in kinds.values()), default=0.0), 4),
                    "max_s_by_kind": {kind: round(max(each), 3) for kind, each in kinds.items()},
                }
                for phase, kinds in self._seconds.items()
            } | {"errors": self._errors}


def _describe(error: Exception) -> str:
    if isinstance(error, grpc.RpcError) and isinstance(error, grpc.Call):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"[:300]


def _p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.99 * (len(seconds) - 1))]


def run(recorder: Recorder, *threads: Callable[[], object]) -> None:
    """Run threads until standard input ends, with the phases that are read from it, and print the report."""
    running = [threading.Thread(target=thread, daemon=True) for thread in threads]
    for thread in running:
        thread.start()
    print("ready", flush=True)
    for line in sys.stdin:
        recorder.phase = line.strip()
    recorder.until.set()
    for thread in running:
        thread.join()
    print(json.dumps(recorder.report()), flush=True)


class Child:
    """A process that runs a module of this package with settings, until its standard input ends.

    Args:
        module: The module's name within this package.
        settings: Its settings.

    """

    def __init__(self, module: str, settings: Mapping[str, object]) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "fuzz.attacks.child", module, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._process.stdout is None or self._process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"expected {module} to start, got status {self._process.wait()}")

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        if self._process.stdin is not None:
            self._process.stdin.write(f"{phase}\n")
            self._process.stdin.flush()

    def finish(self, timeout: float = END_SECONDS) -> dict[str, Any]:
        """Ask the process to end, and return its report; an empty one if it had to be killed."""
        try:
            output, _ = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return {}
        return dict(json.loads(output)) if output.strip() else {}

    def kill(self) -> None:
        """End the process now, and with it everything that it has open."""
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()


def main() -> None:
    """Run a module of this package."""
    # Ctrl-C is for the runner, which then ends its children. An attacker has a machine of its own: here it leaves the
    # processors to the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    name, settings = sys.argv[1:]
    if name == "attacker":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    importlib.import_module(f"fuzz.attacks.{name}").main(json.loads(settings))


if __name__ == "__main__":
    main()
