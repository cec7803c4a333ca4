"""What both clients share: what they were told, and the pure steps from arguments to messages and back."""

from __future__ import annotations

import threading
from math import prod
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import grpc
import numpy as np

from poolrpc._shapes.limits import MAX_MESSAGE_BYTES, MAX_NUMEL
from poolrpc._shapes.parameters import integer
from poolrpc._transport.stream import CallOptions
from poolrpc._transport.transfer import (
    ARENA_BYTES,
    ARENA_MOST_BYTES,
    Transfer,
    by_size,
    check_transport,
    outline,
    outline_of,
)
from poolrpc._version import __version__
from poolrpc._wire import codec
from poolrpc.access import credentials_for, metadata_for, unix_path
from poolrpc.chains import Chain, as_chain, check_layout
from poolrpc.errors import InvalidArgumentError, PoolError, UnavailableError
from poolrpc.tensors import Array, as_array, dtype_name, spec_of
from poolrpc.v1 import pool_pb2, standard_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from poolrpc._transport.arena_memory import Arenas
    from poolrpc.layers import Layer

Out: TypeAlias = Array | tuple[Array, Array]
"""Where an output goes, or an output and its indices."""

IN_FLIGHT, MAX_IN_FLIGHT = 4, 64
"""Requests of a map under way at a time: while one is computed, others are on their way; and each has a thread."""

SERVICE = "poolrpc.v1.PoolService"
POOL = f"/{SERVICE}/Pool"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
BROKEN_OFF = ("Stream removed", "Socket closed", "Connection reset", "recvmsg")
"""How gRPC's text begins where a connection broke; of another, the caller hears as of any error."""

METHODS = {"unary": f"{SERVICE}/Pool", "stream": f"{SERVICE}/PoolStream", "arena": f"{SERVICE}/Pool"}
"""What pools, by each way."""

# Pooling changes nothing on the server, so a call that found it full, draining or gone may be tried again: by gRPC
# itself, at most five times, with growing random pauses, and (the throttling) not while most tries fail: a server
# process that dies fails hundreds at once, perhaps, and these are to be tried again. A server of gRPC's that stops says
# CANCELLED to calls that it hasn't begun (github.com/grpc/grpc/issues/41785); who cancels a call himself ends it.
# Streams have their own way, in poolrpc._transport.stream.
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": SERVICE, "method": method} for method in ("Pool", "InferShape", "GetServerInfo")],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 1000, "tokenRatio": 0.5},
}


