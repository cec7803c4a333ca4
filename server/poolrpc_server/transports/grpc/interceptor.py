"""Calls from grpcio to the pipeline: an interceptor that admits each call, and grpcio's context as a CallContext."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError

from poolrpc.errors import InternalError
from poolrpc_server.calls.call import CallContext, StatusError
from poolrpc_server.calls.pipeline import UNKNOWN_METHOD, status_of
from poolrpc_server.protocols.messages import NO_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from poolrpc_server.calls.pipeline import AdmittedCall, CallPipeline, Method

T = TypeVar("T")
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class GrpcContext(CallContext):
    """A call that grpcio received; until `bind`, only its method and its metadata are known."""

    _context: grpc.ServicerContext | None = None

    def bind(self, context: grpc.ServicerContext) -> None:
        """Add grpcio's own context, which exists once the call's message has arrived."""
        self._context = context

    @property
    def peer(self) -> str:
        """Address of the caller in gRPC's notation; empty until the message has arrived."""
        return "" if self._context is None else self._context.peer()

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None for no deadline."""
        return None if self._context is None else self._context.time_remaining()

    def is_active(self) -> bool:
        """Return whether the call has neither ended nor been cancelled."""
        return self._context is None or self._context.is_active()

    def add_done_callback(self, callback: Callable[[], None]) -> bool:
        """Register a callback for the end of the call; return False if the call has ended already."""
        assert self._context is not None  # noqa: S101 - not called before the message has arrived
        return bool(self._context.add_callback(callback))

    def cancel(self) -> None:
        """End the call from the server's side."""
        if self._context is not None:
            self._context.cancel()


class PipelineInterceptor(grpc.ServerInterceptor):
    """An interceptor that admits each call before grpcio reads its message, and passes it to the pipeline.

    Methods that the pipeline does not have are left to the handlers that were added to the server.

    Args:
        pipeline: Answers the calls.
        executor_of: Returns the executor whose threads answer a method.
        others: Methods that handlers added to the server answer, of which the pipeline only checks the token.

    """

    def __init__(
        self,
        pipeline: CallPipeline,
        executor_of: Callable[[Method], ThreadPoolExecutor],
        others: Iterable[Method] = (),
    ) -> None:
        self._pipeline = pipeline
        self._executor_of = executor_of
        self._others = {method.name: method for method in others}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the handler that answers one call; None if there is no such method."""
        context = GrpcContext(handler_call_details.method, handler_call_details.invocation_metadata or ())
        other = self._others.get(context.method, UNKNOWN_METHOD)
        call = self._pipeline.admit(context, other)
        if call is None:
            inner = continuation(handler_call_details)
            return None if inner is None else _with_parsing(inner, self._executor_of(other))
        if call.error is not None:
            return _rejection(call, context)
        return _handler(call, context, CallExecutor(self._executor_of(call.method), call))


class CallExecutor(ThreadPoolExecutor):
    """The executor of one call: threads of another executor, and the call's release at the end of its thread.

    grpcio hands a call to the executor that its handler names, and a thread waits there for the call's message. If the
    call is cancelled before that, grpcio never calls the handler: what the call reserved is returned here.
    """

    def __init__(self, executor: ThreadPoolExecutor, call: AdmittedCall) -> None:
        # Without ThreadPoolExecutor's own __init__: this has no threads.
        self._executor = executor
        self._call = call

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:  # noqa: ANN401 - fn's
        """Call `fn` in a thread, and release the call afterwards."""
        try:
            return self._executor.submit(self._run, fn, *args, **kwargs)
        except BaseException:
            self._call.release()
            raise

    def _run(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:  # noqa: ANN401 - fn's
        try:
            return fn(*args, **kwargs)
        finally:
            self._call.release()


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
    if call.method.stream is not None:

        def answer_stream(messages: Iterator[bytes], servicer_context: grpc.ServicerContext) -> Iterator[bytes]:
            context.bind(servicer_context)
            try:
                yield from call.stream(messages)
            except StatusError as status:
                _abort(servicer_context, status)

        answer_stream.experimental_thread_pool = executor  # type: ignore[attr-defined]  # grpcio's attribute
        return grpc.stream_stream_rpc_method_handler(answer_stream)

    def answer(message: bytes, servicer_context: grpc.ServicerContext) -> bytes:
        context.bind(servicer_context)
        try:
            return call.unary(message)
        except StatusError as status:
            _abort(servicer_context, status)

    answer.experimental_thread_pool = executor  # type: ignore[attr-defined]  # as above
    return grpc.unary_unary_rpc_method_handler(answer)


def _rejection(call: AdmittedCall, context: GrpcContext) -> Handler:
    def reject(_: object, servicer_context: grpc.ServicerContext) -> NoReturn:
        context.bind(servicer_context)
        try:
            call.reject()
        except StatusError as status:
            _abort(servicer_context, status)

    reject.experimental_thread_pool = INLINE  # type: ignore[attr-defined]  # as above
    # grpcio reads the first message of a stream only when the handler asks for it.
    return grpc.stream_stream_rpc_method_handler(reject)


def _abort(context: grpc.ServicerContext, status: StatusError) -> NoReturn:
    context.set_trailing_metadata(status.trailing)
    context.abort(grpc.StatusCode[status.code], status.message)


def _with_parsing(inner: Handler, executor: ThreadPoolExecutor) -> Handler:
    """Return a handler of another package whose request is parsed here.

    grpcio itself never releases a call whose message it cannot parse: the call's memory, and its place among the calls
    of its connection.
    """
    behavior, parse = inner.unary_stream, inner.request_deserializer
    if behavior is None or parse is None:
        return inner
    error = InternalError("expected a message of the method's type, got other bytes", reason=NO_MESSAGE)

    @wraps(behavior)  # keeps the attribute that tells grpcio how to call it
    def answer(message: bytes, context: grpc.ServicerContext, *rest: object) -> Iterator[Any]:
        try:
            request = parse(message)
        except DecodeError:
            _abort(context, status_of(error))
        return behavior(request, context, *rest)

    # Health's servicer keeps its own executor in an attribute of its class: it is that of the process's latest server,
    # which may have ended.
    answer.experimental_thread_pool = executor  # type: ignore[attr-defined]  # as above
    return grpc.unary_stream_rpc_method_handler(answer, response_serializer=inner.response_serializer)
