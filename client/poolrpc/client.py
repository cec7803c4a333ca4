"""The clients: PoolClient and its asyncio twin, which differ in nothing but how they wait.

_Settings holds what both share: the channel's options, and the pure steps from arguments to a message and from a
message to results. A client only does the I/O between these.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import grpc
from grpc import aio

from poolrpc import codec
from poolrpc._version import __version__
from poolrpc.chains import Chain, Shape, as_chain, check_layout
from poolrpc.errors import LimitExceededError, PoolError
from poolrpc.limits import MAX_MESSAGE_BYTES, MAX_NUMEL
from poolrpc.parameters import integer
from poolrpc.status import DETAILS_KEY, RAISE_HINT, decode_error
from poolrpc.tensors import Array, as_array, from_raw, raw, spec_of, split
from poolrpc.v1 import pool_pb2, pool_pb2_grpc, standard_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from poolrpc.layers import Layer

SERVICE = "poolrpc.v1.PoolService"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"

# Pooling changes nothing on the server, so a call that found it full, draining or gone may be tried again: by gRPC
# itself, at most five times, with growing random pauses, and (the throttling) not while most tries fail.
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.5},
}


@dataclass(frozen=True, slots=True, eq=False)
class PoolResult:
    """What one branch gave.

    Attributes:
        output: The output, of the input's dtype and layout.
        shapes: The shape after every layer of the chain.
        indices: The places of the maxima (int64, the output's shape) where the last layer has return_indices, as torch
            counts them: in the flattened channels-first input plane. None elsewhere.

    """

    output: Array
    shapes: tuple[Shape, ...]
    indices: Array | None = None

    @property
    def shape(self) -> Shape:
        """The shape of the output."""
        return self.shapes[-1]

    def __repr__(self) -> str:
        """Describe the result without its contents."""
        indices = "" if self.indices is None else ", with indices"
        return f"<PoolResult {self.output.dtype.name} {' -> '.join(map(str, self.shapes))}{indices}>"


@contextmanager
def _translated() -> Iterator[None]:
    """Turn gRPC's errors, of both worlds, into the tree of poolrpc.errors."""
    try:
        yield
    except grpc.RpcError as error:
        # Every RpcError of a call is a Call too, in both worlds.
        call: Any = error
        details = None
        for key, value in call.trailing_metadata() or ():
            if key == DETAILS_KEY:
                details = value
        raise decode_error(call.code().name, call.details() or "", details) from error


class _Settings:
    """What a client was told, and the pure steps on both sides of its calls."""

    def __init__(  # noqa: PLR0913 - the settings of a client, all but one by keyword
        self,
        address: str = "127.0.0.1:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        options: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        timeout: float | None = 60.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """Make a client; it connects on the first call.

        Args:
            address: "host:port", "dns:///name:port" (calls take turns over all its addresses) or "unix:PATH".
            credentials: For TLS, from grpc.ssl_channel_credentials. None: plaintext.
            metadata: Pairs that go with every call.
            options: gRPC channel arguments, before which the client's own give way.
            timeout: Seconds for a call that names none. None: no limit.
            max_message_bytes: The largest message, each way; the server has a limit of its own.

        """
        self.address = address
        self.timeout = timeout
        self.max_message_bytes = max_message_bytes
        self._credentials = credentials
        self._metadata = tuple(metadata)
        self._options: list[tuple[str, Any]] = list(
            {
                "grpc.max_send_message_length": max_message_bytes,
                "grpc.max_receive_message_length": max_message_bytes,
                "grpc.service_config": json.dumps(SERVICE_CONFIG),
                # A call is only tried again while its message is kept, and gRPC keeps 256 KB unless told otherwise.
                "grpc.per_rpc_retry_buffer_size": max_message_bytes,
                "grpc.primary_user_agent": f"poolrpc/{__version__}",
                **dict(options),
            }.items()
        )
        self._closed = False
        self._connect()

    def _connect(self) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        """Name the address alone: metadata and credentials may be secrets."""
        return f"{type(self).__name__}({self.address!r})"

    def _call(self, timeout: float | None) -> dict[str, Any]:
        if self._closed:
            msg = f"{self!r} is closed"
            raise PoolError(msg, reason="CLOSED")
        return {"timeout": self.timeout if timeout is None else timeout, "metadata": self._metadata}

    def _request(
        self, x: object, branches: Iterable[Layer | Iterable[Layer]], indices: object, layout: str
    ) -> pool_pb2.PoolRequest:
        check_layout(layout)
        chains: tuple[Chain, ...] = tuple(map(as_chain, branches))
        arrays = [as_array(x)] if indices is None else [as_array(x), as_array(indices)]
        specs = [spec_of(array, layout) for array in arrays]
        nbytes = sum(array.nbytes for array in arrays)
        if nbytes > self.max_message_bytes:
            msg = f"expected tensors of at most {self.max_message_bytes} bytes in a message, got {nbytes}; {RAISE_HINT}"
            limits = {"limit": str(self.max_message_bytes), "actual": str(nbytes)}
            raise LimitExceededError(msg, reason="MESSAGE_TOO_LARGE", metadata=limits)
        request = codec.Request(specs[0], chains, *specs[1:])
        return codec.encode_request(request, b"".join(map(raw, arrays)))

    def _results(self, message: pool_pb2.PoolResponse) -> list[PoolResult]:
        results = codec.decode_response(message)
        pieces = iter(split(message.payload, [spec for each in results for spec in each.specs]))
        return [
            PoolResult(
                from_raw(each.output, next(pieces)),
                each.shapes,
                None if each.indices is None else from_raw(each.indices, next(pieces)),
            )
            for each in results
        ]

    def _shape_request(
        self, shape: Iterable[int], layers: Layer | Iterable[Layer], layout: str
    ) -> pool_pb2.InferShapeRequest:
        check_layout(layout)
        sizes = tuple(integer("shape", size, 0, MAX_NUMEL) for size in shape)
        return codec.encode_shape_request(sizes, [as_chain(layers)], layout)


class PoolClient(_Settings):
    """A connection to a pool server. Any number of threads may use one; it doesn't survive a fork.

    Every method raises a poolrpc.PoolError where the server, or the way to it, does: see poolrpc.errors for the tree.
    A call that finds the server full, draining or gone (UNAVAILABLE) is tried again a few times, within its timeout.
    """

    def _connect(self) -> None:
        if self._credentials is None:
            self._channel = grpc.insecure_channel(self.address, self._options)
        else:
            self._channel = grpc.secure_channel(self.address, self._credentials, self._options)
        self._stub = pool_pb2_grpc.PoolServiceStub(self._channel)
        self._health = self._channel.unary_unary(
            HEALTH_CHECK,
            standard_pb2.HealthCheckRequest.SerializeToString,
            standard_pb2.HealthCheckResponse.FromString,
        )

    def pool(
        self,
        x: object,
        layers: Layer | Iterable[Layer],
        *,
        indices: object = None,
        layout: str = "NCHW",
        timeout: float | None = None,
    ) -> PoolResult:
        """Run a layer, or a chain of layers, on a tensor.

        Args:
            x: An array of (N, C, spatial...) or (C, spatial...); anything with `__array__` or DLPack, a torch tensor
                too. bfloat16 as ml_dtypes has it.
            layers: One layer, or several, each of which takes the output of the one before.
            indices: For MaxUnpool: int64, of x's shape.
            layout: "NCHW", or "NHWC" for channels last; of any number of spatial axes; the output has it too.
            timeout: Seconds. None: the client's.

        Raises:
            PoolError: Of the class that says what went wrong; InvalidArgumentError has the paths of fields at fault.

        """
        return self.pool_each(x, [layers], indices=indices, layout=layout, timeout=timeout)[0]

    def pool_each(
        self,
        x: object,
        branches: Iterable[Layer | Iterable[Layer]],
        *,
        indices: object = None,
        layout: str = "NCHW",
        timeout: float | None = None,
    ) -> list[PoolResult]:
        """Run each of several layers or chains on the same tensor, which is sent once; the rest is as in pool."""
        call = self._call(timeout)
        request = self._request(x, branches, indices, layout)
        with _translated():
            response = self._stub.Pool(request, **call)
        return self._results(response)

    def output_shape(
        self,
        shape: Iterable[int],
        layers: Layer | Iterable[Layer],
        *,
        layout: str = "NCHW",
        timeout: float | None = None,
    ) -> Shape:
        """Ask the server for the shape that pool would give; layer.output_shape(shape) is the same, offline."""
        call = self._call(timeout)
        request = self._shape_request(shape, layers, layout)
        with _translated():
            response = self._stub.InferShape(request, **call)
        return codec.decode_shape_response(response)[0][-1]

    def server_info(self, *, timeout: float | None = None) -> codec.ServerInfo:
        """Ask the server for its versions, device, layers with their dtypes, and limits."""
        with _translated():
            response = self._stub.GetServerInfo(pool_pb2.GetServerInfoRequest(), **self._call(timeout))
        return codec.decode_info(response)

    def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """Ask for the health of a service by grpc.health.v1: "SERVING" or "NOT_SERVING". Empty: the server's."""
        with _translated():
            response = self._health(standard_pb2.HealthCheckRequest(service=service), **self._call(timeout))
        return codec.decode_health(response)

    def close(self) -> None:
        """End the connection and whatever calls are under way."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        """Give the client, to be closed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the client."""
        self.close()


class AsyncPoolClient(_Settings):
    """PoolClient for asyncio: the same methods, awaited. Make it and use it in one event loop."""

    def _connect(self) -> None:
        if self._credentials is None:
            self._channel = aio.insecure_channel(self.address, self._options)
        else:
            self._channel = aio.secure_channel(self.address, self._credentials, self._options)
        self._stub = pool_pb2_grpc.PoolServiceStub(self._channel)
        self._health = self._channel.unary_unary(
            HEALTH_CHECK,
            standard_pb2.HealthCheckRequest.SerializeToString,
            standard_pb2.HealthCheckResponse.FromString,
        )

    async def pool(
        self,
        x: object,
        layers: Layer | Iterable[Layer],
        *,
        indices: object = None,
        layout: str = "NCHW",
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC's deadline, which the server sees too
    ) -> PoolResult:
        """Run a layer, or a chain of layers, on a tensor: PoolClient.pool."""
        results = await self.pool_each(x, [layers], indices=indices, layout=layout, timeout=timeout)
        return results[0]

    async def pool_each(
        self,
        x: object,
        branches: Iterable[Layer | Iterable[Layer]],
        *,
        indices: object = None,
        layout: str = "NCHW",
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC's deadline, which the server sees too
    ) -> list[PoolResult]:
        """Run each of several layers or chains on the same tensor: PoolClient.pool_each."""
        call = self._call(timeout)
        request = self._request(x, branches, indices, layout)
        with _translated():
            response = await self._stub.Pool(request, **call)
        return self._results(response)

    async def output_shape(
        self,
        shape: Iterable[int],
        layers: Layer | Iterable[Layer],
        *,
        layout: str = "NCHW",
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC's deadline, which the server sees too
    ) -> Shape:
        """Ask the server for the shape that pool would give: PoolClient.output_shape."""
        call = self._call(timeout)
        request = self._shape_request(shape, layers, layout)
        with _translated():
            response = await self._stub.InferShape(request, **call)
        return codec.decode_shape_response(response)[0][-1]

    async def server_info(self, *, timeout: float | None = None) -> codec.ServerInfo:  # noqa: ASYNC109 - gRPC's deadline
        """Ask the server what it is: PoolClient.server_info."""
        with _translated():
            response = await self._stub.GetServerInfo(pool_pb2.GetServerInfoRequest(), **self._call(timeout))
        return codec.decode_info(response)

    async def health(self, service: str = "", *, timeout: float | None = None) -> str:  # noqa: ASYNC109 - gRPC's deadline
        """Ask for the health of a service: PoolClient.health."""
        with _translated():
            response = await self._health(standard_pb2.HealthCheckRequest(service=service), **self._call(timeout))
        return codec.decode_health(response)

    async def close(self) -> None:
        """End the connection and whatever calls are under way."""
        self._closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        """Give the client, to be closed at the end."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the client."""
        await self.close()
