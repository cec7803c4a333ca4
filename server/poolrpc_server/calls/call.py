"""One call: the context in which a transport hands it in, the record of it, and the status that it fails with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from time import monotonic, monotonic_ns
from typing import TYPE_CHECKING

from poolrpc._shapes.rules import clip
from poolrpc.errors import CancelledError, DeadlineExceededError
from poolrpc_server.telemetry.stage_times import StageTimes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from poolrpc._wire.codec import BranchResult, Request

DEFAULT_PRIORITY = 1
"""The priority of a call that names none; 0 goes first, 2 last."""

MAX_EXECUTIONS = 32
"""Executions whose stage times are kept with a call; a stream has one for each block, and all of them are counted."""

MAX_FACT_CHARS = 300
"""Length at which a fact of the log line is cut, in characters."""


class StatusError(Exception):
    """The failure of a call, in the form in which every transport sends it.

    Attributes:
        code: Name of the gRPC status code.
        message: Status message.
        trailing: Metadata that goes with the status: the encoded google.rpc.Status, and gRPC's retry pushback.

    """

    def __init__(self, code: str, message: str, trailing: tuple[tuple[str, str | bytes], ...] = ()) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.trailing = code, message, trailing


class CallRecord:
    """The record of one call, from which the log line, the metrics, the spans and Triton's statistics are made.

    Attributes:
        method: "/package.Service/Method"; that of every method that does not exist is "/unknown/Unknown".
        streaming: Whether the call is a stream.
        started: When the call's message had arrived, in nanoseconds of the monotonic clock.
        status: Name of the status code; "OK" until the call fails.
        facts: The call's fields of the log line, in order.
        executions: Stage times of the first MAX_EXECUTIONS executions.
        latest: Stage times of the latest execution; None before the first.
        count: Number of executions.
        queue_ns: Nanoseconds in the queue, summed over the executions.
        compute_ns: Nanoseconds of computation, summed over the executions.

    """

    __slots__ = (
        "compute_ns",
        "count",
        "executions",
        "facts",
        "latest",
        "method",
        "queue_ns",
        "started",
        "status",
        "streaming",
    )

    def __init__(self, method: str, *, streaming: bool = False) -> None:
        self.method = method
        self.streaming = streaming
        self.started = monotonic_ns()
        self.status = "OK"
        self.facts: dict[str, str] = {}
        self.executions: list[StageTimes] = []
        self.latest: StageTimes | None = None
        self.count = self.queue_ns = self.compute_ns = 0

    def note(self, facts: Mapping[str, str]) -> None:
        """Add facts to the call's log line."""
        self.facts.update(facts)

    def begin_execution(self, planes: int, priority: int) -> StageTimes:
        """Return the stage times of a further execution, which is queued now."""
        times = self.latest = StageTimes(planes, priority)
        self.count += 1
        if len(self.executions) < MAX_EXECUTIONS:
            self.executions.append(times)
        return times

    def end_execution(self, times: StageTimes) -> None:
        """Record that an execution has ended, with an answer or without."""
        times.ended = monotonic_ns()
        self.queue_ns += times.queue_ns
        self.compute_ns += times.compute_ns


class CallContext(ABC):
    """One call as its transport received it: its caller, its deadline, and whether the caller still waits.

    Attributes:
        method: "/package.Service/Method".
        metadata: The caller's metadata, as pairs.
        peer: Address of the caller in gRPC's notation ("ipv4:127.0.0.1:50051"); empty if unknown.
        priority: 0, 1 or 2; 0 goes first.
        record: Record of the call.

    """

    def __init__(self, method: str, metadata: Sequence[tuple[str, str | bytes]] = (), peer: str = "") -> None:
        self.method = method
        self.metadata = metadata
        self.peer = peer
        self.priority = DEFAULT_PRIORITY
        self.record = CallRecord(method)

    @abstractmethod
    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None for no deadline."""

    @abstractmethod
    def is_active(self) -> bool:
        """Return whether the call has neither ended nor been cancelled."""

    @abstractmethod
    def add_done_callback(self, callback: Callable[[], None]) -> bool:
        """Register a callback for the end of the call, in any thread; return False if the call has ended already."""

    @abstractmethod
    def cancel(self) -> None:
        """End the call from the server's side."""

    def raise_if_cancelled(self) -> None:
        """Raise if no caller waits for the answer any more.

        Raises:
            DeadlineExceededError: The deadline has passed.
            CancelledError: The caller has cancelled the call or closed its connection.

        """
        left = self.time_remaining()
        if left is not None and left <= 0:
            raise DeadlineExceededError("the deadline passed before the call was computed")
        if not self.is_active():
            raise CancelledError("the call was cancelled before it was computed")


class DerivedContext(CallContext):
    """The context of a part of a call, with a priority and a deadline of its own."""

    def __init__(self, call: CallContext, *, priority: int | None = None, timeout: float | None = None) -> None:
        """Derive a context.

        Args:
            call: The context of the whole call.
            priority: Priority of this part. None: the call's.
            timeout: Seconds that this part may take from now on. None: until the call's deadline.

        """
        self.method, self.metadata, self.peer, self.record = call.method, call.metadata, call.peer, call.record
        self.priority = call.priority if priority is None else priority
        self._call = call
        self._deadline = None if timeout is None else monotonic() + timeout

    def time_remaining(self) -> float | None:
        """Return the seconds until the earlier of the two deadlines; None for no deadline."""
        left = self._call.time_remaining()
        if self._deadline is None:
            return left
        own = self._deadline - monotonic()
        return own if left is None else min(own, left)

    def is_active(self) -> bool:
        """Return whether the call has neither ended nor been cancelled."""
        return self._call.is_active()

    def add_done_callback(self, callback: Callable[[], None]) -> bool:
        """Register a callback for the end of the call; return False if the call has ended already."""
        return self._call.add_done_callback(callback)

    def cancel(self) -> None:
        """End the whole call from the server's side."""
        self._call.cancel()


def request_facts(request: Request) -> dict[str, str]:
    """Return a request's fields of the log line."""
    spec = request.input
    return {
        "layers": clip(request.branches, MAX_FACT_CHARS),
        "shape": clip(spec.shape, MAX_FACT_CHARS),
        "dtype": spec.dtype,
    }


def result_facts(results: Sequence[BranchResult]) -> dict[str, str]:
    """Return the fields of the log line for a request's results."""
    return {"output": clip([each.output.shape for each in results], MAX_FACT_CHARS)}
