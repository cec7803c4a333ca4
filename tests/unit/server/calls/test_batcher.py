"""The batcher: who computes when, with whom, and what becomes of those who leave, fail, or find no room."""

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from poolrpc_server.calls.batcher import PRIORITIES, STRIDES, Batcher, FullError, QueueLimits, StoppedError

PATIENCE = 60
"""Seconds after which a test that waits has failed."""


@dataclass(frozen=True, eq=False)
class Work:
    """A job whose answer is its name."""

    name: str
    key: str | None = "key"
    nbytes: int = 1
    seconds: float = 0.0

    def record_duration(self, seconds):
        """Learn nothing."""


class Left(Exception):  # noqa: N818 - it isn't an error of anybody's
    """What a caller that left is told."""


class Person:
    """A waiter who leaves when a test says so.

    Attributes:
        waits: Set once it has found no free slot and waits.

    """

    def __init__(self, left=None, error=None):
        self.waits = threading.Event()
        self._left, self._error, self._callbacks = left, error, []
        self._lock = threading.Lock()

    def remaining(self):
        """Give the seconds that it waits, where it was made with some."""
        return self._left

    def raise_if_cancelled(self):
        """Raise where it has left."""
        if self._error is not None:
            raise self._error

    def add_done_callback(self, callback):
        """Keep what is to be called."""
        with self._lock:
            self._callbacks.append(callback)
            here = self._error is None
        self.waits.set()
        return here

    def leave(self, error=None):
        """Leave, which tells those who wanted to know."""
        with self._lock:
            self._error = error or Left()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()


class Hasty(Person):
    """One that waits for a moment."""

    def __init__(self, seconds):
        super().__init__()
        self._until = time.monotonic() + seconds

    def remaining(self):
        """Give what is left of the moment."""
        return self._until - time.monotonic()

    def raise_if_cancelled(self):
        """Raise after it."""
        if self.remaining() <= 0:
            raise TimeoutError


class Silent(Person):
    """One that tells nobody when it leaves, and is found out when it is asked."""

    def add_done_callback(self, _):
        """Keep nothing."""
        return super().add_done_callback(lambda: None)


class Observer:
    """What was told."""

    def __init__(self):
        self.waited, self.left = [], []

    def queued(self, seconds):
        """Keep the time that a job waited."""
        self.waited.append(seconds)

    def cancelled(self, stage):
        """Keep where a waiter left."""
        self.left.append(stage)


class Room:
    """A batcher, the threads of those who come, and what is executed: names of jobs, batch by batch.

    Attributes:
        fails: Names of jobs, with what executing them raises.
        held: Names of jobs whose execution waits until it is let go, with the events of its begin and its letting go.

    """

    def __init__(self, slots=1, **bounds):
        self.observer, self.slots = Observer(), slots
        self.batches, self.threads, self.fails, self.held = [], {}, {}, {}
        self.batcher = Batcher(slots, self.execute, QueueLimits(**bounds), self.observer)
        self._callers = ThreadPoolExecutor(128)

    def execute(self, jobs):
        """Answer each job with its name, unless one is held or fails."""
        names = [job.name for job in jobs]
        self.batches.append(names)
        for name in names:
            self.threads[name] = threading.get_ident()
            if name in self.held:
                begun, let_go = self.held[name]
                begun.set()
                assert let_go.wait(PATIENCE)
            if name in self.fails:
                raise self.fails[name]
        return names

    def hold(self, name):
        """Hold a job up once it is executed."""
        self.held[name] = threading.Event(), threading.Event()

    def begun(self, name):
        """Wait until a job that is held is being executed."""
        assert self.held[name][0].wait(PATIENCE)

    def let_go(self, name):
        """Hold a job up no longer."""
        self.held[name][1].set()

    def come(self, job, person=None, priority=1, **options):
        """Have a job come, in a thread of its own; give the future of its answer."""
        return self._callers.submit(self.batcher.run, job, person or Person(), priority, **options)

    def wait(self, *jobs, person=None, priority=1, **options):
        """Have jobs come one after the other, each of which is seen to wait; give the futures of their answers."""
        futures = []
        for job in jobs:
            waiter = person or Person()
            futures.append(self.come(job, waiter, priority, **options))
            assert waiter.waits.wait(PATIENCE)
        return futures

    def occupy(self, name="busy"):
        """Take a slot by a job that is held."""
        self.hold(name)
        future = self.come(Work(name, key=None))
        self.begun(name)
        return future

    def free(self):
        """Count the slots that are free."""
        free = self.batcher.borrow(1000)
        self.batcher.give_back(free)
        return free

    def close(self):
        """Let all go and end the threads."""
        for _, let_go in self.held.values():
            let_go.set()
        self._callers.shutdown()


