"""The server as a deployment of Ray Serve: Ray's gRPC proxy receives the calls, its replicas answer them."""

from __future__ import annotations

import asyncio
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import ray
from grpc_health.v1 import health_pb2
from ray import serve

from poolrpc._wire.status import DETAILS_KEY
from poolrpc.v1 import pool_pb2
from poolrpc_server.config import Config, ConfigError
from poolrpc_server.transports.unwired import Call, UnwiredServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream

POOL = pool_pb2.DESCRIPTOR.services_by_name["PoolService"]
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]

NOT_OURS = ("listen", "tls_cert", "tls_key", "tls_client_ca", "workers", "metrics", "allow_client_shm")
"""Settings of what Ray does in its own way, or not at all."""

LOST = (grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""What Ray says of a replica that died under a call, and of a full queue: such calls may be tried again."""


def add_services(_: object, server: Any) -> None:  # noqa: ANN401 - a class of Ray's inner workings
    """Add our services to Ray's proxy, for `grpc_servicer_functions`."""
    for service, names in ((POOL, [each.name for each in POOL.methods]), (HEALTH, ["Check"])):
        server.add_generic_rpc_handlers((_Forwarded(service, names),))


class _Forwarded(grpc.GenericRpcHandler):
    """A service whose calls Ray's proxy forwards.

    Messages go through as the bytes that they are, since no handler says how they are read. And an error that Ray makes
    becomes one that our clients know.
    """

    def __init__(self, service: Any, names: Sequence[str]) -> None:  # noqa: ANN401 - a descriptor, which has no types
        streams = [each.name for each in service.methods if each.server_streaming]
        # Ray looks for this attribute, and puts its own functions in the place of these.
        self._method_handlers: dict[str, Any] = {
            f"/{service.full_name}/{name}": grpc.stream_stream_rpc_method_handler(_nothing)
            if name in streams
            else grpc.unary_unary_rpc_method_handler(_nothing)
            for name in names
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Give what answers a method: Ray's function, and ours around it."""
        forwarding = self._method_handlers.get(handler_call_details.method)
        if forwarding is None:
            return None
        if forwarding.response_streaming:
            return grpc.stream_stream_rpc_method_handler(_streaming(forwarding.stream_stream))
        return grpc.unary_unary_rpc_method_handler(_unary(forwarding.unary_unary))


def _nothing(*_: object) -> NoReturn:
    raise NotImplementedError


def _unary(forward: Callable[..., Any]) -> Any:  # noqa: ANN401 - of grpc.aio, which the handlers' types leave out
    async def answers(request: bytes, context: Any) -> bytes:  # noqa: ANN401 - as above
        answer = await forward(request, context)
        _name_loss(context)
        return bytes(answer)

    return answers


def _streaming(forward: Callable[..., Any]) -> Any:  # noqa: ANN401 - as above
    async def answers(requests: Any, context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401 - as above
        async for answer in forward(requests, context):
            if not context.code():  # the status comes with an empty message, for Ray has no other way for its details
                yield bytes(answer)
        _name_loss(context)

    return answers


def _name_loss(context: Any) -> None:  # noqa: ANN401 - as above
    # Whatever our own servicer says has details.
    ours = any(key == DETAILS_KEY for key, _ in context.trailing_metadata() or ())
    if not ours and context.code() in LOST:
        context.set_code(grpc.StatusCode.UNAVAILABLE)


class _Message:
    """Bytes, which Ray takes for a message that can be written as such."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> PickleBuffer:
        # Ray lays this into its memory as it is; bytes would be copied into a pickle first, and out of it.
        return PickleBuffer(self._data)


class PoolReplica:
    """One replica: a whole server, but for the wire."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Make a server with Config's fields; threads are as many as the CPUs that Ray gives to the replica."""
        from poolrpc_server.app import Server  # noqa: PLC0415 - it imports torch, for which Ray's proxy need not wait

        cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
        self._server = Server(Config(**{"threads": max(1, cpus), **settings}), make_server=self._make)
        self._server.start()

    def _make(self, *arguments: Any, **options: Any) -> UnwiredServer:  # noqa: ANN401 - grpc.server's
        self._calls = UnwiredServer(*arguments, **options)
        return self._calls

    async def Pool(self, message: bytes, grpc_context: RayServegRPCContext) -> _Message:
        """Answer the method of that name, as all of these do."""
        return await self._unary(f"/{POOL.full_name}/Pool", message, grpc_context)

    async def InferShape(self, message: bytes, grpc_context: RayServegRPCContext) -> _Message:
        """See Pool."""
        return await self._unary(f"/{POOL.full_name}/InferShape", message, grpc_context)

    async def GetServerInfo(self, message: bytes, grpc_context: RayServegRPCContext) -> _Message:
        """See Pool."""
        return await self._unary(f"/{POOL.full_name}/GetServerInfo", message, grpc_context)

    async def Check(self, message: bytes, grpc_context: RayServegRPCContext) -> _Message:
        """See Pool; of grpc.health.v1."""
        return await self._unary(f"/{HEALTH.full_name}/Check", message, grpc_context)

    async def PoolStream(
        self, messages: gRPCInputStream[bytes], grpc_context: RayServegRPCContext
    ) -> AsyncIterator[_Message]:
        """See Pool."""
        call = _call(f"/{POOL.full_name}/PoolStream", grpc_context)
        answers = self._calls.stream(call, _blocking(messages))
        try:
            while (answer := await asyncio.wrap_future(answers.next())) is not None:
                yield _Message(answer)
        finally:
            answers.close()
        if _tell(call, grpc_context):
            yield _Message(b"")

    async def _unary(self, method: str, message: bytes, context: RayServegRPCContext) -> _Message:
        call = _call(method, context)
        try:
            answer = await asyncio.wrap_future(self._calls.unary(call, message))
        finally:
            call.leave()  # Ray cancels this where the caller is gone, or its time is up
        _tell(call, context)
        return _Message(answer)

    def check_health(self) -> None:
        """Tell Ray that this replica is to be replaced, where it can't go on.

        Raises:
            RuntimeError: It can't.

        """
        if self._server.failure:
            raise RuntimeError(self._server.failure)

    def __del__(self) -> None:
        """Stop, once Ray has drained the replica; it calls this, and then Python does."""
        if server := self.__dict__.pop("_server", None):
            server.stop(grace=0)


def _call(method: str, context: RayServegRPCContext) -> Call:
    return Call(method, context.invocation_metadata(), context.peer())


def _tell(call: Call, context: RayServegRPCContext) -> bool:
    code = call.code()
    if code is None or code is grpc.StatusCode.OK:
        return False
    context.set_code(code)
    context.set_details(call.details())
    context.set_trailing_metadata(list(call.trailing_metadata()))
    return True


def _blocking(messages: gRPCInputStream[bytes]) -> Iterator[bytes]:
    """Give what comes to a stream, to a thread that may wait for it."""
    loop = asyncio.get_running_loop()
    end = object()

    async def following() -> Any:  # noqa: ANN401 - bytes, or the end
        return await anext(messages, end)

    def read() -> Iterator[bytes]:
        while (message := asyncio.run_coroutine_threadsafe(following(), loop).result()) is not end:
            yield message

    return read()


def app(settings: dict[str, Any]) -> serve.Application:
    """Give the application, for the `import_path` of a Serve config; its `args` are fields of Config.

    Raises:
        ConfigError: A setting is wrong, or is one of what Ray does in its own way; or `insecure` isn't given.

    """
    for name in NOT_OURS:
        if name in settings:
            raise ConfigError(f"{name}: expected to be left to Ray Serve, got {settings[name]!r}")
    if not settings.get("insecure"):
        raise ConfigError(
            "insecure: expected true, got none: Ray's proxy is public and without TLS, so that whoever reaches it may "
            "call or listen. Keep its port inside, and say that you know"
        )
    Config(**settings)  # each replica makes its own: defaults follow the machine
    return serve.deployment(PoolReplica, name="pool").bind(settings)
