"""The queue: limits, the order of batches, and what goes into one."""

import time
from collections import Counter

import pytest

from poolrpc_server.calls.queue import PRIORITIES, STRIDES, Queue, QueueFullError, QueueLimits
from tests.unit.server.calls.jobs import FakeCall, NamedJob


def append(queue, names, priority=1, **attributes):
    """Append one job for each letter and return the pending jobs."""
    return [queue.append(NamedJob(name, **attributes), FakeCall(), priority) for name in names]


def batches(queue):
    """Empty the queue and return the names of the jobs of each batch, joined."""
    return list(iter(lambda: "".join(pending.job.name for pending in queue.next_batch()), ""))


def test_jobs_with_equal_keys_form_a_batch_in_order():
    """Jobs with equal keys are taken together, oldest first, and the queue is empty afterwards."""
    queue = Queue(1, QueueLimits())
    append(queue, "abc")
    assert batches(queue) == ["abc"]
    assert queue.lengths() == [0, 0, 0]
    assert queue.next_batch() == []


def test_keys_take_turns():
    """A key that had a batch goes behind the other keys, even if it has more jobs."""
    queue = Queue(1, QueueLimits(max_batch_bytes=2))
    append(queue, "abcde", key="1")
    append(queue, "ABC", key="2")
    append(queue, "x", key="3")
    assert batches(queue) == ["ab", "AB", "x", "cd", "C", "e"]


def test_jobs_without_key_are_alone_in_a_batch():
    """Each job without a batch key is a batch of its own, and takes turns like a key."""
    queue = Queue(1, QueueLimits())
    append(queue, "a")
    append(queue, "xy", key=None)
    append(queue, "b")
    assert batches(queue) == ["ab", "x", "y"]


def test_job_that_waited_for_half_the_limit_goes_first():
    """A key whose oldest job has waited for half of `max_queue_seconds` is taken before the others."""
    queue = Queue(1, QueueLimits(max_queue_seconds=1e-9, max_batch_bytes=2))
    append(queue, "abc", key="1")
    append(queue, "d", key="2")
    assert batches(queue) == ["ab", "c", "d"]


def test_batch_is_limited_in_bytes():
    """Jobs are taken in order while they fit; a job larger than the limit is a batch of its own."""
    queue = Queue(1, QueueLimits(max_batch_bytes=10))
    for i, nbytes in enumerate([4, 6, 1, 11, 10, 3, 3]):
        append(queue, str(i), nbytes=nbytes)
    assert batches(queue) == ["01", "2", "3", "4", "56"]


def test_batch_is_limited_in_seconds():
    """Jobs are taken while their estimated durations fit; a job longer than the limit is a batch of its own."""
    queue = Queue(1, QueueLimits(max_queue_seconds=1e9, max_batch_seconds=1.0))
    for i, seconds in enumerate([0.25, 0.75, 0.5, 2.0, 1.0, 0.5, 0.5]):
        append(queue, str(i), seconds=seconds)
    assert batches(queue) == ["01", "2", "3", "4", "56"]


def test_priorities_share_batches_by_strides():
    """Of 13 batches, 9 are of priority 0, 3 of priority 1 and 1 of priority 2, so that none starves."""
    queue = Queue(1, QueueLimits())
    for priority in reversed(range(PRIORITIES)):
        append(queue, str(priority) * 20, priority, key=None)
    order = batches(queue)
    assert Counter(order[:13]) == {"0": 9, "1": 3, "2": 1}
    assert Counter(order[13:26]) == {"0": 9, "1": 3, "2": 1}
    assert order[0] == "0"


def test_urgent_job_goes_before_older_jobs():
    """A job of a more urgent priority is taken first, however many less urgent jobs came before."""
    queue = Queue(1, QueueLimits())
    append(queue, "abc", 2, key=None)
    append(queue, "xyz", 1, key=None)
    append(queue, "u", 0, key=None)
    assert batches(queue)[:4] == ["u", "x", "y", "z"]


