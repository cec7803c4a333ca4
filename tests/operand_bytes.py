"""Operands for tests that run layers of every kind: a spec and valid bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from poolrpc.chains import Chain, operand_name, spatial_dims
from poolrpc.tensors import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from poolrpc.tensors import Layout


def operand_for(
    branches: Sequence[Chain], shape: tuple[int, ...], layout: Layout = "NCHW", *, optional: bool = False, seed: int = 0
) -> tuple[TensorSpec | None, bytes]:
    """Return the operand that branches take for an input, and its bytes.

    Args:
        branches: The branches.
        shape: The shape of the input.
        layout: Its layout.
        optional: Whether one is given to layers that may be without it.
        seed: Determines the values, and the number of boxes.

    """
    name = operand_name(branches, given=optional)
    dims = spatial_dims(branches)
    plane = shape[-dims:] if layout == "NCHW" else shape[-dims - 1 : -1]
    lead = shape[: len(shape) - dims - 1]
    images = lead[0] if lead else 1
    random = np.random.default_rng(seed)
    match name:
        case "indices":
            array = np.zeros(shape, np.int64)
        case "weights":
            array = (random.random((*lead, *plane)) > 0.25).astype(np.float32)
        case "offsets":  # of equal lengths, of others, and of none
            lengths = [32] * (plane[0] // 64) + [2] * (plane[0] // 8) + [0, 1, 5, 1, plane[0] // 8]
            array = np.minimum(np.cumsum([0, *(random.permutation(lengths) if seed else lengths)]), plane[0])
        case "boxes":
            count = (8 + seed % 3) * bool(images)
            corners = random.uniform(0, 1, (count, 4)) * np.array([plane[1], plane[0]] * 2)
            array = np.concatenate([random.integers(0, max(1, images), (count, 1)), corners], 1).astype(np.float32)
        case _:
            return None, b""
    return TensorSpec(array.dtype.name, array.shape, layout), array.tobytes()
