"""Requests in terms of planes: a block of planes, the steps of each branch, the range of indices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poolrpc._wire.codec import Request
from poolrpc.chains import to_channels_first
from poolrpc.errors import InvalidArgumentError
from poolrpc.tensors import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from poolrpc._wire.codec import BranchResult
    from poolrpc.chains import Planes, Shape
    from poolrpc.layers import Layer


def block_of(request: Request, planes: Planes, count: int, first: int) -> Request:
    """Return the request for `count` planes of a request, starting at plane `first`."""
    spec = planes.spec_for(count)
    channels = spec.shape[-1] if spec.layout == "NHWC" else 1
    branches = tuple(tuple(layer.at_plane(first * channels) for layer in chain) for chain in request.branches)
    operand = None if request.operand is None else TensorSpec(request.operand.dtype, spec.shape, spec.layout)
    return Request(spec, branches, operand, request.outputs, is_block=True)


def steps(
    request: Request, dims: int, results: Sequence[BranchResult]
) -> Iterator[Iterator[tuple[Layer, TensorSpec, Shape]]]:
    """Yield the resolved layers that each branch computes, with the spec and the planes' shape of each input tensor."""
    spec = request.input
    for chain, returned in request.by_branch(results):
        shapes = (spec.shape, *returned[-1].shapes)
        planes = [to_channels_first(shape, dims, spec.layout)[-dims:] for shape in shapes]
        yield (
            (layer.resolved(plane), TensorSpec(dtype, shape, spec.layout), plane)
            for layer, dtype, shape, plane in zip(chain, request.dtypes(chain), shapes, planes, strict=False)
        )


def check_indices(indices: np.ndarray[tuple[int, ...], np.dtype[np.int64]], cells: int) -> None:
    """Check that the indices for MaxUnpool are in the range of an output plane.

    Args:
        indices: The indices; the server's own copy, which no client can change after the check.
        cells: The number of cells of an output plane.

    Raises:
        InvalidArgumentError: An index is out of range.

    """
    if not indices.size:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= cells:
        msg = f"expected indices in 0..{cells - 1}, the cells of an output plane, got {low}..{high}"
        raise InvalidArgumentError(msg, field="indices")