@pytest.fixture
def room():
    """Give the way to make rooms, which are closed at the end."""
    made = []

    def make(slots=1, **bounds):
        made.append(Room(slots, **bounds))
        return made[-1]

    yield make
    for each in made:
        each.close()
        # Whatever happened there: every slot is free, and nobody waits.
        assert each.batcher.waiting() == [0] * PRIORITIES
        assert each.batcher.age() == 0.0
        assert each.free() == each.slots


def answers(futures):
    """Give what each came to: its value, or the class of what it raised."""
    ended = []
    for future in futures:
        error = future.exception(PATIENCE)
        ended.append(future.result() if error is None else type(error))
    return ended


def jobs(names, **more):
    """Give a job for each letter."""
    return [Work(name, **more) for name in names]


def test_a_lone_job_is_executed_at_once_by_its_own_thread(room):
    """Where a slot is free nobody is woken: the caller's thread computes, and has not waited."""
    made = room()
    person = Person()
    assert made.batcher.run(Work("a"), person) == "a"
    assert made.threads["a"] == threading.get_ident()
    assert not person.waits.is_set()
    assert made.observer.waited == [0.0]


def test_a_lone_job_that_nobody_waits_for_is_not_executed(room):
    """The waiter is asked before anything is computed, and the slot is free again."""
    made = room()
    with pytest.raises(Left):
        made.batcher.run(Work("a"), Person(error=Left()))
    assert made.batches == []
    assert made.free() == 1


def test_a_lone_job_that_fails_leaves_its_seat(room):
    """What executing raises is the caller's, and the next one finds the slot free."""
    made = room()
    made.fails["a"] = KeyError("a")
    with pytest.raises(KeyError):
        made.batcher.run(Work("a"), Person())
    assert made.batcher.run(Work("b"), Person()) == "b"


def test_each_seat_is_an_execution_at_a_time(room):
    """With two slots two jobs are executed side by side, and a third waits."""
    made = room(2)
    futures = [made.occupy("x"), made.occupy("y"), *made.wait(Work("a"))]
    assert made.batcher.waiting() == [0, 1, 0]
    made.let_go("y")
    assert answers(futures[1:]) == ["y", "a"]
    made.let_go("x")
    assert answers(futures[:1]) == ["x"]


def test_jobs_gather_while_every_seat_is_taken(room):
    """What came meanwhile and can share is one batch, in order, computed by the first of them; each has its answer."""
    made = room()
    made.occupy()
    futures = made.wait(*jobs("abc"))
    made.let_go("busy")
    assert answers(futures) == ["a", "b", "c"]
    assert made.batches == [["busy"], ["a", "b", "c"]]
    assert len(made.observer.waited) == 4
    assert min(made.observer.waited[1:]) > 0


def test_keys_take_turns(room):
    """A key that has had a batch goes behind the others, whatever more of it waits."""
    made = room(batch_bytes=2)
    made.occupy()
    futures = made.wait(*jobs("abcde", key="1"), *jobs("ABC", key="2"), *jobs("x", key="3"))
    made.let_go("busy")
    assert answers(futures) == list("abcdeABCx")
    assert made.batches[1:] == [["a", "b"], ["A", "B"], ["x"], ["c", "d"], ["C"], ["e"]]


