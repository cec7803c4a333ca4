"""A request as planes: the request for a range of them, the layers and the planes they take, indices in range."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from poolrpc._wire.codec import Request
from poolrpc.chains import channels_first
from poolrpc.errors import InvalidArgumentError
from poolrpc.tensors import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from poolrpc._wire.codec import BranchResult
    from poolrpc.chains import Planes, Shape
    from poolrpc.layers import Layer


def block_of(request: Request, planes: Planes, count: int, first: int) -> Request:
    """Give the request for `count` planes from number `first` on."""
    spec = planes.part(count)
    channels = spec.shape[-1] if spec.layout == "NHWC" else 1
    branches = tuple(tuple(layer.at_plane(first * channels) for layer in chain) for chain in request.branches)
    indices = None if request.indices is None else TensorSpec("int64", spec.shape, spec.layout)
    return Request(spec, branches, indices)


def steps(
    request: Request, dims: int, results: Sequence[BranchResult]
) -> Iterator[Iterator[tuple[Layer, TensorSpec, Shape]]]:
    """Give each layer of each branch with the tensor that it takes, and that tensor's plane."""
    spec = request.input
    for chain, result in zip(request.branches, results, strict=True):
        shapes = (spec.shape, *result.shapes)
        yield (
            (layer, TensorSpec(spec.dtype, shape, spec.layout), channels_first(shape, dims, spec.layout)[-dims:])
            for layer, shape in zip(chain, shapes, strict=False)
        )


def check_indices(
    indices: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    request: Request,
    dims: int,
    results: Sequence[BranchResult],
) -> None:
    """Check that MaxUnpool's indices lie in every output plane that they are for.

    Args:
        indices: The server's own copy, so that what is checked is what is used.
        request: The request.
        dims: Its spatial axes.
        results: What comes of it.

    Raises:
        InvalidArgumentError: An index is out of its plane.

    """
    if not indices.size:
        return
    low, high = int(indices.min()), int(indices.max())
    for chain, result in zip(request.branches, results, strict=True):
        if chain[0].takes_indices:
            cells = math.prod(channels_first(result.shapes[0], dims, request.input.layout)[-dims:])
            if low < 0 or high >= cells:
                msg = f"expected indices in 0..{cells - 1}, the cells of an output plane, got {low}..{high}"
                raise InvalidArgumentError(msg, field="indices")
