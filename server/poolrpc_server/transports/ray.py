"""The Ray Serve transport: Ray's gRPC proxy receives the calls, and its replicas answer them through the pipeline."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import ray
from ray import serve

from poolrpc._wire.status import DETAILS_KEY
from poolrpc.v1 import pool_pb2
from poolrpc_server.calls.call import EndingContext, StatusError
from poolrpc_server.calls.pipeline import CONTROL_CALLS
from poolrpc_server.config import Config, ConfigError
from poolrpc_server.protocols.health import HEALTH_SERVICE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence

    from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream

    from poolrpc_server.calls.admitted_call import AdmittedCall

POOL_DESCRIPTOR = pool_pb2.DESCRIPTOR.services_by_name["PoolService"]
STREAM_METHODS = tuple(method.name for method in POOL_DESCRIPTOR.methods if method.server_streaming)

RAY_SETTINGS = ("listen", "tls_cert", "tls_key", "tls_client_ca", "workers", "metrics", "allow_client_shm")
"""Settings of Config that Ray controls, or that do not apply to a replica."""

RETRYABLE_RAY_CODES = (grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""Ray's statuses for a call whose replica died, and for a call that finds the queue full: both may be tried again."""


def add_services(_: object, server: Any) -> None:  # noqa: ANN401 - a class of Ray's that is not public
    """Add this project's services to Ray's proxy, for `grpc_servicer_functions`."""
    # One handler in each call, because Ray replaces only the functions of a call's first handler.
    server.add_generic_rpc_handlers(
        (_Forwarding(POOL_DESCRIPTOR.full_name, [method.name for method in POOL_DESCRIPTOR.methods]),)
    )
    server.add_generic_rpc_handlers((_Forwarding(HEALTH_SERVICE, ["Check"]),))


