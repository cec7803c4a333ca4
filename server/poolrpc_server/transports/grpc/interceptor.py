"""What surrounds every call: errors become statuses, and each call becomes a line in the log and is counted."""

from __future__ import annotations

import logging
import secrets
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import wraps
from threading import Event
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError

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
    UnsupportedError,
)
from poolrpc_server.calls.queue import PRIORITIES
from poolrpc_server.telemetry.logs import log

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from poolrpc_server.telemetry.logs import CallLog
    from poolrpc_server.telemetry.metrics import Metrics
    from poolrpc_server.telemetry.spans import CallSpan, Spans
    from poolrpc_server.telemetry.timeline import Timeline

QUIET = (
    "/grpc.health.v1.Health/",
    "/grpc.reflection.",
    *(f"/inference.GRPCInferenceService/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")),
)
"""Methods that probes and tools call, by the second perhaps: logged at DEBUG."""

RESET_SECONDS = 0.1
"""How long a stream that misses something is taken for one that is being reset."""

PRIORITY_KEY = "priority"
"""The metadata by which a caller says how urgent a call is: 0 goes first, 1 is what others have, 2 goes last."""

PRIORITY_NAMES = tuple(map(str, range(PRIORITIES)))

MOST_DIGITS = 19
"""Of a number of bytes."""

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""The trailing metadata from which gRPC's own retries take their delay."""

NO_MESSAGE = "NO_MESSAGE"
"""Why a call is INTERNAL, as gRPC has it, whose bytes are no message: no fault of the server's."""

T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., object]")

_line: ContextVar[_Line] = ContextVar("line")
_caller: ContextVar[str] = ContextVar("caller", default="")


def note(facts: Mapping[str, str]) -> None:
    """Add facts to the log line of the call that this thread answers."""
    _line.get().noted.update(facts)


def priority() -> int:
    """Give the priority of the call that this thread answers."""
    return _line.get().priority


def timeline() -> Timeline | None:
    """Give where the stages of the call that this thread answers are told, where somebody wants to know."""
    span = _line.get().span
    return None if span is None else span.timeline


class _Inline(ThreadPoolExecutor):
    """Calls what it is given at once, in the thread that gives it: gRPC's own, which may not wait for anything."""

    def submit(self, fn: Callable[..., T], /, *args: object, **kwargs: object) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - whoever asks for the result has it
            future.set_exception(error)
        return future


INLINE = _Inline(1)
"""Who refuses: it takes less time than to wake a thread, of which there would have to be many when it matters."""


def name_caller(name: str) -> None:
    """Say whose the call is that is about to be answered: its log line has the name."""
    _caller.set(name)


class Room(Protocol):
    """Who knows whether there is room for a call."""

    def check_room(self, priority: int, announced: int) -> None:
        """Raise where there is none for a call of that priority, whose message has so many bytes; 0: unknown."""

    def arrived(self) -> None:
        """Hear that the call of this thread has its message."""


