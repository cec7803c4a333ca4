"""The batcher: slots, batches and their threads, and jobs that are cancelled, fail or find the queue full."""

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from poolrpc_server.calls.batcher import Batcher, StoppedError
from poolrpc_server.calls.queue import PRIORITIES, QueueFullError, QueueLimits
from tests.unit.server.calls.jobs import Cancelled, FakeCall, NamedJob

PATIENCE = 60
"""Seconds after which a waiting test fails."""


class CallWithDeadline(FakeCall):
    """A call whose deadline passes after so many seconds, without a callback."""

    def __init__(self, seconds):
        super().__init__()
        self._deadline = time.monotonic() + seconds

    def time_remaining(self):
        """Return the seconds until the deadline."""
        return self._deadline - time.monotonic()

    def raise_if_cancelled(self):
        """Raise after the deadline."""
        if self.time_remaining() <= 0:
            raise TimeoutError


class SilentCall(FakeCall):
    """A call that runs no callback when it is cancelled."""

    def add_done_callback(self, _):
        """Ignore the callback."""
        return super().add_done_callback(lambda: None)


class RecordingObserver:
    """An observer that keeps what it receives."""

    def __init__(self):
        self.seconds, self.stages = [], []

    def queued(self, seconds):
        """Keep the time that a job was queued."""
        self.seconds.append(seconds)

    def cancelled(self, stage):
        """Keep the stage in which a call was cancelled."""
        self.stages.append(stage)


class Harness:
    """A batcher, the threads of its callers, and a record of the executed batches.

    Attributes:
        batches: Names of the jobs of each executed batch.
        threads: Identifier of the thread that executed each job.
        errors: Exceptions that executing certain jobs raises.
        held: For each job whose execution blocks: an event that it started, and one that lets it end.

    """

    def __init__(self, slots=1, **limits):
        self.observer, self.slots = RecordingObserver(), slots
        self.batches, self.threads, self.errors, self.held = [], {}, {}, {}
        self.batcher = Batcher(slots, self.execute, QueueLimits(**limits), self.observer)
        self._callers = ThreadPoolExecutor(128)

    def execute(self, jobs):
        """Return the name of each job; block or raise for those that a test prepared."""
        names = [job.name for job in jobs]
        self.batches.append(names)
        for name in names:
            self.threads[name] = threading.get_ident()
            if name in self.held:
                started, end = self.held[name]
                started.set()
                assert end.wait(PATIENCE)
            if name in self.errors:
                raise self.errors[name]
        return names

    def hold(self, name):
        """Make the execution of a job block."""
        self.held[name] = threading.Event(), threading.Event()

    def wait_until_started(self, name):
        """Wait until the execution of a held job has started."""
        assert self.held[name][0].wait(PATIENCE)

    def let_go(self, name):
        """Let the execution of a held job end."""
        self.held[name][1].set()

    def submit(self, job, call=None, priority=1, **options):
        """Run a job in a thread of its own and return the future of its result."""
        return self._callers.submit(self.batcher.run, job, call or FakeCall(), priority, **options)

    def enqueue(self, *jobs, call=None, priority=1, **options):
        """Submit jobs one after the other, wait until each is queued, and return the futures of their results."""
        futures = []
        for job in jobs:
            context = call or FakeCall()
            futures.append(self.submit(job, context, priority, **options))
            assert context.queued.wait(PATIENCE)
        return futures

    def occupy(self, name="busy"):
        """Occupy a slot with a held job."""
        self.hold(name)
        future = self.submit(NamedJob(name, key=None))
        self.wait_until_started(name)
        return future

    def free_slots(self):
        """Return the number of free slots."""
        count = self.batcher.borrow(1000)
        self.batcher.release(count)
        return count

    def close(self):
        """Let all held jobs end, and join the threads."""
        for _, end in self.held.values():
            end.set()
        self._callers.shutdown()


@pytest.fixture
def make_harness():
    """Return a factory of harnesses, each of which is checked for lost slots and jobs at the end of the test."""
    made = []

    def make(slots=1, **limits):
        made.append(Harness(slots, **limits))
        return made[-1]

    yield make
    for each in made:
        each.close()
        assert each.batcher.queue_lengths() == [0] * PRIORITIES
        assert each.batcher.oldest_wait() == 0.0
        assert each.free_slots() == each.slots


