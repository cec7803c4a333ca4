"""Whose turn it is: jobs that find every slot taken wait here, and those that can share one execution do.

There is no thread here and no timer. Who asks computes, in its own thread, if a slot is free; else it waits. Who leaves
a slot wakes the first of the next batch, which computes for all of that batch. So a batch is what gathered while every
slot was taken, and a caller that is alone pays for nothing of it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

PRIORITIES = 3
"""Levels, 0 first."""

STRIDES = (1, 3, 9)
"""Of thirteen batches that all levels want they have nine, three and one: nobody waits for ever."""


BATCH_SECONDS = 0.005
"""Of a batch, by estimate: where jobs take longer they share next to nothing, and the first would wait for the last."""


class Job(Protocol):
    """What is to be executed.

    Attributes:
        key: What it shares with the jobs that it may be executed with. None: alone.
        nbytes: What it counts for in a batch.
        seconds: How long it will take, by estimate.

    """

    @property
    def key(self) -> Hashable: ...  # noqa: D102 - described above
    @property
    def nbytes(self) -> int: ...  # noqa: D102
    @property
    def seconds(self) -> float: ...  # noqa: D102

    def record_duration(self, seconds: float) -> None:
        """Learn how long it had a slot, when it had one alone."""


class Waiter(Protocol):
    """Who waits for a job."""

    def remaining(self) -> float | None:
        """Give the seconds that it waits yet, None for no limit."""

    def raise_if_cancelled(self) -> None:
        """Raise if nobody waits any more."""

    def add_done_callback(self, callback: Callable[[], None]) -> bool:
        """Have something called when nobody waits any more; False where that is so already."""


class Observer(Protocol):
    """What is told of all that happens."""

    def queued(self, seconds: float) -> None:
        """A job waited for so long."""

    def cancelled(self, stage: str) -> None:
        """A waiter left."""


J = TypeVar("J", bound=Job)


class FullError(Exception):
    """A level has no room for another job.

    Attributes:
        what: What there is too much of: "calls" or "seconds" of work.
        limit: Of that.
        actual: What it would be.
        delay: Seconds until what waits will have been executed, by estimate.

    """

    def __init__(self, what: str, limit: float, actual: float, delay: float) -> None:
        super().__init__(what)
        self.what, self.limit, self.actual, self.delay = what, limit, actual, delay


class StoppedError(Exception):
    """The batcher was stopped before the job's turn came."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What may wait, and how it is put together.

    Attributes:
        waiting: Jobs of a level.
        seconds: Work of a level's jobs, by estimate, spread over the slots.
        batch_bytes: Of a batch.
        delay: Seconds that a job with a key waits for others although a slot is free.

    """

    waiting: int = 64
    seconds: float = 1.0
    batch_bytes: int = 2 * 2**20
    delay: float = 0.0


class _State(Enum):
    WAITING = "queue"
    FOLLOWING = "compute"  # in another one's batch
    LEADING = "leading"
    DONE = "done"


class Pending(Generic[J]):
    """A job that waits, with its answer when it comes; its thread is woken once, by the state that it then has."""

    __slots__ = (
        "batch",
        "entered",
        "error",
        "job",
        "level",
        "ripe",
        "seconds",
        "slotted",
        "state",
        "value",
        "waiter",
        "woken",
    )

    def __init__(self, job: J, waiter: Waiter, level: _Level[J], delay: float) -> None:
        self.job, self.waiter, self.level = job, waiter, level
        self.seconds = job.seconds  # as it is now: it is learnt
        self.entered = time.monotonic()
        self.ripe = self.entered + delay
        self.slotted = 0.0
        self.state = _State.WAITING
        self.batch: list[Pending[J]] = []
        self.value: Any = None
        self.error: BaseException | None = None
        self.woken = threading.Lock()
        self.woken.acquire()

    def done(self, value: object, error: BaseException | None = None) -> None:
        """Hand over the answer and wake the thread that waits for it."""
        self.state, self.value, self.error = _State.DONE, value, error
        self.woken.release()


class _Level(Generic[J]):
    """The jobs of one priority, by key; keys take turns."""

    def __init__(self, stride: int) -> None:
        self.keys: dict[Hashable, deque[Pending[J]]] = {}
        self.count = 0
        self.seconds = 0.0
        self.stride = stride
        self.passed = 0

    def add(self, entry: Pending[J]) -> None:
        # A job without a key takes turns like a key of its own.
        key = entry if entry.job.key is None else entry.job.key
        self.keys.setdefault(key, deque()).append(entry)
        self.count += 1
        self.seconds += entry.seconds

    def remove(self, entry: Pending[J]) -> None:
        key = entry if entry.job.key is None else entry.job.key
        entries = self.keys[key]
        entries.remove(entry)
        if not entries:
            del self.keys[key]
        self._gone(entry)

    def take(self, key: Hashable, most: int) -> list[Pending[J]]:
        """Give a key's next jobs, of `most` bytes and BATCH_SECONDS or one job; the key goes to the end of the line."""
        entries = self.keys.pop(key)
        batch: list[Pending[J]] = []
        nbytes, seconds = 0, 0.0
        while entries and (
            not batch or (nbytes + entries[0].job.nbytes <= most and seconds + entries[0].seconds <= BATCH_SECONDS)
        ):
            nbytes, seconds = nbytes + entries[0].job.nbytes, seconds + entries[0].seconds
            batch.append(entries.popleft())
            self._gone(batch[-1])
        if entries:
            self.keys[key] = entries
        return batch

    def _gone(self, entry: Pending[J]) -> None:
        self.count -= 1
        self.seconds = self.seconds - entry.seconds if self.count else 0.0


