"""Replicas behind a balancer, and the calls that they receive, in a simulation by events.

A replica is a server with `--threads 1`: one slot behind the batcher's queue, with the server's own limits. Batching
saves no time here: the requests of a batch only begin and end together.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING

from poolrpc_server.calls.admission import RETRY_DELAY
from poolrpc_server.calls.dispatch import MAX_RETRY_DELAY

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from poolrpc_server.calls.queue import QueueLimits


@dataclass(frozen=True, slots=True)
class Call:
    """A call that a client sends.

    Attributes:
        at: The time of arrival in seconds.
        seconds: The time for which it uses a slot.
        nbytes: The size of input and output.
        key: Calls with the same key may share a batch; None for a call that is computed alone.

    """

    at: float
    seconds: float
    nbytes: int
    key: Hashable


@dataclass(slots=True)
class Replica:
    """A server with one slot: poolrpc_server.calls.batcher in simulated time.

    Attributes:
        limits: The limits of the queue.
        keys: The calls that wait, with their times of arrival, by batch key; keys take turns.
        waiting: The number of calls that wait.
        work: The seconds of the calls that wait.
        held: The number of calls that wait or are computed.
        busy: Seconds for which the slot was used.

    """

    limits: QueueLimits
    keys: dict[Hashable, deque[tuple[float, Call]]] = field(default_factory=dict)
    waiting: int = 0
    work: float = 0.0
    held: int = 0
    busy: float = 0.0

    def enter(self, now: float, call: Call) -> bool:
        """Accept a call if there is room for it."""
        full = self.waiting >= self.limits.max_queue or (self.waiting and self.work >= self.limits.max_queue_seconds)
        if self.held and full:
            return False
        self.keys.setdefault(id(call) if call.key is None else call.key, deque()).append((now, call))
        self.held, self.waiting, self.work = self.held + 1, self.waiting + 1, self.work + call.seconds
        return True

    def next_batch(self, now: float) -> list[Call]:
        """Return the calls that are computed next."""
        if not self.waiting:
            return []
        key = next(iter(self.keys))
        oldest, entries = min(self.keys.items(), key=lambda each: each[1][0][0])
        if now - entries[0][0] > self.limits.max_queue_seconds / 2:
            key = oldest
        entries = self.keys.pop(key)
        batch: list[Call] = []
        nbytes, seconds = 0, 0.0
        while entries:
            call = entries[0][1]
            nbytes, seconds = nbytes + call.nbytes, seconds + call.seconds
            if batch and (nbytes > self.limits.max_batch_bytes or seconds > self.limits.max_batch_seconds):
                break
            batch.append(entries.popleft()[1])
        if entries:
            self.keys[key] = entries
        self.waiting -= len(batch)
        self.work = self.work - sum(call.seconds for call in batch) if self.waiting else 0.0
        return batch


@dataclass(frozen=True)
class Outcome:
    """The results of a load.

    Attributes:
        latencies: Seconds from the first attempt of a call to its answer; infinite if every attempt was rejected.
        rejections: How often a replica was full.
        seconds: The time from the start to the last answer.
        busy: Seconds for which slots were used, of all replicas.

    """

    latencies: list[float]
    rejections: int
    seconds: float
    busy: float

    @cached_property
    def answered(self) -> list[float]:
        """The latencies of the calls that were answered, in order."""
        return sorted(each for each in self.latencies if each < math.inf)

    @property
    def goodput(self) -> float:
        """Answered calls per second."""
        return len(self.answered) / self.seconds

    def within(self, part: float) -> float:
        """Return the seconds within which a part of all calls was answered; infinite if more were rejected."""
        index = math.ceil(len(self.latencies) * part) - 1
        return self.answered[index] if index < len(self.answered) else math.inf


class Fleet:
    """Replicas, their balancer, and the clients."""

    def __init__(self, replicas: int, limits: QueueLimits, *, least_request: bool = True, attempts: int = 1) -> None:
        """Create idle replicas.

        Args:
            replicas: Their number.
            limits: The limits of each queue.
            least_request: Whether two replicas are drawn and the one with fewer calls is used, like Envoy's least
                request. Otherwise one is drawn, which is what gRPC's round_robin of many clients amounts to.
            attempts: The maximum number of attempts of a call.

        """
        self._replicas = [Replica(limits) for _ in range(replicas)]
        self._choices = min(replicas, 1 + least_request)
        self._attempts = attempts
        self._drawn = random.Random(0)  # noqa: S311 - reproducible
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._now = 0.0
        self._latencies: list[float] = []
        self._rejections = 0

    def serve(self, calls: Iterable[Call]) -> Outcome:
        """Send calls, and return the outcome; once."""
        for call in calls:
            self._later(call.at, lambda call=call: self._send(call, self._attempts))
        while self._events:
            self._now, _, event = heappop(self._events)
            event()
        return Outcome(self._latencies, self._rejections, self._now, sum(each.busy for each in self._replicas))

    def _later(self, at: float, event: Callable[[], None]) -> None:
        heappush(self._events, (at, next(self._order), event))

    def _send(self, call: Call, left: int) -> None:
        replica = min(self._drawn.sample(self._replicas, self._choices), key=lambda each: each.held)
        if replica.enter(self._now, call):
            if replica.held == 1:
                self._begin(replica)
            return
        self._rejections += 1
        if left > 1:
            delay = min(max(replica.work, RETRY_DELAY / 2), MAX_RETRY_DELAY)
            self._later(self._now + delay, lambda: self._send(call, left - 1))
        else:
            self._latencies.append(math.inf)

    def _begin(self, replica: Replica) -> None:
        if batch := replica.next_batch(self._now):
            seconds = sum(call.seconds for call in batch)
            replica.busy += seconds
            self._later(self._now + seconds, lambda: self._end(replica, batch))

    def _end(self, replica: Replica, batch: list[Call]) -> None:
        replica.held -= len(batch)
        self._latencies.extend(self._now - call.at for call in batch)
        self._begin(replica)
