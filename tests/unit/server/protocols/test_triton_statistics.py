"""What is counted of a model's requests."""

import time

from poolrpc_server.protocols.triton.statistics import STAGES, ModelStatistics, Timing


def test_requests_are_counted_by_what_became_of_them():
    """A success has every stage, whose times add up to it; a failure has its own; the last has its time."""
    tally, before = ModelStatistics(), time.time_ns() // 10**6
    assert (tally.counted().last_ms, set(tally.counted().durations.values())) == (0, {(0, 0)})
    timing = Timing()
    timing.read, timing.begun, timing.computed = (timing.came + each for each in (10, 30, 60))
    tally.succeeded(timing)
    tally.succeeded(timing)
    tally.failed(Timing())
    counted = tally.counted()
    counts = {stage: count for stage, (count, _) in counted.durations.items()}
    assert counts == dict.fromkeys(STAGES, 2) | {"fail": 1}
    ns = {stage: ns for stage, (_, ns) in counted.durations.items()}
    assert (ns["compute_input"], ns["queue"], ns["compute_infer"]) == (20, 40, 60)
    assert sum(ns[stage] for stage in STAGES[2:]) == ns["success"]
    assert counted.last_ms >= before
