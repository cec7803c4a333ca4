"""Tensors as the wire has them: dtypes by name, a spec, and the way from anything array-like to bytes and back."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from poolrpc._shapes.rules import clip
from poolrpc.errors import InvalidArgumentError, PoolError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Bytes: TypeAlias = bytes | bytearray | memoryview
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

ITEM_BYTES: dict[str, int] = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}
"""Every dtype that has a name on the wire, and its bytes an element."""

ALIGNMENT = 64
"""Bytes, of the start of each tensor in memory that is shared or lent: a line of the cache. Pages gain nothing more."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What describes a tensor apart from its bytes.

    Attributes:
        dtype: One of ITEM_BYTES.
        shape: The length of each axis, in the order of `layout`.
        layout: "NCHW" or "NHWC".

    """

    dtype: str
    shape: tuple[int, ...]
    layout: str = "NCHW"

    @property
    def numel(self) -> int:
        """How many elements the tensor has; a Python int, which doesn't wrap as np.prod does."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor has."""
        return self.numel * ITEM_BYTES[self.dtype]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Give NumPy's dtype of that name; bfloat16's comes from ml_dtypes.

    Raises:
        UnsupportedError: bfloat16 without ml_dtypes installed.

    """
    if name != "bfloat16":
        return np.dtype(name).newbyteorder("<")
    try:
        import ml_dtypes  # noqa: PLC0415 - optional, and only bfloat16 needs it
    except ImportError:
        msg = "bfloat16 arrays need ml_dtypes: pip install 'poolrpc[bfloat16]'"
        raise UnsupportedError(msg, reason="DTYPE") from None
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def as_array(x: object) -> Array:
    """Give anything array-like as a C-contiguous, little-endian array, without a copy where it is one already.

    Args:
        x: A NumPy array (of any strides and byte order, read-only too), something with `__array__` or DLPack (a torch
            tensor), or a nested list of numbers.

    Raises:
        InvalidArgumentError: It is none of these.

    """
    if not isinstance(x, np.ndarray):
        is_torch = any(cls.__module__.partition(".")[0] == "torch" for cls in type(x).__mro__)
        try:
            x = _from_torch(x) if is_torch else _from_protocol(x)
        except (TypeError, RuntimeError, BufferError) as error:
            # UnsupportedError too is a TypeError.
            if isinstance(error, PoolError):
                raise
            reason = str(error).partition("\n")[0]
            raise InvalidArgumentError(f"expected what NumPy can hold, got {reason}", field="input") from None
    swapped = x.dtype.byteorder == ">" or (x.dtype.byteorder == "=" and sys.byteorder == "big")
    return np.asarray(x, dtype=x.dtype.newbyteorder("<") if swapped else None, order="C")


def _from_torch(x: Any) -> Array:  # noqa: ANN401 - a torch tensor, whose type the client can't name
    x = x.detach().cpu()
    if str(x.dtype) != "torch.bfloat16":
        return np.asarray(x)
    # NumPy has no bfloat16, so torch gives no array of it: its bits go over as integers.
    bits = np.asarray(x.view(sys.modules["torch"].int16))
    return bits.view(numpy_dtype("bfloat16"))


def _from_protocol(x: object) -> Array:
    if hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
        return np.from_dlpack(x)
    if hasattr(x, "__array__") or isinstance(x, list | tuple):
        try:
            return np.asarray(x)
        except ValueError as error:  # a ragged list
            raise InvalidArgumentError(str(error), field="input") from None
    msg = f"expected an array, a tensor or a nested list of numbers, got {clip(type(x).__name__)}"
    raise InvalidArgumentError(msg, field="input")


def spec_of(array: Array, layout: str = "NCHW") -> TensorSpec:
    """Describe an array.

    Raises:
        UnsupportedError: No layer takes its dtype.

    """
    return TensorSpec(dtype_name(array.dtype), array.shape, layout)


@lru_cache(256)
def dtype_name(dtype: np.dtype[Any]) -> str:
    """Give the name of a dtype on the wire.

    Raises:
        UnsupportedError: No layer takes it.

    """
    name = dtype.name
    if name not in ITEM_BYTES:
        msg = f"expected one of {', '.join(ITEM_BYTES)}, got {clip(name)}"
        raise UnsupportedError(msg, reason="DTYPE", metadata={"dtypes": ",".join(ITEM_BYTES)})
    return name


def raw(array: Array) -> memoryview:
    """Give the bytes of a C-contiguous array, without a copy."""
    # By way of uint8: the buffer protocol knows no bfloat16, and no view of an array without elements.
    return array.reshape(-1).view(np.uint8).data


def split(payload: Bytes, specs: Sequence[TensorSpec]) -> list[memoryview]:
    """Cut a payload into the bytes of its tensors, without a copy.

    Raises:
        InvalidArgumentError: There are more or fewer bytes than the specs say.

    """
    expected = sum(spec.nbytes for spec in specs)
    if len(payload) != expected:
        tensors = " and ".join(f"{spec.dtype} {clip(spec.shape)}" for spec in specs)
        msg = f"expected {expected} bytes for {tensors}, got {len(payload)}"
        raise InvalidArgumentError(msg, field="payload")
    view, ends = memoryview(payload), accumulate((spec.nbytes for spec in specs), initial=0)
    return [view[start:end] for start, end in pairwise(ends)]


def align(place: int) -> int:
    """Give the next multiple of ALIGNMENT."""
    return -(-place // ALIGNMENT) * ALIGNMENT


def spans(specs: Iterable[TensorSpec]) -> tuple[list[tuple[int, int]], int]:
    """Lay tensors out in one piece of memory, each at a multiple of ALIGNMENT; give where each is, and the end."""
    places, end = [], 0
    for spec in specs:
        start = align(end)
        end = start + spec.nbytes
        places.append((start, end))
    return places, end


@lru_cache(1)
def keep_freed_memory() -> None:
    """Have the C library keep some freed memory for the next allocation, once for the process.

    glibc gives freed pages back to the system from a threshold on, and asking for them anew takes longer than pooling
    what lies in them. The threshold is twice the largest block that was mapped on its own and freed (M_MMAP_THRESHOLD
    in mallopt(3)): so one of nearly the most, 32 MiB, is, without ever being touched.
    """
    np.empty(2**25 - 2**16, np.uint8)