def outcomes(futures):
    """Return the result of each future, or the class of its exception."""
    found = []
    for future in futures:
        error = future.exception(PATIENCE)
        found.append(future.result() if error is None else type(error))
    return found


def jobs(names, **attributes):
    """Return one job for each letter."""
    return [NamedJob(name, **attributes) for name in names]


def test_lone_job_is_executed_at_once_by_its_own_thread(make_harness):
    """With a free slot, the thread of the call executes the job, and the time in the queue is 0."""
    harness = make_harness()
    call = FakeCall()
    assert harness.batcher.run(NamedJob("a"), call) == "a"
    assert harness.threads["a"] == threading.get_ident()
    assert not call.queued.is_set()
    assert not call.made_way
    assert harness.observer.seconds == [0.0]


def test_lone_job_of_a_cancelled_call_is_not_executed(make_harness):
    """Cancellation is checked before the execution, and the slot is free afterwards."""
    harness = make_harness()
    with pytest.raises(Cancelled):
        harness.batcher.run(NamedJob("a"), FakeCall(error=Cancelled()))
    assert harness.batches == []
    assert harness.free_slots() == 1


def test_lone_job_that_fails_releases_its_slot(make_harness):
    """The exception of the execution is raised to the caller, and the next job finds the slot free."""
    harness = make_harness()
    harness.errors["a"] = KeyError("a")
    with pytest.raises(KeyError):
        harness.batcher.run(NamedJob("a"), FakeCall())
    assert harness.batcher.run(NamedJob("b"), FakeCall()) == "b"


def test_slots_bound_the_executions_at_a_time(make_harness):
    """With two slots, two jobs are executed concurrently, and a third one is queued."""
    harness = make_harness(2)
    futures = [harness.occupy("x"), harness.occupy("y"), *harness.enqueue(NamedJob("a"))]
    assert harness.batcher.queue_lengths() == [0, 1, 0]
    harness.let_go("y")
    assert outcomes(futures[1:]) == ["y", "a"]
    harness.let_go("x")
    assert outcomes(futures[:1]) == ["x"]


def test_jobs_queued_while_all_slots_are_taken_form_a_batch(make_harness):
    """Queued jobs with equal keys are executed as one batch, in order, and each caller gets its own result."""
    harness = make_harness()
    harness.occupy()
    futures = harness.enqueue(*jobs("abc"))
    harness.let_go("busy")
    assert outcomes(futures) == ["a", "b", "c"]
    assert harness.batches == [["busy"], ["a", "b", "c"]]
    assert len(harness.observer.seconds) == 4
    assert min(harness.observer.seconds[1:]) > 0


def test_a_call_whose_job_is_queued_makes_way(make_harness):
    """The batcher says so before the call's thread waits."""
    harness, call = make_harness(), FakeCall()
    busy = harness.occupy()
    queued = harness.enqueue(NamedJob("a"), call=call)
    harness.let_go("busy")
    assert outcomes([busy, *queued]) == ["busy", "a"]
    assert call.made_way


def test_durations_are_recorded_for_jobs_that_are_executed_alone(make_harness):
    """A job's duration is recorded if it was alone, whether it was queued or not; jobs of a batch record none."""
    harness = make_harness()
    lone, queued, batch = NamedJob("a"), NamedJob("b", key=None), jobs("cd")
    harness.batcher.run(lone, FakeCall())
    harness.occupy()
    futures = harness.enqueue(queued, *batch)
    harness.let_go("busy")
    assert outcomes(futures) == ["b", "c", "d"]
    assert [len(job.durations) for job in (lone, queued, *batch)] == [1, 1, 0, 0]
    assert min(lone.durations + queued.durations) > 0


def test_jobs_that_are_not_executed_to_their_end_have_no_duration(make_harness):
    """A call that was cancelled before, at once or in the queue, and an execution that failed, record none."""
    harness = make_harness()
    cancelled, failed, queued, queued_failed = (NamedJob(name, key=None) for name in "abcd")
    harness.errors = {"b": KeyError("b"), "d": KeyError("d")}
    with pytest.raises(Cancelled):
        harness.batcher.run(cancelled, FakeCall(error=Cancelled()))
    with pytest.raises(KeyError):
        harness.batcher.run(failed, FakeCall())
    harness.occupy()
    call = SilentCall()
    futures = harness.enqueue(queued, call=call) + harness.enqueue(queued_failed)
    call.cancel()
    harness.let_go("busy")
    wait(futures, PATIENCE)
    assert [type(each.exception()) for each in futures] == [Cancelled, KeyError]
    assert [job.durations for job in (cancelled, failed, queued, queued_failed)] == [[], [], [], []]


