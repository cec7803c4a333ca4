"""Messages to and from values: with layer_codec and status the one place, beside a servicer, where protobuf is seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from poolrpc._shapes.limits import MAX_RANK
from poolrpc._wire.layer_codec import decode_branches, encode_branches
from poolrpc.chains import branch_shapes
from poolrpc.errors import InvalidArgumentError
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2, standard_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from poolrpc.chains import Chain, Shape

DTYPE_TO_WIRE: dict[str, pool_pb2.DataType.ValueType] = {
    name.removeprefix("DATA_TYPE_").lower(): number
    for name, number in pool_pb2.DataType.items()
    if number != pool_pb2.DATA_TYPE_UNSPECIFIED
}
DTYPE_FROM_WIRE = {number: name for name, number in DTYPE_TO_WIRE.items()}
LAYOUT_TO_WIRE: dict[str, pool_pb2.Layout.ValueType] = {
    "NCHW": pool_pb2.LAYOUT_CHANNELS_FIRST,
    "NHWC": pool_pb2.LAYOUT_CHANNELS_LAST,
}
LAYOUT_FROM_WIRE = {number: name for name, number in LAYOUT_TO_WIRE.items()} | {pool_pb2.LAYOUT_UNSPECIFIED: "NCHW"}


@dataclass(frozen=True, slots=True)
class Request:
    """What a PoolRequest says, apart from its payload.

    Attributes:
        input: The input's spec.
        indices: The spec of MaxUnpool's indices, where there are any.
        branches: The chains to run on the input.

    """

    input: TensorSpec
    branches: tuple[Chain, ...]
    indices: TensorSpec | None = None

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The tensors of the payload, in order."""
        return (self.input,) if self.indices is None else (self.input, self.indices)

    def shapes(self) -> list[tuple[Shape, ...]]:
        """Give, for each branch, the shape after every layer.

        Raises:
            InvalidArgumentError: The layers don't fit the input or each other; paths are the request's.

        """
        try:
            return branch_shapes(self.input.shape, self.branches, self.input.layout)
        except InvalidArgumentError as error:
            raise error.with_prefix("input") if error.violations[0].field == "shape" else error from None

    def results(self) -> tuple[BranchResult, ...]:
        """Give what comes of each branch; the rest is as in shapes."""
        spec = self.input
        return tuple(
            BranchResult(
                steps,
                TensorSpec(spec.dtype, steps[-1], spec.layout),
                TensorSpec("int64", steps[-1], spec.layout) if chain[-1].returns_indices else None,
            )
            for chain, steps in zip(self.branches, self.shapes(), strict=True)
        )


@dataclass(frozen=True, slots=True)
class ArenaRanges:
    """Where in an arena a request's tensors are.

    Attributes:
        arena_id: The arena.
        input: The offset and the length of the range with the inputs.
        output: The same of the range for the outputs.

    """

    arena_id: bytes
    input: tuple[int, int]
    output: tuple[int, int]


@dataclass(frozen=True, slots=True)
class BranchResult:
    """What a branch gave, apart from its payload.

    Attributes:
        shapes: The shape after every layer.
        output: The output's spec.
        indices: The spec of the indices, where the last layer returns them.

    """

    shapes: tuple[Shape, ...]
    output: TensorSpec
    indices: TensorSpec | None = None

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The tensors of the payload, in order."""
        return (self.output,) if self.indices is None else (self.output, self.indices)


def payload_specs(results: Iterable[BranchResult]) -> tuple[TensorSpec, ...]:
    """Give the tensors of an answer's payload, in order."""
    return tuple(spec for each in results for spec in each.specs)


def encode_spec(spec: TensorSpec) -> pool_pb2.TensorSpec:
    """Give a spec's message."""
    return pool_pb2.TensorSpec(dtype=DTYPE_TO_WIRE[spec.dtype], shape=spec.shape, layout=LAYOUT_TO_WIRE[spec.layout])


