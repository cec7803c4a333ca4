"""Triton's statistics: how many requests a model had, and where their time went."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poolrpc_server.telemetry.stage_times import StageTimes

STATISTICS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
"""The statistics of a model: the names of the fields of Triton's InferStatistics."""


@dataclass(frozen=True, slots=True)
class Totals:
    """The counts of a model up to a moment.

    Attributes:
        last_ms: When the last request ended, in milliseconds since 1970; 0 if there was none.
        durations: For each of STATISTICS, how often it occurred, and its nanoseconds in all.

    """

    last_ms: int
    durations: dict[str, tuple[int, int]]


class ModelStatistics:
    """The counts of one model's requests."""

    def __init__(self) -> None:
        self._last_ms = 0
        self._counts = dict.fromkeys(STATISTICS, 0)
        self._nanoseconds = dict.fromkeys(STATISTICS, 0)
        self._lock = threading.Lock()

    def succeeded(self, received: int, times: StageTimes) -> None:
        """Count a request that was answered.

        Args:
            received: When its message had arrived, in nanoseconds of the monotonic clock.
            times: Its stage times.

        """
        ended = time.monotonic_ns()
        self._add(
            success=ended - received,
            queue=times.started - times.queued,
            compute_input=times.queued - received,
            compute_infer=times.computed - times.started,
            compute_output=ended - times.computed,
        )

    def failed(self, received: int) -> None:
        """Count a request that failed."""
        self._add(fail=time.monotonic_ns() - received)

    def totals(self) -> Totals:
        """Return the counts so far."""
        with self._lock:
            durations = {stage: (self._counts[stage], self._nanoseconds[stage]) for stage in STATISTICS}
            return Totals(self._last_ms, durations)

    def _add(self, **stages: int) -> None:
        with self._lock:
            self._last_ms = time.time_ns() // 10**6
            for stage, nanoseconds in stages.items():
                self._counts[stage] += 1
                self._nanoseconds[stage] += max(0, nanoseconds)
