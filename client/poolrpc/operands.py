"""The operands of a call, as a client takes them: the second tensor that a layer may take, by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from poolrpc._shapes.limits import MAX_NUMEL
from poolrpc._shapes.rules import clip
from poolrpc.chains import operand_name
from poolrpc.errors import InvalidArgumentError
from poolrpc.tensors import Array, as_array

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from poolrpc.chains import Chain

BOX_AXES = 2


class Operand(TypedDict, total=False):
    """The operand of a call, by its name; a call has at most one.

    Attributes:
        indices: For MaxUnpool: the indices of the maxima, int64, of the input's shape.
        weights: For GlobalPool: a weight of at least 0 for each cell, such as a mask, of (N, spatial...), or of
            (spatial...) for an input of (C, spatial...). A cell of weight 0 isn't there.
        offsets: For SegmentPool: where each segment begins, and the last one ends, of (S + 1,).
        lengths: In place of offsets: the length of each segment, of (S,).
        ids: In place of offsets: the number of the segment of each cell, in ascending order, of (L,).
        boxes: For RoIPool and RoIAlign: the number of the image, x1, y1, x2 and y2 of each box, of (K, 5); or a list
            with the boxes of each image, of (K_n, 4).

    """

    indices: object
    weights: object
    offsets: object
    lengths: object
    ids: object
    boxes: object


MAX_SEGMENTS = 2**28
"""Largest number of segments: their offsets, in int64, have to fit a message."""


def operand_of(given: Mapping[str, object], chains: Sequence[Chain], cells: int | None = None) -> Array | None:
    """Return the operand among a call's keyword arguments as an array; None if there is none.

    Args:
        given: The keyword arguments. A value of None is none.
        chains: The branches of the call.
        cells: The cells of the input's last axis in the order of channels first. None: unknown.

    Raises:
        InvalidArgumentError: The layers do not take the operand, there are several, it is not an array of its kind, or
            it is of another number of cells.
        TypeError: A keyword is not the name of an operand.

    """
    named = given_operand(given)
    if named is None:
        return None
    name, value = named
    check_operand_name(name, chains)
    operand = _CONVERTERS[name](name, value)
    # The server sees offsets alone, and could not name what they were made of.
    if cells is not None and name in {"lengths", "ids"} and operand.size:
        last = int(operand[-1])
        if name == "ids" and last != cells:
            raise InvalidArgumentError(f"expected {cells} numbers, one for each cell, got {last}", field=name)
        if last > cells:
            raise InvalidArgumentError(f"expected at most {cells} cells in all, got {last}", field=name)
    return operand


def check_operand_name(name: str, chains: Sequence[Chain]) -> None:
    """Check that the layers take the operand of a keyword argument.

    Raises:
        InvalidArgumentError: They don't.

    """
    takes = operand_name(chains, given=True)
    if wire_name(name) != takes:
        layers = ", ".join(dict.fromkeys(chain[0].name for chain in chains))
        raise InvalidArgumentError(f"expected {takes or 'no operand'} for {layers}, got {name}", field=name)


def wire_name(name: str) -> str:
    """Return the name of the operand that a keyword argument becomes."""
    return "offsets" if name in {"lengths", "ids"} else name


def given_operand(given: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return the name and the value of the operand among keyword arguments; None if there is none.

    Raises:
        InvalidArgumentError: There are several.
        TypeError: A keyword is not the name of an operand.

    """
    unknown = [name for name in given if name not in _CONVERTERS]
    if unknown:
        raise TypeError(f"expected one of {', '.join(_CONVERTERS)}, got the keyword argument {unknown[0]!r}")
    named = [(name, value) for name, value in given.items() if value is not None]
    if len(named) > 1:
        names = " and ".join(name for name, _ in named)
        raise InvalidArgumentError(f"expected one operand, got {names}", field=named[1][0])
    return named[0] if named else None


