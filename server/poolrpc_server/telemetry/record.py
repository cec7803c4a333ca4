"""The record of one call."""

from __future__ import annotations

from time import monotonic_ns
from typing import TYPE_CHECKING

from poolrpc_server.telemetry.stage_times import StageTimes

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_EXECUTIONS = 32
"""Executions whose stage times are kept with a call; a stream has one for each block, and all of them are counted."""


class CallRecord:
    """The record of one call, from which the log line, the metrics, the spans and Triton's statistics are made.

    Attributes:
        method: "/package.Service/Method"; that of every method that does not exist is "/unknown/Unknown".
        streaming: Whether the call is a stream.
        started: When the call's message had arrived, in nanoseconds of the monotonic clock.
        status: Name of the status code; "OK" until the call fails.
        facts: The call's fields of the log line, in order.
        executions: Stage times of the first MAX_EXECUTIONS executions.
        latest: Stage times of the latest execution; None before the first.
        count: Number of executions.
        queue_ns: Nanoseconds in the queue, summed over the executions.
        compute_ns: Nanoseconds of computation, summed over the executions.
        device_ns: Nanoseconds of each stage on a device, by name, summed over the executions; empty on the CPU.

    """

    __slots__ = (
        "compute_ns",
        "count",
        "device_ns",
        "executions",
        "facts",
        "latest",
        "method",
        "queue_ns",
        "started",
        "status",
        "streaming",
    )

    def __init__(self, method: str) -> None:
        self.method = method
        self.streaming = False
        self.started = monotonic_ns()
        self.status = "OK"
        self.facts: dict[str, object] = {}
        self.executions: list[StageTimes] = []
        self.latest: StageTimes | None = None
        self.count = self.queue_ns = self.compute_ns = 0
        self.device_ns: dict[str, int] = {}

    def note(self, facts: Mapping[str, object]) -> None:
        """Add facts to the call's log line."""
        self.facts.update(facts)

    def begin_execution(self, planes: int, priority: int) -> StageTimes:
        """Return the stage times of a further execution, which is queued now."""
        times = self.latest = StageTimes(planes, priority)
        self.count += 1
        if len(self.executions) < MAX_EXECUTIONS:
            self.executions.append(times)
        return times

    def end_execution(self, times: StageTimes) -> None:
        """Record that an execution has ended, with an answer or without."""
        times.ended = monotonic_ns()
        self.queue_ns += times.queue_ns
        self.compute_ns += times.compute_ns
        for stage in times.device:
            self.device_ns[stage.name] = self.device_ns.get(stage.name, 0) + stage.busy_ns
