"""The queue in front of the execution slots: pending jobs by priority and batch key, and the choice of the next batch.

Nothing here locks, waits or executes: the batcher does, and calls the queue under its lock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from poolrpc_server.calls.call import CallContext

PRIORITIES = 3
"""Number of priorities; 0 is the most urgent."""

STRIDES = (1, 3, 9)
"""Stride of each priority in stride scheduling: while all have jobs, 13 batches are divided 9 to 3 to 1."""


class Job(Protocol):
    """A unit of work to execute.

    Attributes:
        key: Batch key: jobs with equal keys may be executed together. None: the job is executed alone.
        nbytes: Size that counts towards a batch's limit, in bytes.
        seconds: Estimated duration, in seconds.

    """

    @property
    def key(self) -> Hashable: ...  # noqa: D102 - described above
    @property
    def nbytes(self) -> int: ...  # noqa: D102
    @property
    def seconds(self) -> float: ...  # noqa: D102

    def record_duration(self, seconds: float) -> None:
        """Record how long the job occupied a slot, if it was executed alone."""


J = TypeVar("J", bound=Job)


class QueueFullError(Exception):
    """The queue of a priority has no room for another job.

    Attributes:
        quantity: What exceeds its limit: "calls" or "seconds" (of estimated work).
        limit: The limit.
        actual: The value that exceeds it.
        wait: Estimated seconds until all jobs that are queued now will have been executed.

    """

    def __init__(self, quantity: str, limit: float, actual: float, wait: float) -> None:
        super().__init__(quantity)
        self.quantity, self.limit, self.actual, self.wait = quantity, limit, actual, wait


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Limits of the queue and of the batches taken from it.

    Attributes:
        max_queue: Maximum number of queued jobs of each priority.
        max_queue_seconds: Maximum estimated work of each priority's queued jobs, in seconds, divided among the slots.
        max_batch_bytes: Maximum size of a batch of several jobs, in bytes.
        max_queue_delay: Seconds that a job with a batch key waits for others although a slot is free.
        max_batch_seconds: Maximum estimated duration of a batch of several jobs, in seconds. Longer jobs gain next to
            nothing from a batch, and its first job would wait for the last.

    """

    max_queue: int = 64
    max_queue_seconds: float = 1.0
    max_batch_bytes: int = 2 * 2**20
    max_queue_delay: float = 0.0
    max_batch_seconds: float = 0.005


class State(Enum):
    """The state of a pending job; a value names the stage that is reported when the call is cancelled in it."""

    QUEUED = "queue"
    FOLLOWER = "compute"  # executed by the thread of its batch's first job
    LEADER = "lead"  # executes its batch
    DONE = "done"


class Pending(Generic[J]):
    """A queued job, and its result once there is one.

    Attributes:
        job: The job.
        context: The context of its call.
        priority: Its priority.
        seconds: Its estimated duration when it was queued; the job's own estimate changes with experience.
        queued_at: When it was queued, by the monotonic clock.
        ready_at: When it stops waiting for other jobs of its batch.
        started_at: When its batch got a slot, if it is the leader.
        state: Its state.
        batch: The jobs of its batch, itself first, if it is the leader.
        result: The result, once it is DONE.
        error: The exception, if it failed.
        wakeup: A lock that is released once, to wake the job's thread when it is LEADER or DONE.

    """

    def __init__(self, job: J, context: CallContext, priority: int, delay: float) -> None:
        self.job, self.context, self.priority = job, context, priority
        self.seconds = job.seconds
        self.queued_at = time.monotonic()
        self.ready_at = self.queued_at + delay
        self.started_at = 0.0
        self.state = State.QUEUED
        self.batch: list[Pending[J]] = []
        self.result: Any = None
        self.error: BaseException | None = None
        self.wakeup = threading.Lock()
        self.wakeup.acquire()

    @property
    def key(self) -> Hashable:
        """The batch key; a job without one is a key of its own, which no other job shares."""
        return self if self.job.key is None else self.job.key

    def lead(self, batch: list[Pending[J]], now: float) -> None:
        """Become the leader of a batch that got a slot, and wake the job's thread to execute it."""
        self.state, self.batch, self.started_at = State.LEADER, batch, now
        self.wakeup.release()

    def finish(self, result: object, error: BaseException | None = None) -> None:
        """Set the result or the error, and wake the job's thread."""
        self.state, self.result, self.error = State.DONE, result, error
        self.wakeup.release()


