"""How many requests a model had, and where their time went."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

STAGES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")


class Timing:
    """When the steps of one request were done, in nanoseconds."""

    __slots__ = ("begun", "came", "computed", "read")

    def __init__(self) -> None:
        """Begin."""
        self.came = self.read = self.begun = self.computed = time.perf_counter_ns()


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted.

    Attributes:
        last_ms: When the last request ended, in milliseconds since 1970; 0 if there was none.
        durations: How often there was each of STAGES, and its nanoseconds in all.

    """

    last_ms: int
    durations: dict[str, tuple[int, int]]


class ModelStatistics:
    """The requests of one model."""

    def __init__(self) -> None:
        """Count from 0."""
        self._last_ms = 0
        self._counts = dict.fromkeys(STAGES, 0)
        self._ns = dict.fromkeys(STAGES, 0)
        self._lock = threading.Lock()

    def succeeded(self, timing: Timing) -> None:
        """Count a request that was answered."""
        ended = time.perf_counter_ns()
        self._add(
            success=ended - timing.came,
            queue=timing.begun - timing.read,
            compute_input=timing.read - timing.came,
            compute_infer=timing.computed - timing.begun,
            compute_output=ended - timing.computed,
        )

    def failed(self, timing: Timing) -> None:
        """Count one that was not."""
        self._add(fail=time.perf_counter_ns() - timing.came)

    def counted(self) -> Counted:
        """Give what was counted so far."""
        with self._lock:
            return Counted(self._last_ms, {stage: (self._counts[stage], self._ns[stage]) for stage in STAGES})

    def _add(self, **stages: int) -> None:
        with self._lock:
            self._last_ms = time.time_ns() // 10**6
            for stage, ns in stages.items():
                self._counts[stage] += 1
                self._ns[stage] += max(0, ns)
