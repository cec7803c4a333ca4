"""Protobuf messages to and from values. Only this module, layer_codec, status and the protocols use protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, islice, repeat
from typing import TYPE_CHECKING

from poolrpc._shapes.limits import MAX_RANK
from poolrpc._shapes.operands import OPERAND_DTYPES
from poolrpc._shapes.rules import clip
from poolrpc._wire.layer_codec import (
    DTYPE_FROM_WIRE,
    DTYPE_TO_WIRE,
    decode_branches,
    decode_outputs,
    encode_branches,
)
from poolrpc.chains import layer_path, operand_name, returned_steps, shapes_of
from poolrpc.errors import InvalidArgumentError, UnsupportedError
from poolrpc.layers import FLOATS
from poolrpc.tensors import Layout, TensorSpec
from poolrpc.v1 import pool_pb2, standard_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from poolrpc.chains import Chain, Outputs, Shape
    from poolrpc.layers import Layer

LAYOUT_TO_WIRE: dict[Layout, pool_pb2.Layout.ValueType] = {
    "NCHW": pool_pb2.LAYOUT_CHANNELS_FIRST,
    "NHWC": pool_pb2.LAYOUT_CHANNELS_LAST,
}
LAYOUT_FROM_WIRE: dict[pool_pb2.Layout.ValueType, Layout] = {
    pool_pb2.LAYOUT_UNSPECIFIED: "NCHW",
    **{number: name for name, number in LAYOUT_TO_WIRE.items()},
}


@dataclass(frozen=True, slots=True)
class Request:
    """A PoolRequest without its payload.

    Attributes:
        input: The spec of the input.
        branches: The chains to apply to the input.
        operand: The spec of the operand, such as MaxUnpool's indices; None if there is none.
        outputs: For each branch, the numbers of the layers whose outputs are returned. Empty: the last of each.
        is_block: Whether the input is some of the planes of a tensor, whose number is not that of the channels.
        channels: The number of channels of the tensor that a block is a part of. 0: that of the input.
        start: The number of planes of the first image that come before the block.

    """

    input: TensorSpec
    branches: tuple[Chain, ...]
    operand: TensorSpec | None = None
    outputs: tuple[Outputs, ...] = ()
    is_block: bool = False
    channels: int = 0
    start: int = 0

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The specs of the payload's tensors, in order."""
        return (self.input,) if self.operand is None else (self.input, self.operand)

    @property
    def operand_name(self) -> str:
        """The name of the operand that the first layers of the branches take; empty if none takes one."""
        return operand_name(self.branches, given=self.operand is not None)

    def check(self) -> tuple[BranchResult, ...]:
        """Check all that does not depend on a server's limits, and return the results that the branches will have.

        Client and server both call this, so that a request has the same error wherever it is found.

        Raises:
            UnsupportedError: A layer does not take the dtype that it gets.
            InvalidArgumentError: A shape is invalid, or does not fit a layer, or the operand does not fit the input.

        """
        for i, chain in enumerate(self.branches):
            for j, (layer, dtype) in enumerate(zip(chain, self.dtypes(chain), strict=False)):
                if dtype not in layer.dtypes:
                    dtypes, name = ", ".join(layer.dtypes), layer.name
                    msg = f"{layer_path(i, j, layer)}: {name} takes {dtypes}, got {dtype}{_helpful_step(layer, dtype)}"
                    raise UnsupportedError(msg, reason="DTYPE", metadata={"layer": name, "dtypes": dtypes})
        self._check_operand()
        return self.results()

    def dtypes(self, chain: Chain) -> list[str]:
        """Return the dtype of the input, and of the output of each layer of a chain."""
        return [*accumulate(chain, lambda dtype, layer: layer.output_dtype(dtype), initial=self.input.dtype)]

    def _check_operand(self) -> None:
        """Check that the operand is there if it is needed, and its dtype; `shapes` checks the rest."""
        name, spec = self.operand_name, self.operand
        if spec is None:
            if name:
                takers = ", ".join(dict.fromkeys(chain[0].name for chain in self.branches if chain[0].operand == name))
                raise InvalidArgumentError(f"expected the {name} for {takers}, got none", field=name)
            return
        if not name:
            return
        if spec.dtype not in OPERAND_DTYPES[name]:
            msg = f"expected {' or '.join(OPERAND_DTYPES[name])}, got {spec.dtype}"
            raise InvalidArgumentError(msg, field=f"{name}.dtype")
        if name == "indices" and (spec.shape, spec.layout) != (self.input.shape, self.input.layout):
            expected = f"{self.input.shape} in {self.input.layout}"
            msg = f"expected the input's {expected}, got {clip(spec.shape)} in {spec.layout}"
            raise InvalidArgumentError(msg, field="indices.shape")
        if name == "weights" and self.input.dtype not in FLOATS:
            msg = f"layers with weights take {', '.join(FLOATS)}, got {self.input.dtype}"
            raise UnsupportedError(msg, reason="DTYPE", metadata={"dtypes": ", ".join(FLOATS)})

    def shapes(self) -> list[tuple[Shape, ...]]:
        """Return, for each branch, the shape after every layer.

        Raises:
            InvalidArgumentError: The layers don't fit the input or each other; the paths are those of the request.

        """
        spec, operand = self.input, None if self.operand is None else self.operand.shape
        try:
            return shapes_of(spec.shape, self.branches, spec.layout, self.outputs, operand, is_block=self.is_block)
        except InvalidArgumentError as error:
            field, description = error.violations[0].field, error.violations[0].description
            if field == "operand_shape":
                name = self.operand_name
                raise InvalidArgumentError(description, field=f"{name}.shape" if name else "operand") from None
            raise error.with_prefix("input") if field == "shape" else error from None

    def results(self) -> tuple[BranchResult, ...]:
        """Return the results that the branches will have; raises the same errors as `shapes`."""
        results, layout = [], self.input.layout
        for (chain, steps), shapes in zip(self.returned(), self.shapes(), strict=True):
            dtypes = self.dtypes(chain)
            for step in steps:
                indices = TensorSpec("int64", shapes[step], layout) if chain[step].returns_indices else None
                output = TensorSpec(dtypes[step + 1], shapes[step], layout)
                results.append(BranchResult(shapes[: step + 1], output, indices))
        return tuple(results)

    def returned(self) -> Iterator[tuple[Chain, Outputs]]:
        """Yield each branch with the numbers of the layers whose outputs are returned."""
        for chain, outputs in zip(self.branches, self.outputs or repeat(()), strict=False):
            yield chain, returned_steps(chain, outputs)

    def by_branch(self, results: Iterable[BranchResult]) -> Iterator[tuple[Chain, list[BranchResult]]]:
        """Yield the layers that each branch computes, and its results, of which the last has the shapes after each."""
        remaining = iter(results)
        for chain, steps in self.returned():
            yield chain[: steps[-1] + 1], list(islice(remaining, len(steps)))


