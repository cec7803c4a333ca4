"""Tensors: dtypes by name, specs, conversion of array-like objects to arrays, and arrays to and from bytes."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from poolrpc._shapes.rules import clip
from poolrpc.errors import InvalidArgumentError, PoolError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Bytes: TypeAlias = bytes | bytearray | memoryview
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

Layout: TypeAlias = Literal["NCHW", "NHWC"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
"""Channels first, as in torch, and channels last, as in most images; for any number of spatial axes."""

ITEM_BYTES: dict[str, int] = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "uint8": 1,
    "uint16": 2,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}
"""Bytes per element of every dtype on the wire, by its name."""

BFLOAT16_BITS = np.dtype([("bfloat16", "<u2")])
"""The bits of bfloat16, as a dtype of NumPy alone, for tensors that only pass through NumPy."""

MAX_AXES = 64
"""NumPy's limit on axes, and so on the depth of a nested list."""

ALIGNMENT = 64
"""Alignment of each tensor in shared memory and in buffers, in bytes: a cache line. Whole pages are not faster."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The description of a tensor without its bytes.

    Attributes:
        dtype: A name in ITEM_BYTES.
        shape: The length of each axis, in the order of `layout`.
        layout: "NCHW" or "NHWC".

    """

    dtype: str
    shape: tuple[int, ...]
    layout: Layout = "NCHW"

    @property
    def numel(self) -> int:
        """Number of elements, as a Python int, which doesn't overflow as np.prod does."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.numel * ITEM_BYTES[self.dtype]


@lru_cache(32)
def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's little-endian dtype of that name; bfloat16 is that of ml_dtypes, or BFLOAT16_BITS without it."""
    if name != "bfloat16":
        return np.dtype(name).newbyteorder("<")
    try:
        import ml_dtypes  # noqa: PLC0415 - optional, and only bfloat16 needs it
    except ImportError:
        return BFLOAT16_BITS
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


PROTOCOLS = ("__array__", "__array_interface__")
"""The attributes by which numpy.asarray converts an object."""


def as_array(x: object, layout: Layout = "NHWC") -> Array:
    """Return an array-like object as a C-contiguous, little-endian array, without a copy if it already is one.

    Args:
        x: A NumPy array (of any strides and byte order, writable or not), an object with `__array__`,
            `__array_interface__` or DLPack such as a torch tensor, an image of Pillow, which becomes (H, W, C), or a
            nested list of numbers.
        layout: The layout that the array is to have, which must be "NHWC" for an image. Default: "NHWC".

    Raises:
        InvalidArgumentError: x is not one of these, a part of it is masked, it is a tensor whose gradient torch
            records, or an image that has a palette or another layout.
        UnsupportedError: x is a bfloat16 tensor and ml_dtypes is not installed.

    """
    if not isinstance(x, np.ndarray):
        is_torch = any(cls.__module__.partition(".")[0] == "torch" for cls in type(x).__mro__)
        try:
            x = _from_torch(x) if is_torch else _from_protocol(x, layout)
        except (TypeError, RuntimeError, BufferError) as error:
            # UnsupportedError is a TypeError too.
            if isinstance(error, PoolError):
                raise
            reason = str(error).partition("\n")[0]
            msg = f"expected a tensor that NumPy can represent, got {reason}"
            raise InvalidArgumentError(msg, field="input") from None
    elif isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        raise _masked()
    swapped = x.dtype.byteorder == ">" or (x.dtype.byteorder == "=" and sys.byteorder == "big")
    return np.asarray(x, dtype=x.dtype.newbyteorder("<") if swapped else None, order="C")


def _masked() -> InvalidArgumentError:
    msg = "expected an array without a mask, got a masked array; use its filled(value)"
    return InvalidArgumentError(msg, field="input")


def _from_torch(x: Any) -> Array:  # noqa: ANN401 - a torch tensor; the client doesn't import torch
    check_no_gradient(x)
    x = x.detach().cpu()
    if str(x.dtype) != "torch.bfloat16":
        return np.asarray(x)
    bfloat16 = numpy_dtype("bfloat16")
    if bfloat16 == BFLOAT16_BITS:
        msg = "expected ml_dtypes to be installed, for bfloat16: pip install 'poolrpc[bfloat16]'"
        raise UnsupportedError(msg, reason="DTYPE")
    # torch doesn't convert bfloat16 to NumPy, which lacks it, so the bits are converted as int16.
    return np.asarray(x.view(sys.modules["torch"].int16)).view(bfloat16)


def check_no_gradient(x: Any) -> None:  # noqa: ANN401 - a torch tensor
    """Check that torch does not record the gradient of a tensor, which a remote layer would lose.

    Raises:
        InvalidArgumentError: It does.

    """
    if x.requires_grad and sys.modules["torch"].is_grad_enabled():
        msg = "expected a tensor that needs no gradient, got one with requires_grad: a remote layer has none; use its "
        msg += "detach(), or torch.no_grad()"
        raise InvalidArgumentError(msg, field="input")


