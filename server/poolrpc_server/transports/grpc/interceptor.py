"""Calls from grpcio to the pipeline: an interceptor that admits each call, and grpcio's context as a CallContext."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

import grpc

from poolrpc._wire.status import ATTEMPTS_KEY
from poolrpc_server.calls.call import CallContext, StatusError
from poolrpc_server.calls.method import UNKNOWN_METHOD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from poolrpc_server.calls.admitted_call import AdmittedCall
    from poolrpc_server.calls.method import Method
    from poolrpc_server.calls.pipeline import CallPipeline
    from poolrpc_server.transports.grpc.health_watch import HealthWatch

T = TypeVar("T")
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class GrpcContext(CallContext):
    """A call that grpcio received; until `bind`, only its method and its metadata are known."""

    _context: grpc.ServicerContext | None = None
    _peer = ""

    @property
    def _retried(self) -> tuple[tuple[str, str | bytes], ...]:
        """What gRPC says of the call's earlier attempts, which goes back to the caller; empty for the first one."""
        return tuple(each for each in self.metadata if each[0] == ATTEMPTS_KEY)

    def bind(self, context: grpc.ServicerContext) -> None:
        """Add grpcio's own context, which exists once a thread handles the call, and release the ticket at its end."""
        self._context = context
        self._peer = context.peer()
        if self._retried:
            context.set_trailing_metadata(self._retried)
        if not context.add_callback(self.ticket.release):
            self.ticket.release()

    @property
    def peer(self) -> str:
        """Address of the caller in gRPC's notation; empty until a thread handles the call."""
        return self._peer

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None for no deadline."""
        return None if self._context is None else self._context.time_remaining()

    def is_active(self) -> bool:
        """Return whether the call has neither ended nor been cancelled."""
        return self._context is None or self._context.is_active()

    def add_done_callback(self, callback: Callable[[], None]) -> bool:
        """Register a callback for the end of the call; return False if the call has ended already."""
        assert self._context is not None  # noqa: S101 - not called before a thread handles the call
        return bool(self._context.add_callback(callback))

    def cancel(self) -> None:
        """End the call from the server's side."""
        if self._context is not None:
            self._context.cancel()

    def abort(self, status: StatusError) -> NoReturn:
        """End the call with a status, from the function that handles it."""
        assert self._context is not None  # noqa: S101 - a thread handles the call
        self._context.set_trailing_metadata((*self._retried, *status.trailing))
        self._context.abort(grpc.StatusCode[status.code], status.message)


class PipelineInterceptor(grpc.ServerInterceptor):
    """An interceptor that admits each call before grpcio reads its message, and passes it to the pipeline.

    A method that neither the pipeline nor the watch has is left to the handlers that were added to the server.

    Args:
        pipeline: Answers the calls.
        executor_of: Returns the executor whose threads answer a method.
        watch: The method that answers without a thread, of whose calls the pipeline only checks the token.

    """

    def __init__(
        self,
        pipeline: CallPipeline,
        executor_of: Callable[[Method], ThreadPoolExecutor],
        watch: HealthWatch,
    ) -> None:
        self._pipeline = pipeline
        self._executor_of = executor_of
        self._watch = watch

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the handler that answers one call; None if there is no such method."""
        context = GrpcContext(handler_call_details.method, handler_call_details.invocation_metadata or ())
        watched = context.method == self._watch.method.name
        call = self._pipeline.admit(context, self._watch.method if watched else UNKNOWN_METHOD)
        if call is None:
            if watched:
                return self._watch.handler(context)
            context.ticket.release()
            return continuation(handler_call_details)
        if call.error is not None:
            return _rejection(call, context)
        return _handler(call, context, self._executor_of(call.method))


class _Inline(ThreadPoolExecutor):
    """An executor that calls functions at once, in the calling thread: grpcio's own, which must not wait."""

    def submit(self, fn: Callable[..., T], /, *args: object, **kwargs: object) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - raised by the future
            future.set_exception(error)
        return future


INLINE = _Inline(1)
"""The executor of rejected calls: a rejection takes less time than waking a thread, and under overload none is idle."""


def _handler(call: AdmittedCall, context: GrpcContext, executor: ThreadPoolExecutor) -> Handler:
    """Return the handler of an admitted call.

    grpcio enters the handler of a unary method when the message has arrived, and nothing can end its wait. It enters
    that of a method with a stream of messages at once, and cancelling the call ends the wait for a message. The two are
    the same on the wire.
    """
    if call.method.stream is not None:

        def answer_stream(messages: Iterator[bytes], servicer_context: grpc.ServicerContext) -> Iterator[bytes]:
            context.bind(servicer_context)
            try:
                yield from call.stream(messages)
            except StatusError as status:
                context.abort(status)

        answer_stream.experimental_thread_pool = executor  # type: ignore[attr-defined]  # grpcio's attribute
        return grpc.stream_stream_rpc_method_handler(answer_stream)

    def answer(messages: Iterator[bytes], servicer_context: grpc.ServicerContext) -> bytes:
        context.bind(servicer_context)
        try:
            return call.unary(messages)
        except StatusError as status:
            context.abort(status)

    answer.experimental_thread_pool = executor  # type: ignore[attr-defined]  # as above
    return grpc.stream_unary_rpc_method_handler(answer)


def _rejection(call: AdmittedCall, context: GrpcContext) -> Handler:
    def reject(_: object, servicer_context: grpc.ServicerContext) -> NoReturn:
        context.bind(servicer_context)
        try:
            call.reject()
        except StatusError as status:
            context.abort(status)

    reject.experimental_thread_pool = INLINE  # type: ignore[attr-defined]  # as above
    # grpcio reads the first message of a stream only when the handler asks for it.
    return grpc.stream_stream_rpc_method_handler(reject)
