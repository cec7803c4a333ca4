"""One call: the context in which a transport hands it in, the status that it fails with, and its facts for the log."""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from functools import lru_cache
from time import monotonic
from typing import TYPE_CHECKING
from urllib.parse import unquote

from poolrpc._shapes.rules import clip
from poolrpc.errors import CancelledError, DeadlineExceededError, PermissionDeniedError
from poolrpc_server.calls.admission import ENDED
from poolrpc_server.telemetry.record import CallRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc._wire.codec import BranchResult, Request
    from poolrpc_server.calls.admission import Ticket

DEFAULT_PRIORITY = 1
"""The priority of a call that names none; 0 goes first, 2 last."""

MAX_FACT_CHARS = 300
"""Length at which a fact of the log line is cut, in characters."""

MAX_FACT_AXES = 16
"""Axes of a shape that the log line shows."""

MAX_FACT_OUTPUTS = 16
"""Outputs whose shapes the log line shows."""


TRACE_CONTEXT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
"""The metadata traceparent, as W3C's Trace Context defines it: version, trace id, parent id, flags."""


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


class CallContext(ABC):
    """One call as its transport received it: its caller, its deadline, and whether the caller still waits.

    Attributes:
        method: "/package.Service/Method".
        metadata: The caller's metadata, as pairs.
        priority: 0, 1 or 2; 0 goes first.
        record: Record of the call.
        ticket: What the call holds until it ends; set by the pipeline.
        token: Name of the token that the call presented; empty without tokens.
        urgent: Whether the call may have priority 0.
        transport: Name of the transport, for the metrics.
        arrived: Size of the message in bytes, if all of it is here before the call is admitted. Such a call never waits
            for its caller, neither for its message nor until its answer is read. None: the message is yet to come.

    """

    ticket: Ticket
    transport = "grpc"
    arrived: int | None = None

    def __init__(self, method: str, metadata: Sequence[tuple[str, str | bytes]] = ()) -> None:
        self.method = method
        self.metadata = metadata
        self.priority = DEFAULT_PRIORITY
        self.record = CallRecord(method)
        self.token = ""
        self.urgent = True

    @property
    def caller(self) -> str:
        """The caller, among whose calls limits are divided: a token, a local process or a connection; or empty."""
        # gRPC's peers on unix sockets have no address of their own.
        return self.token or (peer if (peer := self.peer) != "unix:" else "")

    @property
    def peer(self) -> str:
        """Address of the caller in gRPC's notation ("ipv4:127.0.0.1:50051"); empty if unknown."""
        return ""

    @property
    def peer_address(self) -> str:
        """Address of the caller as people write it: "127.0.0.1:50051", "[::1]:50051" or "unix"; empty if unknown."""
        return _address_of(self.peer)

    @property
    def trace_id(self) -> str:
        """Id of the trace that the caller's metadata name, in hexadecimal; empty if they name none."""
        found = (TRACE_CONTEXT.fullmatch(str(value)) for key, value in self.metadata if key == "traceparent")
        return next((each[1] for each in found if each), "")

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

    def make_way(self) -> None:  # noqa: B027 - most transports have a thread for each call
        """Note that the call's thread is about to wait, or to compute for long: it must not keep other calls waiting.

        Any thread may call this, any number of times.
        """

    def set_priority(self, priority: int) -> None:
        """Set the priority.

        Raises:
            PermissionDeniedError: The call's token does not allow it.

        """
        if priority == 0 and not self.urgent:
            raise PermissionDeniedError("the token does not allow priority 0")
        self.priority = priority

    def raise_if_cancelled(self) -> None:
        """Raise if no caller waits for the answer any more.

        Raises:
            DeadlineExceededError: The deadline has passed.
            CancelledError: The caller has cancelled the call or closed its connection.

        """
        # In this order: a deadline that passes between the two must not look like a cancellation.
        active, left = self.is_active(), self.time_remaining()
        if left is not None and left <= 0:
            raise DeadlineExceededError("the deadline passed before the call was computed")
        if not active:
            raise CancelledError(ENDED)


@lru_cache(1024)
def _address_of(peer: str) -> str:
    kind, _, address = peer.partition(":")
    return kind if kind == "unix" else unquote(address)


class EndingContext(CallContext):
    """A call whose end no library reports: its transport calls `cancel`."""

    def __init__(
        self,
        method: str,
        metadata: Sequence[tuple[str, str | bytes]] = (),
        peer: str = "",
        timeout: float | None = None,
    ) -> None:
        """Make a context.

        Args:
            method: "/package.Service/Method".
            metadata: The caller's metadata, as pairs.
            peer: The caller, in gRPC's notation; empty if unknown.
            timeout: Seconds until the deadline. None: no deadline.

        """
        super().__init__(method, metadata)
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] | None = []
        self._peer = peer
        self._deadline = None if timeout is None else monotonic() + timeout

    @property
    def peer(self) -> str:
        """The caller, in gRPC's notation; empty if unknown."""
        return self._peer

    @property
    def cancelled(self) -> bool:
        """Whether the caller is gone, or the server has ended the call."""
        return self._callbacks is None

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None for no deadline."""
        return None if self._deadline is None else self._deadline - monotonic()

    def is_active(self) -> bool:
        """Return whether the call has neither ended nor been cancelled, and its deadline has not passed."""
        return not self.cancelled and (self._deadline is None or monotonic() < self._deadline)

    def add_done_callback(self, callback: Callable[[], None]) -> bool:
        """Register a callback for the end of the call; return False if the call has ended already."""
        with self._lock:
            if self._callbacks is None:
                return False
            self._callbacks.append(callback)
            return True

    def cancel(self) -> None:
        """End the call: it was answered, its caller has cancelled it or is gone, or the server ends it."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks or [], None
        for callback in callbacks:
            callback()


class DerivedContext(CallContext):
    """The context of a part of a call, with a priority and a deadline of its own."""

    def __init__(self, call: CallContext, *, priority: int | None = None, timeout: float | None = None) -> None:
        """Derive a context.

        Args:
            call: The context of the whole call.
            priority: Priority of this part. None: the call's.
            timeout: Seconds that this part may take from now on. None: until the call's deadline.

        Raises:
            PermissionDeniedError: The call's token does not allow the priority.

        """
        self.method, self.metadata, self.record = call.method, call.metadata, call.record
        self.ticket, self.token, self.urgent = call.ticket, call.token, call.urgent
        self.priority = call.priority
        if priority is not None:
            self.set_priority(priority)
        self._call = call
        self._deadline = None if timeout is None else monotonic() + timeout

    @property
    def peer(self) -> str:
        """Address of the caller of the whole call."""
        return self._call.peer

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

    def make_way(self) -> None:
        """Note that the call's thread is about to wait, or to compute for long."""
        self._call.make_way()


def shape_fact(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape as a fact of the log line: its first axes, because a rejected one may have any number."""
    return tuple(shape[:MAX_FACT_AXES])


def request_facts(request: Request) -> dict[str, object]:
    """Return a request's fields of the log line."""
    spec = request.input
    return {
        "layers": clip(request.branches, MAX_FACT_CHARS),
        "shape": shape_fact(spec.shape),
        "dtype": spec.dtype,
    }


def result_facts(results: Sequence[BranchResult]) -> dict[str, object]:
    """Return the fields of the log line for a request's results: the shapes of the first ones."""
    return {"output": [tuple(each.output.shape) for each in results[:MAX_FACT_OUTPUTS]]}
