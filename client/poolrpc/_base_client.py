"""The base class of both clients: their settings, and every call as the steps of its I/O."""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from weakref import WeakSet

import grpc
import numpy as np

from poolrpc._shapes.limits import MAX_MESSAGE_BYTES, MAX_NUMEL
from poolrpc._shapes.parameters import integer
from poolrpc._shapes.rules import clip
from poolrpc._transport.arena import arena_steps
from poolrpc._transport.channel import (
    GET_SERVER_INFO,
    HEALTH_CHECK,
    INFER_SHAPE,
    POOL,
    POOL_SERVICE,
    POOL_STREAM,
    channel_arguments,
    check_options,
    unary_methods,
)
from poolrpc._transport.connection import explain, is_transport_error
from poolrpc._transport.local import local_steps, send_steps
from poolrpc._transport.local_connections import LocalConnections, NotLocalError
from poolrpc._transport.options import (
    UNSET,
    CallOptions,
    call_metadata,
    check_transport,
    default_transport,
    pairs,
    seconds,
    transport_by_size,
)
from poolrpc._transport.request import Transfer, prepare, prepare_single
from poolrpc._transport.steps import (
    Deliver,
    NextGroup,
    Pause,
    RunBlocking,
    Send,
    SendStream,
    Start,
    Wait,
    log,
    log_retries,
    translate,
)
from poolrpc._transport.unary import unary_steps
from poolrpc._wire import codec
from poolrpc.addresses import check_address, grpc_target, unix_path
from poolrpc.chains import as_branches, as_chain, branch_shapes, check_layout, to_channels_first
from poolrpc.credentials import check_metadata, credentials_for, has_token, is_local, metadata_for
from poolrpc.errors import (
    CancelledError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    PoolError,
    UnavailableError,
    UnsupportedError,
)
from poolrpc.operands import given_operand, operand_of
from poolrpc.tensors import Array, as_array, dtype_name, spec_of
from poolrpc.tracing import traced
from poolrpc.v1 import pool_pb2, standard_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from google.protobuf.message import Message

    from poolrpc._transport.arena import SendSteps
    from poolrpc._transport.arena_memory import Arenas
    from poolrpc._transport.coalesce import Group, Grouping, Outcome
    from poolrpc._transport.join import Join, Joined
    from poolrpc._transport.options import Pairs, Timeout, Transport
    from poolrpc._transport.result import PoolResult, Progress
    from poolrpc._transport.steps import MapSteps, Steps
    from poolrpc.chains import ChainLike, LayerLike, Outputs, Shape
    from poolrpc.tensors import Layout

Out: TypeAlias = Array | tuple[Array, Array]
"""An array for an output, or a pair of arrays for an output and its indices."""

IN_FLIGHT = 4
"""The default number of requests that a map has in flight: while one is computed, others are being sent."""

MAX_IN_FLIGHT = 64
"""The largest number of requests that a map has in flight; each has a thread."""

MAX_MESSAGE_LIMIT = 2**31 - 1
"""The largest limit on messages that gRPC takes, in bytes."""

FIRST_PAUSE, MAX_PAUSE = 0.1, 1.0
"""The first and the longest pause, in seconds, while a client waits for its server to be ready."""

T = TypeVar("T")


LOCAL_RESPONSES: dict[str, Any] = {
    INFER_SHAPE: pool_pb2.InferShapeResponse,
    GET_SERVER_INFO: pool_pb2.GetServerInfoResponse,
}
"""The methods besides Pool that are called by packets, with the classes of their responses."""

_METHOD_OF = {"unary": POOL, "stream": POOL_STREAM, "arena": POOL, "local": POOL}


_clients: WeakSet[BaseClient] = WeakSet()
"""The clients of this process, for the child of a fork."""

callers: set[int] = set()
"""The threads that are in a call of a blocking client."""

forked = threading.Event()
"""Set in a process that was forked while a thread was in a call: gRPC then skips what it has to do for the child, whose
calls would hang, with any client, or crash it."""