class CallInterceptor(grpc.ServerInterceptor):
    """Lets calls in, answers with the status of whatever a servicer raises, logs the call and counts it.

    What needs room is refused before its message is read where there is none. What needs none (health, the server's
    info, the refusals themselves) has threads of its own, so that it is answered while all others are taken.

    Attributes:
        metrics: Where it counts.
        judge: Gives a better error than InternalError for one that is no PoolError, perhaps.
        spans: Makes spans, where there are any.

    """

    def __init__(  # noqa: PLR0913, PLR0917 - what surrounds a call
        self,
        call_log: CallLog,
        metrics: Metrics,
        room: Room | None = None,
        needs_room: Collection[str] = (),
        threads: Mapping[str, ThreadPoolExecutor] | None = None,
        judge: Callable[[Exception], PoolError | None] = lambda _: None,
        spans: Spans | None = None,
    ) -> None:
        """Make one.

        Args:
            call_log: Where it logs.
            metrics: Where it counts.
            room: Knows whether there is room for a call. None: there always is.
            needs_room: The methods for which that is asked.
            threads: Who answers methods that begin so. Any other is answered by the server's own.
            judge: Gives a better error than InternalError for one that is no PoolError, perhaps.
            spans: Makes spans, where there are any.

        """
        self._log = call_log
        self.metrics = metrics
        self.judge = judge
        self.spans = spans
        self._room = room
        self._needs_room = frozenset(needs_room)
        self._threads = dict(threads or {})
        self._wrapped: dict[tuple[str, int], grpc.RpcMethodHandler[Any, Any]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap a method of a kind that the services have."""
        method = handler_call_details.method
        level = 1
        if method in self._needs_room:
            try:
                level, announced = _said(handler_call_details.invocation_metadata)
                if self._room is not None:
                    self._room.check_room(level, announced)
            except PoolError as error:
                return self.refusal(method, error)
        wrapped = self._wrapped.get((method, level))
        if wrapped is not None:
            return wrapped
        inner = continuation(handler_call_details)
        if inner is None:
            return None  # a method that isn't there, of which callers make up any number
        if inner.unary_unary is not None:
            wrapped = self._unary(method, level, inner, inner.unary_unary)
        elif inner.stream_stream is not None:
            wrapped = self._stream(method, level, inner, inner.stream_stream)
        elif inner.unary_stream is not None:
            wrapped = _watched(inner, inner.unary_stream)
        else:
            return inner
        self._wrapped[method, level] = wrapped
        return wrapped

    def refusal(self, method: str, error: PoolError) -> grpc.RpcMethodHandler[Any, Any]:
        """Give a handler, for a method of any kind, that ends a call with an error before a message of it is read."""
        kind = "bidi_stream" if (method, 1) in self._wrapped and self._wrapped[method, 1].stream_stream else "unary"

        def refuse(_: object, context: grpc.ServicerContext) -> NoReturn:
            line = _Line(method, kind, self, context)
            try:
                line.fail(error, context)
            finally:
                line.end(self._log)

        # Of a stream gRPC doesn't read the first message before it asks.
        return grpc.stream_stream_rpc_method_handler(self._by(INLINE, refuse))

    def _of(self, method: str) -> ThreadPoolExecutor | None:
        return next((each for start, each in self._threads.items() if method.startswith(start)), None)

    @staticmethod
    def _by(threads: ThreadPoolExecutor | None, behaviour: F) -> F:
        if threads is not None:
            behaviour.experimental_thread_pool = threads  # type: ignore[attr-defined]  # gRPC's way to be told
        return behaviour

    def _unary(
        self,
        method: str,
        level: int,
        inner: grpc.RpcMethodHandler[Any, Any],
        behaviour: Callable[[Any, grpc.ServicerContext], object],
    ) -> grpc.RpcMethodHandler[Any, Any]:
        read, room = _reading(inner), self._room

        def answers(data: bytes, context: grpc.ServicerContext) -> object:
            if room is not None:
                room.arrived()
            line = _Line(method, "unary", self, context, level)
            try:
                answer = behaviour(read(data), context)
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status
                line.fail(error, context)
            else:
                if not context.is_active():
                    line.leave(context, "send")
                return answer
            finally:
                line.end(self._log)

        return grpc.unary_unary_rpc_method_handler(
            self._by(self._of(method), answers), response_serializer=inner.response_serializer
        )

    def _stream(
        self,
        method: str,
        level: int,
        inner: grpc.RpcMethodHandler[Any, Any],
        behaviour: Callable[[Iterator[Any], grpc.ServicerContext], Iterator[object]],
    ) -> grpc.RpcMethodHandler[Any, Any]:
        read, room = _reading(inner), self._room

        def answers(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[object]:
            if room is not None:
                room.arrived()
            line, ended = _Line(method, "bidi_stream", self, context, level), Event()
            context.add_callback(ended.set)
            try:
                yield from behaviour(map(read, messages), context)
            except GeneratorExit:  # gRPC wants no more answers
                line.status = "CANCELLED"
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status
                if isinstance(error, InvalidArgumentError):
                    # gRPC tells of the end of the messages before it tells that they end by a reset.
                    ended.wait(RESET_SECONDS)
                if context.is_active():
                    line.fail(error, context)
                # The caller left, or its time is up: nobody hears a status, and what was raised came of that.
                line.leave(context)
            finally:
                line.end(self._log)

        return grpc.stream_stream_rpc_method_handler(
            self._by(self._of(method), answers), response_serializer=inner.response_serializer
        )


def _reading(inner: grpc.RpcMethodHandler[Any, Any]) -> Callable[[bytes], Any]:
    """Give what reads a method's messages.

    gRPC would do it, but of a call whose message it can't read it keeps all that it has of it, for good: memory, and a
    place among the connection's calls. Nor would that call be in the log.
    """
    deserialize = inner.request_deserializer or (lambda data: data)

    def read(data: bytes) -> Any:  # noqa: ANN401 - the method's kind of message
        try:
            return deserialize(data)
        except DecodeError:
            raise InternalError(
                "expected a message of the method's, got bytes that are none", reason=NO_MESSAGE
            ) from None

    return read


def _watched(
    inner: grpc.RpcMethodHandler[Any, Any], behaviour: Callable[..., Iterator[Any]]
) -> grpc.RpcMethodHandler[Any, Any]:
    """Give the method that watches health, which says by attributes of its own how it is to be called."""
    read = _reading(inner)

    @wraps(behaviour)
    def answers(data: bytes, context: grpc.ServicerContext, *rest: object) -> Iterator[Any]:
        try:
            message = read(data)
        except InternalError as error:
            _fail(context, error)
        return behaviour(message, context, *rest)

    return grpc.unary_stream_rpc_method_handler(answers, response_serializer=inner.response_serializer)


class _Line:
    """What is told of a call, in the log, the metrics and the traces, from its begin to its end."""

    def __init__(
        self, method: str, kind: str, owner: CallInterceptor, context: grpc.ServicerContext, level: int = 1
    ) -> None:
        self.method = method
        self.priority = level
        service, _, name = method[1:].partition("/")
        self._labels = kind, service, name
        self._metrics, self._judge = owner.metrics, owner.judge
        self.status = "OK"
        self.level = logging.DEBUG if method.startswith(QUIET) else logging.INFO
        caller = _caller.get()
        self.noted: dict[str, str] = {"caller": caller} if caller else {}
        self.span: CallSpan | None = None
        if owner.spans is not None and not method.startswith(QUIET):
            self.span = owner.spans.begin(method, context.invocation_metadata(), context.peer())
        self._started = time.perf_counter()
        _line.set(self)
        self._metrics.started(*self._labels)

    def end(self, call_log: CallLog) -> None:
        """Log and count it, and end its span."""
        seconds = time.perf_counter() - self._started
        facts = {"method": self.method, "status": self.status, "ms": round(seconds * 1000, 3), **self.noted}
        if self.span is not None:
            code = grpc.StatusCode[self.status].value[0]
            self.span.end(self.status, code, self.noted, streams=self._labels[0] != "unary")
            facts["trace_id"] = self.span.trace_id
        call_log.add(self.level, facts)
        self._metrics.handled(*self._labels, self.status, seconds)

    def leave(self, context: grpc.ServicerContext, stage: str = "") -> None:
        """End the call of a caller that has gone; the stage that it left in is counted."""
        left = context.time_remaining()
        self.status = "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"
        if stage:
            self._metrics.cancelled(stage)

    def fail(self, error: Exception, context: grpc.ServicerContext) -> NoReturn:
        """End the call with the status of an error."""
        if isinstance(error, NotImplementedError):
            # A servicer's generated base class says so before it raises; torch raises the same for reasons of its own.
            told = context.code()  # type: ignore[attr-defined]  # which the stubs lack
            if told == grpc.StatusCode.UNIMPLEMENTED:
                error = UnsupportedError("the service doesn't have this method")
        if not isinstance(error, PoolError):
            error = self._judge(error) or error
        if isinstance(error, PoolError):
            self.noted.update(reason=error.reason, error=clip(error.message, 300))
            if isinstance(error, UnauthenticatedError | PermissionDeniedError):
                self.level = logging.INFO  # whatever they try
            if isinstance(error, UnavailableError):
                self._metrics.rejected(error.reason)
        else:
            error_id = secrets.token_hex(6)
            log.exception("unexpected error", method=self.method, error_id=error_id)
            if not self.method.startswith(QUIET):
                self._metrics.escaped()
            self.noted.update(error_id=error_id, error=type(error).__name__)
            text = f"the server failed on this call; its log explains it under the id {error_id}"
            error = InternalError(text, metadata={"error_id": error_id})
        self.status = error.code
        _fail(context, error)


def _fail(context: grpc.ServicerContext, error: PoolError) -> NoReturn:
    code = grpc.StatusCode[error.code]
    text, details = encode_error(error)
    trailing: list[tuple[str, str | bytes]] = [(DETAILS_KEY, details)]
    if isinstance(error, UnavailableError) and error.retry_delay is not None:
        trailing.append((PUSHBACK_KEY, str(round(error.retry_delay * 1000))))
    context.set_trailing_metadata(tuple(trailing))
    context.abort(code, text)


def _said(metadata: Iterable[tuple[str, str | bytes]] | None) -> tuple[int, int]:
    """Give what a caller says: the call's priority, and how large its message is, 0 where it doesn't."""
    level, announced = 1, 0
    for key, value in metadata or ():
        if key == PRIORITY_KEY:
            if value not in PRIORITY_NAMES:
                msg = f"expected one of {', '.join(PRIORITY_NAMES)}, got {clip(value)}"
                raise InvalidArgumentError(msg, field=f"metadata.{PRIORITY_KEY}")
            level = int(value)
        elif key == MESSAGE_BYTES_KEY:
            if not (isinstance(value, str) and value.isdecimal() and len(value) <= MOST_DIGITS):
                msg = f"expected a number of bytes, got {clip(value)}"
                raise InvalidArgumentError(msg, field=f"metadata.{MESSAGE_BYTES_KEY}")
            announced = int(value)
    return level, announced
