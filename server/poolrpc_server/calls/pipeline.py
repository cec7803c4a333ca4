"""The pipeline of a call: token, admission, record, protocol, status. Every transport hands its calls to it.

A transport makes a `CallContext` and calls `admit` before it reads anything of the call's messages. If the call was
rejected, it calls `reject` and reads nothing; otherwise `unary` or `stream`, and `release` at the end. Every failure is
raised as a `StatusError`.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field
from threading import Event
from time import monotonic_ns
from typing import TYPE_CHECKING, NoReturn

from poolrpc._shapes.rules import clip
from poolrpc._wire.framing import MESSAGE_BYTES_KEY
from poolrpc._wire.status import DETAILS_KEY, encode_error
from poolrpc.errors import (
    InternalError,
    InvalidArgumentError,
    PermissionDeniedError,
    PoolError,
    UnauthenticatedError,
    UnavailableError,
)
from poolrpc_server.calls.call import DEFAULT_PRIORITY, StatusError
from poolrpc_server.calls.queue import PRIORITIES
from poolrpc_server.telemetry.logs import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from poolrpc_server.calls.admission import Ticket
    from poolrpc_server.calls.call import CallContext
    from poolrpc_server.calls.tokens import TokenFile
    from poolrpc_server.telemetry.logs import CallLog
    from poolrpc_server.telemetry.metrics import Metrics
    from poolrpc_server.telemetry.traces import Spans

PRIORITY_KEY = "priority"
"""Metadata key of a call's priority: 0 goes first, 1 is the default, 2 goes last."""

PRIORITY_NAMES = tuple(map(str, range(PRIORITIES)))

MAX_SIZE_DIGITS = 19
"""Digits of the largest message size that is read."""

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata from which gRPC's own retries take their delay."""

RESET_SECONDS = 0.1
"""Seconds to wait for the reset of a stream whose messages ended early: if the client resets a stream, gRPC reports the
end of the messages before it reports the reset."""

MAX_ERROR_CHARS = 300
"""Length at which the log line cuts an error's message, in characters."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method of a protocol, or one that a transport answers itself, which has neither handler.

    Attributes:
        name: "/package.Service/Method".
        unary: Answers a call of one message each way. None for a stream.
        stream: Answers a call of any number of messages each way. None for a unary method.
        computes: Whether a call needs the engine: it is admitted, or rejected, before its message is read.
        probe: Whether monitoring calls it frequently: its calls are logged at DEBUG, and not traced.
        public: Whether a call needs no token.
        labels: Its kind ("unary" or "bidi_stream"), service and short name, as the metrics have them.

    """

    name: str
    unary: Callable[[bytes, CallContext], bytes] | None = None
    stream: Callable[[Iterator[bytes], CallContext], Iterator[bytes]] | None = None
    computes: bool = False
    probe: bool = False
    public: bool = False
    labels: tuple[str, str, str] = field(init=False)

    def __post_init__(self) -> None:
        service, _, name = self.name.removeprefix("/").partition("/")
        object.__setattr__(self, "labels", ("bidi_stream" if self.stream else "unary", service, name))


UNKNOWN_METHOD = Method("/unknown/Unknown")
"""The method as which calls of unknown methods are counted, so that callers cannot fill the metrics with names."""


@dataclass(frozen=True, slots=True)
class Observers:
    """Receivers of every call's record.

    Attributes:
        call_log: Writes its log line.
        metrics: Counts it.
        spans: Makes its spans. None: calls are not traced.
        translate: Returns the error to answer with in place of an unexpected exception, or None for InternalError.

    """

    call_log: CallLog
    metrics: Metrics
    spans: Spans | None = None
    translate: Callable[[Exception], PoolError | None] = lambda _: None


class CallPipeline:
    """The methods of all protocols, and the steps that are the same for each of their calls."""

    def __init__(
        self, admit: Callable[[int, int], Ticket], observers: Observers, tokens: TokenFile | None = None
    ) -> None:
        """Make a pipeline without methods.

        Args:
            admit: Returns a ticket for a call of a priority and an announced message size, or raises.
            observers: Receivers of every call's record.
            tokens: Tokens, one of which each call has to carry. None: calls need none.

        """
        self._admit = admit
        self._observers = observers
        self._tokens = tokens
        self._methods: dict[str, Method] = {}
        self._stopped = False

    def add(self, methods: Iterable[Method]) -> None:
        """Add the methods of a protocol."""
        for method in methods:
            self._methods[method.name] = method
            self._observers.metrics.expect(*method.labels)

    def stop(self) -> None:
        """Reject calls from now on."""
        self._stopped = True

    def admit(self, call: CallContext, other: Method = UNKNOWN_METHOD) -> AdmittedCall | None:
        """Admit a call before anything of its messages is read.

        Args:
            call: Context of the call.
            other: The method, if the transport answers it itself: the pipeline only checks the token.

        Returns:
            The call, admitted or rejected; None if the pipeline has no such method, and does not reject the call.

        """
        method = self._methods.get(call.method, other)
        call.record.method = method.name
        try:
            if self._tokens is not None and not method.public:
                self._authenticate(call, self._tokens)
            if method is other:
                return None
            call.record.streaming = method.stream is not None
            if self._stopped:
                raise UnavailableError("the server is stopping; try again", reason="STOPPING")
            ticket = None
            if method.computes:
                call.priority, announced = _call_options(call.metadata)
                ticket = self._admit(call.priority, announced)
        except PoolError as error:
            return AdmittedCall(method, call, self._observers, error=error)
        return AdmittedCall(method, call, self._observers, ticket)

    @staticmethod
    def _authenticate(call: CallContext, tokens: TokenFile) -> None:
        token = tokens.authenticate([str(value) for key, value in call.metadata if key == "authorization"])
        call.record.note({"caller": token.name})
        token.authorize(call.method)