class BaseClient:
    """What a client was told, and the pure steps on both sides of its calls."""

    def __init__(  # noqa: PLR0913 - the settings of a client, all but one by keyword
        self,
        address: str = "127.0.0.1:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        options: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        timeout: float | None = 60.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """Make a client; it connects on the first call.

        Args:
            address: "host:port", "dns:///name:port" (calls take turns over all its addresses) or "unix:PATH".
            credentials: For TLS, from grpc.ssl_channel_credentials. None: TLS with the authorities in the PEM file
                that POOLRPC_CA names, and the client's certificate and key in those that POOLRPC_CLIENT_CERT and
                POOLRPC_CLIENT_KEY name; plaintext where the environment has none, and on a unix socket.
            token: Goes with every call, as `authorization: Bearer`. None: POOLRPC_TOKEN, where the environment has it.
            metadata: Pairs that go with every call.
            options: gRPC channel arguments, before which the client's own give way.
            timeout: Seconds for a call that names none. None: no limit.
            max_message_bytes: The largest message, each way; the server has a limit of its own.

        Raises:
            InvalidArgumentError: A token would leave this machine without TLS, or the environment's files can't be
                read.

        """
        import json  # noqa: PLC0415 - import poolrpc is to be quick

        self.address = address
        self.timeout = timeout
        self.max_message_bytes = max_message_bytes
        self._credentials = credentials_for(address, credentials)
        self._metadata = metadata_for(address, metadata, token, encrypted=self._credentials is not None)
        self._options: list[tuple[str, Any]] = list(
            {
                "grpc.max_send_message_length": max_message_bytes,
                "grpc.max_receive_message_length": max_message_bytes,
                "grpc.service_config": json.dumps(SERVICE_CONFIG),
                # A call is only tried again while its message is kept, and gRPC keeps 256 KB unless told otherwise.
                "grpc.per_rpc_retry_buffer_size": max_message_bytes,
                # Else a first attempt that fails, at a worker's socket that is just going, is followed by a second in
                # which nothing is tried; and a server that comes back, by up to two minutes.
                "grpc.initial_reconnect_backoff_ms": 100,
                "grpc.max_reconnect_backoff_ms": 5000,
                "grpc.primary_user_agent": f"poolrpc/{__version__}",
                **dict(options),
            }.items()
        )
        self._retries = bool(dict(self._options).get("grpc.enable_retries", 1))
        self._closed = False
        self._others: dict[str, tuple[Any, Any]] = {}
        self._opening = threading.Lock()
        path = unix_path(address)
        self._arenas: Arenas | None = None
        if path:
            from poolrpc._transport.arena_memory import Arenas  # noqa: PLC0415 - import poolrpc is to be quick

            self._arenas = Arenas(path)
        self._connect()

    def _connect(self) -> None:
        raise NotImplementedError

    def _channel_to(self, address: str) -> Any:  # noqa: ANN401 - of either world
        raise NotImplementedError

    def _blocking_channel(self, address: str) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(address, self._options)
        return grpc.secure_channel(address, self._credentials, self._options)

    def _pool_at(self, socket: str) -> Any:  # noqa: ANN401 - of either world
        # The method of the process that has an arena: of several workers' one.
        if not socket:
            return self._pool
        with self._opening:
            if socket not in self._others:
                from pathlib import Path  # noqa: PLC0415 - import poolrpc is to be quick

                channel = self._channel_to(f"unix:{Path(unix_path(self.address)).with_name(socket)}")
                self._others[socket] = channel, channel.unary_unary(POOL)
            return self._others[socket][1]

    def _broke_off(self, error: Any) -> bool:  # noqa: ANN401 - of either world
        """Tell whether a call is to be made once more: its connection broke in the middle of the answer.

        gRPC gives such a call up at once, and only its text says so.
        """
        broke_off = error.code() is grpc.StatusCode.UNAVAILABLE and (error.details() or "").startswith(BROKEN_OFF)
        return self._retries and broke_off

    @staticmethod
    def _streams_of(channel: grpc.Channel) -> grpc.StreamStreamMultiCallable[bytes, bytes]:
        return channel.stream_stream(f"/{SERVICE}/PoolStream")

    def _bind(self, channel: Any) -> None:  # noqa: ANN401 - of either world
        # Messages with payloads are framed by wire, so gRPC gets their bytes as they are.
        self._pool = channel.unary_unary(POOL)
        self._infer_shape = channel.unary_unary(
            f"/{SERVICE}/InferShape",
            pool_pb2.InferShapeRequest.SerializeToString,
            pool_pb2.InferShapeResponse.FromString,
        )
        self._get_server_info = channel.unary_unary(
            f"/{SERVICE}/GetServerInfo",
            pool_pb2.GetServerInfoRequest.SerializeToString,
            pool_pb2.GetServerInfoResponse.FromString,
        )
        self._health = channel.unary_unary(
            HEALTH_CHECK,
            standard_pb2.HealthCheckRequest.SerializeToString,
            standard_pb2.HealthCheckResponse.FromString,
        )

    def __repr__(self) -> str:
        """Name the address alone: metadata and credentials may be secrets."""
        return f"{type(self).__name__}({self.address!r})"

    def _call(self, timeout: float | None) -> CallOptions:
        if self._closed:
            msg = f"{self!r} is closed"
            raise PoolError(msg, reason="CLOSED")
        return CallOptions(self.timeout if timeout is None else timeout, self._metadata)

    def _transfer(
        self,
        x: object,
        branches: Iterable[Layer | Iterable[Layer]],
        indices: object,
        layout: str,
        out: Sequence[Array | tuple[Array, Array] | None] | None,
    ) -> Transfer:
        check_layout(layout)
        chains: tuple[Chain, ...] = tuple(map(as_chain, branches))
        flat = [part for each in out or () for part in (each if isinstance(each, tuple) else (each,))]
        array = as_array(x)
        if indices is None:
            return Transfer(outline_of(dtype_name(array.dtype), array.shape, layout, chains), [array], flat)
        places = as_array(indices)
        request = codec.Request(spec_of(array, layout), chains, spec_of(places, layout))
        return Transfer(outline(request), [array, places], flat)

    def _path(self, transfer: Transfer, transport: str | None) -> str:
        check_transport(transport)
        if transport is not None:
            return transport
        nbytes, arenas = transfer.outline.nbytes, self._arenas
        if arenas is None or nbytes < ARENA_BYTES:
            return by_size(transfer, self.max_message_bytes)
        # Larger ones than most go that way where they lie in an arena already.
        fits = nbytes <= ARENA_MOST_BYTES or arenas.find(transfer.arrays[0]) is not None
        return "arena" if fits else by_size(transfer, self.max_message_bytes)

    def _no_arena(self) -> PoolError:
        reason = "the address is no unix socket" if self._arenas is None else str(self._arenas.refused or "no room")
        return UnavailableError(f"expected an arena, got none: {reason}", reason="ARENA")

    def empty(self, shape: int | Iterable[int], dtype: object = "float32") -> Array:
        """Give an array, of any values, that lies in memory shared with the server: pooling it copies nothing.

        Where there is no such memory (another address than a unix socket, another host, a server that refuses), it is
        an ordinary array, and everything works as well. The memory stays reserved for as long as the array, or a view
        of it, lives, and may be used after the client is closed.

        Args:
            shape: As numpy.empty takes it.
            dtype: As numpy.empty takes it, but for one of objects.

        Raises:
            InvalidArgumentError: It is one of objects, whose addresses nobody else should see, let alone change.

        """
        kind: np.dtype[Any] = np.dtype(dtype)  # type: ignore[call-overload]  # whatever NumPy makes a dtype of
        if kind.hasobject:
            raise InvalidArgumentError(f"expected a dtype without objects, got {kind}", field="dtype")
        sizes = (int(shape),) if isinstance(shape, SupportsIndex) else tuple(map(int, shape))
        span = None if self._arenas is None else self._arenas.allocate(prod(sizes) * kind.itemsize)
        return np.empty(sizes, kind) if span is None else span.array(kind, sizes)

    def _shape_request(
        self, shape: Iterable[int], layers: Layer | Iterable[Layer], layout: str
    ) -> pool_pb2.InferShapeRequest:
        check_layout(layout)
        sizes = tuple(integer("shape", size, 0, MAX_NUMEL) for size in shape)
        return codec.encode_shape_request(sizes, [as_chain(layers)], layout)