def _helpful_step(layer: Layer, dtype: str) -> str:
    """Return what to put before a layer that does not take a dtype; "" if no conversion helps."""
    if layer.family == "to_dtype":
        return ""
    widened = "uint8" if dtype == "bool" and "uint8" in layer.dtypes else "float32"
    return f"; put ToDtype({widened!r}) before it"


@dataclass(frozen=True, slots=True)
class ArenaRanges:
    """The ranges of an arena that hold a request's tensors.

    Attributes:
        arena_id: The id of the arena.
        input: Offset and length of the inputs' range, in bytes.
        output: Offset and length of the outputs' range, in bytes.

    """

    arena_id: bytes
    input: tuple[int, int]
    output: tuple[int, int]


@dataclass(frozen=True, slots=True)
class BranchResult:
    """An output of a branch without its payload.

    Attributes:
        shapes: The shape after every layer up to the one whose output it is.
        output: The spec of the output.
        indices: The spec of the indices; None if that layer doesn't return them.

    """

    shapes: tuple[Shape, ...]
    output: TensorSpec
    indices: TensorSpec | None = None

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The specs of the payload's tensors, in order."""
        return (self.output,) if self.indices is None else (self.output, self.indices)


def payload_specs(results: Iterable[BranchResult]) -> tuple[TensorSpec, ...]:
    """Return the specs of the tensors in the payload of these results, in order."""
    return tuple(spec for each in results for spec in each.specs)


def encode_spec(spec: TensorSpec) -> pool_pb2.TensorSpec:
    """Return the message of a spec."""
    return pool_pb2.TensorSpec(dtype=DTYPE_TO_WIRE[spec.dtype], shape=spec.shape, layout=LAYOUT_TO_WIRE[spec.layout])


def decode_spec(message: pool_pb2.TensorSpec, path: str) -> TensorSpec:
    """Return the spec of a message.

    Args:
        message: The message.
        path: Its path in the request, for errors.

    Raises:
        InvalidArgumentError: The dtype or the layout is unknown, or there are more than MAX_RANK axes.

    """
    dtype = DTYPE_FROM_WIRE.get(message.dtype)
    if dtype is None:
        msg = f"expected one of {', '.join(pool_pb2.DataType.keys()[1:])}, got {message.dtype}"
        raise InvalidArgumentError(msg, field=f"{path}.dtype")
    return TensorSpec(
        dtype, _decode_sizes(message.shape, f"{path}.shape"), decode_layout(message.layout, f"{path}.layout")
    )