def decode_spec(message: pool_pb2.TensorSpec, path: str) -> TensorSpec:
    """Give the spec of a message.

    Raises:
        InvalidArgumentError: The dtype or the layout is none that there is.

    """
    dtype = DTYPE_FROM_WIRE.get(message.dtype)
    if dtype is None:
        msg = f"expected one of {', '.join(pool_pb2.DataType.keys()[1:])}, got {message.dtype}"
        raise InvalidArgumentError(msg, field=f"{path}.dtype")
    return TensorSpec(
        dtype, _decode_sizes(message.shape, f"{path}.shape"), decode_layout(message.layout, f"{path}.layout")
    )


def _decode_sizes(sizes: Sequence[int], path: str) -> Shape:
    # Counted before they are copied: a message has room for millions.
    if len(sizes) > MAX_RANK:
        raise InvalidArgumentError(f"expected at most {MAX_RANK} dims, got {len(sizes)}", field=path)
    return tuple(sizes)


def decode_layout(number: pool_pb2.Layout.ValueType, path: str) -> str:
    """Give a layout's name.

    Raises:
        InvalidArgumentError: It is none that there is.

    """
    layout = LAYOUT_FROM_WIRE.get(number)
    if layout is None:
        msg = f"expected one of {', '.join(pool_pb2.Layout.keys()[1:])}, got {number}"
        raise InvalidArgumentError(msg, field=path)
    return layout


def encode_shapes(shapes: Iterable[Shape]) -> list[pool_pb2.Shape]:
    """Give the messages of shapes."""
    return [pool_pb2.Shape(dims=shape) for shape in shapes]


def decode_shapes(messages: Iterable[pool_pb2.Shape]) -> tuple[Shape, ...]:
    """Give the shapes of messages."""
    return tuple(tuple(each.dims) for each in messages)


def encode_request(request: Request) -> pool_pb2.PoolRequest:
    """Give a request's message, without its payload."""
    return pool_pb2.PoolRequest(
        input=encode_spec(request.input),
        indices=None if request.indices is None else encode_spec(request.indices),
        branches=encode_branches(request.branches),
    )


@lru_cache(1024)
def encode_ranges(ranges: ArenaRanges) -> bytes:
    """Give the part of a request's encoded message that says where in an arena its tensors are."""
    message = pool_pb2.PoolRequest()
    message.arena.arena_id = ranges.arena_id
    message.arena.input.offset, message.arena.input.length = ranges.input
    message.arena.output.offset, message.arena.output.length = ranges.output
    return message.SerializeToString()


def decode_ranges(message: pool_pb2.PoolRequest) -> ArenaRanges | None:
    """Give the ranges of a message that has its tensors in an arena."""
    if not message.HasField("arena"):
        return None
    arena = message.arena
    return ArenaRanges(
        arena.arena_id, (arena.input.offset, arena.input.length), (arena.output.offset, arena.output.length)
    )


def decode_request(message: pool_pb2.PoolRequest) -> Request:
    """Give what a message says, its payload apart.

    Raises:
        InvalidArgumentError: A field is out of its range.
        LimitExceededError: There are too many layers.

    """
    return Request(
        branches=decode_branches(message.branches),
        input=decode_spec(message.input, "input"),
        indices=decode_spec(message.indices, "indices") if message.HasField("indices") else None,
    )


def encode_results(results: Iterable[BranchResult]) -> list[pool_pb2.BranchResult]:
    """Give the messages of results."""
    return [
        pool_pb2.BranchResult(
            shapes=encode_shapes(each.shapes),
            output=encode_spec(each.output),
            indices=None if each.indices is None else encode_spec(each.indices),
        )
        for each in results
    ]


def decode_results(messages: Iterable[pool_pb2.BranchResult]) -> list[BranchResult]:
    """Give the results of messages."""
    return [
        BranchResult(
            decode_shapes(each.shapes),
            decode_spec(each.output, f"results[{i}].output"),
            decode_spec(each.indices, f"results[{i}].indices") if each.HasField("indices") else None,
        )
        for i, each in enumerate(messages)
    ]


