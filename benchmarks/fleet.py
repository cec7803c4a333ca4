"""Replicas behind a balancer, and calls that come to them: simulated by events, where time is a number.

A replica is what `--threads 1` is: one seat, and before it the batcher's queue, with the server's own bounds. Requests
that are computed together save no time here: they only take their turn together.
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
        at: When, in seconds.
        seconds: How long it needs a seat.
        nbytes: Of input and output.
        key: What it shares with calls that it may be computed with; None: alone.

    """

    at: float
    seconds: float
    nbytes: int
    key: Hashable


@dataclass(slots=True)
class Replica:
    """A server with one seat: the essence of poolrpc_server.calls.batcher, where time is a number.

    Attributes:
        bounds: What may wait.
        keys: The calls that wait, with the time since when they do; keys take turns.
        waiting: How many they are.
        work: Their seconds.
        held: Calls that wait or are computed.
        busy: Seconds for which the seat was taken.

    """

    bounds: QueueLimits
    keys: dict[Hashable, deque[tuple[float, Call]]] = field(default_factory=dict)
    waiting: int = 0
    work: float = 0.0
    held: int = 0
    busy: float = 0.0

    def enter(self, now: float, call: Call) -> bool:
        """Take a call in, if there is room for it."""
        full = self.waiting >= self.bounds.max_queue or (self.waiting and self.work >= self.bounds.max_queue_seconds)
        if self.held and full:
            return False
        self.keys.setdefault(id(call) if call.key is None else call.key, deque()).append((now, call))
        self.held, self.waiting, self.work = self.held + 1, self.waiting + 1, self.work + call.seconds
        return True

    def take(self, now: float) -> list[Call]:
        """Give those whose turn it is a seat."""
        if not self.waiting:
            return []
        key = next(iter(self.keys))
        oldest, entries = min(self.keys.items(), key=lambda each: each[1][0][0])
        if now - entries[0][0] > self.bounds.max_queue_seconds / 2:
            key = oldest
        entries = self.keys.pop(key)
        batch: list[Call] = []
        nbytes, seconds = 0, 0.0
        while entries:
            call = entries[0][1]
            nbytes, seconds = nbytes + call.nbytes, seconds + call.seconds
            if batch and (nbytes > self.bounds.max_batch_bytes or seconds > self.bounds.max_batch_seconds):
                break
            batch.append(entries.popleft()[1])
        if entries:
            self.keys[key] = entries
        self.waiting -= len(batch)
        self.work = self.work - sum(call.seconds for call in batch) if self.waiting else 0.0
        return batch


@dataclass(frozen=True)
class Outcome:
    """What came of a load.

    Attributes:
        latencies: Seconds from when a call was first sent to its answer; infinite where it was refused for good.
        refusals: How often a replica was full.
        seconds: From the start to the last answer.
        busy: Seconds for which seats were taken, of all replicas.

    """

    latencies: list[float]
    refusals: int
    seconds: float
    busy: float

    @cached_property
    def answered(self) -> list[float]:
        """The seconds of the calls that were answered, in order."""
        return sorted(each for each in self.latencies if each < math.inf)

    @property
    def goodput(self) -> float:
        """Answers a second."""
        return len(self.answered) / self.seconds

    def within(self, part: float) -> float:
        """Give the seconds within which this part of all calls was answered; infinite where more were refused."""
        place = math.ceil(len(self.latencies) * part) - 1
        return self.answered[place] if place < len(self.answered) else math.inf


class Fleet:
    """Replicas, their balancer, and the clients."""

    def __init__(self, replicas: int, bounds: QueueLimits, *, least_request: bool = True, attempts: int = 1) -> None:
        """Make one that has nothing to do.

        Args:
            replicas: How many there are.
            bounds: What may wait at each.
            least_request: Whether two replicas are drawn and the one with fewer calls is taken, as Envoy has it. Else
                one is drawn: what gRPC's round_robin comes to where clients are many, each with turns of its own.
            attempts: How often a call is sent, at most.

        """
        self._replicas = [Replica(bounds) for _ in range(replicas)]
        self._choices = min(replicas, 1 + least_request)
        self._attempts = attempts
        self._drawn = random.Random(0)  # noqa: S311 - the same draw each time
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._now = 0.0
        self._latencies: list[float] = []
        self._refusals = 0

    def serve(self, calls: Iterable[Call]) -> Outcome:
        """Send calls, and see what comes of them, once."""
        for call in calls:
            self._later(call.at, lambda call=call: self._send(call, self._attempts))
        while self._events:
            self._now, _, event = heappop(self._events)
            event()
        return Outcome(self._latencies, self._refusals, self._now, sum(each.busy for each in self._replicas))

    def _later(self, at: float, event: Callable[[], None]) -> None:
        heappush(self._events, (at, next(self._order), event))

    def _send(self, call: Call, left: int) -> None:
        replica = min(self._drawn.sample(self._replicas, self._choices), key=lambda each: each.held)
        if replica.enter(self._now, call):
            if replica.held == 1:
                self._begin(replica)
            return
        self._refusals += 1
        if left > 1:
            delay = min(max(replica.work, RETRY_DELAY / 2), MAX_RETRY_DELAY)
            self._later(self._now + delay, lambda: self._send(call, left - 1))
        else:
            self._latencies.append(math.inf)

    def _begin(self, replica: Replica) -> None:
        if batch := replica.take(self._now):
            seconds = sum(call.seconds for call in batch)
            replica.busy += seconds
            self._later(self._now + seconds, lambda: self._end(replica, batch))

    def _end(self, replica: Replica, batch: list[Call]) -> None:
        replica.held -= len(batch)
        self._latencies.extend(self._now - call.at for call in batch)
        self._begin(replica)
