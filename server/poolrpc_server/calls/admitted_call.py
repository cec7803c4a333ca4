"""One call after its admission: its message is received, its protocol answers it, and its end is recorded."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from threading import Event
from time import monotonic_ns
from typing import TYPE_CHECKING, NoReturn

from poolrpc._wire.status import DETAILS_KEY, encode_error
from poolrpc.errors import (
    InternalError,
    InvalidArgumentError,
    PermissionDeniedError,
    PoolError,
    UnauthenticatedError,
    UnavailableError,
)
from poolrpc_server.calls.admission import CONTROL_STALLED_SECONDS, ROOM_SECONDS
from poolrpc_server.calls.call import StatusError
from poolrpc_server.telemetry.logs import log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from poolrpc_server.calls.call import CallContext
    from poolrpc_server.calls.method import Method, Observers

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata from which gRPC's own retries take their delay."""

RESET_SECONDS = 0.1
"""Seconds to wait for the reset of a stream whose messages ended early: if the client resets a stream, gRPC reports the
end of the messages before it reports the reset."""

MAX_ERROR_CHARS = 300
"""Length at which the log line cuts an error's message, in characters."""

MESSAGE_COPIES = 2
"""Copies of a message that gRPC has in memory while it passes the message on: as received, and in one piece."""

UNKNOWN_BYTES = 64 * 2**20
"""Bytes that are reserved at most for a message whose size is not announced. The reaper watches for larger ones."""

ANSWER_COPIES = 2
"""Copies of an answer until it has been sent: the server's, and gRPC's."""

MIN_BYTES_PER_SECOND = 2**20
"""Speed, in bytes per second, at which a caller has to send or read at least."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long calls wait for their callers.

    Attributes:
        max_message_bytes: Maximum size of a message.
        seconds: Seconds that a caller may take, without those for its bytes.

    """

    max_message_bytes: int
    seconds: float

    def for_bytes(self, nbytes: int) -> float:
        """Return the seconds that a caller may take to send or read so many bytes."""
        return self.seconds + nbytes / MIN_BYTES_PER_SECOND