def test_full_queue_rejects_a_job(make_harness):
    """A job of a full priority is rejected with the limit; other priorities still have room."""
    harness = make_harness(max_queue=2)
    harness.occupy()
    futures = harness.enqueue(*jobs("ab"))
    with pytest.raises(QueueFullError) as raised:
        harness.batcher.run(NamedJob("c"), FakeCall())
    assert (raised.value.quantity, raised.value.limit, raised.value.actual) == ("calls", 2, 3)
    with pytest.raises(QueueFullError):
        harness.batcher.check_queue(1)
    harness.batcher.check_queue(0)
    futures += harness.enqueue(NamedJob("d"), priority=0)
    assert harness.batcher.queue_lengths() == [1, 2, 0]
    harness.let_go("busy")
    assert outcomes(futures) == ["a", "b", "d"]
    harness.batcher.check_queue(1)


def test_admitted_jobs_ignore_the_limits(make_harness):
    """A job that belongs to an admitted call is queued although the queue is full."""
    harness = make_harness(max_queue=1, max_queue_seconds=1.0)
    harness.occupy()
    futures = harness.enqueue(NamedJob("a", seconds=1.0))
    futures += harness.enqueue(*jobs("bc", seconds=5.0), admitted=True)
    assert harness.batcher.queue_lengths() == [0, 3, 0]
    harness.let_go("busy")
    assert outcomes(futures) == ["a", "b", "c"]


def test_cancelled_job_leaves_the_queue_at_once(make_harness):
    """A queued job that is cancelled ends while the slot is still taken, frees its room and is not executed."""
    harness = make_harness(max_queue=2)
    harness.occupy()
    call = FakeCall()
    kept = harness.enqueue(NamedJob("a"))
    (gone,) = harness.enqueue(NamedJob("b"), call=call)
    call.cancel()
    assert outcomes([gone]) == [Cancelled]
    assert harness.batcher.queue_lengths() == [0, 1, 0]
    kept += harness.enqueue(NamedJob("c"))
    harness.let_go("busy")
    assert outcomes(kept) == ["a", "c"]
    assert harness.batches[1:] == [["a", "c"]]
    assert harness.observer.stages == ["queue"]


def test_job_cancelled_before_the_callback_leaves_the_queue(make_harness):
    """A job of a call that ended before its callback was registered does not stay in the queue."""
    harness = make_harness()
    harness.occupy()
    with pytest.raises(Cancelled):
        harness.batcher.run(NamedJob("a"), FakeCall(error=Cancelled()))
    assert harness.batcher.queue_lengths() == [0, 0, 0]
    harness.let_go("busy")


def test_job_queued_after_its_deadline_ends_at_once(make_harness):
    """A job whose deadline has passed is not executed, and ends although no slot becomes free."""
    harness = make_harness()
    harness.occupy()
    with pytest.raises(TimeoutError):
        harness.batcher.run(NamedJob("late"), FakeCall(remaining=0.0, error=TimeoutError()))
    assert harness.observer.stages == ["queue"]
    harness.let_go("busy")
    assert harness.batcher.run(NamedJob("a"), FakeCall()) == "a"
    assert ["late"] not in harness.batches


def test_deadline_in_the_queue_needs_no_callback(make_harness):
    """A queued job ends when its deadline passes, without any callback."""
    harness = make_harness()
    harness.occupy()
    assert outcomes(harness.enqueue(NamedJob("late"), call=CallWithDeadline(0.05))) == [TimeoutError]
    assert harness.batches == [["busy"]]


def held_batch(harness, names="abc", calls=None):
    """Start one batch of jobs, whose leader is held, and return the futures."""
    harness.occupy()
    harness.hold(names[0])
    futures = []
    for name in names:
        futures += harness.enqueue(NamedJob(name), call=(calls or {}).get(name))
    harness.let_go("busy")
    harness.wait_until_started(names[0])
    return futures