class AdmittedCall:
    """A call that went through admission: it is answered or rejected once, and released at its end.

    Attributes:
        method: Its method.
        error: Why it is rejected; None if it was admitted.

    """

    def __init__(
        self,
        method: Method,
        call: CallContext,
        observers: Observers,
        ticket: Ticket | None = None,
        error: PoolError | None = None,
    ) -> None:
        self.method = method
        self.error = error
        self._call = call
        self._ticket = ticket
        self._observers = observers
        self._level = logging.DEBUG if method.probe else logging.INFO

    def reject(self) -> NoReturn:
        """End a call that was rejected.

        Raises:
            StatusError: Its error as a status.

        """
        assert self.error is not None  # noqa: S101 - the transport asked
        self._begin()
        try:
            self._fail(self.error)
        finally:
            self._end()

    def unary(self, message: bytes) -> bytes:
        """Answer a call of one message each way.

        Raises:
            StatusError: The call failed.

        """
        assert self.method.unary is not None  # noqa: S101 - the transport asked whether it is a stream
        self._begin()
        try:
            answer = self.method.unary(message, self._call)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status
            self._fail(error)
        else:
            if not self._call.is_active():
                self._abandon("send")
            return answer
        finally:
            self._end()

    def stream(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        """Answer a call of any number of messages each way.

        Raises:
            StatusError: The call failed.

        """
        assert self.method.stream is not None  # noqa: S101 - the transport asked whether it is one
        self._begin()
        ended = Event()
        self._call.add_done_callback(ended.set)
        try:
            yield from self.method.stream(messages, self._call)
        except GeneratorExit:  # the transport wants no more answers
            self._call.record.status = "CANCELLED"
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status
            if isinstance(error, InvalidArgumentError):
                ended.wait(RESET_SECONDS)
            if self._call.is_active():
                self._fail(error)
            # The caller left, or the deadline passed: no one reads a status, and the error is a consequence.
            self._abandon()
        finally:
            self._end()

    def release(self) -> None:
        """Return what was reserved for the call; a second time does nothing."""
        if self._ticket is not None:
            self._ticket.release()

    def _begin(self) -> None:
        if self._ticket is not None:
            self._ticket.message_arrived()
        self._call.record.started = monotonic_ns()
        self._observers.metrics.started(*self.method.labels)

    def _end(self) -> None:
        record, observers = self._call.record, self._observers
        nanoseconds = monotonic_ns() - record.started
        line: dict[str, object] = {
            "method": self.method.name,
            "status": record.status,
            "ms": _milliseconds(nanoseconds),
        }
        if record.count:
            line |= {"queue_ms": _milliseconds(record.queue_ns), "compute_ms": _milliseconds(record.compute_ns)}
        line |= record.facts
        if observers.spans is not None and not self.method.probe:
            line["trace_id"] = observers.spans.add(record, self._call.metadata, self._call.peer)
        observers.call_log.add(self._level, line)
        observers.metrics.handled(*self.method.labels, record.status, nanoseconds / 1e9)

    def _fail(self, error: Exception) -> NoReturn:
        record, observers = self._call.record, self._observers
        if not isinstance(error, PoolError):
            error = observers.translate(error) or error
        if isinstance(error, PoolError):
            record.note({"reason": error.reason, "error": clip(error.message, MAX_ERROR_CHARS)})
            if isinstance(error, UnauthenticatedError | PermissionDeniedError):
                self._level = logging.INFO  # a probe's, too
            if isinstance(error, UnavailableError):
                observers.metrics.rejected(error.reason)
        else:
            error_id = secrets.token_hex(6)
            log.exception("unexpected error", method=self.method.name, error_id=error_id)
            if not self.method.probe:
                observers.metrics.escaped()
            record.note({"error_id": error_id, "error": type(error).__name__})
            message = f"the server failed on this call; its log explains it under the id {error_id}"
            error = InternalError(message, metadata={"error_id": error_id})
        record.status = error.code
        raise status_of(error) from None

    def _abandon(self, stage: str = "") -> None:
        # No caller waits for the answer any more; the stage is counted.
        left = self._call.time_remaining()
        self._call.record.status = "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"
        if stage:
            self._observers.metrics.cancelled(stage)


def status_of(error: PoolError) -> StatusError:
    """Return an error as the status that a transport sends."""
    message, details = encode_error(error)
    trailing: tuple[tuple[str, str | bytes], ...] = ((DETAILS_KEY, details),)
    if isinstance(error, UnavailableError) and error.retry_delay is not None:
        trailing += ((PUSHBACK_KEY, str(round(error.retry_delay * 1000))),)
    return StatusError(error.code, message, trailing)


def _call_options(metadata: Sequence[tuple[str, str | bytes]]) -> tuple[int, int]:
    """Return the priority and the announced message size that a call's metadata names; 0 stands for no size."""
    priority, announced = DEFAULT_PRIORITY, 0
    for key, value in metadata:
        if key == PRIORITY_KEY:
            if value not in PRIORITY_NAMES:
                msg = f"expected one of {', '.join(PRIORITY_NAMES)}, got {clip(value)}"
                raise InvalidArgumentError(msg, field=f"metadata.{PRIORITY_KEY}")
            priority = int(value)
        elif key == MESSAGE_BYTES_KEY:
            if not (isinstance(value, str) and value.isdecimal() and len(value) <= MAX_SIZE_DIGITS):
                msg = f"expected a number of bytes, got {clip(value)}"
                raise InvalidArgumentError(msg, field=f"metadata.{MESSAGE_BYTES_KEY}")
            announced = int(value)
    return priority, announced


def _milliseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)
