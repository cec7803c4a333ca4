"""When the stages of an execution began and ended."""

from poolrpc_server.telemetry.stage_times import StageTimes


def test_stages_follow_each_other():
    """Times rise from stage to stage, and a batch that is computed again, one by one, is recorded again."""
    times = StageTimes(6, 1)
    times.compute_started(3, 18)
    times.compute_ended()
    times.compute_started(1, 6)
    assert times.computed == 0
    assert times.around(lambda outputs: [*outputs, "answer"])([]) == ["answer"]
    stages = [times.queued, times.started, times.computed, times.encoded]
    assert stages == sorted(stages)
    assert (times.batch_requests, times.batch_planes) == (1, 6)


def test_the_end_of_a_batch_counts_once():
    """The outputs of a batch are complete at one time, however long its answers take."""
    times = StageTimes(1, 1)
    times.compute_started(1, 1)
    times.compute_ended()
    computed = times.computed
    times.around(list)([])
    assert times.computed == computed


def test_durations_of_what_was_not_reached():
    """A request that was never computed spent all of its time in the queue."""
    times = StageTimes(1, 1)
    times.ended = times.queued + 50
    assert (times.queue_ns, times.compute_ns) == (50, 0)
    times.started, times.ended = times.queued + 20, times.queued + 60
    assert (times.queue_ns, times.compute_ns) == (20, 40)
    times.computed = times.started + 30
    assert times.compute_ns == 30