def test_who_has_waited_for_long_goes_first(room):
    """What has waited for half of what may wait is next, whichever key's turn it would be."""
    made = room(seconds=1e-9, waiting=100)
    made.occupy("x")
    futures = made.wait(*jobs("abc", key="k", nbytes=2**20), *jobs("d", key="l"), admitted=True)
    made.let_go("x")
    assert sorted(answers(futures)) == ["a", "b", "c", "d"]
    assert made.batches == [["x"], ["a", "b"], ["c"], ["d"]]


def test_a_batch_is_short(room):
    """Jobs that take their time by themselves aren't put together, though they have a key in common."""
    made = room(seconds=10.0)
    made.occupy("x")
    futures = made.wait(*jobs("abc", seconds=1.0))
    made.let_go("x")
    assert sorted(answers(futures)) == ["a", "b", "c"]
    assert made.batches == [["x"], ["a"], ["b"], ["c"]]


def test_a_batch_is_bounded_in_bytes_but_takes_one_job_of_any_size(room):
    """Jobs are taken in order while they fit; one that is larger than a batch goes by itself."""
    made = room(batch_bytes=10)
    made.occupy()
    sizes = [4, 6, 1, 11, 10, 3, 3]
    futures = made.wait(*[Work(str(i), nbytes=size) for i, size in enumerate(sizes)])
    made.let_go("busy")
    assert answers(futures) == list("0123456")
    assert made.batches[1:] == [["0", "1"], ["2"], ["3"], ["4"], ["5", "6"]]


def test_a_job_without_a_key_goes_alone(room):
    """Such jobs take turns like keys of their own."""
    made = room()
    made.occupy()
    futures = made.wait(*jobs("a"), *jobs("xy", key=None), *jobs("b"))
    made.let_go("busy")
    assert answers(futures) == list("axyb")
    assert made.batches[1:] == [["a", "b"], ["x"], ["y"]]


def test_priorities_share_by_strides(room):
    """Of thirteen batches nine are of the first level, three of the second, one of the last: none waits for ever."""
    made = room()
    made.occupy()
    futures = []
    for level in reversed(range(PRIORITIES)):
        futures += made.wait(*[Work(f"{level}{i}", key=None) for i in range(20)], priority=level)
    made.let_go("busy")
    answers(futures)
    order = [name[0] for (name,) in made.batches[1:]]
    assert Counter(order[:13]) == {"0": 9, "1": 3, "2": 1}
    assert Counter(order[13:26]) == {"0": 9, "1": 3, "2": 1}
    assert order[0] == "0"


def test_an_urgent_job_goes_before_those_that_wait(room):
    """What is more urgent goes first, however many less urgent ones came before."""
    made = room()
    made.occupy()
    futures = made.wait(*jobs("abc", key=None), priority=2) + made.wait(*jobs("xyz", key=None), priority=1)
    futures += made.wait(*jobs("u", key=None), priority=0)
    made.let_go("busy")
    assert answers(futures) == list("abcxyzu")
    assert made.batches[1] == ["u"]
    assert [name for (name,) in made.batches[2:5]] == ["x", "y", "z"]


@pytest.mark.parametrize(("alone", "late"), [(1, 2), (2, 1), (2, 0), (0, 2)])
def test_a_level_that_was_alone_for_long_owes_nothing(room, alone, late):
    """A level's turns while the others wanted none don't count against it when another one comes."""
    made = room(waiting=100)
    made.occupy()
    futures = made.wait(*[Work(f"early{i}", key=None) for i in range(60)], priority=alone)
    made.hold("early59")
    made.let_go("busy")
    made.begun("early59")
    # Nothing waits. Then the others come, and both have their share from the start.
    for level in (late, alone):
        futures += made.wait(*[Work(f"{level}", key=None) for _ in range(20)], priority=level)
    made.let_go("early59")
    answers(futures)
    order = [name for (name,) in made.batches[61:]]
    ratio = max(STRIDES[alone], STRIDES[late]) // min(STRIDES[alone], STRIDES[late])
    assert Counter(order[: ratio + 1])[str(max(alone, late))] == 1