def _decode_sizes(sizes: Sequence[int], path: str) -> Shape:
    # Counted before they are copied, since a message can hold millions.
    if len(sizes) > MAX_RANK:
        raise InvalidArgumentError(f"expected at most {MAX_RANK} dims, got {len(sizes)}", field=path)
    return tuple(sizes)


def decode_layout(number: pool_pb2.Layout.ValueType, path: str) -> Layout:
    """Return the name of a layout.

    Raises:
        InvalidArgumentError: The layout is unknown.

    """
    layout = LAYOUT_FROM_WIRE.get(number)
    if layout is None:
        msg = f"expected one of {', '.join(pool_pb2.Layout.keys()[1:])}, got {number}"
        raise InvalidArgumentError(msg, field=path)
    return layout


def encode_shapes(shapes: Iterable[Shape]) -> list[pool_pb2.Shape]:
    """Return the messages of shapes."""
    return [pool_pb2.Shape(dims=shape) for shape in shapes]


def decode_shapes(messages: Iterable[pool_pb2.Shape]) -> tuple[Shape, ...]:
    """Return the shapes of messages."""
    return tuple(tuple(each.dims) for each in messages)


def encode_request(request: Request) -> pool_pb2.PoolRequest:
    """Return the message of a request, without its payload."""
    return pool_pb2.PoolRequest(
        input=encode_spec(request.input),
        operand=None if request.operand is None else encode_spec(request.operand),
        branches=encode_branches(request.branches, request.outputs),
    )


@lru_cache(1024)
def encode_ranges(ranges: ArenaRanges) -> bytes:
    """Return the part of a serialized request that names the ranges of an arena with its tensors."""
    message = pool_pb2.PoolRequest()
    message.arena.arena_id = ranges.arena_id
    message.arena.input.offset, message.arena.input.length = ranges.input
    message.arena.output.offset, message.arena.output.length = ranges.output
    return message.SerializeToString()


def decode_ranges(message: pool_pb2.PoolRequest) -> ArenaRanges | None:
    """Return the arena ranges of a request, or None if its tensors are in the payload."""
    if not message.HasField("arena"):
        return None
    arena = message.arena
    return ArenaRanges(
        arena.arena_id, (arena.input.offset, arena.input.length), (arena.output.offset, arena.output.length)
    )


def decode_request(message: pool_pb2.PoolRequest) -> Request:
    """Return the request of a message.

    Raises:
        InvalidArgumentError: A field is invalid.
        LimitExceededError: There are too many branches or layers.

    """
    branches, given = decode_branches(message.branches), message.HasField("operand")
    name = next((chain[0].operand for chain in branches if chain[0].operand), "operand")
    return Request(
        branches=branches,
        input=decode_spec(message.input, "input"),
        operand=decode_spec(message.operand, name) if given else None,
        outputs=decode_outputs(message.branches),
    )


def encode_results(results: Iterable[BranchResult]) -> list[pool_pb2.BranchResult]:
    """Return the messages of results."""
    return [
        pool_pb2.BranchResult(
            shapes=encode_shapes(each.shapes),
            output=encode_spec(each.output),
            indices=None if each.indices is None else encode_spec(each.indices),
        )
        for each in results
    ]


def decode_results(messages: Iterable[pool_pb2.BranchResult]) -> list[BranchResult]:
    """Return the results of messages."""
    return [
        BranchResult(
            decode_shapes(each.shapes),
            decode_spec(each.output, f"results[{i}].output"),
            decode_spec(each.indices, f"results[{i}].indices") if each.HasField("indices") else None,
        )
        for i, each in enumerate(messages)
    ]


def encode_shape_request(
    shape: Shape, branches: Iterable[Chain], layout: Layout, operand_shape: Shape | None = None
) -> pool_pb2.InferShapeRequest:
    """Return the message of a request for shapes."""
    return pool_pb2.InferShapeRequest(
        shape=pool_pb2.Shape(dims=shape),
        layout=LAYOUT_TO_WIRE[layout],
        branches=encode_branches(branches),
        operand_shape=None if operand_shape is None else pool_pb2.Shape(dims=operand_shape),
    )


