"""Layers and branches to and from their messages.

A parameter has the same name in its layer's class and in its message, so a layer goes over field by field; KINDS says
how each lies in the message.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from poolrpc._shapes.limits import MAX_BRANCHES, MAX_CHAIN, MAX_RANK
from poolrpc._shapes.parameters import per_axis
from poolrpc.errors import InvalidArgumentError, LimitExceededError
from poolrpc.layers import LAYERS, Layer
from poolrpc.v1 import pool_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from poolrpc.chains import Chain

UNSET: Any = object()
"""What a kind decodes to where the message leaves the parameter to the layer's default."""


def _values(message: Any, name: str) -> tuple[Any, ...]:  # noqa: ANN401 - any family's message
    # Counted before they are copied: a message has room for millions.
    values = getattr(message, name)
    if len(values) > MAX_RANK:
        raise InvalidArgumentError(f"expected one value or one per axis, got {len(values)}", field=name)
    return tuple(values)


class _Plain:
    """A number or a bool, whose default is proto3's: 0 or false."""

    def encode(self, message: Any, name: str, value: Any) -> None:  # noqa: ANN401 - any family's message and parameter
        setattr(message, name, value)

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        return getattr(message, name)


class _Optional(_Plain):
    """A number or a bool whose default isn't proto3's: unset leaves it to the layer."""

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        return getattr(message, name) if message.HasField(name) else UNSET


class _Ints:
    """One integer or one an axis; empty leaves it to the layer."""

    def encode(self, message: Any, name: str, value: Any) -> None:  # noqa: ANN401
        getattr(message, name).extend(per_axis(value, 1))

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        return _values(message, name) or UNSET


class _RequiredInts(_Ints):
    """One integer or one an axis; empty is passed on, for the layer to refuse."""

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        return _values(message, name)


class _AdaptiveSizes:
    """One size or one an axis, each of which may be None."""

    def encode(self, message: Any, name: str, value: Any) -> None:  # noqa: ANN401
        for cells in per_axis(value, 1):
            getattr(message, name).add(cells=cells)

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        return tuple(each.cells if each.HasField("cells") else None for each in _values(message, name))


@dataclass(frozen=True)
class _Wrapped:
    """A list in a message of its own, as a oneof needs it."""

    inner: str

    def encode(self, message: Any, name: str, value: Any) -> None:  # noqa: ANN401
        getattr(getattr(message, name), self.inner).extend(per_axis(value, 1))

    def decode(self, message: Any, name: str) -> Any:  # noqa: ANN401
        return _values(getattr(message, name), self.inner) if message.HasField(name) else UNSET


KINDS: dict[str, Any] = {
    "kernel_size": _RequiredInts(),
    "stride": _Ints(),
    "padding": _Ints(),
    "dilation": _Ints(),
    "ceil_mode": _Plain(),
    "return_indices": _Plain(),
    "norm_type": _Plain(),
    "seed": _Plain(),
    "count_include_pad": _Optional(),
    "divisor_override": _Optional(),
    "output_ratio": _Wrapped("ratios"),
    "adaptive_max_pool.output_size": _AdaptiveSizes(),
    "adaptive_avg_pool.output_size": _AdaptiveSizes(),
    "fractional_max_pool.output_size": _Wrapped("cells"),
    "max_unpool.output_size": _Ints(),
}
"""The kind of each parameter, by its name; by family and name where families differ."""


def _parameters(cls: type[Layer]) -> dict[str, Any]:
    names = (each.name for each in fields(cls))  # type: ignore[arg-type]  # every layer is a dataclass
    return {name: KINDS.get(f"{cls.family}.{name}") or KINDS[name] for name in names}


PARAMETERS = {cls: _parameters(cls) for cls in LAYERS.values()}
BY_FAMILY: dict[str, dict[int | None, type[Layer]]] = {}
for _cls in LAYERS.values():
    BY_FAMILY.setdefault(_cls.family, {})[_cls.spatial_dims] = _cls


def encode_layer(layer: Layer) -> pool_pb2.Layer:
    """Give a layer's message."""
    message = pool_pb2.Layer()
    family = getattr(message, layer.family)
    family.SetInParent()
    if layer.spatial_dims is not None:
        family.spatial_dims = layer.spatial_dims
    for name, kind in PARAMETERS[type(layer)].items():
        value = getattr(layer, name)
        if value is not None:
            kind.encode(family, name, value)
    return message


def decode_layer(message: pool_pb2.Layer, path: str) -> Layer:
    """Give the layer of a message.

    Args:
        message: The message.
        path: Where it lies in its request, for the errors.

    Raises:
        InvalidArgumentError: It is no layer that there is, or a parameter is out of its range.

    """
    name = message.WhichOneof("layer")
    if name is None:
        raise InvalidArgumentError("expected a layer, got none that this version knows", field=path)
    family, by_dims = getattr(message, name), BY_FAMILY[name]
    path = f"{path}.{name}"
    cls = by_dims.get(None) or by_dims.get(family.spatial_dims)
    if cls is None:
        msg = f"expected one of {', '.join(map(str, by_dims))}, got {family.spatial_dims}"
        raise InvalidArgumentError(msg, field=f"{path}.spatial_dims")
    kinds = PARAMETERS[cls]
    for descriptor, _ in family.ListFields():
        if descriptor.name not in kinds and descriptor.name != "spatial_dims":
            msg = f"expected it unset, as {cls.__name__} has no such parameter, got {getattr(family, descriptor.name)}"
            raise InvalidArgumentError(msg, field=f"{path}.{descriptor.name}")
    try:
        values = {parameter: kind.decode(family, parameter) for parameter, kind in kinds.items()}
        return cls(**{parameter: value for parameter, value in values.items() if value is not UNSET})
    except InvalidArgumentError as error:
        raise error.with_prefix(path) from None


def encode_branches(branches: Iterable[Chain]) -> list[pool_pb2.Branch]:
    """Give the messages of branches."""
    return [pool_pb2.Branch(layers=map(encode_layer, chain)) for chain in branches]


def decode_branches(messages: Sequence[pool_pb2.Branch]) -> tuple[Chain, ...]:
    """Give the chains of messages.

    Raises:
        InvalidArgumentError: There are none, or a layer is wrong.
        LimitExceededError: There are more than MAX_BRANCHES, or a chain has more than MAX_CHAIN layers.

    """
    _check_count("branches", len(messages), MAX_BRANCHES)
    for i, branch in enumerate(messages):
        _check_count(f"branches[{i}].layers", len(branch.layers), MAX_CHAIN)
    return tuple(
        tuple(decode_layer(layer, f"branches[{i}].layers[{j}]") for j, layer in enumerate(branch.layers))
        for i, branch in enumerate(messages)
    )


def _check_count(field: str, count: int, most: int) -> None:
    if not count:
        raise InvalidArgumentError("expected at least one, got none", field=field)
    if count > most:
        msg = f"{field}: expected at most {most}, got {count}"
        raise LimitExceededError(msg, reason="TOO_MANY_LAYERS", metadata={"limit": str(most), "actual": str(count)})