def test_each_level_is_bounded_by_count(room):
    """A full level refuses and says how full it is; others have room."""
    made = room(waiting=2)
    made.occupy()
    futures = made.wait(*jobs("ab"))
    with pytest.raises(FullError) as raised:
        made.batcher.run(Work("c"), Person())
    assert (raised.value.what, raised.value.limit, raised.value.actual) == ("calls", 2, 3)
    with pytest.raises(FullError):
        made.batcher.check_room(1)
    made.batcher.check_room(0)
    futures += made.wait(Work("d"), priority=0)
    assert made.batcher.waiting() == [1, 2, 0]
    made.let_go("busy")
    assert answers(futures) == ["a", "b", "d"]
    made.batcher.check_room(1)


def test_each_level_is_bounded_by_seconds_of_work(room):
    """Seconds are of all slots together; a job is let in until they are reached, whatever it takes itself."""
    made = room(2, seconds=1.0)
    made.occupy("x")
    made.occupy("y")
    futures = made.wait(Work("a", seconds=1.5))
    made.batcher.check_room(1)
    futures += made.wait(Work("b", seconds=0.75))
    with pytest.raises(FullError) as raised:
        made.batcher.run(Work("c", seconds=0.0), Person())
    error = raised.value
    assert (error.what, error.limit, error.actual, error.delay) == ("seconds", 1.0, 1.125, 1.125)
    made.let_go("x")
    made.let_go("y")
    assert sorted(answers(futures)) == ["a", "b"]
    made.batcher.check_room(1)


def test_one_job_of_any_size_finds_an_empty_level(room):
    """A job that takes longer than the bound isn't refused for ever: where nothing waits it may."""
    made = room(seconds=1.0)
    made.occupy()
    futures = made.wait(Work("a", seconds=100.0))
    with pytest.raises(FullError):
        made.batcher.run(Work("b"), Person())
    made.let_go("busy")
    assert answers(futures) == ["a"]


def test_what_was_let_in_is_not_held_to_the_bounds(room):
    """A part of something that has begun waits in a full level."""
    made = room(waiting=1, seconds=1.0)
    made.occupy()
    futures = made.wait(Work("a", seconds=1.0))
    futures += made.wait(*jobs("bc", seconds=5.0), admitted=True)
    assert made.batcher.waiting() == [0, 3, 0]
    made.let_go("busy")
    assert answers(futures) == ["a", "b", "c"]


def test_a_waiter_that_leaves_the_queue_frees_its_place_at_once(room):
    """It is told so while the slot is still taken, its place is another one's, and it isn't computed."""
    made = room(waiting=2)
    made.occupy()
    person = Person()
    kept = made.wait(Work("a"))
    (gone,) = made.wait(Work("b"), person=person)
    person.leave()
    assert answers([gone]) == [Left]
    assert made.batcher.waiting() == [0, 1, 0]
    kept += made.wait(Work("c"))
    made.let_go("busy")
    assert answers(kept) == ["a", "c"]
    assert made.batches[1:] == [["a", "c"]]
    assert made.observer.left == ["queue"]


def test_a_waiter_that_had_left_before_it_came_is_not_queued_for_long(room):
    """Where leaving can't be told of any more, it is found out."""
    made = room()
    made.occupy()
    with pytest.raises(Left):
        made.batcher.run(Work("a"), Person(error=Left()))
    assert made.batcher.waiting() == [0, 0, 0]
    made.let_go("busy")