def decode_shape_request(
    message: pool_pb2.InferShapeRequest,
) -> tuple[Shape, tuple[Chain, ...], Layout, tuple[Outputs, ...], Shape | None]:
    """Return the shape, branches, layout, outputs that are returned, and shape of the operand of a request for shapes.

    Raises:
        InvalidArgumentError: A field is invalid.
        LimitExceededError: There are too many branches or layers.

    """
    return (
        _decode_sizes(message.shape.dims, "shape"),
        decode_branches(message.branches),
        decode_layout(message.layout, "layout"),
        decode_outputs(message.branches),
        _decode_sizes(message.operand_shape.dims, "operand_shape") if message.HasField("operand_shape") else None,
    )


def encode_shape_response(branches: Iterable[Iterable[Shape]]) -> pool_pb2.InferShapeResponse:
    """Return the message with the shapes of branches."""
    return pool_pb2.InferShapeResponse(
        branches=[pool_pb2.BranchShapes(shapes=encode_shapes(shapes)) for shapes in branches]
    )


def decode_shape_response(message: pool_pb2.InferShapeResponse) -> list[tuple[Shape, ...]]:
    """Return the shapes of branches in a message."""
    return [decode_shapes(each.shapes) for each in message.branches]


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit of a server.

    Attributes:
        value: The largest value that the server accepts.
        unit: The unit of the value: "bytes", "cells", "times" or "layers".

    Examples:
        >>> from poolrpc import Limit
        >>> str(Limit(64, "layers"))
        '64 layers'

    """

    value: int
    unit: str

    def __str__(self) -> str:
        return f"{self.value} {self.unit}"


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The description of a server, from `server_info()`.

    Attributes:
        version: The version of poolrpc.
        torch_version: The version of torch.
        device: The device that computes layers, as torch names it: "cpu", "cuda:0".
        threads: Number of requests that are computed at the same time.
        layers: The dtypes of every layer that the server has, by the layer's name.
        limits: The limits of the server, by name.
        features: The state of optional features, by name: "tls", "tokens", "metrics", "traces". Empty if the server
            doesn't report them.
        operands: The name of the operand that a layer takes, by the layer's name, without the layers that take none.

    """

    version: str
    torch_version: str
    device: str
    threads: int
    layers: dict[str, tuple[str, ...]]
    limits: dict[str, Limit]
    features: dict[str, str] = field(default_factory=dict)
    operands: dict[str, str] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        # Jupyter's protocol.
        from poolrpc._html import info_table  # noqa: PLC0415 - keeps `import poolrpc` fast

        return info_table(self)


def encode_info(info: ServerInfo) -> pool_pb2.GetServerInfoResponse:
    """Return the message of a server's description."""
    return pool_pb2.GetServerInfoResponse(
        version=info.version,
        torch_version=info.torch_version,
        device=info.device,
        threads=info.threads,
        layers=[
            pool_pb2.LayerInfo(
                name=name, dtypes=[DTYPE_TO_WIRE[each] for each in dtypes], operand=info.operands.get(name, "")
            )
            for name, dtypes in info.layers.items()
        ],
        limits=[pool_pb2.Limit(name=name, value=each.value, unit=each.unit) for name, each in info.limits.items()],
        features=info.features,
    )


def decode_info(message: pool_pb2.GetServerInfoResponse) -> ServerInfo:
    """Return a server's description, without dtypes that this client doesn't know."""
    info = _decode_info(message.SerializeToString())
    # The caller may change the dicts.
    return replace(
        info,
        layers=info.layers.copy(),
        limits=info.limits.copy(),
        features=info.features.copy(),
        operands=info.operands.copy(),
    )


@lru_cache(16)
def _decode_info(data: bytes) -> ServerInfo:
    # Cached, since a server always says the same, and reading its message takes as long as a call on one machine.
    message = pool_pb2.GetServerInfoResponse.FromString(data)
    return ServerInfo(
        version=message.version,
        torch_version=message.torch_version,
        device=message.device,
        threads=message.threads,
        layers={each.name: _known_dtypes(tuple(each.dtypes)) for each in message.layers},
        limits={each.name: Limit(each.value, each.unit) for each in message.limits},
        features=dict(message.features),
        operands={each.name: each.operand for each in message.layers if each.operand},
    )


@lru_cache(64)
def _known_dtypes(numbers: tuple[pool_pb2.DataType.ValueType, ...]) -> tuple[str, ...]:
    # Cached, since most layers have the same.
    return tuple(DTYPE_FROM_WIRE[number] for number in numbers if number in DTYPE_FROM_WIRE)


def decode_health(message: standard_pb2.HealthCheckResponse) -> str:
    """Return the name of a health status of grpc.health.v1."""
    status = standard_pb2.HealthCheckResponse.ServingStatus
    name: str = status.Name(message.status) if message.status in status.values() else "UNKNOWN"
    return name.removeprefix("SERVING_STATUS_")