def test_cancelled_follower_ends_before_its_batch(make_harness):
    """A cancelled job of a running batch ends at once; the other jobs get their results."""
    harness, call = make_harness(), FakeCall()
    first, gone, last = held_batch(harness, calls={"b": call})
    call.cancel()
    assert outcomes([gone]) == [Cancelled]
    harness.let_go("a")
    assert outcomes([first, last]) == ["a", "c"]
    assert harness.observer.stages == ["compute"]


def test_cancelled_leader_still_executes_its_batch(make_harness):
    """The thread of a cancelled leader finishes the batch, once, and all jobs get their results."""
    harness, call = make_harness(), FakeCall()
    first, *others = held_batch(harness, calls={"a": call})
    call.cancel()
    harness.let_go("a")
    assert outcomes(others) == ["b", "c"]
    assert outcomes([first]) == ["a"]
    assert harness.batches == [["busy"], ["a", "b", "c"]]


def test_batch_excludes_jobs_that_were_cancelled_silently(make_harness):
    """Cancellation is checked again before the execution; a cancelled leader executes the batch without its own job."""
    for name in "abc":
        harness, call = make_harness(), SilentCall()
        harness.occupy()
        futures = []
        for each in "abc":
            futures += harness.enqueue(NamedJob(each), call=call if each == name else None)
        call.cancel()
        harness.let_go("busy")
        assert outcomes(futures) == [Cancelled if each == name else each for each in "abc"]
        assert harness.batches[1:] == [[each for each in "abc" if each != name]]
        assert harness.observer.stages == ["queue"]


def test_batch_of_cancelled_jobs_is_not_executed(make_harness):
    """A batch whose jobs were all cancelled executes nothing, and the next batch gets the slot."""
    harness = make_harness()
    harness.occupy()
    calls = [SilentCall(), SilentCall()]
    futures = [harness.enqueue(NamedJob(str(i)), call=call)[0] for i, call in enumerate(calls)]
    for call in calls:
        call.cancel()
    futures += harness.enqueue(NamedJob("x", key="other"))
    harness.let_go("busy")
    assert outcomes(futures) == [Cancelled, Cancelled, "x"]
    assert harness.batches == [["busy"], ["x"]]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("culprit", "abc")
def test_jobs_of_a_failed_batch_are_executed_alone(make_harness, culprit, error):
    """Only the job at fault fails, whatever the exception and wherever the job is in the batch."""
    harness = make_harness()
    harness.errors[culprit] = error()
    harness.occupy()
    futures = harness.enqueue(*jobs("abc"))
    harness.let_go("busy")
    assert outcomes(futures) == [error if each == culprit else each for each in "abc"]
    assert harness.batches[1:] == [["a", "b", "c"], ["a"], ["b"], ["c"]]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_wrong_number_of_results_leaves_no_caller_waiting(number):
    """If an execution returns too few or too many results, each job is executed alone."""
    started, end = threading.Event(), threading.Event()

    def execute(batch):
        if batch[0].name == "busy":
            started.set()
            assert end.wait(PATIENCE)
        return [job.name for job in batch] if len(batch) == 1 else ["?"] * number

    batcher = Batcher(1, execute, QueueLimits())
    with ThreadPoolExecutor(3) as callers:
        calls = [FakeCall(), FakeCall()]
        futures = [callers.submit(batcher.run, NamedJob("busy"), FakeCall())]
        assert started.wait(PATIENCE)
        for name, call in zip("ab", calls, strict=True):
            futures.append(callers.submit(batcher.run, NamedJob(name), call))
            assert call.queued.wait(PATIENCE)
        end.set()
        try:
            found = [future.result(5) for future in futures]
        finally:
            for call in calls:  # so that the test fails instead of waiting forever
                call.cancel()
    assert found == ["busy", "a", "b"]


def test_stop_fails_queued_jobs_and_finishes_running_ones(make_harness):
    """Jobs of a running batch get their results; queued and new jobs get StoppedError."""
    harness = make_harness()
    futures = held_batch(harness, "ab")
    waiting = harness.enqueue(NamedJob("c"), priority=0) + harness.enqueue(NamedJob("d", key=None), priority=2)
    harness.batcher.stop()
    assert outcomes(waiting) == [StoppedError, StoppedError]
    with pytest.raises(StoppedError):
        harness.batcher.run(NamedJob("e"), FakeCall())
    harness.let_go("a")
    assert outcomes(futures) == ["a", "b"]