def test_a_deadline_that_passes_in_the_queue_is_told_at_once(room):
    """Nothing of it is executed, although the slot is never free before it is told."""
    made = room()
    made.occupy()
    with pytest.raises(TimeoutError):
        made.batcher.run(Work("late"), Person(left=0.0, error=TimeoutError()))
    assert made.observer.left == ["queue"]
    made.let_go("busy")
    assert made.batcher.run(Work("a"), Person()) == "a"
    assert ["late"] not in made.batches


def test_a_deadline_ends_the_wait_by_itself(room):
    """Nobody has to tell of a deadline: who waits looks at the time that is left."""
    made = room()
    made.occupy()
    assert answers(made.wait(Work("late"), person=Hasty(0.05))) == [TimeoutError]
    assert made.batches == [["busy"]]


def held_batch(made, names="abc", people=None):
    """Bring jobs into one batch, the first of which is held; give the futures."""
    made.occupy()
    made.hold(names[0])
    futures = []
    for name in names:
        futures += made.wait(Work(name), person=(people or {}).get(name))
    made.let_go("busy")
    made.begun(names[0])
    return futures


def test_a_waiter_that_leaves_its_batch_is_gone_at_once_and_nobody_notices(room):
    """It is told while the batch is still computed; the others have their answers."""
    made, person = room(), Person()
    first, gone, last = held_batch(made, people={"b": person})
    person.leave()
    assert answers([gone]) == [Left]
    made.let_go("a")
    assert answers([first, last]) == ["a", "c"]
    assert made.observer.left == ["compute"]


def test_a_leader_that_leaves_still_computes_for_the_others(room):
    """Its thread is the batch's: whoever else is in it has an answer, once."""
    made, person = room(), Person()
    first, *others = held_batch(made, people={"a": person})
    person.leave()
    made.let_go("a")
    assert answers(others) == ["b", "c"]
    assert answers([first]) == ["a"]
    assert made.batches == [["busy"], ["a", "b", "c"]]


def test_one_that_left_unheard_is_left_out_of_its_batch(room):
    """Waiters are asked once more when their turn comes: the leader too, whose thread then computes for the others."""
    for name in "abc":
        made, person = room(), Silent()
        made.occupy()
        futures = []
        for each in "abc":
            futures += made.wait(Work(each), person=person if each == name else None)
        person.leave()
        made.let_go("busy")
        assert answers(futures) == [Left if each == name else each for each in "abc"]
        assert made.batches[1:] == [[each for each in "abc" if each != name]]
        assert made.observer.left == ["queue"]


def test_a_batch_that_everybody_left_unheard_is_not_executed(room):
    """Nothing is computed for nobody, and the slot goes on to who is next."""
    made = room()
    made.occupy()
    people = [Silent(), Silent()]
    futures = [made.wait(Work(str(i)), person=person)[0] for i, person in enumerate(people)]
    for person in people:
        person.leave()
    futures += made.wait(Work("x", key="other"))
    made.let_go("busy")
    assert answers(futures) == [Left, Left, "x"]
    assert made.batches == [["busy"], ["x"]]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("culprit", "abc")
def test_of_a_batch_that_fails_each_is_tried_alone(room, culprit, error):
    """Only who is at fault fails, whatever was raised and wherever in the batch it is."""
    made = room()
    made.fails[culprit] = error()
    made.occupy()
    futures = made.wait(*jobs("abc"))
    made.let_go("busy")
    assert answers(futures) == [error if each == culprit else each for each in "abc"]
    assert made.batches[1:] == [["a", "b", "c"], ["a"], ["b"], ["c"]]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_execution_with_another_number_of_answers_hangs_nobody(number):
    """Answers that can't be told apart are nobody's: each job is tried alone, and fails there if need be."""
    begun, let_go = threading.Event(), threading.Event()

    def execute(batch):
        if batch[0].name == "busy":
            begun.set()
            assert let_go.wait(PATIENCE)
        return [job.name for job in batch] if len(batch) == 1 else ["?"] * number

    batcher = Batcher(1, execute, QueueLimits())
    with ThreadPoolExecutor(3) as callers:
        people = [Person(), Person()]
        futures = [callers.submit(batcher.run, Work("busy"), Person())]
        assert begun.wait(PATIENCE)
        for name, person in zip("ab", people, strict=True):
            futures.append(callers.submit(batcher.run, Work(name), person))
            assert person.waits.wait(PATIENCE)
        let_go.set()
        assert answers(futures) == ["busy", "a", "b"]