@pytest.mark.parametrize(("alone", "late"), [(1, 2), (2, 1), (2, 0), (0, 2)])
def test_batches_taken_alone_do_not_count_against_a_priority(alone, late):
    """A priority that had all batches while the others were idle gets its full share when another one arrives."""
    queue = Queue(1, QueueLimits())
    append(queue, "e" * 60, alone, key=None)
    assert len(batches(queue)) == 60
    for priority in (late, alone):
        append(queue, str(priority) * 20, priority, key=None)
    ratio = max(STRIDES[alone], STRIDES[late]) // min(STRIDES[alone], STRIDES[late])
    assert Counter(batches(queue)[: ratio + 1])[str(max(alone, late))] == 1


def test_delay_holds_back_a_key_until_a_batch_is_full():
    """With a delay, jobs with a key are not ready until they fill a batch; jobs without a key are ready at once."""
    queue = Queue(1, QueueLimits(max_batch_bytes=3, max_queue_delay=3600.0))
    append(queue, "ab")
    assert queue.next_batch() == []
    append(queue, "x", key=None)
    append(queue, "y", key="other", nbytes=3)
    assert batches(queue) == ["x", "y"]
    append(queue, "c")
    assert batches(queue) == ["abc"]


def test_delay_ends_with_time():
    """A job with a key is ready once the delay has passed, even alone."""
    queue = Queue(1, QueueLimits(max_queue_delay=0.01))
    (pending,) = append(queue, "a")
    time.sleep(max(0.0, pending.ready_at - time.monotonic()))
    assert batches(queue) == ["a"]


def test_check_limits_the_number_of_jobs_of_each_priority():
    """A full priority is reported with its limit; other priorities still have room."""
    queue = Queue(1, QueueLimits(max_queue=2))
    append(queue, "ab")
    with pytest.raises(QueueFullError) as raised:
        queue.check(1)
    error = raised.value
    assert (error.quantity, error.limit, error.actual, error.wait) == ("calls", 2, 3, 0.0)
    queue.check(0)
    append(queue, "d", 0)
    assert queue.lengths() == [1, 2, 0]


def test_check_limits_the_seconds_of_work_of_each_priority():
    """The limit counts seconds per slot; a job is accepted until it is reached, whatever the job's own duration."""
    queue = Queue(2, QueueLimits(max_queue_seconds=1.0))
    append(queue, "a", seconds=1.5)
    queue.check(1)
    append(queue, "b", seconds=0.5)
    with pytest.raises(QueueFullError) as raised:
        queue.check(1)
    error = raised.value
    assert (error.quantity, error.limit, error.actual, error.wait) == ("seconds", 1.0, 1.0, 1.0)
    queue.check(0)
    queue.next_batch()
    queue.check(1)


def test_empty_priority_has_room_for_a_job_of_any_duration():
    """A job longer than the limit is accepted by an empty priority, so that it is not rejected forever."""
    queue = Queue(1, QueueLimits(max_queue_seconds=1.0))
    queue.check(1)
    append(queue, "a", seconds=100.0)
    with pytest.raises(QueueFullError):
        queue.check(1)


def test_removed_jobs_free_their_room():
    """A removed job is in no batch and does not count, whatever its key."""
    queue = Queue(1, QueueLimits(max_queue=3, max_queue_seconds=1.0))
    _, b, x = [*append(queue, "ab"), *append(queue, "x", key=None, seconds=2.0)]
    with pytest.raises(QueueFullError):
        queue.check(1)
    queue.remove(x)
    queue.check(1)
    queue.remove(b)
    assert queue.lengths() == [0, 1, 0]
    assert batches(queue) == ["a"]


def test_oldest_is_the_job_that_was_queued_first():
    """The oldest job of all priorities counts; an empty queue has none."""
    queue = Queue(1, QueueLimits())
    assert queue.oldest() is None
    (first,) = append(queue, "a", 2)
    append(queue, "b", 0)
    assert queue.oldest() == first.queued_at
    assert [pending.job.name for pending in queue] == ["b", "a"]
    queue.remove(first)
    assert queue.oldest() > first.queued_at
