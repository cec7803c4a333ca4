"""Checks of layer parameters, which return a value in canonical form or raise "expected X, got Y"."""

from __future__ import annotations

import math
import operator
from typing import Any, TypeAlias

from poolrpc._shapes.limits import MAX_NORMALIZED_CHANNELS, MAX_PARAMETER
from poolrpc._shapes.rules import clip
from poolrpc.errors import InvalidArgumentError

Axes: TypeAlias = int | tuple[int, ...]
"""A parameter with one value for all spatial axes, or one for each axis."""
Padding: TypeAlias = int | tuple[int, ...] | tuple[tuple[int, int], ...] | str
"""Cells of padding on both sides of all axes, or of each; or before and after each axis; or the name of a rule."""
OptionalAxes: TypeAlias = int | tuple[int | None, ...]
"""A parameter like Axes, whose value may be None on any axis."""

AUTO_PADDINGS = ("same", "same_lower")
"""Paddings that are computed from the size of the input."""


def _unwrapped(value: Any) -> Any:  # noqa: ANN401 - the value of any parameter
    """Return the element of an array or a tensor without axes; anything else as it is."""
    return value.item() if hasattr(value, "__len__") and getattr(value, "shape", None) == () else value


def integer(name: str, value: object, low: int, high: int) -> int:
    """Return `value` as an int in low..high; bools and floats are rejected, as in torch."""
    value = _unwrapped(value)
    if type(value) is not int:
        kind = type(value).__name__
        try:
            # Arrays and tensors have __index__ too, and raise unless they are integer scalars.
            index = None if kind in ("bool", "bool_") else operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            index = None
        if index is None:
            msg = f"expected an integer, got {clip(value)} ({kind})"
            raise InvalidArgumentError(msg, field=name)
        value = index
    if not low <= value <= high:
        msg = f"expected {low} to {high}, got {clip(value)}"
        raise InvalidArgumentError(msg, field=name)
    return value


def boolean(name: str, value: object) -> bool:
    """Return `value` as a bool; everything but Python's and NumPy's bools is rejected."""
    value = _unwrapped(value)
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    msg = f"expected True or False, got {clip(value)}"
    raise InvalidArgumentError(msg, field=name)


def choice(name: str, value: object, among: tuple[str, ...]) -> str:
    """Return the string of `among` that `value` equals."""
    if isinstance(value, str) and value in among:
        return among[among.index(value)]
    msg = f"expected {' or '.join(map(repr, among))}, got {clip(value)}"
    raise InvalidArgumentError(msg, field=name)


def real(name: str, value: object) -> float:
    """Return `value` as a float above 0, which may be infinite; bools are rejected."""
    number = _number(name, value)
    if not number > 0:
        raise InvalidArgumentError(f"expected a number above 0, got {clip(value)}", field=name)
    return number


def _number(name: str, value: object) -> float:
    """Return `value` as a float, NaN if it is an integer beyond its range; bools are rejected."""
    value = _unwrapped(value)
    # A value with a length is a string, an array or another container.
    rejected = type(value).__name__ in ("bool", "bool_") or hasattr(value, "__len__")
    try:
        number = None if rejected else float(value)  # type: ignore[arg-type]  # TypeError is caught below
    except OverflowError:  # an integer beyond float's range
        number = math.nan
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise InvalidArgumentError(f"expected a number, got {clip(value)} ({type(value).__name__})", field=name)
    return number


def finite_number(name: str, value: object) -> float:
    """Return `value` as a finite float; bools are rejected."""
    number = _number(name, value)
    if not math.isfinite(number):
        raise InvalidArgumentError(f"expected a finite number, got {clip(value)}", field=name)
    return number


def finite_numbers(name: str, value: object) -> float | tuple[float, ...]:
    """Return a float, or a tuple of several, one per channel; all are finite."""
    value = _unwrapped(value)
    if hasattr(value, "__len__") and not isinstance(value, str | bytes | dict | set):
        values: tuple[Any, ...] = tuple(value)  # type: ignore[arg-type]  # a sequence or an array
        if not 1 <= len(values) <= MAX_NORMALIZED_CHANNELS:
            msg = f"expected 1 to {MAX_NORMALIZED_CHANNELS} numbers, got {len(values)}"
            raise InvalidArgumentError(msg, field=name)
    else:
        values = (value,)
    numbers = tuple(_number(name, each) for each in values)
    for number in numbers:
        if not math.isfinite(number):
            raise InvalidArgumentError(f"expected a finite number, got {clip(number)}", field=name)
    return numbers[0] if len(numbers) == 1 else numbers