def test_stopping_fails_what_waits_and_finishes_what_is_executed(room):
    """Those in a slot, and in its batch, have their answers; those that wait, and come, are told."""
    made = room()
    futures = held_batch(made, "ab")
    waiting = made.wait(Work("c"), priority=0) + made.wait(Work("d", key=None), priority=2)
    made.batcher.stop()
    assert answers(waiting) == [StoppedError, StoppedError]
    with pytest.raises(StoppedError):
        made.batcher.run(Work("e"), Person())
    made.let_go("a")
    assert answers(futures) == ["a", "b"]


def test_after_stopping_a_free_seat_is_nobodys(room):
    """What comes is failed even where it could be executed at once."""
    made = room()
    made.batcher.stop()
    for key in ("key", None):
        with pytest.raises(StoppedError):
            made.batcher.run(Work("a", key=key), Person())
    assert made.batches == []


DELAY = 3600.0
"""Longer than any test."""


def test_with_a_delay_a_job_waits_for_others_until_a_batch_is_full(room):
    """The slot stays free until there are bytes enough; then all of them are one batch."""
    made = room(batch_bytes=3, delay=DELAY)
    futures = made.wait(*jobs("ab"))
    assert made.batches == []
    assert made.free() == 1
    assert made.batches == []
    futures += made.wait(*jobs("c"))
    assert answers(futures) == ["a", "b", "c"]
    assert made.batches == [["a", "b", "c"]]


def test_with_a_delay_what_can_share_nothing_waits_for_nothing(room):
    """A job without a key, and one that fills a batch, have the free slot at once, and a key that is full its turn."""
    made = room(batch_bytes=3, delay=DELAY)
    futures = made.wait(*jobs("ab"))
    assert made.batcher.run(Work("x", key=None), Person()) == "x"
    assert made.batcher.run(Work("y", key="other", nbytes=3), Person()) == "y"
    assert made.batcher.waiting() == [0, 2, 0]
    futures += made.wait(*jobs("c"))
    assert answers(futures) == ["a", "b", "c"]


def test_with_a_delay_a_job_goes_when_it_has_passed(room):
    """Alone as it is."""
    made = room(delay=0.05)
    person = Person(left=DELAY)
    assert made.batcher.run(Work("a"), person) == "a"
    assert person.waits.is_set()
    assert made.observer.waited[0] >= 0.05


def test_with_a_delay_that_has_passed_a_job_waits_for_a_seat(room):
    """The delay ends in a queue; then a slot that is left is taken, with whoever came meanwhile."""
    made = room(delay=0.05)
    made.occupy()
    futures = made.wait(*jobs("ab"))
    # One that gives up later than the others' delay ends: when it is told, they wait for the slot alone.
    assert answers(made.wait(Work("z"), person=Hasty(0.1))) == [TimeoutError]
    made.let_go("busy")
    assert answers(futures) == ["a", "b"]
    assert made.batches == [["busy"], ["a", "b"]]


def test_a_deadline_before_the_delay_ends_the_wait(room):
    """Who can't wait for others as long is told at its own time."""
    made = room(delay=DELAY)
    with pytest.raises(Left):
        made.batcher.run(Work("a"), Person(left=0.0, error=Left()))
    assert made.batcher.waiting() == [0, 0, 0]


