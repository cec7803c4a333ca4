"""What surrounds every call: errors become statuses, and each call becomes a line in the log."""

from __future__ import annotations

import logging
import secrets
import time
from contextvars import ContextVar
from threading import Event
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from poolrpc.errors import InternalError, InvalidArgumentError, PoolError
from poolrpc.shapes import clip
from poolrpc.status import DETAILS_KEY, encode_error
from poolrpc_server.logs import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from poolrpc_server.logs import CallLog

QUIET = ("/grpc.health.v1.Health/", "/grpc.reflection.")
"""Methods that probes and tools call, by the second perhaps: logged at DEBUG."""

RESET_SECONDS = 0.1
"""How long a stream that misses something is taken for one that is being reset."""

_facts: ContextVar[dict[str, str]] = ContextVar("facts")


def note(facts: Mapping[str, str]) -> None:
    """Add facts to the log line of the call that this thread answers."""
    _facts.get().update(facts)


class CallInterceptor(grpc.ServerInterceptor):
    """Answers with the status of whatever a servicer raises, and logs the call."""

    def __init__(self, call_log: CallLog, judge: Callable[[Exception], PoolError | None] | None = None) -> None:
        """Make one that logs there; `judge` may give a better error than InternalError for one that is no PoolError."""
        self._log = call_log
        self._judge = judge or (lambda _: None)
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap a method of a kind that the services have: one message each way, or a stream each way."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is not None:
            return wrapped
        inner = continuation(handler_call_details)
        if inner is None:
            return None  # a method that isn't there, of which callers make up any number
        if inner.unary_unary is not None:
            wrapped = self._unary(method, inner, inner.unary_unary)
        elif inner.stream_stream is not None:
            wrapped = self._stream(method, inner, inner.stream_stream)
        else:
            return inner
        self._wrapped[method] = wrapped
        return wrapped

    def _unary(
        self,
        method: str,
        inner: grpc.RpcMethodHandler[Any, Any],
        behaviour: Callable[[Any, grpc.ServicerContext], object],
    ) -> grpc.RpcMethodHandler[Any, Any]:
        def answer(request: object, context: grpc.ServicerContext) -> object:
            line = _Line(method, self._judge)
            try:
                return behaviour(request, context)
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status
                line.fail(error, context)
            finally:
                self._log.add(line.level, line.facts())

        return grpc.unary_unary_rpc_method_handler(answer, inner.request_deserializer, inner.response_serializer)

    def _stream(
        self,
        method: str,
        inner: grpc.RpcMethodHandler[Any, Any],
        behaviour: Callable[[Iterator[Any], grpc.ServicerContext], Iterator[object]],
    ) -> grpc.RpcMethodHandler[Any, Any]:
        def answers(requests: Iterator[object], context: grpc.ServicerContext) -> Iterator[object]:
            line, ended = _Line(method, self._judge), Event()
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
                left = context.time_remaining()
                line.status = "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"
            finally:
                self._log.add(line.level, line.facts())

        return grpc.stream_stream_rpc_method_handler(answers, inner.request_deserializer, inner.response_serializer)


class _Line:
    """The log line of a call, from its begin to its end."""

    def __init__(self, method: str, judge: Callable[[Exception], PoolError | None]) -> None:
        self.method = method
        self._judge = judge
        self.status = "OK"
        self.level = logging.DEBUG if method.startswith(QUIET) else logging.INFO
        self._noted: dict[str, str] = {}
        self._started = time.perf_counter()
        _facts.set(self._noted)

    def facts(self) -> dict[str, object]:
        milliseconds = round((time.perf_counter() - self._started) * 1000, 3)
        return {"method": self.method, "status": self.status, "ms": milliseconds, **self._noted}

    def fail(self, error: Exception, context: grpc.ServicerContext) -> NoReturn:
        """End the call with the status of an error."""
        if not isinstance(error, PoolError):
            error = self._judge(error) or error
        if isinstance(error, PoolError):
            self._noted.update(reason=error.reason, error=clip(error.message, 300))
        else:
            error_id = secrets.token_hex(6)
            log.exception("unexpected error", method=self.method, error_id=error_id)
            self._noted.update(error_id=error_id, error=type(error).__name__)
            text = f"the server failed on this call; its log explains it under the id {error_id}"
            error = InternalError(text, metadata={"error_id": error_id})
        self.status = error.code
        _fail(context, error)


def _fail(context: grpc.ServicerContext, error: PoolError) -> NoReturn:
    code = grpc.StatusCode[error.code]
    text, details = encode_error(error, code.value[0])
    context.set_trailing_metadata(((DETAILS_KEY, details),))
    context.abort(code, text)
