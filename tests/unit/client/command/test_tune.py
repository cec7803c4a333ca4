"""What `poolrpc tune` tries, and how it judges what it measured, without a server."""

import numpy as np
import pytest

from poolrpc import MaxPool2d
from poolrpc.command.load import Load, LoadResult
from poolrpc.command.tune import GAIN, Trial, cpu_flags, gain, is_better, limit_flags, score_of

LOAD = Load((((1, 1, 4, 4), ((MaxPool2d(2),),)),), concurrency=4)
OPEN = Load(LOAD.requests, rate=100)


def result_of(latency, count=100, failed=0, errors=()):
    """Return the result of so many equal calls in a second, of which the last ones failed."""
    return LoadResult(
        due=np.zeros(count),
        late=np.zeros(count),
        latency=np.full(count, latency),
        request=np.zeros(count, int),
        failed=np.arange(count) >= count - failed,
        errors=dict.fromkeys(errors, failed),
        messages={},
        unsent=0,
        seconds=1.0,
        cpus=0.5,
        busiest=0.5,
    )


def trial_of(*scores, flags=("--threads", "1")):
    """Return a trial with these scores."""
    return Trial(flags, scores=list(scores))


@pytest.mark.parametrize(
    ("cpus", "flags"),
    [
        (1, ["--threads 2"]),
        (2, ["--threads 1", "--threads 4", "--workers 2"]),
        (6, ["--threads 1", "--threads 3", "--threads 12", "--workers 2", "--workers 4", "--workers 6"]),
        (
            16,
            ["--threads 1", "--threads 8", "--threads 32", "--workers 2", "--workers 4", "--workers 8", "--workers 16"],
        ),
    ],
)
def test_threads_and_workers_follow_the_cpus(cpus, flags):
    """Numbers other than the default are tried, and no more workers than CPUs."""
    assert [" ".join(each) for each in cpu_flags(cpus)] == flags


def test_limits_are_tried_where_they_matter():
    """Batches only for calls that are batched, a longer queue only if calls were rejected; alone, and with the best."""
    best = Trial(("--workers", "2"), [result_of(0.01)], [100.0])
    assert limit_flags(best, 2**20) == []
    assert [" ".join(each) for each in limit_flags(best, 1000)] == [
        "--max-queue-delay 1",
        "--max-batch-bytes 8MiB",
        "--workers 2 --max-queue-delay 1",
        "--workers 2 --max-batch-bytes 8MiB",
    ]
    defaults = Trial((), [result_of(0.01, failed=5, errors=["UnavailableError QUEUE_FULL"])], [0.0])
    assert [" ".join(each) for each in limit_flags(defaults, 2**20)] == ["--max-queue 1024 --max-queue-seconds 5"]


def test_a_closed_loop_is_judged_by_its_calls_within_the_p99():
    """Calls per second count in full up to the p99 that was asked for, and in proportion beyond it."""
    assert score_of(result_of(0.01), LOAD, 0.02) == score_of(result_of(0.02), LOAD, 0.02) == 100
    assert score_of(result_of(0.04), LOAD, 0.02) == pytest.approx(50)
    assert score_of(result_of(0.01, failed=1), LOAD, 0.02) == 99
    assert score_of(result_of(0.01, failed=2), LOAD, 0.02) == 0


def test_an_open_loop_is_judged_by_its_p99():
    """With a rate, the calls per second are given, and a shorter p99 is better."""
    assert score_of(result_of(0.01), OPEN, 0.02) == pytest.approx(2)
    assert score_of(result_of(0.04), OPEN, 0.02) == pytest.approx(0.5)
    assert score_of(result_of(0.01, failed=2), OPEN, 0.02) == 0


@pytest.mark.parametrize(
    ("scores", "better"),
    [
        ((110, 110, 110), True),
        ((110, 110, 101), False),  # one round in which a run of the defaults was as good
        ((103.5, 103.5, 103.5), False),  # too little
        ((1000, 1000, 1), False),
    ],
)
def test_noise_is_not_taken_for_a_gain(scores, better):
    """Flags are better only if they beat both runs of the defaults in each round, and by a few per cent."""
    defaults = trial_of(100, 98, 97, 103, 99, 101, flags=())
    trial = trial_of(*scores)
    assert is_better(trial, defaults) == better
    if better:
        assert gain(trial, defaults) >= GAIN


def test_any_answer_is_better_than_none():
    """If the defaults answer no call in time, flags that do are infinitely better."""
    defaults = trial_of(*[0.0] * 6, flags=())
    assert is_better(trial_of(1, 1, 1), defaults)
    assert not is_better(trial_of(0, 1, 1), defaults)


def test_a_trial_that_failed_says_why():
    """A trial without results has the reason in its data."""
    assert Trial(("--workers", "64"), failure="too little memory").data() == {
        "flags": ("--workers", "64"),
        "runs": 0,
        "failure": "too little memory",
    }
