"""What surrounds every call: errors become statuses, and each call becomes a line in the log."""

from __future__ import annotations

import logging
import secrets
import time
from contextvars import ContextVar
from threading import Event
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc

from poolrpc.errors import InternalError, InvalidArgumentError, PoolError, UnavailableError
from poolrpc.shapes import clip
from poolrpc.status import DETAILS_KEY, encode_error
from poolrpc_server.logs import log

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from concurrent.futures import ThreadPoolExecutor

    from poolrpc_server.logs import CallLog

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

PRIORITY_NAMES = ("0", "1", "2")

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""The trailing metadata from which gRPC's own retries take their delay."""

F = TypeVar("F", bound="Callable[..., object]")

_line: ContextVar[_Line] = ContextVar("line")


def note(facts: Mapping[str, str]) -> None:
    """Add facts to the log line of the call that this thread answers."""
    _line.get().noted.update(facts)


def priority() -> int:
    """Give the priority of the call that this thread answers."""
    return _line.get().priority


class CallInterceptor(grpc.ServerInterceptor):
    """Lets calls in, answers with the status of whatever a servicer raises, and logs the call.

    What needs room is refused before its message is read where there is none. What needs none (health, the server's
    info, the refusals themselves) has threads of its own, so that it is answered while all others are taken.
    """

    def __init__(
        self,
        call_log: CallLog,
        check_room: Callable[[int], None],
        needs_room: Collection[str] = (),
        threads: Mapping[str, ThreadPoolExecutor] | None = None,
    ) -> None:
        """Make one.

        Args:
            call_log: Where it logs.
            check_room: Raises where there is no room for a call of that priority.
            needs_room: The methods for which that is asked.
            threads: Who answers methods that begin so; "" who refuses. Any other is answered by the server's own.

        """
        self._log = call_log
        self._check_room = check_room
        self._needs_room = frozenset(needs_room)
        self._threads = dict(threads or {})
        self._wrapped: dict[tuple[str, int], grpc.RpcMethodHandler[Any, Any]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap a method of a kind that the services have: one message each way, or a stream each way."""
        method = handler_call_details.method
        level = 1
        if method in self._needs_room:
            try:
                level = _priority_of(handler_call_details.invocation_metadata)
                self._check_room(level)
            except PoolError as error:
                return self._refusal(method, error)
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
        else:
            return inner
        self._wrapped[method, level] = wrapped
        return wrapped

    def _refusal(self, method: str, error: PoolError) -> grpc.RpcMethodHandler[Any, Any]:
        def refuse(_: object, context: grpc.ServicerContext) -> NoReturn:
            line = _Line(method)
            try:
                line.fail(error, context)
            finally:
                self._log.add(line.level, line.facts())

        # Of a stream gRPC doesn't read the first message before it asks.
        return grpc.stream_stream_rpc_method_handler(self._by(self._threads.get(""), refuse))

    def _of(self, method: str) -> ThreadPoolExecutor | None:
        return next((each for start, each in self._threads.items() if start and method.startswith(start)), None)

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
        def answers(request: object, context: grpc.ServicerContext) -> object:
            line = _Line(method, level)
            try:
                answer = behaviour(request, context)
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status
                line.fail(error, context)
            else:
                if not context.is_active():
                    line.leave(context)
                return answer
            finally:
                self._log.add(line.level, line.facts())

        return grpc.unary_unary_rpc_method_handler(
            self._by(self._of(method), answers), inner.request_deserializer, inner.response_serializer
        )

    def _stream(
        self,
        method: str,
        level: int,
        inner: grpc.RpcMethodHandler[Any, Any],
        behaviour: Callable[[Iterator[Any], grpc.ServicerContext], Iterator[object]],
    ) -> grpc.RpcMethodHandler[Any, Any]:
        def answers(requests: Iterator[object], context: grpc.ServicerContext) -> Iterator[object]:
            line, ended = _Line(method, level), Event()
            context.add_callback(ended.set)
            try:
                yield from behaviour(requests, context)
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
                self._log.add(line.level, line.facts())

        return grpc.stream_stream_rpc_method_handler(
            self._by(self._of(method), answers), inner.request_deserializer, inner.response_serializer
        )


class _Line:
    """The log line of a call, from its begin to its end."""

    def __init__(self, method: str, level: int = 1) -> None:
        self.method = method
        self.priority = level
        self.status = "OK"
        self.level = logging.DEBUG if method.startswith(QUIET) else logging.INFO
        self.noted: dict[str, str] = {}
        self._started = time.perf_counter()
        _line.set(self)

    def facts(self) -> dict[str, object]:
        milliseconds = round((time.perf_counter() - self._started) * 1000, 3)
        return {"method": self.method, "status": self.status, "ms": milliseconds, **self.noted}

    def leave(self, context: grpc.ServicerContext) -> None:
        """End the call of a caller that has gone."""
        left = context.time_remaining()
        self.status = "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"

    def fail(self, error: Exception, context: grpc.ServicerContext) -> NoReturn:
        """End the call with the status of an error."""
        if isinstance(error, PoolError):
            self.noted.update(reason=error.reason, error=clip(error.message, 300))
        else:
            error_id = secrets.token_hex(6)
            log.exception("unexpected error", method=self.method, error_id=error_id)
            self.noted.update(error_id=error_id, error=type(error).__name__)
            text = f"the server failed on this call; its log explains it under the id {error_id}"
            error = InternalError(text, metadata={"error_id": error_id})
        self.status = error.code
        _fail(context, error)


def _fail(context: grpc.ServicerContext, error: PoolError) -> NoReturn:
    code = grpc.StatusCode[error.code]
    text, details = encode_error(error, code.value[0])
    trailing: list[tuple[str, str | bytes]] = [(DETAILS_KEY, details)]
    if isinstance(error, UnavailableError) and error.retry_delay is not None:
        trailing.append((PUSHBACK_KEY, str(round(error.retry_delay * 1000))))
    context.set_trailing_metadata(tuple(trailing))
    context.abort(code, text)


def _priority_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> int:
    for key, value in metadata or ():
        if key == PRIORITY_KEY:
            if value not in PRIORITY_NAMES:
                msg = f"expected one of {', '.join(PRIORITY_NAMES)}, got {clip(value)}"
                raise InvalidArgumentError(msg, field=f"metadata.{PRIORITY_KEY}")
            return int(value)
    return 1