def test_stopped_batcher_rejects_jobs_although_a_slot_is_free(make_harness):
    """After a stop, a new job fails even if it could be executed at once."""
    harness = make_harness()
    harness.batcher.stop()
    for key in ("key", None):
        with pytest.raises(StoppedError):
            harness.batcher.run(NamedJob("a", key=key), FakeCall())
    assert harness.batches == []


DELAY = 3600.0
"""Longer than any test."""


def test_delay_holds_jobs_until_a_batch_is_full(make_harness):
    """With a delay, the slot stays free until the queued jobs fill a batch."""
    harness = make_harness(max_batch_bytes=3, max_queue_delay=DELAY)
    futures = harness.enqueue(*jobs("ab"))
    assert harness.batches == []
    assert harness.free_slots() == 1
    assert harness.batches == []
    futures += harness.enqueue(*jobs("c"))
    assert outcomes(futures) == ["a", "b", "c"]
    assert harness.batches == [["a", "b", "c"]]


def test_delay_does_not_hold_jobs_that_gain_nothing(make_harness):
    """With a delay, a job without a key and a job that fills a batch alone are executed at once."""
    harness = make_harness(max_batch_bytes=3, max_queue_delay=DELAY)
    futures = harness.enqueue(*jobs("ab"))
    assert harness.batcher.run(NamedJob("x", key=None), FakeCall()) == "x"
    assert harness.batcher.run(NamedJob("y", key="other", nbytes=3), FakeCall()) == "y"
    assert harness.batcher.queue_lengths() == [0, 2, 0]
    futures += harness.enqueue(*jobs("c"))
    assert outcomes(futures) == ["a", "b", "c"]


def test_job_is_executed_when_its_delay_has_passed(make_harness):
    """A job that no other one joins is executed alone after the delay."""
    harness = make_harness(max_queue_delay=0.05)
    call = FakeCall(remaining=DELAY)
    assert harness.batcher.run(NamedJob("a"), call) == "a"
    assert call.queued.is_set()
    assert harness.observer.seconds[0] >= 0.05


def test_job_waits_for_a_slot_after_its_delay(make_harness):
    """If no slot is free when the delay ends, the job is in the batch that gets the next slot."""
    harness = make_harness(max_queue_delay=0.05)
    harness.occupy()
    futures = harness.enqueue(*jobs("ab"))
    # Its deadline is later than the end of the others' delay, after which they wait for the slot alone.
    assert outcomes(harness.enqueue(NamedJob("z"), call=CallWithDeadline(0.1))) == [TimeoutError]
    harness.let_go("busy")
    assert outcomes(futures) == ["a", "b"]
    assert harness.batches == [["busy"], ["a", "b"]]


def test_deadline_before_the_delay_ends_the_wait(make_harness):
    """A job whose deadline is earlier than its delay ends at the deadline."""
    harness = make_harness(max_queue_delay=DELAY)
    with pytest.raises(Cancelled):
        harness.batcher.run(NamedJob("a"), FakeCall(remaining=0.0, error=Cancelled()))
    assert harness.batcher.queue_lengths() == [0, 0, 0]


def test_free_slots_can_be_borrowed(make_harness):
    """At most the free slots can be borrowed; when they are released, queued jobs are executed."""
    harness = make_harness(3)
    harness.occupy()
    assert harness.batcher.borrow(1) == 1
    assert harness.batcher.borrow(5) == 1
    assert harness.batcher.borrow(5) == 0
    futures = harness.enqueue(*jobs("a", key=None), *jobs("b", key=None))
    harness.hold("a")
    harness.batcher.release(1)
    harness.wait_until_started("a")
    assert harness.batcher.queue_lengths() == [0, 1, 0]
    harness.batcher.release(1)
    assert outcomes(futures[1:]) == ["b"]
    harness.let_go("a")
    assert outcomes(futures[:1]) == ["a"]


