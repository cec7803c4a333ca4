"""Dynamic batching.

A fixed number of slots bounds how many executions run at a time. There is no batching thread and no timer. A job that
finds a slot free is executed at once, by the thread of its call. Otherwise the job is queued, and its thread sleeps.
Whichever thread releases a slot wakes the first job of the next batch, the leader, whose thread executes the whole
batch. So a batch consists of the jobs that were queued while every slot was taken, and a lone call pays nothing for it.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Generic, Protocol

from poolrpc_server.calls.queue import J, Pending, Queue, State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc_server.calls.call import CallContext
    from poolrpc_server.calls.queue import QueueLimits


class Observer(Protocol):
    """Callbacks for what happens in the queue."""

    def queued(self, seconds: float) -> None:
        """A job is about to be executed after so many seconds in the queue."""

    def cancelled(self, stage: str) -> None:
        """A call ended before its job did, in the stage "arrival", "queue" or "compute"."""


class StoppedError(Exception):
    """The batcher was stopped before the job was executed."""


class Batcher(Generic[J]):
    """A bounded queue in front of a fixed number of execution slots.

    Args:
        slots: Maximum number of executions at a time.
        execute: Executes jobs with equal batch keys, and returns their results in order. If it raises for several jobs,
            each of them is executed again, alone, so that only the job at fault fails.
        limits: Limits of the queue and of batches.
        observer: Receives what happens in the queue.

    """

    def __init__(
        self,
        slots: int,
        execute: Callable[[Sequence[J]], list[Any]],
        limits: QueueLimits,
        observer: Observer | None = None,
    ) -> None:
        self._free_slots = slots
        self._execute = execute
        self._limits = limits
        self._observer = observer
        self._queue: Queue[J] = Queue(slots, limits)
        self._stopped = False
        self._lock = threading.Lock()

    def run(self, job: J, context: CallContext, priority: int = 1, *, admitted: bool = False) -> Any:  # noqa: ANN401 - whatever execute returns
        """Execute a job, at once or in a later batch, and return its result.

        Args:
            job: The job.
            context: The context of its call. If the call ends while the job is queued, the job leaves the queue.
            priority: The priority; 0 is the most urgent.
            admitted: Whether the job belongs to a call that was admitted earlier, so that the queue's limits do not
                apply to it.

        Raises:
            QueueFullError: The queue has no room.
            StoppedError: The batcher was stopped.
            Exception: Whatever the context's raise_if_cancelled, or the execution, raised.

        """
        pending = None
        with self._lock:
            if self._stopped:
                raise StoppedError
            # While a slot is free, no queued job is ready for it, so this one overtakes nothing.
            if self._free_slots and not (self._limits.max_queue_delay and job.key is not None):
                self._free_slots -= 1
            else:
                pending = self._enqueue(job, context, priority, admitted=admitted)
        if pending is None:
            try:
                self._check_arrival(context)
                started_at = time.monotonic()
                (result,) = self._execute([job])
                job.record_duration(time.monotonic() - started_at)  # of one that was executed to its end
                return result
            finally:
                self.release(1)
        if not context.add_done_callback(lambda: self._drop_if_cancelled(pending)):
            self._drop_if_cancelled(pending)
        context.make_way()
        self._wait(pending)
        if pending.state is State.LEADER:
            self._execute_batch(pending)
        error, pending.error = pending.error, None
        try:
            if error is not None:
                raise error
            return pending.result
        finally:
            error = None  # breaks the cycle of the error, its traceback and this frame, which keeps the job's memory

    def borrow(self, count: int) -> int:
        """Take up to `count` free slots, for a large job that has one already, and return how many were taken."""
        with self._lock:
            taken = min(self._free_slots, count)
            self._free_slots -= taken
            return taken

    def release(self, slots: int) -> None:
        """Free slots, and start the next batches in them."""
        with self._lock:
            self._free_slots += slots
            self._start_batches()

    def check_queue(self, priority: int) -> None:
        """Check that a priority's queue has room for another job.

        Raises:
            QueueFullError: There is no room.

        """
        self._queue.check(priority)

    def queue_lengths(self) -> list[int]:
        """Return the number of queued jobs of each priority."""
        return self._queue.lengths()

    def oldest_wait(self) -> float:
        """Return how long the oldest queued job has waited, in seconds; 0 if the queue is empty."""
        with self._lock:
            oldest = self._queue.oldest()
        return 0.0 if oldest is None else time.monotonic() - oldest

    def stop(self) -> None:
        """Fail all queued and future jobs; running executions are finished."""
        with self._lock:
            self._stopped = True
            for pending in list(self._queue):
                self._queue.remove(pending)
                pending.finish(None, StoppedError())

    def _check_arrival(self, context: CallContext) -> None:
        try:
            context.raise_if_cancelled()
        except Exception:
            if self._observer is not None:
                self._observer.cancelled("arrival")
            raise
        if self._observer is not None:
            self._observer.queued(0.0)

    def _enqueue(self, job: J, context: CallContext, priority: int, *, admitted: bool) -> Pending[J]:
        if not admitted:
            self._queue.check(priority)
        pending = self._queue.append(job, context, priority)
        self._start_batches()
        return pending

    def _start_batches(self) -> None:
        """Assign free slots to batches, and wake the leaders."""
        while self._free_slots and (batch := self._queue.next_batch()):
            now = time.monotonic()
            self._free_slots -= 1
            for pending in batch[1:]:
                pending.state = State.FOLLOWER
            batch[0].lead(batch, now)

    def _wait(self, pending: Pending[J]) -> None:
        """Wait until a job leads a batch or is done; drop it if its deadline passes before."""
        delayed = self._limits.max_queue_delay > 0
        while True:
            remaining = pending.context.time_remaining()
            delay = pending.ready_at - time.monotonic() if delayed else 0.0
            if delayed and delay <= 0:
                # A slot may be free, and nothing else would notice: the delay may be over before this wait begins.
                delayed = False
                with self._lock:
                    self._start_batches()
            timeouts = [max(0.0, remaining)] if remaining is not None else []
            if delay > 0:
                timeouts.append(delay)
            # A lock cannot wait longer than TIMEOUT_MAX.
            if pending.wakeup.acquire(timeout=min(*timeouts, threading.TIMEOUT_MAX) if timeouts else -1):
                return
            if delay <= 0 or (remaining is not None and remaining <= delay):
                self._drop_if_cancelled(pending)

    def _drop_if_cancelled(self, pending: Pending[J]) -> None:
        """Finish a job at once if its call has ended; a leader has to execute its batch first."""
        with self._lock:
            state = pending.state
            if state not in (State.QUEUED, State.FOLLOWER):
                return
            try:
                pending.context.raise_if_cancelled()
            except Exception as error:  # noqa: BLE001 - whatever it raises is the job's outcome
                pending.finish(None, error)
            else:
                return
            if state is State.QUEUED:
                self._queue.remove(pending)
        if self._observer is not None:
            self._observer.cancelled(state.value)

    def _execute_batch(self, leader: Pending[J]) -> None:
        now = time.monotonic()
        try:
            active = [pending for pending in leader.batch if self._is_active(pending)]
            if self._observer is not None:
                for pending in active:
                    self._observer.queued(now - pending.queued_at)
            outcomes = self._outcomes([pending.job for pending in active])
        finally:
            # First of all, so that the next batch starts while this one's results are handed out.
            self.release(1)
        # Of one that was executed alone and to its end, including the time that its thread took to wake up.
        if len(leader.batch) == 1 and outcomes and outcomes[0][1] is None:
            leader.job.record_duration(time.monotonic() - leader.started_at)
        result = error = None
        with self._lock:
            for pending, (result, error) in zip(active, outcomes, strict=True):
                if pending is leader:
                    pending.result, pending.error = result, error
                elif pending.state is State.FOLLOWER:
                    pending.finish(result, error)
        # These break reference cycles: the frames of an error's traceback refer to this one, which called them.
        leader.batch = []
        del outcomes, result, error

    def _is_active(self, pending: Pending[J]) -> bool:
        """Return whether a job of a batch is to be executed; if its call has ended, finish it."""
        try:
            pending.context.raise_if_cancelled()
        except Exception as error:  # noqa: BLE001 - whatever it raises is the job's outcome
            with self._lock:
                if pending.state is State.LEADER:
                    pending.error = error
                elif pending.state is State.FOLLOWER:
                    pending.finish(None, error)
                else:
                    return False
            if self._observer is not None:
                self._observer.cancelled(State.QUEUED.value)
            return False
        return pending.state is not State.DONE

    def _outcomes(self, jobs: list[J]) -> list[tuple[Any, BaseException | None]]:
        """Execute jobs and return the result or the error of each."""
        if not jobs:
            return []
        try:
            return [(result, None) for result, _ in zip(self._execute(jobs), jobs, strict=True)]
        except BaseException as error:  # noqa: BLE001 - it is raised again in the thread of the job's call
            if len(jobs) == 1:
                return [(None, error)]
        return [outcome for job in jobs for outcome in self._outcomes([job])]