class Batcher(Generic[J]):
    """So many slots, and the jobs that wait for one."""

    def __init__(
        self,
        slots: int,
        execute: Callable[[Sequence[J]], list[Any]],
        bounds: QueueLimits,
        observer: Observer | None = None,
    ) -> None:
        """Make one with every slot free.

        Args:
            slots: Executions at a time.
            execute: Gives the answers to jobs of one key, in order; or raises, which blames none of them: where
                there are several, each is then executed alone.
            bounds: What may wait.
            observer: Are told what happens, where there are any.

        """
        self._slots = self._free = slots
        self._execute = execute
        self._bounds = bounds
        self._observer = observer
        self._levels: list[_Level[J]] = [_Level(stride) for stride in STRIDES]
        self._turn = 0  # what the level of the last batch had passed
        self._stopped = False
        self._lock = threading.Lock()

    def run(self, job: J, waiter: Waiter, priority: int = 1, *, admitted: bool = False) -> Any:  # noqa: ANN401 - whatever execute gives
        """Execute a job when its turn comes, with others of its key that wait.

        Args:
            job: The job.
            waiter: Who waits for it, and perhaps leaves: then the job has its place no longer.
            priority: Its level.
            admitted: Whether it is part of something that was let in: it isn't held to the bounds.

        Raises:
            FullError: Its level is full.
            StoppedError: The batcher is being stopped.
            Exception: What the waiter's raise_if_cancelled, or executing the job, raised.

        """
        entry = None
        with self._lock:
            if self._stopped:
                raise StoppedError
            # While a slot is free nothing waits that is ripe.
            if self._free and not (self._bounds.delay and job.key is not None):
                self._free -= 1
            else:
                entry = self._enter(job, waiter, priority, admitted=admitted)
        if entry is None:
            started = time.monotonic()
            try:
                self._arrived(waiter)
                return self._execute([job])[0]
            finally:
                self.give_back(1)
                job.record_duration(time.monotonic() - started)
        if not waiter.add_done_callback(lambda: self._leave(entry)):
            self._leave(entry)
        self._wait(entry)
        if entry.state is _State.LEADING:
            self._lead(entry)
        if entry.error is not None:
            raise entry.error
        return entry.value

    def borrow(self, most: int) -> int:
        """Take up to so many slots that are free, for as long as something that has one is spread over more."""
        with self._lock:
            taken = min(self._free, most)
            self._free -= taken
            return taken

    def give_back(self, slots: int) -> None:
        """Leave slots to whoever is next."""
        with self._lock:
            self._free += slots
            self._dispatch()

    def check_room(self, priority: int) -> None:
        """See that a level has room for another job, whatever that takes: else the cheap ones alone would come in.

        Raises:
            FullError: It has none.

        """
        level, bounds = self._levels[priority], self._bounds
        if level.count >= bounds.waiting:
            raise FullError("calls", bounds.waiting, level.count + 1, self._delay())
        if level.count and level.seconds >= bounds.seconds * self._slots:
            raise FullError("seconds", bounds.seconds, level.seconds / self._slots, self._delay())

    def waiting(self) -> list[int]:
        """Count the jobs that wait, of each level."""
        return [level.count for level in self._levels]

    def age(self) -> float:
        """Give the seconds that the one that has waited longest has waited."""
        with self._lock:
            first = min((each[0].entered for level in self._levels for each in level.keys.values()), default=None)
        return 0.0 if first is None else time.monotonic() - first

    def stop(self) -> None:
        """Fail what waits, and whatever comes; what is being executed is finished."""
        with self._lock:
            self._stopped = True
            for level in self._levels:
                for entry in [each for entries in level.keys.values() for each in entries]:
                    level.remove(entry)
                    entry.done(None, StoppedError())

    def _arrived(self, waiter: Waiter) -> None:
        try:
            waiter.raise_if_cancelled()
        except Exception:
            if self._observer is not None:
                self._observer.cancelled("arrival")
            raise
        if self._observer is not None:
            self._observer.queued(0.0)

    def _enter(self, job: J, waiter: Waiter, priority: int, *, admitted: bool) -> Pending[J]:
        level = self._levels[priority]
        if not admitted:
            self.check_room(priority)
        if not level.count:
            # It has no claim on the turns that it didn't want, nor have others on those that it had while it was alone.
            level.passed = self._turn + level.stride
        entry = Pending(job, waiter, level, self._bounds.delay if job.key is not None else 0.0)
        level.add(entry)
        self._dispatch()
        return entry

    def _wait(self, entry: Pending[J]) -> None:
        while True:
            left = entry.waiter.remaining()
            ripening = entry.ripe - time.monotonic() if self._bounds.delay else 0.0
            times = [max(0.0, left)] if left is not None else []
            if ripening > 0:
                times.append(ripening)
            # A lock's timeout is a C long of nanoseconds.
            if entry.woken.acquire(timeout=min(*times, threading.TIMEOUT_MAX) if times else -1):
                return
            if ripening > 0 and (left is None or ripening < left):
                with self._lock:
                    self._dispatch()
            else:
                self._leave(entry)

    def _leave(self, entry: Pending[J]) -> None:
        """Let a job go that nobody waits for, unless its own thread executes it or it is done."""
        with self._lock:
            state = entry.state
            if state not in (_State.WAITING, _State.FOLLOWING):
                return
            try:
                entry.waiter.raise_if_cancelled()
            except Exception as error:  # noqa: BLE001 - what it raises is the answer
                entry.done(None, error)
            else:
                return
            if state is _State.WAITING:
                entry.level.remove(entry)
        if self._observer is not None:
            self._observer.cancelled(state.value)

    def _dispatch(self) -> None:
        now = time.monotonic()
        while self._free and (batch := self._next()):
            self._free -= 1
            for entry in batch:
                entry.state = _State.FOLLOWING
            batch[0].state, batch[0].batch = _State.LEADING, batch
            batch[0].slotted = now
            batch[0].woken.release()

    def _next(self) -> list[Pending[J]]:
        found = [(level, key) for level in self._levels if level.count for key in self._ripe(level)]
        if not found:
            return []
        level, key = min(found, key=lambda each: each[0].passed)
        self._turn = level.passed
        level.passed += level.stride
        oldest, entries = min(level.keys.items(), key=lambda each: each[1][0].entered)
        if time.monotonic() - entries[0].entered > self._bounds.seconds / 2:
            # Those that come later to other keys would have it wait for longer than what was there when it came.
            key = oldest
        return level.take(key, self._bounds.batch_bytes)

    def _ripe(self, level: _Level[J]) -> Iterator[Hashable]:
        """Give the first key of a level whose jobs needn't wait for others, if there is one."""
        if not self._bounds.delay:
            yield next(iter(level.keys))
            return
        now = time.monotonic()
        for key, entries in level.keys.items():
            if entries[0].ripe <= now or sum(each.job.nbytes for each in entries) >= self._bounds.batch_bytes:
                yield key
                return

    def _lead(self, leader: Pending[J]) -> None:
        now = time.monotonic()
        try:
            wanted = [entry for entry in leader.batch if self._wanted(entry)]
            if self._observer is not None:
                for entry in wanted:
                    self._observer.queued(now - entry.entered)
            answers = self._answers([entry.job for entry in wanted])
        finally:
            # First of all, so that the next batch begins while this one's answers are given.
            self.give_back(1)
        if len(leader.batch) == 1:  # with the time that it took to wake
            leader.job.record_duration(time.monotonic() - leader.slotted)
        with self._lock:
            for entry, (value, error) in zip(wanted, answers, strict=True):
                if entry is leader:
                    entry.value, entry.error = value, error
                elif entry.state is _State.FOLLOWING:
                    entry.done(value, error)
        leader.batch = []

    def _wanted(self, entry: Pending[J]) -> bool:
        try:
            entry.waiter.raise_if_cancelled()
        except Exception as error:  # noqa: BLE001 - what it raises is the answer
            with self._lock:
                if entry.state is _State.LEADING:
                    entry.error = error
                elif entry.state is _State.FOLLOWING:
                    entry.done(None, error)
                else:
                    return False
            if self._observer is not None:
                self._observer.cancelled(_State.WAITING.value)
            return False
        return entry.state is not _State.DONE

    def _answers(self, jobs: list[J]) -> list[tuple[Any, BaseException | None]]:
        if not jobs:
            return []
        try:
            return [(value, None) for value, _ in zip(self._execute(jobs), jobs, strict=True)]
        except BaseException as error:  # noqa: BLE001 - whatever it is, those who wait are told of it
            if len(jobs) == 1:
                return [(None, error)]
        return [answer for job in jobs for answer in self._answers([job])]

    def _delay(self) -> float:
        return sum(level.seconds for level in self._levels) / self._slots