def test_free_seats_can_be_borrowed(room):
    """As many as are free, and no more; given back, they wake who waits."""
    made = room(3)
    made.occupy()
    assert made.batcher.borrow(1) == 1
    assert made.batcher.borrow(5) == 1
    assert made.batcher.borrow(5) == 0
    futures = made.wait(*jobs("a", key=None), *jobs("b", key=None))
    made.hold("a")
    made.batcher.give_back(1)
    made.begun("a")
    assert made.batcher.waiting() == [0, 1, 0]
    made.batcher.give_back(1)
    assert answers(futures[1:]) == ["b"]
    made.let_go("a")
    assert answers(futures[:1]) == ["a"]


def test_the_age_is_of_the_one_that_has_waited_longest(room):
    """Nobody: 0. It grows, whatever comes later, and ends with who leaves."""
    made = room()
    made.occupy()
    assert made.batcher.age() == 0.0
    before = time.monotonic()
    person = Person()
    futures = made.wait(Work("a"), person=person, priority=2)
    between = time.monotonic()
    futures += made.wait(Work("b"), priority=0)
    age, now = made.batcher.age(), time.monotonic()
    assert now - between - 0.001 <= age <= now - before
    person.leave()
    assert made.batcher.age() <= time.monotonic() - between
    made.let_go("busy")
    assert answers(futures) == [Left, "b"]


SEATS, LIVES, JOBS = 3, 24, 60


def try_each(batch):
    """Answer each job with its name, and blame one that is bad by it where it is alone."""
    for job in batch:
        if "bad" in job.name:
            raise ValueError(job.name if len(batch) == 1 else "one of several")
    return [job.name for job in batch]


def live(batcher, drawn, number, here):
    """Come with one job after the other, and have others leave; give how each job ended."""
    for i in range(JOBS):
        name = f"{number}-{i}{'-bad' * (drawn.random() < 0.1)}"
        job = Work(name, drawn.choice(["a", "b", None]), drawn.randint(1, 10), drawn.choice([0.0, 0.1, 0.5]))
        here[number] = person = Person(error=Left() if drawn.random() < 0.05 else None)
        if drawn.random() < 0.3 and (other := here.get(drawn.randrange(LIVES))) is not None:
            other.leave()
        if drawn.random() < 0.2:
            batcher.give_back(batcher.borrow(drawn.randint(1, SEATS)))
        try:
            got = batcher.run(job, person, drawn.randrange(PRIORITIES), admitted=drawn.random() < 0.1)
        except (FullError, Left) as error:
            yield type(error).__name__
        except ValueError as error:
            yield "bad" if str(error) == name else f"{name}: {error}"
        else:
            yield "right" if got == name and "bad" not in name else f"{name}: {got}"


@pytest.mark.parametrize("delay", [0.0, 0.0005])
@pytest.mark.parametrize("seed", range(4))
def test_each_job_ends_once_whatever_happens_around_it(seed, delay):
    """Many threads with jobs of all kinds, some of which fail, leave or find no room: no wake-up is lost.

    Each ends with its own answer, its own error, its own leaving, or a refusal; then every slot is free.
    """
    batcher, here = Batcher(SEATS, try_each, QueueLimits(12, 1.0, 8, delay), Observer()), {}
    with ThreadPoolExecutor(LIVES) as lives:
        futures = [
            lives.submit(lambda *own: list(live(batcher, *own)), random.Random(seed * LIVES + number), number, here)  # noqa: S311 - not for secrets
            for number in range(LIVES)
        ]
        ended = Counter(end for future in futures for end in future.result(PATIENCE))
    assert set(ended) <= {"right", "bad", "Left", "FullError"}
    assert ended.total() == LIVES * JOBS
    assert min(ended["right"], ended["bad"], ended["Left"]) > 0
    assert batcher.waiting() == [0] * PRIORITIES
    assert batcher.age() == 0.0
    assert batcher.borrow(100) == SEATS