class AdmittedCall:
    """A call that went through admission: it is answered or rejected once.

    Attributes:
        method: Its method.
        error: Why it is rejected; None if it was admitted.

    """

    def __init__(  # noqa: PLR0913, PLR0917 - the pipeline alone makes it
        self,
        method: Method,
        call: CallContext,
        observers: Observers,
        patience: Patience,
        announced: int = 0,
        error: PoolError | None = None,
    ) -> None:
        self.method = method
        self.error = error
        self._call = call
        self._observers = observers
        self._patience = patience
        self._announced = announced
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

    def unary(self, messages: Iterator[bytes]) -> bytes:
        """Answer a call of one message each way.

        Args:
            messages: Receives the message, and ends or raises when the call has ended.

        Raises:
            StatusError: The call failed.

        """
        assert self.method.unary is not None  # noqa: S101 - the transport asked whether it is a stream
        self._begin()
        stage = "receive"
        try:
            message = self._receive(messages)
            stage = ""
            if not self.method.short:
                self._call.make_way()
            answer = self.method.unary(message, self._call)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status
            if stage and not self._call.is_active():
                self._abandon(stage)
            self._fail(error)
        else:
            if not self._call.is_active():
                self._abandon("send")
            if self._call.arrived is None:
                # The answer, and gRPC's copy of it, until the caller has read them.
                self._call.ticket.shrink(ANSWER_COPIES * len(answer))
                self._call.ticket.wait(self._patience.for_bytes(len(answer)), len(answer))
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
        ended = self._ended()
        try:
            self._call.ticket.identify(self._call.caller)
            yield from self.method.stream(self._measured(messages), self._call)
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

    def _receive(self, messages: Iterator[bytes]) -> bytes:
        """Return the message of a unary call, whose bytes are counted until the call has ended."""
        call, ticket = self._call, self._call.ticket
        ticket.identify(call.caller)
        if call.arrived is None:
            self._wait_for_message()
        elif self.method.computes:
            ticket.reserve(call.arrived, wait=ROOM_SECONDS)
        message = self._next(messages)
        ticket.proceed()
        if message is None:
            self._ended().wait(RESET_SECONDS)
            call.raise_if_cancelled()
            raise InvalidArgumentError("expected a message, got the end of the call")
        ticket.shrink(len(message))
        if len(message) > ticket.nbytes and self.method.computes:
            ticket.reserve(len(message) - ticket.nbytes)
        arrived = monotonic_ns()
        if self.method.computes:
            self._observers.metrics.received((arrived - call.record.started) / 1e9)
        call.record.started = arrived
        return message

    def _wait_for_message(self) -> None:
        """Make room for the message of a unary call, and note that the call waits for it."""
        ticket, patience = self._call.ticket, self._patience
        if not self.method.computes:
            ticket.wait(patience.seconds, patience=CONTROL_STALLED_SECONDS)
        elif self._announced:
            ticket.reserve(MESSAGE_COPIES * self._announced, wait=ROOM_SECONDS)
            ticket.wait(patience.for_bytes(self._announced), self._announced)
        else:
            ticket.reserve_unknown(MESSAGE_COPIES * min(patience.max_message_bytes, UNKNOWN_BYTES))
            ticket.wait(patience.seconds)

    def _measured(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the messages of a stream."""
        while True:
            if not self.method.computes:  # also while a message is answered, and its caller has to read
                self._call.ticket.wait(self._patience.seconds, patience=CONTROL_STALLED_SECONDS)
            message = self._next(messages)
            if message is None:
                return
            yield message

    def _next(self, messages: Iterator[bytes]) -> bytes | None:
        """Return the next message, or None after the last one; gRPC's own errors are those of a call that has ended."""
        try:
            message = next(messages, None)
        except Exception as error:
            error.with_traceback(None)  # grpcio keeps the error with the call, and its traceback would keep the call
            self._call.raise_if_cancelled()
            raise
        if message is not None:
            self.method.check_size(message)
        return message

    def _ended(self) -> Event:
        """Return an event that is set when the call has ended."""
        ended = Event()
        if not self._call.add_done_callback(ended.set):
            ended.set()
        return ended

    def _begin(self) -> None:
        self._call.record.started = monotonic_ns()
        self._observers.metrics.started(*self.method.labels, self._call.transport)

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
            line |= {f"{stage}_ms": _milliseconds(each) for stage, each in record.device_ns.items()}
        if peer := self._call.peer_address:
            line["peer"] = peer
        line |= record.facts
        trace_id = (
            observers.spans.add(record, self._call.metadata, self._call.peer)
            if observers.spans is not None and not self.method.probe
            else self._call.trace_id
        )
        if trace_id:
            line["trace_id"] = trace_id
        observers.call_log.add(self._level, line)
        observers.metrics.handled(*self.method.labels, record.status, nanoseconds / 1e9)

    def _fail(self, error: Exception) -> NoReturn:
        record, observers = self._call.record, self._observers
        if not isinstance(error, PoolError):
            error = observers.translate(error) or error
        if isinstance(error, PoolError):
            record.note({"reason": error.reason, "error": _cut(error.message)})
            if isinstance(error, UnauthenticatedError | PermissionDeniedError):
                self._level = logging.INFO  # a probe's, too
            if isinstance(error, UnavailableError):
                observers.metrics.rejected(error.reason)
        else:
            error_id = secrets.token_hex(6)
            facts = {"method": self.method.name, "error_id": error_id, "peer": self._call.peer_address}
            if trace_id := self._call.trace_id:
                facts["trace_id"] = trace_id
            log.exception("unexpected error", **facts)
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


def _cut(message: str) -> str:
    return message if len(message) <= MAX_ERROR_CHARS else f"{message[: MAX_ERROR_CHARS - 3]}..."


def _milliseconds(nanoseconds: int) -> float:
    return nanoseconds // 1000 / 1000  # to a microsecond; round() takes three times as long