def _from_protocol(x: object, layout: Layout) -> Array:
    has_protocol = any(hasattr(x, each) for each in PROTOCOLS)
    if hasattr(x, "__dlpack__") and not has_protocol:
        return np.from_dlpack(x)
    if has_protocol or isinstance(x, list | tuple):
        if _has_mask(x):
            raise _masked()
        if _is_image(x):
            return _from_image(x, layout)
        if isinstance(x, list | tuple):
            x = [_from_image(each, layout) if _is_image(each) else each for each in x]
        try:
            return np.asarray(x)
        except ValueError as error:  # a ragged list
            raise InvalidArgumentError(str(error), field="input") from None
    msg = f"expected an array, a tensor or a nested list of numbers, got {clip(type(x).__name__)}"
    raise InvalidArgumentError(msg, field="input")


def _is_image(x: object) -> bool:
    return any((cls.__module__, cls.__name__) == ("PIL.Image", "Image") for cls in type(x).__mro__)


def _from_image(x: Any, layout: Layout) -> Array:  # noqa: ANN401 - an image of Pillow; the client doesn't import it
    """Return an image as an array of (H, W, C)."""
    if layout == "NCHW":
        msg = "expected NHWC for an image, whose channels are last, got NCHW"
        raise InvalidArgumentError(msg, field="layout")
    if x.mode in ("P", "PA"):
        msg = f"expected an image of values, got one of palette indices (mode {x.mode}); use its convert()"
        raise InvalidArgumentError(msg, field="input")
    array = np.asarray(x)
    return array[..., None] if array.ndim == 2 else array  # noqa: PLR2004 - an image of one channel


def _has_mask(x: object, depth: int = MAX_AXES) -> bool:
    """Return whether any part of a nested list is masked."""
    if isinstance(x, list | tuple):
        return depth > 0 and any(_has_mask(each, depth - 1) for each in x)
    return isinstance(x, np.ma.MaskedArray) and bool(np.ma.is_masked(x))


def spec_of(array: Array, layout: Layout = "NCHW") -> TensorSpec:
    """Return the spec of an array.

    Raises:
        UnsupportedError: The dtype is not one of ITEM_BYTES.

    """
    return TensorSpec(dtype_name(array.dtype), array.shape, layout)


@lru_cache(256)
def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the name of a dtype on the wire.

    Raises:
        UnsupportedError: The dtype is not one of ITEM_BYTES.

    """
    name = "bfloat16" if dtype == BFLOAT16_BITS else dtype.name
    if name not in ITEM_BYTES:
        names = [*ITEM_BYTES]
        msg = f"expected one of {', '.join(names)}, got {clip(name)}"
        raise UnsupportedError(msg, reason="DTYPE", metadata={"dtypes": ",".join(names)})
    return name


def array_bytes(array: Array) -> memoryview:
    """Return the bytes of a C-contiguous array, without a copy."""
    # Through uint8, since the buffer protocol has no bfloat16 and no views of empty arrays.
    return array.reshape(-1).view(np.uint8).data


def split_tensors(payload: Bytes, specs: Sequence[TensorSpec]) -> list[memoryview]:
    """Split a payload into the bytes of its tensors, without a copy.

    Raises:
        InvalidArgumentError: The payload is longer or shorter than the tensors.

    """
    expected = sum(spec.nbytes for spec in specs)
    if len(payload) != expected:
        tensors = " and ".join(f"{spec.dtype} {clip(spec.shape)}" for spec in specs)
        msg = f"expected {expected} bytes for {tensors}, got {len(payload)}"
        raise InvalidArgumentError(msg, field="payload")
    view = memoryview(payload)
    return [view[each.start : each.end] for each in tensor_ranges(specs)]


class TensorRange(NamedTuple):
    """Where a tensor is in a payload, and how NumPy reads it.

    Attributes:
        dtype: The dtype.
        shape: The shape.
        numel: The number of elements.
        start: The offset of the first byte.
        end: The offset after the last byte.

    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    numel: int
    start: int
    end: int


def tensor_ranges(specs: Iterable[TensorSpec], alignment: int = 1) -> tuple[TensorRange, ...]:
    """Return the ranges of tensors that are one after the other, each at a multiple of `alignment`."""
    ranges, end = [], 0
    for spec in specs:
        start = -(-end // alignment) * alignment
        end = start + spec.nbytes
        ranges.append(TensorRange(numpy_dtype(spec.dtype), spec.shape, spec.numel, start, end))
    return tuple(ranges)


def size_of(ranges: Sequence[TensorRange]) -> int:
    """Return the size of the memory that has tensors at these ranges, in bytes."""
    return ranges[-1].end if ranges else 0


def align(offset: int) -> int:
    """Return the offset rounded up to a multiple of ALIGNMENT."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


@lru_cache(1)
def keep_freed_memory() -> None:
    """Make the C library keep freed memory of up to 64 MiB for later allocations; takes effect once per process.

    glibc returns freed memory above a threshold to the system, and to allocate its pages again takes longer than to
    pool a tensor in them. The threshold is twice the size of the largest block that was mapped separately and freed
    (M_MMAP_THRESHOLD in mallopt(3)), so this maps and frees a block of nearly the maximum, 32 MiB, without touching it.
    """
    np.empty(2**25 - 2**16, np.uint8)
