"""Layers and branches to and from protobuf messages.

A parameter has the same name in its layer's class and in its message, so a layer is converted field by field.
FIELD_CODECS has the representation of each parameter in the message.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import repeat
from typing import TYPE_CHECKING, Any

from poolrpc._shapes.limits import MAX_BRANCHES, MAX_CHAIN, MAX_NORMALIZED_CHANNELS, MAX_RANK
from poolrpc._shapes.parameters import AUTO_PADDINGS, padded_sides, per_axis
from poolrpc.errors import InvalidArgumentError, LimitExceededError
from poolrpc.layers import LAYERS, REDUCTIONS, STEPS, Layer
from poolrpc.v1 import pool_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from poolrpc.chains import Chain, Outputs

DTYPE_TO_WIRE: dict[str, pool_pb2.DataType.ValueType] = {
    name.removeprefix("DATA_TYPE_").lower(): number
    for name, number in pool_pb2.DataType.items()
    if number != pool_pb2.DATA_TYPE_UNSPECIFIED
}
DTYPE_FROM_WIRE = {number: name for name, number in DTYPE_TO_WIRE.items()}
REDUCTION_FROM_WIRE = {
    number: name.removeprefix("REDUCTION_").lower() for name, number in pool_pb2.Reduction.items() if number
}
REDUCTION_TO_WIRE = {name: number for number, name in REDUCTION_FROM_WIRE.items()}

AUTO_PAD_TO_WIRE = {name: pool_pb2.AutoPad.Value(f"AUTO_PAD_{name.upper()}") for name in AUTO_PADDINGS}
AUTO_PAD_FROM_WIRE = {number: name for name, number in AUTO_PAD_TO_WIRE.items()}

ABSENT: Any = object()
"""The decoded value of a parameter that the message leaves to the layer's default."""


def _values(message: Any, name: str, most: int = MAX_RANK, each: str = "axis") -> tuple[Any, ...]:  # noqa: ANN401 - any family's message
    # Counted before they are copied, since a message can hold millions.
    values = getattr(message, name)
    if len(values) > most:
        raise InvalidArgumentError(f"expected one value or one per {each}, got {len(values)}", field=name)
    return tuple(values)


class _Scalar:
    """A number or a bool whose default is proto3's: 0 or false."""

    others: tuple[str, ...] = ()
    """The fields that it has in addition to the one of the parameter's name."""

    def encode(self, message: Any, name: str, value: Any) -> None:  # noqa: ANN401 - any family's message and parameter
        setattr(message, name, value)

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        return getattr(message, name)


class _OptionalScalar(_Scalar):
    """A number or a bool with another default than proto3's, which the layer has if the field is unset."""

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        return getattr(message, name) if message.HasField(name) else ABSENT


class _Integers(_Scalar):
    """One integer or one per axis; an empty list leaves the parameter to the layer's default."""

    def encode(self, message: Any, name: str, value: Any) -> None:  # noqa: ANN401
        getattr(message, name).extend(per_axis(value, 1))

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        return _values(message, name) or ABSENT


class _RequiredIntegers(_Integers):
    """One integer or one per axis; the layer rejects an empty list."""

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        return _values(message, name)


class _Padding(_Integers):
    """A padding in cells, before and after each axis if that differs; or the rule that computes it."""

    others = ("padding_end", "auto_pad")

    def encode(self, message: Any, name: str, value: Any) -> None:  # noqa: ANN401
        if isinstance(value, str):
            message.auto_pad = AUTO_PAD_TO_WIRE[value]
        elif isinstance(value, tuple) and any(isinstance(each, tuple) for each in value):
            before, after = zip(*padded_sides(value, len(value)), strict=True)
            message.padding.extend(before)
            message.padding_end.extend(after)
        else:
            super().encode(message, name, value)

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        before, after = super().decode(message, name), _values(message, "padding_end")
        if message.auto_pad:
            if before is not ABSENT or after:
                msg = f"expected none together with auto_pad, got {before if before is not ABSENT else after}"
                raise InvalidArgumentError(msg, field=name if before is not ABSENT else "padding_end")
            if message.auto_pad not in AUTO_PAD_FROM_WIRE:
                msg = f"expected one of {', '.join(pool_pb2.AutoPad.keys()[1:])}, got {message.auto_pad}"
                raise InvalidArgumentError(msg, field="auto_pad")
            return AUTO_PAD_FROM_WIRE[message.auto_pad]
        if not after:
            return before
        sides = ((0,) if before is ABSENT else before, after)
        most = max(map(len, sides))
        if any(len(each) not in {1, most} for each in sides):
            msg = f"expected one value or {len(sides[0])}, as of padding, got {len(after)}"
            raise InvalidArgumentError(msg, field="padding_end")
        return tuple(zip(*(each * most if len(each) == 1 else each for each in sides), strict=True))


