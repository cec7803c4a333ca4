"""The calls of a load in one process, and how long each takes."""

from __future__ import annotations

import threading
import time
from array import array
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from poolrpc.client import PoolClient
from poolrpc.errors import PoolError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import ExitStack

    from poolrpc._transport.result import PoolResult
    from poolrpc.command.load import Load
    from poolrpc.tensors import Array

OPTIONS = {"grpc.enable_retries": 0, "grpc.use_local_subchannel_pool": 1}
"""Arguments of a client's channel: no call is sent twice, and each client has a connection of its own."""

DIFFERENT = "different answer"
"""How a call is counted whose answer is not that of the first call."""

COLUMNS = 5
"""Numbers of a call: when it was due, sent and answered, in seconds; its request; how it ended, 0 for an answer."""


def first_answers(address: str, load: Load) -> list[list[PoolResult]]:
    """Make one call of each request, and return the results.

    Raises:
        PoolError: A call failed.

    """
    with PoolClient(address, timeout=load.timeout, options=OPTIONS) as client:
        return [_call(client, load, number, load.input_of(number)) for number in range(len(load.requests))]


def arrays_of(results: list[PoolResult]) -> tuple[Array, ...]:
    """Return the arrays of an answer."""
    return tuple(each for result in results for each in (result.output, result.indices) if each is not None)


def _call(client: PoolClient, load: Load, request: int, x: Array) -> list[PoolResult]:
    return client.pool_each(x, load.requests[request][1], layout=load.layout, transport=load.transport)


@dataclass(frozen=True, slots=True, eq=False)
class LoadPart:
    """What became of the calls of one process.

    Attributes:
        calls: Rows of COLUMNS numbers.
        messages: The message of a failure of each kind, in the order of the kinds' numbers.
        unsent: As in LoadResult.
        ended: The time of the last answer, or of the end.
        cpu: The number of CPUs that the process kept busy.

    """

    calls: Array
    messages: dict[str, str]
    unsent: int
    ended: float
    cpu: float


class LoadRun:
    """The calls of one process.

    Args:
        stack: Closes the clients.
        address: The address of the server.
        load: The part of the load.

    Raises:
        PoolError: The first call of a connection failed.

    """

    def __init__(self, stack: ExitStack, address: str, load: Load) -> None:
        self._load = load
        self._inputs = [load.input_of(number) for number in range(len(load.requests))]
        self._clients = [
            stack.enter_context(PoolClient(address, timeout=load.timeout, options=OPTIONS))
            for _ in range(load.connections)
        ]
        for client in self._clients:
            _call(client, load, 0, self._inputs[0])
        self._lock = threading.Lock()
        self._messages: dict[str, str] = {}
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._begin = 0.0
        self._schedule: Iterator[tuple[float, int]] = iter(())

    def stop(self) -> None:
        """End the calls in flight, and make no more."""
        self._stopped.set()
        for client in self._clients:
            client.close()

    def make_calls(self, begin: float) -> LoadPart:
        """Make the calls, and return what became of them."""
        load, self._begin = self._load, begin
        schedule = load.schedule()
        self._schedule = iter(schedule)
        records = [array("d") for _ in range(load.concurrency)]
        threads = [threading.Thread(target=self._work, args=each, daemon=True) for each in enumerate(records)]
        cpu, started = time.process_time(), time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failure:
            raise self._failure
        calls = np.concatenate([np.array(record).reshape(-1, COLUMNS) for record in records])
        ended, stopped = time.monotonic(), self._stopped.is_set()
        cpu = (time.process_time() - cpu) / (ended - started)
        if not stopped:
            ended = max(begin + load.seconds, calls[:, 2].max(initial=0).item())
        unsent = sum(0 <= due <= ended - begin for due, _ in self._schedule)
        return LoadPart(calls, self._messages, unsent, ended, cpu)

    def _work(self, number: int, record: array[float]) -> None:
        """Make one call after the other, in a thread."""
        client = self._clients[number % len(self._clients)]
        try:
            for due, request in self._due_calls(number):
                sent = time.monotonic()
                status = self._status(client, request)
                ended = time.monotonic()
                if status and self._stopped.is_set():
                    return
                if due is None:
                    due = sent  # noqa: PLW2901 - without a rate
                if due >= self._begin:
                    record.extend((due, sent, ended, request, status))
        except BaseException as error:  # noqa: BLE001 - raised by make_calls
            self._failure = error
            self.stop()

    def _due_calls(self, number: int) -> Iterator[tuple[float | None, int]]:
        """Yield the calls of a thread when they are due: the time, or None if there is no rate, and the request."""
        if self._load.rate is None:
            end = self._begin + self._load.seconds
            draw = np.random.default_rng((*self._load.part, number))
            requests = cycle(draw.integers(len(self._inputs), size=1000).tolist())
            while time.monotonic() < end and not self._stopped.is_set():
                yield None, next(requests)
            return
        while not self._stopped.is_set():
            with self._lock:
                now = time.monotonic() - self._begin
                if now >= self._load.seconds:  # what is due and not sent at the end is not sent at all
                    return
                following = next((call for call in self._schedule if call[0] >= 0 or now < 0), None)
            if following is None:
                return
            due = self._begin + following[0]
            if self._stopped.wait(max(due - time.monotonic(), 0)):
                return
            yield due, following[1]

    def _status(self, client: PoolClient, request: int) -> int:
        """Make a call; return 0, or the number of how it failed."""
        try:
            results = _call(client, self._load, request, self._inputs[request])
        except PoolError as error:
            return self._count(f"{type(error).__name__} {error.reason}", str(error))
        expected = self._load.expected
        if expected is not None and not _same(arrays_of(results), expected[request]):
            return self._count(DIFFERENT, f"request {request}: the answer differs from that of the first call")
        return 0

    def _count(self, kind: str, message: str) -> int:
        with self._lock:
            self._messages.setdefault(kind, message)
            return list(self._messages).index(kind) + 1


def _same(arrays: tuple[Array, ...], expected: tuple[Array, ...]) -> bool:
    """Return whether arrays are equal bit for bit, NaN included."""
    return len(arrays) == len(expected) and all(
        one.dtype == two.dtype
        and one.shape == two.shape
        and np.array_equal(one.reshape(-1).view(np.uint8), two.reshape(-1).view(np.uint8))
        for one, two in zip(arrays, expected, strict=True)
    )
