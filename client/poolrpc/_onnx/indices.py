"""Indices as ONNX counts them, in the whole tensor, and as torch does, in each plane."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from poolrpc.errors import InvalidArgumentError

if TYPE_CHECKING:
    from poolrpc.tensors import Array


def in_tensor(indices: Array, shape: tuple[int, ...], storage_order: int) -> Array:
    """Return indices in the planes of a tensor as offsets in the whole tensor.

    Args:
        indices: The indices, (N, C, spatial...).
        shape: The shape of the tensor, (N, C, spatial...).
        storage_order: How the offsets count in a plane: 0 for row-major, 1 for column-major.

    Returns:
        The offsets, of the shape of the indices. As in onnxruntime, that of a window without a cell of the tensor,
        which a dilation can have, is -1.

    """
    plane = shape[2:]
    offsets = _first_cells(shape)
    if storage_order:
        rest = indices
        for axis in reversed(range(len(plane))):  # the first axis is the fastest one
            rest, position = np.divmod(rest, plane[axis])
            offsets = offsets + position * prod(plane[:axis])
    else:
        offsets = offsets + indices
    return np.where(indices < prod(plane), offsets, -1)


def in_planes(offsets: Array, shape: tuple[int, ...]) -> Array:
    """Return offsets in a whole tensor as indices in its planes.

    Args:
        offsets: The offsets, (N, C, spatial...), row-major.
        shape: The shape of the tensor, (N, C, spatial...).

    Raises:
        InvalidArgumentError: The offsets have another N or C, or one is not in its own plane.

    """
    if offsets.ndim != len(shape) or offsets.shape[:2] != shape[:2]:
        msg = f"expected {len(shape)} axes, the first of them {shape[:2]}, got {offsets.shape}"
        raise InvalidArgumentError(msg, field="indices")
    indices: Array = offsets - _first_cells(shape)
    outside = (indices < 0) | (indices >= prod(shape[2:]))
    if outside.any():
        n, c, *_ = at = tuple(map(int, np.argwhere(outside)[0]))
        first = (n * shape[1] + c) * prod(shape[2:])
        msg = f"expected offsets of plane ({n}, {c}), {first} to {first + prod(shape[2:]) - 1}, got {offsets[at]}"
        raise InvalidArgumentError(msg, field="indices")
    return indices


def _first_cells(shape: tuple[int, ...]) -> Array:
    """Return the offset of each plane of a tensor, with an axis of length 1 for every spatial axis."""
    offsets = np.arange(shape[0] * shape[1], dtype=np.int64) * prod(shape[2:])
    return offsets.reshape(*shape[:2], *(1 for _ in shape[2:]))
