"""Tensors in JSON: nested lists of numbers, or base64 with a shape and a dtype."""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc._shapes.limits import MAX_RANK
from poolrpc._shapes.rules import clip
from poolrpc.errors import InvalidArgumentError, LimitExceededError
from poolrpc.layers import FLOATS
from poolrpc.tensors import ITEM_BYTES, TensorSpec, numpy_dtype

if TYPE_CHECKING:
    from poolrpc.tensors import Bytes

MAX_LISTED = 2**16
"""Maximum number of elements of an answer's lists: to write a million of them takes the interpreter for a second."""

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""The numbers that JSON does not have, as strings."""

LIST_VALUE_BYTES = 96
"""Memory of an element while it is written as text: as a number, in a list, and its digits."""

BASE64_COPIES = 3
"""Memory of a tensor while it is written as base64, as a multiple of its bytes."""


@dataclass(frozen=True, slots=True)
class JsonTensor:
    """A tensor of a request.

    Attributes:
        dtype: Name of the dtype.
        shape: The shape.
        data: The elements as little-endian bytes.

    """

    dtype: str
    shape: tuple[int, ...]
    data: Bytes


def read_tensor(value: object, dtype: str, field: str) -> JsonTensor:
    """Return a tensor of a request.

    Args:
        value: A nested list of numbers, or an object with data (base64), shape and dtype.
        dtype: The dtype of a list.
        field: The request's field, for errors.

    Raises:
        InvalidArgumentError: It is neither, or its parts do not fit each other.

    """
    if isinstance(value, dict):
        return _read_base64(value, field)
    if not isinstance(value, list):
        msg = f"expected a nested list of numbers, or an object with data, shape and dtype, got {clip(value)}"
        raise InvalidArgumentError(msg, field=field)
    check_dtype(dtype, "dtype")
    if dtype == "bfloat16":
        msg = "expected an object with data, shape and dtype for bfloat16, which Python's numbers lack, got a list"
        raise InvalidArgumentError(msg, field=field)
    values, shape = _flattened(value, field)
    kinds = set(map(type, values))
    if str in kinds and dtype in FLOATS:
        values = [NON_FINITE.get(each, each) if isinstance(each, str) else each for each in values]
        kinds = set(map(type, values))
    allowed = {bool} if dtype == "bool" else {int, float} if dtype in FLOATS else {int}
    if kinds - allowed:
        expected = "true or false" if dtype == "bool" else "numbers" if dtype in FLOATS else "integers"
        received = next(each for each in values if type(each) not in allowed)
        raise InvalidArgumentError(f"expected {expected} for {dtype}, got {clip(received)}", field=field)
    if kinds == {int} and dtype not in FLOATS:  # NumPy wraps them before its version 2
        limits = np.iinfo(dtype)
        if min(values) < limits.min or max(values) > limits.max:
            raise _out_of_range(values, dtype, field)
    try:
        with np.errstate(over="ignore"):  # a number beyond the dtype's range is infinite, as in NumPy
            array = np.array(values, numpy_dtype(dtype))
    except OverflowError:
        raise _out_of_range(values, dtype, field) from None
    return JsonTensor(dtype, shape, array.tobytes())


def _out_of_range(values: list[Any], dtype: str, field: str) -> InvalidArgumentError:
    """Return the error of integers beyond the range of a dtype."""
    # Only of Python's integers: floats beyond the range of a dtype of floats are infinite.
    integers = [each for each in values if isinstance(each, int)]
    if dtype in FLOATS:
        msg = f"expected numbers within the range of float64, got {clip(max(integers, key=abs))}"
    else:
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        received = next(each for each in integers if not low <= each <= high)
        msg = f"expected {low} to {high} for {dtype}, got {clip(received)}"
    return InvalidArgumentError(msg, field=field)


def _flattened(value: list[Any], field: str) -> tuple[list[Any], tuple[int, ...]]:
    """Return the elements of a nested list, and its shape."""
    level: list[Any] = [value]
    shape: list[int] = []
    while level and isinstance(level[0], list):
        size = len(level[0])
        for each in level:
            if type(each) is not list or len(each) != size:
                got = f"a list of {len(each)}" if isinstance(each, list) else clip(each)
                msg = f"expected lists of equal lengths: {size} at depth {len(shape) + 1}, got {got}"
                raise InvalidArgumentError(msg, field=field)
        shape.append(size)
        if len(shape) > MAX_RANK:
            raise InvalidArgumentError(f"expected lists of at most {MAX_RANK} levels, got more", field=field)
        level = list(chain.from_iterable(level))
    if list in set(map(type, level)):
        msg = f"expected lists of equal depths, got a number next to a list at depth {len(shape) + 1}"
        raise InvalidArgumentError(msg, field=field)
    return level, tuple(shape)


def check_dtype(dtype: object, field: str) -> str:
    """Return a dtype's name.

    Raises:
        InvalidArgumentError: There is no such dtype.

    """
    if isinstance(dtype, str) and dtype in ITEM_BYTES:
        return dtype
    raise InvalidArgumentError(f"expected one of {', '.join(ITEM_BYTES)}, got {clip(dtype)}", field=field)


def _read_base64(value: dict[str, Any], field: str) -> JsonTensor:
    if value.keys() != {"data", "shape", "dtype"}:
        msg = f"expected data, shape and dtype, got {clip(', '.join(value) or 'nothing')}"
        raise InvalidArgumentError(msg, field=field)
    dtype, shape = check_dtype(value["dtype"], f"{field}.dtype"), read_shape(value["shape"], f"{field}.shape")
    try:
        data = base64.b64decode(value["data"], validate=True) if isinstance(value["data"], str) else None
    except (binascii.Error, ValueError):
        data = None
    if data is None:
        raise InvalidArgumentError(f"expected base64, got {clip(value['data'])}", field=f"{field}.data")
    nbytes = TensorSpec(dtype, shape).nbytes
    if len(data) != nbytes:
        msg = f"expected {nbytes} bytes for {dtype} {clip(shape)}, got {len(data)}"
        raise InvalidArgumentError(msg, field=f"{field}.data")
    return JsonTensor(dtype, shape, data)


def read_shape(value: object, field: str) -> tuple[int, ...]:
    """Return a shape.

    Raises:
        InvalidArgumentError: It is not a list of at most MAX_RANK integers of 0 or more.

    """
    if not isinstance(value, list) or len(value) > MAX_RANK or any(type(each) is not int or each < 0 for each in value):
        msg = f"expected a list of at most {MAX_RANK} integers of 0 or more, got {clip(value)}"
        raise InvalidArgumentError(msg, field=field)
    return tuple(value)


def check_listed(specs: list[TensorSpec]) -> None:
    """Check that tensors can be written as lists.

    Raises:
        InvalidArgumentError: A dtype has no numbers in JSON.
        LimitExceededError: They have too many elements.

    """
    if any(each.dtype == "bfloat16" for each in specs):
        raise InvalidArgumentError("expected base64 for an output of bfloat16, got list", field="encoding")
    count = sum(each.numel for each in specs)
    if count > MAX_LISTED:
        msg = f"encoding: expected at most {MAX_LISTED} elements in lists, got {count}; base64 has no such limit"
        limits = {"limit": str(MAX_LISTED), "actual": str(count)}
        raise LimitExceededError(msg, reason="JSON_ELEMENTS", metadata=limits)


def written_bytes(specs: list[TensorSpec], encoding: str) -> int:
    """Return the memory that it takes to write tensors, in bytes."""
    if encoding == "base64":
        return BASE64_COPIES * sum(each.nbytes for each in specs)
    return LIST_VALUE_BYTES * sum(each.numel for each in specs)


def write_tensor(data: Bytes, dtype: str, shape: tuple[int, ...], encoding: str) -> Any:  # noqa: ANN401 - JSON
    """Return a tensor in one of the two forms, which `json` writes."""
    if encoding == "base64":
        return {"data": base64.b64encode(data).decode("ascii"), "shape": shape, "dtype": dtype}
    array = np.frombuffer(data, numpy_dtype(dtype))
    # float32 as text is the shortest that reads back as the same float32: 0.1, not 0.10000000149011612.
    values = list(map(float, array.astype(np.str_))) if dtype in {"float16", "float32"} else array.tolist()
    if dtype in FLOATS and not np.isfinite(array).all():
        values = [each if math.isfinite(each) else _non_finite(each) for each in values]
    return _nested(values, shape)


def _non_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _nested(values: list[Any], shape: tuple[int, ...]) -> Any:  # noqa: ANN401 - as deep as the shape
    for axis in range(len(shape) - 1, 0, -1):
        size, count = shape[axis], math.prod(shape[:axis])
        values = [values[i * size : (i + 1) * size] for i in range(count)]
    return values if shape else values[0]