def _array(name: str, value: object) -> Array:
    """Return an operand as an array, or raise an error that names it rather than the input."""
    try:
        return as_array(value)
    except InvalidArgumentError as error:
        description = "; ".join(each.description for each in error.violations)
        raise InvalidArgumentError(description, field=name) from None


def _indices(name: str, value: object) -> Array:
    array = _array(name, value)
    if array.dtype != np.int64:
        raise _wrong_dtype(name, "int64", array)
    return array


def _integers(name: str, value: object) -> Array:
    array = _array(name, [*value] if isinstance(value, range) else value)
    if not array.size and array.dtype.kind == "f":  # an empty list
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise _wrong_dtype(name, "integers", array)
    if array.ndim != 1:
        raise InvalidArgumentError(f"expected one axis, got shape {clip(array.shape)}", field=f"{name}.shape")
    if array.size and int(array.max()) > MAX_NUMEL:
        raise InvalidArgumentError(f"expected at most {MAX_NUMEL}, got {int(array.max())}", field=name)
    return array.astype(np.int64, copy=False)


def _offsets_of_lengths(name: str, value: object) -> Array:
    lengths = _integers(name, value)
    if lengths.size and int(lengths.min()) < 0:
        raise InvalidArgumentError(f"expected at least 0, got {int(lengths.min())}", field=name)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _offsets_of_ids(name: str, value: object) -> Array:
    ids = _integers(name, value)
    if ids.size and (int(ids[0]) < 0 or bool((ids[1:] < ids[:-1]).any())):
        at = 0 if int(ids[0]) < 0 else int((ids[1:] < ids[:-1]).argmax()) + 1
        msg = f"expected numbers from 0 on in ascending order, got {int(ids[at])} at position {at}"
        raise InvalidArgumentError(msg, field=name)
    segments = int(ids[-1]) + 1 if ids.size else 0
    if segments > MAX_SEGMENTS:
        raise InvalidArgumentError(f"expected numbers below {MAX_SEGMENTS}, got {segments - 1}", field=name)
    return np.searchsorted(ids, np.arange(segments + 1)).astype(np.int64)


def _weights(name: str, value: object) -> Array:
    array = _array(name, value)
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise _wrong_dtype(name, "numbers or bool", array)
    return np.asarray(array, np.float64 if array.dtype == np.float64 else np.float32)


def _boxes(name: str, value: object) -> Array:
    if isinstance(value, list | tuple) and any(_has_axes(each) for each in value):
        parts = [_array(name, each) for each in value]
        for part in parts:
            if part.ndim != BOX_AXES or part.shape[1] != 4:  # noqa: PLR2004 - x1, y1, x2, y2
                msg = f"expected (K, 5), or for each image (K, 4), got an array of {clip(part.shape)} in a list"
                raise InvalidArgumentError(msg, field=f"{name}.shape")
        numbers = [np.full((len(part), 1), number) for number, part in enumerate(parts)]
        value = np.concatenate([np.concatenate(pair, 1) for pair in zip(numbers, parts, strict=True)])
    array = _array(name, value)
    if array.dtype.kind not in "fiu":
        raise _wrong_dtype(name, "numbers", array)
    return np.asarray(array, np.float64 if array.dtype == np.float64 else np.float32)


def _has_axes(value: object) -> bool:
    return len(getattr(value, "shape", ())) == BOX_AXES


def _wrong_dtype(name: str, expected: str, array: Array) -> InvalidArgumentError:
    return InvalidArgumentError(f"expected {expected}, got {clip(array.dtype.name)[1:-1]}", field=f"{name}.dtype")


_CONVERTERS: dict[str, Callable[[str, Any], Array]] = {
    "indices": _indices,
    "weights": _weights,
    "offsets": _integers,
    "lengths": _offsets_of_lengths,
    "ids": _offsets_of_ids,
    "boxes": _boxes,
}
"""The function that converts each keyword argument."""
