"""Triton's statistics of a model's requests."""

import time

from poolrpc_server.protocols.triton.statistics import STATISTICS, ModelStatistics
from poolrpc_server.telemetry.stage_times import StageTimes


def test_requests_are_counted_by_their_outcome():
    """A success has every stage, and the stages add up to it; a failure is counted as such; the last one is dated."""
    statistics, before = ModelStatistics(), time.time_ns() // 10**6
    assert (statistics.totals().last_ms, set(statistics.totals().durations.values())) == (0, {(0, 0)})
    received = time.monotonic_ns() - 100
    times = StageTimes(1, 1, queued=received + 10, started=received + 30, computed=received + 60)
    statistics.succeeded(received, times)
    statistics.succeeded(received, times)
    statistics.failed(received)
    totals = statistics.totals()
    counts = {stage: count for stage, (count, _) in totals.durations.items()}
    assert counts == dict.fromkeys(STATISTICS, 2) | {"fail": 1}
    sums = {stage: nanoseconds for stage, (_, nanoseconds) in totals.durations.items()}
    assert (sums["compute_input"], sums["queue"], sums["compute_infer"]) == (20, 40, 60)
    assert sum(sums[stage] for stage in STATISTICS[2:]) == sums["success"]
    assert totals.last_ms >= before