class _AdaptiveSizes(_Scalar):
    """One size or one per axis, each of which may be None."""

    def encode(self, message: Any, name: str, value: Any) -> None:  # noqa: ANN401
        for cells in per_axis(value, 1):
            getattr(message, name).add(cells=cells)

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        return tuple(each.cells if each.HasField("cells") else None for each in _values(message, name))


@dataclass(frozen=True)
class _Wrapped(_Scalar):
    """A list in a message of its own, since a oneof can't hold a list."""

    inner: str

    def encode(self, message: Any, name: str, value: Any) -> None:  # noqa: ANN401
        getattr(getattr(message, name), self.inner).extend(per_axis(value, 1))

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        return _values(getattr(message, name), self.inner) if message.HasField(name) else ABSENT


class _Reduce(_Scalar):
    """A reduction by its name, or by its message if it has parameters."""

    def encode(self, message: Any, name: str, value: Any) -> None:  # noqa: ANN401
        reduce = getattr(message, name)
        if isinstance(value, str):
            reduce.named = REDUCTION_TO_WIRE[value]
            return
        parameters = getattr(reduce, value.name)
        parameters.SetInParent()
        for each in fields(value):
            setattr(parameters, each.name, getattr(value, each.name))

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        reduce = getattr(message, name)
        chosen = reduce.WhichOneof("reduce")
        if chosen is None or chosen == "named":
            # The layer rejects None, and the number of a reduction that this version lacks.
            return REDUCTION_FROM_WIRE.get(reduce.named, reduce.named or None)
        parameters, cls = getattr(reduce, chosen), REDUCTIONS[chosen]
        given = (
            each.name
            for each in parameters.DESCRIPTOR.fields
            if not each.has_presence or parameters.HasField(each.name)
        )
        try:
            return cls(**{each: getattr(parameters, each) for each in given})
        except InvalidArgumentError as error:
            raise error.with_prefix(f"{name}.{chosen}") from None


class _Numbers(_Scalar):
    """One number or one per channel."""

    def encode(self, message: Any, name: str, value: Any) -> None:  # noqa: ANN401
        getattr(message, name).extend(per_axis(value, 1))

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        return _values(message, name, MAX_NORMALIZED_CHANNELS, f"channel, for at most {MAX_NORMALIZED_CHANNELS}")


class _Dtype(_Scalar):
    """A dtype by its name."""

    def encode(self, message: Any, name: str, value: Any) -> None:  # noqa: ANN401
        setattr(message, name, DTYPE_TO_WIRE[value])

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        number = getattr(message, name)
        # The layer rejects None, and the number of a dtype that this version lacks.
        return DTYPE_FROM_WIRE.get(number, number or None)


FIELD_CODECS: dict[str, Any] = {
    "kernel_size": _RequiredIntegers(),
    "stride": _Integers(),
    "padding": _Padding(),
    "max_unpool.padding": _Integers(),
    "dilation": _Integers(),
    "ceil_mode": _Scalar(),
    "return_indices": _Scalar(),
    "norm_type": _Scalar(),
    "seed": _Scalar(),
    "count_include_pad": _OptionalScalar(),
    "pool.count_include_pad": _Scalar(),
    "blur_pool.kernel_size": _OptionalScalar(),
    "blur_pool.stride": _OptionalScalar(),
    "divisor_override": _OptionalScalar(),
    "output_ratio": _Wrapped("ratios"),
    "reduce": _Reduce(),
    "dtype": _Dtype(),
    "scale": _Scalar(),
    "spatial_scale": _OptionalScalar(),
    "sampling_ratio": _Scalar(),
    "aligned": _Scalar(),
    "roi_pool.output_size": _RequiredIntegers(),
    "roi_align.output_size": _RequiredIntegers(),
    "mean": _Numbers(),
    "std": _Numbers(),
    "adaptive_max_pool.output_size": _AdaptiveSizes(),
    "adaptive_avg_pool.output_size": _AdaptiveSizes(),
    "fractional_max_pool.output_size": _Wrapped("cells"),
    "max_unpool.output_size": _Integers(),
}
"""The representation of each parameter, by its name, or by family and name if families differ."""


def _parameters(cls: type[Layer]) -> dict[str, Any]:
    names = (each.name for each in fields(cls))  # type: ignore[arg-type]  # every layer is a dataclass
    return {name: FIELD_CODECS.get(f"{cls.family}.{name}") or FIELD_CODECS[name] for name in names}


CLASSES: tuple[type[Layer], ...] = (*LAYERS.values(), *STEPS.values())
PARAMETER_CODECS = {cls: _parameters(cls) for cls in CLASSES}
FIELDS = {
    cls: {"spatial_dims", *codecs, *(other for codec in codecs.values() for other in codec.others)}
    for cls, codecs in PARAMETER_CODECS.items()
}
"""The fields that the message of a layer may have."""
BY_FAMILY: dict[str, dict[int, type[Layer]]] = {}
for _cls in CLASSES:
    BY_FAMILY.setdefault(_cls.family, {})[_cls.spatial_dims] = _cls