class BaseClient:
    """The settings of a client, and its calls as steps that a subclass drives.

    A subclass opens the channels, performs the steps of poolrpc._transport.steps, and has the public methods.
    """

    _closed = True  # until the constructor has ended, so that a client which was never made is not reported as unclosed

    def __init__(  # noqa: PLR0913 - the settings of a client, all but one by keyword
        self,
        address: str | os.PathLike[str] = "127.0.0.1:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        metadata: Mapping[str, str] | Iterable[tuple[str, str]] = (),
        options: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        timeout: float | None = 60.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """Create a client, which connects on the first call.

        Args:
            address: "host:port", "dns:///name:port" (calls are distributed over all its addresses), "unix:PATH", or a
                path object of a unix socket.
            credentials: Credentials for TLS, from grpc.ssl_channel_credentials. None: TLS with the authorities in the
                PEM file that POOLRPC_CA names, and the client's certificate and key in those that POOLRPC_CLIENT_CERT
                and POOLRPC_CLIENT_KEY name; plaintext if POOLRPC_CA is not set, and on a unix socket.
            token: Sent with every call, as `authorization: Bearer`. None: POOLRPC_TOKEN, if it is set.
            metadata: A dict, or pairs, sent with every call. Keys are sent in lower case.
            options: gRPC channel arguments, which override the client's own.
            timeout: The timeout, in seconds, of a call that has none of its own. None: no limit.
            max_message_bytes: The largest message, in bytes, in each direction. The server has its own limit.

        Raises:
            InvalidArgumentError: An argument is not valid, the token would be sent to another machine or through a
                proxy without TLS, or a file that the environment names cannot be read.

        """
        self._check_fork()
        self.address = address = check_address(address)
        self.timeout = seconds("timeout", timeout)
        self.max_message_bytes = integer("max_message_bytes", max_message_bytes, 1, MAX_MESSAGE_LIMIT)
        # What the environment adds is not a setting: a copy reads it where it is unpickled.
        self._settings: dict[str, Any] = {
            "address": address,
            "credentials": credentials,
            "token": token,
            "metadata": check_metadata(metadata),
            "options": check_options(options),
            "timeout": self.timeout,
            "max_message_bytes": self.max_message_bytes,
        }
        self._credentials = credentials_for(address, credentials)
        encrypted = self._credentials is not None
        self._metadata = metadata_for(address, self._settings["metadata"], token, encrypted=encrypted)
        self._channel_arguments = channel_arguments(
            self._settings["options"],
            self.max_message_bytes,
            is_local=is_local(address),
            has_plain_token=not encrypted and has_token(self._metadata),
        )
        self._retry = bool(dict(self._channel_arguments).get("grpc.enable_retries", 1))
        self._processes: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._processes_lock = threading.Lock()
        path = unix_path(address)
        self._arenas: Arenas | None = None
        self._local: LocalConnections | None = None
        if path:
            from poolrpc._transport.arena_memory import Arenas  # noqa: PLC0415 - keeps `import poolrpc` fast

            self._arenas = Arenas(path)
            self._local = LocalConnections(path)
        self._channel: Any = None
        self._methods: dict[str, Any] = {}
        self._connect()
        self._closing = threading.Event()
        self._closed = False
        _clients.add(self)

    def __repr__(self) -> str:
        """Show the address alone: metadata and credentials may be secret."""
        return f"{type(self).__name__}({self.address!r})"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the settings; a copy has connections and shared memory of its own."""
        if self._settings["credentials"] is not None:
            msg = f"expected a client without credentials= to pickle, since those of gRPC have no bytes, got {self!r}; "
            raise TypeError(msg + "set POOLRPC_CA in the environment, or make a client in each process")
        return _restore, (type(self), self._settings)

    def __del__(self) -> None:
        if not self._closed:
            text = f"unclosed {self!r}: use it in a with block, or close it"
            warnings.warn(text, ResourceWarning, stacklevel=2, source=self)

    def empty(self, shape: int | Iterable[int], dtype: object = "float32") -> Array:
        """Return an uninitialised array in memory shared with the server: pooling it copies nothing.

        If there is no such memory (the address is not a unix socket, the server is on another host, or it rejects the
        request), the array is an ordinary one, and pooling it works as well. The memory stays reserved while the array
        or a view of it exists, and remains valid after the client is closed.

        Args:
            shape: The shape, as numpy.empty takes it.
            dtype: The dtype, as numpy.empty takes it, except one of objects.

        Raises:
            InvalidArgumentError: The dtype is one of objects, whose addresses must not be shared, or a size is no
                integer.

        """
        kind: np.dtype[Any] = np.dtype(dtype)  # type: ignore[call-overload]  # anything that NumPy converts to a dtype
        if kind.hasobject:
            raise InvalidArgumentError(f"expected a dtype without objects, got {kind}", field="dtype")
        sizes = tuple(
            integer("shape", size, 0, MAX_NUMEL) for size in (shape if isinstance(shape, Iterable) else (shape,))
        )
        span = None if self._arenas is None else self._arenas.allocate_with_room(prod(sizes) * kind.itemsize)
        return np.empty(sizes, kind) if span is None else span.array(kind, sizes)

    def _connect(self) -> None:
        """Open the channel, which connects on its first call."""
        self._channel = self._open_channel(self.address)
        self._methods = unary_methods(self._channel)

    def _open_channel(self, address: str) -> Any:  # noqa: ANN401 - a channel of grpc or grpc.aio
        raise NotImplementedError

    def _open_blocking_channel(self, address: str) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(grpc_target(address), self._channel_arguments)
        return grpc.secure_channel(grpc_target(address), self._credentials, self._channel_arguments)

    def _close_arenas(self) -> None:
        self._closed = True
        self._closing.set()
        if self._arenas is not None:
            self._arenas.close()
        if self._local is not None:
            self._local.close()

    @staticmethod
    def _check_fork() -> None:
        if forked.is_set():
            msg = (
                "expected a process that was forked while no thread was in a call, got one in which gRPC is unusable; "
                "use multiprocessing's spawn or forkserver"
            )
            raise PoolError(msg, reason="FORKED")

    def _after_fork(self) -> None:
        """Leave what the client shares with its server to the parent; grpcio connects again in the child."""
        self._processes_lock = threading.Lock()  # a thread of the parent may have held it
        if self._arenas is not None:
            self._arenas.leave_to_parent()
        if self._local is not None:
            self._local.leave_to_parent()

    def _is_closed(self) -> bool:
        return self._closed

    def _closed_during_call(self) -> CancelledError:
        return CancelledError(f"{self!r} was closed during the call", reason="CLOSED")

    def _translate(self, error: BaseException) -> BaseException:
        """Return the PoolError for an error of a step, if it has one."""
        if isinstance(error, grpc.RpcError):
            log_retries(error.trailing_metadata())
        translation = translate(error)
        if self._closed and isinstance(translation, CancelledError | UnavailableError):
            closed = self._closed_during_call()
            closed.__cause__ = error
            return closed
        return translation

    def _call_options(self, timeout: Timeout, priority: int | None = None, metadata: Pairs = ()) -> CallOptions:
        self._check_fork()
        if self._closed:
            msg = f"{self!r} is closed"
            raise PoolError(msg, reason="CLOSED")
        limit = self.timeout if timeout is UNSET else seconds("timeout", timeout)
        return CallOptions(limit, call_metadata(self._metadata, priority, metadata))

    def _method(self, step: Send) -> Any:  # noqa: ANN401 - a method of grpc or grpc.aio
        """Return the method that a step calls, of the process that it names."""
        if not step.socket:
            return self._methods[step.method]
        with self._processes_lock:
            if self._closed:  # a channel that is opened now would stay open
                raise self._closed_during_call()
            if step.socket not in self._processes:
                from pathlib import Path  # noqa: PLC0415 - keeps `import poolrpc` fast

                channel = self._open_channel(f"unix:{Path(unix_path(self.address)).with_name(step.socket)}")
                self._processes[step.socket] = channel, unary_methods(channel)
            return self._processes[step.socket][1][step.method]

    def _transfer(  # noqa: PLR0913, PLR0917 - the tensors of a call and its layers
        self,
        x: object,
        branches: LayerLike | Iterable[ChainLike],
        given: Mapping[str, object],
        layout: Layout,
        out: Sequence[Out | None] | None,
        outputs: tuple[Outputs, ...] = (),
    ) -> Transfer:
        check_layout(layout)
        chains = as_branches(branches)
        flat = [part for each in out for part in (each if isinstance(each, tuple) else (each,))] if out else ()
        array = as_array(x, layout)
        cells = to_channels_first(array.shape, 1, layout)[-1] if given and array.ndim > 1 else None
        named = operand_of(given, chains, cells) if given else None
        if named is None:
            return Transfer(
                prepare_single(dtype_name(array.dtype), array.shape, layout, chains, outputs), [array], flat
            )
        request = codec.Request(spec_of(array, layout), chains, spec_of(named, layout), outputs)
        return Transfer(prepare(request), [array], flat, named)

    @staticmethod
    def _joined(join: Join, transfer: Transfer) -> Joined:
        from poolrpc._transport.join import Joined  # noqa: PLC0415 - keeps `import poolrpc` fast

        if transfer.out:
            raise InvalidArgumentError("expected no arrays together with join, got some", field="out")
        return Joined(join, transfer.prepared)

    def _call_steps(
        self,
        transfer: Transfer,
        options: CallOptions,
        transport: Transport | None = None,
        progress: Progress | None = None,
        *,
        copy: bool = True,
    ) -> Steps[list[PoolResult]]:
        steps = self._transport_steps(transfer, options, transport, progress, copy=copy)
        return self._explained(steps, POOL, options)

    def _transport_steps(
        self,
        transfer: Transfer,
        options: CallOptions,
        transport: Transport | None,
        progress: Progress | None,
        *,
        copy: bool,
    ) -> Steps[list[PoolResult]]:
        required = transport is not None
        check_transport(transport)
        if transport in ("arena", "local") and self._local is None:
            msg = f"expected the address of a unix socket for {transport!r}, got {self.address}"
            raise InvalidArgumentError(msg, field="transport")
        local = self._local is not None and self._local.available
        chosen = transport or default_transport(transfer, self._arenas, self.max_message_bytes, local=local)
        with traced(_METHOD_OF[chosen], self.address, options, transfer.prepared.request) as span:
            results: list[PoolResult] | None = None
            if chosen == "local":
                assert self._local is not None  # noqa: S101 - checked above
                results = yield from local_steps(
                    transfer,
                    self._arenas,
                    options,
                    progress,
                    self._local_send_steps(self._local),
                    copy=copy,
                    required=required,
                )
                if results is None:
                    chosen = default_transport(transfer, self._arenas, self.max_message_bytes)
            if results is None and chosen == "arena":
                results = yield from arena_steps(
                    transfer, self._arenas, options, progress, copy=copy, required=required
                )
                if results is None:
                    chosen = transport_by_size(transfer, self.max_message_bytes)
            if results is None and chosen == "stream":
                results = yield SendStream(transfer, options, progress)
            if results is None:
                results = yield from unary_steps(
                    transfer, options, progress, max_message_bytes=self.max_message_bytes, retry=self._retry
                )
            if span is not None:
                span.set_attribute("poolrpc.transport", results[0].transport)
            return results

    def _grouping(self, layers: ChainLike, layout: Layout, operands: Mapping[str, Any]) -> Grouping:
        from poolrpc._transport.coalesce import Grouping  # noqa: PLC0415 - keeps `import poolrpc` fast

        return Grouping(as_chain(layers), layout, given_operand(operands))

    def _map_steps(
        self,
        tensors: object,
        *,
        in_flight: int,
        progress: bool,
        return_exceptions: bool,
        options: Callable[[], CallOptions],
    ) -> MapSteps:
        """Check the settings of a map, and return its steps."""
        in_flight = integer("in_flight", in_flight, 1, MAX_IN_FLIGHT)

        def steps() -> MapSteps:
            from poolrpc._transport.coalesce import Order, progress_bar  # noqa: PLC0415 - keeps `import poolrpc` fast

            order, started = Order(return_exceptions=return_exceptions), deque[Any]()
            with progress_bar(tensors, shown=progress) as advance:
                try:
                    while (group := (yield NextGroup())) is not None:
                        started.append((yield Start(self._group_steps(group, options))))
                        if len(started) > in_flight:
                            yield Deliver(order.deliver((yield Wait(started.popleft())), advance))
                    while started:
                        yield Deliver(order.deliver((yield Wait(started.popleft())), advance))
                finally:
                    for future in started:
                        future.cancel()

        return steps()

    def _map_options(self, timeout: Timeout, priority: int | None, metadata: Pairs) -> Callable[[], CallOptions]:
        """Check the options of a map's calls, and return a function that returns those of a call that starts now."""
        checked, own = timeout if timeout is UNSET else seconds("timeout", timeout), pairs(metadata)
        call_metadata(self._metadata, priority, own)  # raises if the priority is not valid
        return partial(self._call_options, checked, priority, own)

    def _group_steps(self, group: Group, options: Callable[[], CallOptions]) -> Steps[list[Outcome]]:
        try:
            return group.outcomes((yield from self._call_steps(group.transfer(), options()))[0])
        except PoolError as error:
            if not group.may_be_one_tensors_fault(error):
                return group.failed(error)
            outcomes: list[Outcome] = []
            for single in group.split():
                outcomes += yield from self._group_steps(single, options)
            return outcomes

    def _output_shape_steps(
        self,
        shape: Iterable[int],
        layers: ChainLike,
        layout: Layout,
        operand_shape: Iterable[int] | None,
        options: CallOptions,
    ) -> Steps[Shape]:
        check_layout(layout)
        sizes = tuple(integer("shape", size, 0, MAX_NUMEL) for size in shape)
        operand = None
        if operand_shape is not None:
            operand = tuple(integer("operand_shape", size, 0, MAX_NUMEL) for size in operand_shape)
        chain = as_chain(layers)
        request = codec.encode_shape_request(sizes, [chain], layout, operand)
        branch_shapes(sizes, [chain], layout, (), operand)  # raises the error that the server would send
        response = yield from self._explained(self._send_steps(INFER_SHAPE, request, options), INFER_SHAPE, options)
        return codec.decode_shape_response(response)[0][-1]

    def _server_info_steps(self, options: CallOptions) -> Steps[codec.ServerInfo]:
        steps = self._send_steps(GET_SERVER_INFO, pool_pb2.GetServerInfoRequest(), options)
        response = yield from self._explained(steps, GET_SERVER_INFO, options)
        return codec.decode_info(response)

    def _health_steps(self, service: object, options: CallOptions) -> Steps[str]:
        if not isinstance(service, str):
            msg = f"expected the name of a service, got {clip(service)} ({type(service).__name__})"
            raise InvalidArgumentError(msg, field="service")
        steps = self._send_steps(HEALTH_CHECK, standard_pb2.HealthCheckRequest(service=service), options)
        return codec.decode_health((yield from self._explained(steps, HEALTH_CHECK, options)))

    def _ready_steps(self, options: CallOptions) -> Steps[None]:
        pause = FIRST_PAUSE
        request = standard_pb2.HealthCheckRequest(service=POOL_SERVICE)
        failure: UnavailableError | None = None
        while True:
            try:
                steps = self._send_steps(HEALTH_CHECK, request, options)
                response = yield from self._explained(steps, HEALTH_CHECK, options)
                if (status := codec.decode_health(response)) == "SERVING":
                    return
                msg = f"expected the server at {self.address} to be SERVING, got {status}: it starts or stops"
                failure = UnavailableError(msg, reason="NOT_SERVING")
            except UnavailableError as error:
                failure = error
            except DeadlineExceededError as error:
                raise failure or error from error.__cause__
            except NotFoundError as error:
                msg = f"expected a poolrpc server at {self.address}, got a gRPC server that lacks {POOL_SERVICE}: "
                msg += "correct the address (--address, POOLRPC_ADDRESS)"
                raise UnsupportedError(msg, reason="METHOD") from error.__cause__
            remaining = options.time_remaining()
            if remaining is not None and remaining <= pause:
                raise failure
            log.debug("%r is not ready, the next attempt is in %.2f s: %s", self, pause, failure)
            yield Pause(pause)
            pause = min(2 * pause, MAX_PAUSE)

    def _explained(self, steps: Steps[T], method: str, options: CallOptions) -> Steps[T]:
        """Perform the steps of a call; its error has the address, the timeout and what to try if it has no answer."""
        try:
            return (yield from steps)
        except (UnavailableError, DeadlineExceededError, UnsupportedError) as error:
            if self._closed or not is_transport_error(error):
                raise
            encrypted = self._credentials is not None
            explained: PoolError = yield RunBlocking(
                partial(explain, error, method, self.address, options.timeout, encrypted=encrypted)
            )
            log.debug("%s failed: %s", method, error)
            try:
                raise explained from error.__cause__
            finally:
                del explained  # breaks the cycle of the error, its traceback and this frame, which keeps the tensors

    def _local_send_steps(self, connections: LocalConnections) -> SendSteps:
        return partial(send_steps, connections, retry=self._retry)

    def _send_steps(self, method: str, message: Message, options: CallOptions) -> Steps[Any]:
        with traced(method, self.address, options):
            if self._local is not None and self._local.available and method in LOCAL_RESPONSES:
                with suppress(NotLocalError):
                    send = self._local_send_steps(self._local)
                    response = yield from send(method, (message.SerializeToString(),), options, "")
                    return LOCAL_RESPONSES[method].FromString(response)
            return (yield Send(method, message, options))


def _restore(cls: type[BaseClient], settings: dict[str, Any]) -> BaseClient:
    return cls(**settings)


def _after_fork() -> None:
    if callers - {threading.get_ident()}:
        forked.set()
    callers.clear()
    for client in list(_clients):
        client._after_fork()  # noqa: SLF001 - of the class above


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
