"""The attributes of ONNX's pooling nodes: which an operator set has, and their values, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from poolrpc._shapes.limits import MAX_PARAMETER
from poolrpc._shapes.parameters import choice, integer, real
from poolrpc._shapes.rules import clip
from poolrpc.errors import FieldViolation, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping

NEWEST_OPSET = 22
"""The last operator set that changed a pooling operator."""

_WINDOW = {"auto_pad": 1, "kernel_shape": 1, "pads": 1, "strides": 1}

ATTRIBUTES: dict[str, dict[str, int]] = {
    "MaxPool": {**_WINDOW, "storage_order": 8, "ceil_mode": 10, "dilations": 10},
    "AveragePool": {**_WINDOW, "count_include_pad": 7, "ceil_mode": 10, "dilations": 19},
    "LpPool": {**_WINDOW, "p": 1, "ceil_mode": 18, "dilations": 18},
    "GlobalMaxPool": {},
    "GlobalAveragePool": {},
    "GlobalLpPool": {"p": 1},
    "MaxUnpool": {"kernel_shape": 9, "pads": 9, "strides": 9},
    "MaxRoiPool": {"pooled_shape": 1, "spatial_scale": 1},
    "RoiAlign": {
        "coordinate_transformation_mode": 16,
        "mode": 10,
        "output_height": 10,
        "output_width": 10,
        "sampling_ratio": 10,
        "spatial_scale": 10,
    },
}
"""The first operator set of each attribute, by operator, as in onnx.defs."""

FIRST_OPSET = {"MaxUnpool": 9, "RoiAlign": 10}
"""The first operator set of the operators that the first one lacks."""

_VALUE_FIELDS = {1: "f", 2: "i", 3: "s", 6: "floats", 7: "ints"}
"""The field of an AttributeProto that has its value, by the number of its type."""

_ONNX_NAMES = {
    "kernel_size": "kernel_shape",
    "stride": "strides",
    "padding": "pads",
    "dilation": "dilations",
    "output_size": "output_shape",
}
"""The attributes that become a parameter of a layer under another name."""


class Attributes:
    """The values of a node's attributes.

    Args:
        op_type: The operator.
        values: The attributes that are given.
        opset: The operator set.

    Attributes:
        opset: The operator set.

    Raises:
        InvalidArgumentError: The operator set lacks the operator or one of the attributes.

    """

    def __init__(self, op_type: str, values: Mapping[str, Any], opset: int) -> None:
        first = FIRST_OPSET.get(op_type, 1)
        if opset < first:
            raise InvalidArgumentError(f"expected at least {first} for {op_type}, got {opset}", field="opset")
        known = [name for name, since in ATTRIBUTES[op_type].items() if since <= opset]
        for name in values:
            if name not in known:
                has = ", ".join(known) or "none"
                msg = f"expected an attribute of {op_type} in opset {opset} ({has}), got {clip(name)}"
                raise InvalidArgumentError(msg, field="attributes")
        self.opset = opset
        self._values = values

    def text(self, name: str, default: str, among: tuple[str, ...]) -> str:
        """Return an attribute that is one of several strings."""
        value = self._values.get(name, default)
        return choice(name, value.decode(errors="replace") if isinstance(value, bytes) else value, among)

    def flag(self, name: str) -> bool:
        """Return an attribute that is 0 or 1, by default 0."""
        return bool(self.integer(name, 0, 0, 1))

    def integer(self, name: str, default: int, low: int, high: int = MAX_PARAMETER) -> int:
        """Return an attribute that is an integer."""
        return integer(name, self._values.get(name, default), low, high)

    def number(self, name: str, default: float) -> float:
        """Return an attribute that is a number above 0."""
        return real(name, self._values.get(name, default))

    def integers(self, name: str, count: int, low: int, default: int | None = None) -> tuple[int, ...]:
        """Return an attribute that is a list of `count` integers; without a default it is required."""
        value = self._values.get(name)
        if value is None and default is not None:
            return (default,) * count
        values = self.items(name)
        if len(values) != count:
            raise InvalidArgumentError(f"expected {count} integers, got {clip(value)}", field=name)
        return tuple(integer(name, each, low, MAX_PARAMETER) for each in values)

    def items(self, name: str) -> tuple[Any, ...]:
        """Return the elements of an attribute that is a list."""
        value = self._values.get(name)
        if value is None or isinstance(value, str | bytes) or not hasattr(value, "__len__"):
            got = "none" if value is None else clip(value)
            raise InvalidArgumentError(f"expected a list of integers, got {got}", field=name)
        return tuple(value)


def attributes_of(node: Any) -> dict[str, Any]:  # noqa: ANN401 - a NodeProto, or what has its fields
    """Return the attributes of a NodeProto as a dict.

    Raises:
        InvalidArgumentError: An attribute has a type that no pooling operator has, or refers to an attribute of a
            function.

    """
    values = {}
    for each in node.attribute:
        if each.type not in _VALUE_FIELDS or bool(getattr(each, "ref_attr_name", "")):
            kind = "a reference to an attribute of a function" if each.type in _VALUE_FIELDS else f"type {each.type}"
            raise InvalidArgumentError(f"expected an integer, float, string or list, got {kind}", field=each.name)
        values[each.name] = getattr(each, _VALUE_FIELDS[each.type])
    return values


def with_names_of_onnx(error: InvalidArgumentError) -> InvalidArgumentError:
    """Return the error of a layer with ONNX's names of its parameters."""
    violations = [
        FieldViolation(_ONNX_NAMES.get(each.field, each.field), each.description) for each in error.violations
    ]
    return InvalidArgumentError(error.message, violations=violations)