def encode_shape_request(shape: Shape, branches: Iterable[Chain], layout: str) -> pool_pb2.InferShapeRequest:
    """Give the message that asks for shapes."""
    return pool_pb2.InferShapeRequest(
        shape=pool_pb2.Shape(dims=shape), layout=LAYOUT_TO_WIRE[layout], branches=encode_branches(branches)
    )


def decode_shape_request(message: pool_pb2.InferShapeRequest) -> tuple[Shape, tuple[Chain, ...], str]:
    """Give the shape, the branches and the layout that a message asks about.

    Raises:
        InvalidArgumentError: A field is out of its range.
        LimitExceededError: There are too many layers.

    """
    return (
        _decode_sizes(message.shape.dims, "shape"),
        decode_branches(message.branches),
        decode_layout(message.layout, "layout"),
    )


def encode_shape_response(branches: Iterable[Iterable[Shape]]) -> pool_pb2.InferShapeResponse:
    """Give the message of the shapes of branches."""
    return pool_pb2.InferShapeResponse(
        branches=[pool_pb2.BranchShapes(shapes=encode_shapes(shapes)) for shapes in branches]
    )


def decode_shape_response(message: pool_pb2.InferShapeResponse) -> list[tuple[Shape, ...]]:
    """Give the shapes of branches of a message."""
    return [decode_shapes(each.shapes) for each in message.branches]


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound that a server holds requests to.

    Attributes:
        value: The bound.
        unit: What it counts: "bytes", "cells", "times", "layers".

    """

    value: int
    unit: str

    def __str__(self) -> str:
        return f"{self.value} {self.unit}"


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server is.

    Attributes:
        version: Of poolrpc.
        torch_version: Of torch.
        device: What layers run on, as torch names it.
        threads: How many requests are computed at a time.
        layers: The dtypes of every layer that is served, by the layer's name.
        limits: Every limit in force, by its name.
        features: What is on, by name: "tls", "tokens", "metrics", "traces"; empty from a server that doesn't say.

    """

    version: str
    torch_version: str
    device: str
    threads: int
    layers: dict[str, tuple[str, ...]]
    limits: dict[str, Limit]
    features: dict[str, str] = field(default_factory=dict)


def encode_info(info: ServerInfo) -> pool_pb2.GetServerInfoResponse:
    """Give the message of a server's description."""
    return pool_pb2.GetServerInfoResponse(
        version=info.version,
        torch_version=info.torch_version,
        device=info.device,
        threads=info.threads,
        layers=[
            pool_pb2.LayerInfo(name=name, dtypes=[DTYPE_TO_WIRE[each] for each in dtypes])
            for name, dtypes in info.layers.items()
        ],
        limits=[pool_pb2.Limit(name=name, value=each.value, unit=each.unit) for name, each in info.limits.items()],
        features=info.features,
    )


def decode_info(message: pool_pb2.GetServerInfoResponse) -> ServerInfo:
    """Give a server's description; dtypes that this client doesn't know are left out."""
    return ServerInfo(
        version=message.version,
        torch_version=message.torch_version,
        device=message.device,
        threads=message.threads,
        layers={
            each.name: tuple(DTYPE_FROM_WIRE[number] for number in each.dtypes if number in DTYPE_FROM_WIRE)
            for each in message.layers
        },
        limits={each.name: Limit(each.value, each.unit) for each in message.limits},
        features=dict(message.features),
    )


def decode_health(message: standard_pb2.HealthCheckResponse) -> str:
    """Give the name of a health status, as grpc.health.v1 has it."""
    status = standard_pb2.HealthCheckResponse.ServingStatus
    name: str = status.Name(message.status) if message.status in status.values() else "UNKNOWN"
    return name.removeprefix("SERVING_STATUS_")