def encode_layer(layer: Layer) -> pool_pb2.Layer:
    """Return the message of a layer."""
    message = pool_pb2.Layer()
    family = getattr(message, layer.family)
    family.SetInParent()  # a step may have no parameter
    if layer.spatial_dims:
        family.spatial_dims = layer.spatial_dims
    for name, codec in PARAMETER_CODECS[type(layer)].items():
        value = getattr(layer, name)
        if value is not None:
            codec.encode(family, name, value)
    return message


def decode_layer(message: pool_pb2.Layer, path: str) -> Layer:
    """Return the layer of a message.

    Args:
        message: The message.
        path: Its path in the request, for errors.

    Raises:
        InvalidArgumentError: The layer is unknown, or a parameter is invalid.

    """
    name = message.WhichOneof("layer")
    if name is None or name not in BY_FAMILY:
        raise InvalidArgumentError("expected a layer, got none that this version has", field=path)
    family, by_dims = getattr(message, name), BY_FAMILY[name]
    path = f"{path}.{name}"
    cls = by_dims.get(getattr(family, "spatial_dims", 0))
    if cls is None:
        msg = f"expected one of {', '.join(map(str, by_dims))}, got {family.spatial_dims}"
        raise InvalidArgumentError(msg, field=f"{path}.spatial_dims")
    codecs = PARAMETER_CODECS[cls]
    for descriptor, _ in family.ListFields():
        if descriptor.name not in FIELDS[cls]:
            msg = f"expected no value, since {cls.__name__} lacks it, got {getattr(family, descriptor.name)}"
            raise InvalidArgumentError(msg, field=f"{path}.{descriptor.name}")
    try:
        values = {parameter: codec.decode(family, parameter) for parameter, codec in codecs.items()}
        return cls(**{parameter: value for parameter, value in values.items() if value is not ABSENT})
    except InvalidArgumentError as error:
        raise error.with_prefix(path) from None


def encode_branches(branches: Iterable[Chain], outputs: Sequence[Outputs] = ()) -> list[pool_pb2.Branch]:
    """Return the messages of branches.

    Args:
        branches: The branches.
        outputs: For each branch, the numbers of the layers whose outputs are returned. Empty: the last of each.

    Raises:
        InvalidArgumentError: There is no branch, or a branch has no layer.
        LimitExceededError: There are more than MAX_BRANCHES branches, or a chain has more than MAX_CHAIN layers.

    """
    chains = tuple(branches)
    _check_counts([len(chain) for chain in chains])
    return [
        pool_pb2.Branch(layers=map(encode_layer, chain), outputs=returned)
        for chain, returned in zip(chains, outputs or repeat(()), strict=False)
    ]


def decode_branches(messages: Sequence[pool_pb2.Branch]) -> tuple[Chain, ...]:
    """Return the chains of messages.

    Raises:
        InvalidArgumentError: There is no branch, or a branch has no layer or an invalid one.
        LimitExceededError: There are more than MAX_BRANCHES branches, or a chain has more than MAX_CHAIN layers.

    """
    _check_counts([len(branch.layers) for branch in messages])
    return tuple(
        tuple(decode_layer(layer, f"branches[{i}].layers[{j}]") for j, layer in enumerate(branch.layers))
        for i, branch in enumerate(messages)
    )


def decode_outputs(messages: Sequence[pool_pb2.Branch]) -> tuple[Outputs, ...]:
    """Return, for each branch, the numbers of the layers whose outputs are returned; empty if it is the last of each.

    Raises:
        LimitExceededError: A branch has more than MAX_CHAIN outputs.

    """
    for i, branch in enumerate(messages):
        # Counted before they are copied, since a message can hold millions.
        if branch.outputs:
            _check_count(f"branches[{i}].outputs", len(branch.outputs), MAX_CHAIN)
    outputs = tuple(tuple(branch.outputs) for branch in messages)
    return outputs if any(outputs) else ()


def _check_counts(layers: Sequence[int]) -> None:
    """Check the number of branches, and the number of layers of each."""
    _check_count("branches", len(layers), MAX_BRANCHES)
    for i, count in enumerate(layers):
        _check_count(f"branches[{i}].layers", count, MAX_CHAIN)


def _check_count(field: str, count: int, limit: int) -> None:
    if not count:
        raise InvalidArgumentError("expected at least one, got none", field=field)
    if count > limit:
        msg = f"{field}: expected at most {limit}, got {count}"
        raise LimitExceededError(msg, reason="TOO_MANY_LAYERS", metadata={"limit": str(limit), "actual": str(count)})