def test_oldest_wait_is_the_age_of_the_oldest_job(make_harness):
    """The oldest wait is 0 for an empty queue, grows with time and drops when the oldest job leaves."""
    harness = make_harness()
    harness.occupy()
    assert harness.batcher.oldest_wait() == 0.0
    before = time.monotonic()
    call = FakeCall()
    futures = harness.enqueue(NamedJob("a"), call=call, priority=2)
    between = time.monotonic()
    futures += harness.enqueue(NamedJob("b"), priority=0)
    age, now = harness.batcher.oldest_wait(), time.monotonic()
    assert now - between - 0.001 <= age <= now - before
    call.cancel()
    assert harness.batcher.oldest_wait() <= time.monotonic() - between
    harness.let_go("busy")
    assert outcomes(futures) == [Cancelled, "b"]


SLOTS, THREADS, JOBS = 3, 24, 60


def execute_all(batch):
    """Return the name of each job; raise for a bad one, with its name if it is alone."""
    for job in batch:
        if "bad" in job.name:
            raise ValueError(job.name if len(batch) == 1 else "one of several")
    return [job.name for job in batch]


def run_random_jobs(batcher, seed, number, current):
    """Run one job after the other, cancel other threads' calls, and yield how each job ended."""
    drawn = random.Random(seed)  # noqa: S311 - not for secrets
    for i in range(JOBS):
        name = f"{number}-{i}{'-bad' * (drawn.random() < 0.1)}"
        job = NamedJob(name, drawn.choice(["a", "b", None]), drawn.randint(1, 10), drawn.choice([0.0, 0.1, 0.5]))
        current[number] = call = FakeCall(error=Cancelled() if drawn.random() < 0.05 else None)
        if drawn.random() < 0.3 and (other := current.get(drawn.randrange(THREADS))) is not None:
            other.cancel()
        if drawn.random() < 0.2:
            batcher.release(batcher.borrow(drawn.randint(1, SLOTS)))
        try:
            got = batcher.run(job, call, drawn.randrange(PRIORITIES), admitted=drawn.random() < 0.1)
        except (QueueFullError, Cancelled) as error:
            yield type(error).__name__
        except ValueError as error:
            yield "bad" if str(error) == name else f"{name}: {error}"
        else:
            yield "right" if got == name and "bad" not in name else f"{name}: {got}"


@pytest.mark.parametrize("delay", [0.0, 0.0005])
@pytest.mark.parametrize("seed", range(4))
def test_each_job_ends_exactly_once_under_random_load(seed, delay):
    """Each job of many threads ends with its own result, its own error, cancellation or rejection; no wake-up is lost.

    Some jobs fail, are cancelled or find no room. Afterwards every slot is free.
    """
    batcher, current = Batcher(SLOTS, execute_all, QueueLimits(12, 1.0, 8, delay), RecordingObserver()), {}
    with ThreadPoolExecutor(THREADS) as threads:
        futures = [
            threads.submit(lambda number: list(run_random_jobs(batcher, seed * THREADS + number, number, current)), i)
            for i in range(THREADS)
        ]
        ended = Counter(end for future in futures for end in future.result(PATIENCE))
    assert set(ended) <= {"right", "bad", "Cancelled", "QueueFullError"}
    assert ended.total() == THREADS * JOBS
    assert min(ended["right"], ended["bad"], ended["Cancelled"]) > 0
    assert batcher.queue_lengths() == [0] * PRIORITIES
    assert batcher.oldest_wait() == 0.0
    assert batcher.borrow(100) == SLOTS


class SlowToWaitCall(FakeCall):
    """A call whose thread comes to its wait only after the delay is over, as on a busy machine."""

    def time_remaining(self):
        """Return the seconds until the deadline, once the delay has passed."""
        until = time.monotonic() + 0.02
        while time.monotonic() < until:
            pass
        return super().time_remaining()


@pytest.mark.parametrize("remaining", [None, PATIENCE * 2])
@pytest.mark.parametrize("callers", [1, 3])
def test_a_delay_that_is_over_before_the_wait_starts_the_batch(remaining, callers):
    """A job whose delay passes before its thread waits takes a free slot at once, and does not wait for another job.

    With a deadline it does not wait until that either.
    """
    batcher = Batcher(1, execute_all, QueueLimits(12, 1.0, 8, 0.01), RecordingObserver())
    with ThreadPoolExecutor(callers) as threads:
        futures = [threads.submit(batcher.run, NamedJob(str(i)), SlowToWaitCall(remaining)) for i in range(callers)]
        _, waiting = wait(futures, PATIENCE)
        batcher.stop()
    assert not waiting
    assert outcomes(futures) == [str(i) for i in range(callers)]
