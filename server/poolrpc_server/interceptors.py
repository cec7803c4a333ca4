"""What surrounds every unary call: errors become statuses, and each call becomes a line in the log."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from structlog.contextvars import bind_contextvars, clear_contextvars

from poolrpc.errors import InternalError, PoolError
from poolrpc.shapes import clip
from poolrpc.status import DETAILS_KEY, encode_error
from poolrpc_server.logs import log

if TYPE_CHECKING:
    from collections.abc import Callable

QUIET = ("/grpc.health.v1.Health/",)
"""Methods that probes call by the second: logged at DEBUG."""


def note(**facts: object) -> None:
    """Add facts to the log line of the call that this thread answers; each is cut to a line's length."""
    bind_contextvars(
        **{key: value if isinstance(value, str | int) else clip(value, 300) for key, value in facts.items()}
    )


class CallInterceptor(grpc.ServerInterceptor):
    """Answers with the status of whatever a servicer raises, and logs the call."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap a unary method; others (reflection's stream) raise no errors of ours and pass."""
        inner = continuation(handler_call_details)
        if inner is None or inner.unary_unary is None:
            return inner
        method, answer = handler_call_details.method, inner.unary_unary

        def surrounded(request: object, context: grpc.ServicerContext) -> object:
            clear_contextvars()
            started, status = time.perf_counter(), "OK"
            try:
                return answer(request, context)
            except PoolError as error:
                status = error.code
                note(reason=error.reason, error=error.message)
                _fail(context, error)
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller learns an id and the log the rest
                status = InternalError.code
                error_id = secrets.token_hex(6)
                log.exception("unexpected error", method=method, error_id=error_id)
                note(error_id=error_id, error=type(error).__name__)
                text = f"the server failed on this call; its log explains it under the id {error_id}"
                _fail(context, InternalError(text, metadata={"error_id": error_id}))
            finally:
                milliseconds = round((time.perf_counter() - started) * 1000, 3)
                line = log.debug if method.startswith(QUIET) else log.info
                line("call", method=method, status=status, ms=milliseconds)

        return grpc.unary_unary_rpc_method_handler(surrounded, inner.request_deserializer, inner.response_serializer)


def _fail(context: grpc.ServicerContext, error: PoolError) -> NoReturn:
    code = grpc.StatusCode[error.code]
    text, details = encode_error(error, code.value[0])
    context.set_trailing_metadata(((DETAILS_KEY, details),))
    context.abort(code, text)