class _Forwarding(grpc.GenericRpcHandler):
    """A service whose calls Ray's proxy forwards to the replicas.

    Messages are forwarded as bytes, since no handler names a deserializer. An error of Ray's own becomes one that this
    project's clients know.
    """

    def __init__(self, service: str, names: Sequence[str]) -> None:
        # Ray looks for this attribute, and replaces these functions by its own.
        self._method_handlers: dict[str, Any] = {
            f"/{service}/{name}": grpc.stream_stream_rpc_method_handler(_unused)
            if name in STREAM_METHODS
            else grpc.unary_unary_rpc_method_handler(_unused)
            for name in names
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler of a method: Ray's function, wrapped."""
        forwarding = self._method_handlers.get(handler_call_details.method)
        if forwarding is None:
            return None
        if forwarding.response_streaming:
            return grpc.stream_stream_rpc_method_handler(_forward_stream(forwarding.stream_stream))
        return grpc.unary_unary_rpc_method_handler(_forward_unary(forwarding.unary_unary))


def _unused(*_: object) -> NoReturn:
    raise NotImplementedError


def _forward_unary(forward: Callable[..., Any]) -> Any:  # noqa: ANN401 - of grpc.aio, which the handlers' types lack
    async def answer(request: bytes, context: Any) -> bytes:  # noqa: ANN401 - as above
        response = await forward(request, context)
        _mark_retryable(context)
        return bytes(response)

    return answer


def _forward_stream(forward: Callable[..., Any]) -> Any:  # noqa: ANN401 - as above
    async def answer(requests: Any, context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401 - as above
        async for response in forward(requests, context):
            if not context.code():  # a status comes with an empty message: Ray has no other way to send its details
                yield bytes(response)
        _mark_retryable(context)

    return answer


def _mark_retryable(context: Any) -> None:  # noqa: ANN401 - as above
    # Every error of the replica's own has details.
    ours = any(key == DETAILS_KEY for key, _ in context.trailing_metadata() or ())
    if not ours and context.code() in RETRYABLE_RAY_CODES:
        context.set_code(grpc.StatusCode.UNAVAILABLE)


class RayContext(EndingContext):
    """A call that Ray's proxy forwarded. The proxy has the deadline, and cancels the call when it has passed."""

    transport = "ray"

    def __init__(self, method: str, context: RayServegRPCContext) -> None:
        """Create the context of a call from Ray's own."""
        super().__init__(method, tuple(context.invocation_metadata() or ()), context.peer() or "")


class _Message:
    """Bytes, in the form of a message that Ray serializes."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> PickleBuffer:
        # Ray writes this into its memory as it is; bytes would be copied into a pickle first, and out of it.
        return PickleBuffer(self._data)


class PoolReplica:
    """One replica: a whole service without a listening address."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Make a service with Config's fields; its threads are as many as the CPUs that Ray assigns to the replica."""
        from poolrpc_server.service import Service  # noqa: PLC0415 - it imports torch, which Ray's proxy does not need

        cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
        config = Config(**{"threads": max(1, cpus), **settings})
        self._executor = ThreadPoolExecutor(config.call_threads, "poolrpc-call")
        self._control = ThreadPoolExecutor(CONTROL_CALLS, "poolrpc-control")
        self._service = Service(config)
        self._service.health.set_serving(True)

    async def Pool(self, message: bytes, grpc_context: RayServegRPCContext) -> _Message:
        """Answer the method of that name, as the methods below do."""
        return await self._unary(f"/{POOL_DESCRIPTOR.full_name}/Pool", message, grpc_context)

    async def InferShape(self, message: bytes, grpc_context: RayServegRPCContext) -> _Message:
        """See Pool."""
        return await self._unary(f"/{POOL_DESCRIPTOR.full_name}/InferShape", message, grpc_context)

    async def GetServerInfo(self, message: bytes, grpc_context: RayServegRPCContext) -> _Message:
        """See Pool."""
        return await self._unary(f"/{POOL_DESCRIPTOR.full_name}/GetServerInfo", message, grpc_context)

    async def Check(self, message: bytes, grpc_context: RayServegRPCContext) -> _Message:
        """Answer Check of grpc.health.v1."""
        return await self._unary(f"/{HEALTH_SERVICE}/Check", message, grpc_context)

    async def PoolStream(
        self, messages: gRPCInputStream[bytes], grpc_context: RayServegRPCContext
    ) -> AsyncIterator[_Message]:
        """See Pool."""
        context = RayContext(f"/{POOL_DESCRIPTOR.full_name}/PoolStream", grpc_context)
        call = self._admit(context)
        loop = asyncio.get_running_loop()
        executor, answers = self._executor_of(call), _answers(call, _blocking(messages))
        stepping = threading.Lock()  # a step may still run when Ray cancels the call

        def step() -> bytes | None:
            with stepping:
                return next(answers, None)

        def close() -> None:
            with stepping:
                answers.close()
            context.ticket.release()

        try:
            while (answer := await loop.run_in_executor(executor, step)) is not None:
                yield _Message(answer)
        except StatusError as status:
            _set_status(grpc_context, status)
            yield _Message(b"")
        finally:
            context.cancel()
            executor.submit(close)

    async def _unary(self, method: str, message: bytes, grpc_context: RayServegRPCContext) -> _Message:
        context = RayContext(method, grpc_context)
        call = self._admit(context)

        def answer() -> bytes:
            try:
                if call.error is not None:
                    call.reject()
                return call.unary(iter([message]))
            finally:
                context.ticket.release()

        try:
            future = self._executor_of(call).submit(answer)
            future.add_done_callback(lambda _: context.ticket.release())  # it may be cancelled before a thread has it
            return _Message(await asyncio.wrap_future(future))
        except StatusError as status:
            _set_status(grpc_context, status)
            return _Message(b"")
        finally:
            context.cancel()  # Ray cancels this coroutine when the caller has gone or the deadline has passed

    def _admit(self, context: RayContext) -> AdmittedCall:
        call = self._service.pipeline.admit(context)
        assert call is not None  # noqa: S101 - every method of this class is in the pipeline
        return call

    def _executor_of(self, call: AdmittedCall) -> ThreadPoolExecutor:
        return self._executor if call.method.computes and call.error is None else self._control

    def check_health(self) -> None:
        """Tell Ray whether this replica is to be replaced.

        Raises:
            RuntimeError: The replica cannot continue.

        """
        if self._service.failure:
            raise RuntimeError(self._service.failure)

    def __del__(self) -> None:
        """Stop the service, once Ray has drained the replica; Ray calls this, and then Python calls it again."""
        service = self.__dict__.pop("_service", None)
        if service is None:
            return
        service.pipeline.stop()
        service.stop_queue()
        for executor in (self._executor, self._control):
            executor.shutdown(cancel_futures=True)
        service.close()


def _answers(call: AdmittedCall, messages: Iterator[bytes]) -> Generator[bytes]:
    if call.error is not None:
        call.reject()
    yield from call.stream(messages)


def _set_status(context: RayServegRPCContext, status: StatusError) -> None:
    context.set_code(grpc.StatusCode[status.code])
    context.set_details(status.message)
    context.set_trailing_metadata(list(status.trailing))


def _blocking(messages: gRPCInputStream[bytes]) -> Iterator[bytes]:
    """Yield the messages of a stream to a thread, which may wait for them."""
    loop = asyncio.get_running_loop()
    end = object()

    async def following() -> Any:  # noqa: ANN401 - bytes, or the end
        return await anext(messages, end)

    def read() -> Iterator[bytes]:
        while (message := asyncio.run_coroutine_threadsafe(following(), loop).result()) is not end:
            yield message

    return read()


def app(settings: dict[str, Any]) -> serve.Application:
    """Return the application, for the `import_path` of a Serve config; its `args` are fields of Config.

    Raises:
        ConfigError: A setting is invalid or Ray's own, or `insecure` is not given.

    """
    for name in RAY_SETTINGS:
        if name in settings:
            raise ConfigError(f"{name}: expected to be left to Ray Serve, got {settings[name]!r}")
    if not settings.get("insecure"):
        raise ConfigError(
            "insecure: expected true, got none: Ray's proxy listens on every interface without TLS, so that anyone who "
            "reaches it may call it and read its traffic. Keep its port inside a private network, and confirm it with "
            "this setting"
        )
    Config(**settings)  # each replica makes its own: the defaults follow the machine
    return serve.deployment(PoolReplica, name="pool").bind(settings)