class _PriorityQueue(Generic[J]):
    """The pending jobs of one priority, by batch key; the keys take turns.

    Attributes:
        keys: The jobs of each key, oldest first; the first key is the next one to be taken.
        count: Number of jobs.
        seconds: Estimated duration of all jobs.
        stride: Added to `pass_value` with each batch.
        pass_value: Stride scheduling's "pass": the priority with the lowest one goes first.

    """

    def __init__(self, stride: int) -> None:
        self.keys: dict[Hashable, deque[Pending[J]]] = {}
        self.count = 0
        self.seconds = 0.0
        self.stride = stride
        self.pass_value = 0

    def append(self, pending: Pending[J]) -> None:
        self.keys.setdefault(pending.key, deque()).append(pending)
        self.count += 1
        self.seconds += pending.seconds

    def remove(self, pending: Pending[J]) -> None:
        jobs = self.keys[pending.key]
        jobs.remove(pending)
        if not jobs:
            del self.keys[pending.key]
        self._subtract(pending)

    def ready_key(self, limits: QueueLimits) -> Hashable | None:
        """Return the first key whose jobs need not wait for others; None: there is no such key."""
        if not limits.max_queue_delay:
            return next(iter(self.keys), None)
        now = time.monotonic()
        for key, jobs in self.keys.items():
            if jobs[0].ready_at <= now or sum(pending.job.nbytes for pending in jobs) >= limits.max_batch_bytes:
                return key
        return None

    def take(self, key: Hashable, limits: QueueLimits) -> list[Pending[J]]:
        """Remove and return a batch: one job of any size, or more within the limits; the key goes behind all others."""
        jobs = self.keys.pop(key)
        batch: list[Pending[J]] = []
        nbytes, seconds = 0, 0.0
        while jobs:
            pending = jobs[0]
            nbytes, seconds = nbytes + pending.job.nbytes, seconds + pending.seconds
            if batch and (nbytes > limits.max_batch_bytes or seconds > limits.max_batch_seconds):
                break
            batch.append(jobs.popleft())
            self._subtract(pending)
        if jobs:
            self.keys[key] = jobs
        return batch

    def _subtract(self, pending: Pending[J]) -> None:
        self.count -= 1
        # Zero for an empty queue, so that rounding errors do not accumulate.
        self.seconds = self.seconds - pending.seconds if self.count else 0.0


class Queue(Generic[J]):
    """The pending jobs of all priorities.

    Args:
        slots: Number of slots that execute the jobs.
        limits: Limits of the queue and of batches.

    """

    def __init__(self, slots: int, limits: QueueLimits) -> None:
        self._slots = slots
        self._limits = limits
        self._priorities: list[_PriorityQueue[J]] = [_PriorityQueue(stride) for stride in STRIDES]
        self._pass_value = 0  # that of the priority that had the last batch

    def check(self, priority: int) -> None:
        """Check that a priority has room for another job, whatever its duration.

        The duration does not count, because otherwise only short jobs would be accepted under load.

        Raises:
            QueueFullError: There is no room.

        """
        queue, limits = self._priorities[priority], self._limits
        if queue.count >= limits.max_queue:
            raise QueueFullError("calls", limits.max_queue, queue.count + 1, self._estimated_wait())
        if queue.count and queue.seconds >= limits.max_queue_seconds * self._slots:
            actual = queue.seconds / self._slots
            raise QueueFullError("seconds", limits.max_queue_seconds, actual, self._estimated_wait())

    def append(self, job: J, context: CallContext, priority: int) -> Pending[J]:
        """Add a job at the end of its priority and key."""
        queue = self._priorities[priority]
        if not queue.count:
            # A priority without jobs saves up no turns, and is not charged for those that it had while it was alone.
            queue.pass_value = self._pass_value + queue.stride
        pending = Pending(job, context, priority, self._limits.max_queue_delay if job.key is not None else 0.0)
        queue.append(pending)
        return pending

    def remove(self, pending: Pending[J]) -> None:
        """Remove a job."""
        self._priorities[pending.priority].remove(pending)

    def next_batch(self) -> list[Pending[J]]:
        """Remove and return the next batch; empty if no job is ready."""
        ready = [
            (queue, key)
            for queue in self._priorities
            if queue.count and (key := queue.ready_key(self._limits)) is not None
        ]
        if not ready:
            return []
        queue, key = min(ready, key=lambda each: each[0].pass_value)
        self._pass_value = queue.pass_value
        queue.pass_value += queue.stride
        oldest, jobs = min(queue.keys.items(), key=lambda each: each[1][0].queued_at)
        if time.monotonic() - jobs[0].queued_at > self._limits.max_queue_seconds / 2:
            # Otherwise jobs of other keys that arrived later could delay it by more than the queue that it found.
            key = oldest
        return queue.take(key, self._limits)

    def lengths(self) -> list[int]:
        """Return the number of jobs of each priority."""
        return [queue.count for queue in self._priorities]

    def oldest(self) -> float | None:
        """Return when the oldest job was queued, by the monotonic clock; None if the queue is empty."""
        return min((pending.queued_at for pending in self), default=None)

    def __iter__(self) -> Iterator[Pending[J]]:
        """Iterate over all jobs."""
        return (pending for queue in self._priorities for jobs in queue.keys.values() for pending in jobs)

    def _estimated_wait(self) -> float:
        return sum(queue.seconds for queue in self._priorities) / self._slots