def sequence(name: str, value: object, dims: int) -> tuple[Any, ...]:
    """Return a list, tuple or array as a tuple of 1 or `dims` values."""
    if isinstance(value, str | bytes | dict | set):
        msg = f"expected an integer or a tuple, got {clip(value)}"
        raise InvalidArgumentError(msg, field=name)
    try:
        values: tuple[Any, ...] = tuple(value)  # type: ignore[arg-type]  # TypeError is caught below
    except TypeError:
        msg = f"expected an integer or a tuple of {dims}, got {clip(value)} ({type(value).__name__})"
        raise InvalidArgumentError(msg, field=name) from None
    if len(values) not in (1, dims):
        msg = f"expected 1 value or {dims}, got {len(values)}: {clip(values)}"
        raise InvalidArgumentError(msg, field=name)
    return values


def axes(name: str, value: object, dims: int, *, low: int = 1, high: int = MAX_PARAMETER) -> Axes:
    """Return an int, or a tuple of one int per axis; equal ints become one, so that equal layers compare equal."""
    value = _unwrapped(value)
    if not hasattr(value, "__len__"):
        return integer(name, value, low, high)
    values = tuple(integer(name, each, low, high) for each in sequence(name, value, dims))
    return values[0] if len(set(values)) == 1 else values


def padding(name: str, value: object, dims: int) -> Padding:
    """Return the padding of windows: in cells, or "same" or "same_lower"; equal paddings become the same value."""
    value = _unwrapped(value)
    if isinstance(value, str):
        named = choice(name, value, (*AUTO_PADDINGS, "valid"))
        return 0 if named == "valid" else named
    if not hasattr(value, "__len__"):
        return integer(name, value, 0, MAX_PARAMETER)
    each = tuple(_sides(name, side) for side in sequence(name, value, dims))
    sides = each * dims if len(each) == 1 else each
    if any(before != after for before, after in sides):
        return sides
    before = tuple(side for side, _ in sides)
    return before[0] if len(set(before)) == 1 else before


def _sides(name: str, value: object) -> tuple[int, int]:
    """Return the padding before and after an axis."""
    value = _unwrapped(value)
    if not hasattr(value, "__len__"):
        cells = integer(name, value, 0, MAX_PARAMETER)
        return cells, cells
    pair = sequence(name, value, 2)
    if len(pair) != len(("before", "after")):
        raise InvalidArgumentError(f"expected a pair (before, after) for an axis, got {clip(pair)}", field=name)
    before, after = (integer(name, cells, 0, MAX_PARAMETER) for cells in pair)
    return before, after


def padded_sides(value: Padding, dims: int) -> tuple[tuple[int, int], ...]:
    """Return a padding in cells as (before, after) for each axis."""
    return tuple(each if isinstance(each, tuple) else (each, each) for each in per_axis(value, dims))


def optional_axes(name: str, value: object, dims: int, *, high: int) -> OptionalAxes:
    """Return the same as `axes` for a parameter whose values in a tuple may be None."""
    value = _unwrapped(value)
    if not hasattr(value, "__len__"):
        return integer(name, value, 1, high)
    values = tuple(None if each is None else integer(name, each, 1, high) for each in sequence(name, value, dims))
    if None in values:
        return values * dims if len(values) == 1 else values
    return values[0] if len(set(values)) == 1 else values  # type: ignore[return-value]  # no None is left


def ratios(name: str, value: object, dims: int) -> float | tuple[float, ...]:
    """Return a float in (0, 1), or a tuple of one per axis."""
    value = _unwrapped(value)
    values = sequence(name, value, dims) if hasattr(value, "__len__") else (value,)
    numbers = tuple(real(name, each) for each in values)
    for number in numbers:
        if not number < 1:
            msg = f"expected a ratio in (0, 1), got {clip(number)}"
            raise InvalidArgumentError(msg, field=name)
    return numbers[0] if len(set(numbers)) == 1 else numbers


def per_axis(value: Any, dims: int) -> tuple[Any, ...]:  # noqa: ANN401 - the value of any parameter
    """Return a parameter as a tuple of one value per axis."""
    return value if isinstance(value, tuple) else (value,) * dims
