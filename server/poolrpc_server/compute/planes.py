"""Requests in terms of planes: a block of planes, the steps of each branch, the range of indices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poolrpc._wire.codec import Request
from poolrpc.chains import to_channels_first
from poolrpc.errors import InvalidArgumentError
from poolrpc.tensors import TensorSpec
from poolrpc_server.compute.with_operand import WithOperand

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
    operand, name = request.operand, request.operand_name
    if operand is None:
        return Request(spec, branches, None, request.outputs, is_block=True)
    if name == "indices":
        return Request(
            spec, branches, TensorSpec(operand.dtype, spec.shape, spec.layout), request.outputs, is_block=True
        )
    if name == "offsets":
        return Request(spec, branches, operand, request.outputs, is_block=True)
    low, high, each = weight_rows(request, planes, first, count)
    rows = TensorSpec(operand.dtype, (high - low, *operand.shape[-planes.spatial_dims :]))
    return Request(spec, branches, rows, request.outputs, is_block=True, channels=each, start=first % each)


def weight_rows(request: Request, planes: Planes, first: int, count: int) -> tuple[int, int, int]:
    """Return the first row of the weights of some planes, the one after the last, and the number of planes of a row."""
    each = request.channels or (planes_of_image(request.input, planes.spatial_dims))
    return first // each, -(-(first + count) // each), each


def planes_of_image(spec: TensorSpec, dims: int) -> int:
    """Return the number of planes of an image: 1 if its channels are last, since they count as one plane."""
    return spec.shape[-dims - 1] if spec.layout == "NCHW" else 1


def images_of(spec: TensorSpec, dims: int) -> int:
    """Return the number of images of a tensor."""
    return spec.shape[0] if len(spec.shape) == dims + 2 else 1


def batch_of(request: Request, planes: Planes, count: int, boxes: int) -> Request:
    """Return the request for a batch of requests that have the layers and the plane size of one.

    Args:
        request: One of them.
        planes: The planes of its input.
        count: The number of planes of all of them.
        boxes: The number of boxes of all of them, if they have any.

    """
    if request.operand is None or request.operand_name != "boxes":
        return block_of(request, planes, count, 0)
    spec, dims = request.input, planes.spatial_dims
    images = count // planes_of_image(spec, dims)
    return Request(
        TensorSpec(spec.dtype, (images, *spec.shape[-dims - 1 :]), spec.layout),
        request.branches,
        TensorSpec(request.operand.dtype, (boxes, *request.operand.shape[1:])),
        request.outputs,
        is_block=True,
    )


def steps(
    request: Request, dims: int, results: Sequence[BranchResult]
) -> Iterator[Iterator[tuple[Layer | WithOperand, TensorSpec, Shape]]]:
    """Yield the resolved layers that each branch computes, with the spec and the planes' shape of each input tensor."""
    spec = request.input
    for chain, returned in request.by_branch(results):
        shapes = (spec.shape, *returned[-1].shapes)
        planes = [to_channels_first(shape, dims, spec.layout)[-dims:] for shape in shapes]
        layers = (_with_operand(chain[0], request, dims), *chain[1:])
        yield (
            (layer.resolved(plane), TensorSpec(dtype, shape, spec.layout), plane)
            for layer, dtype, shape, plane in zip(layers, request.dtypes(chain), shapes, planes, strict=False)
        )


def _with_operand(layer: Layer, request: Request, dims: int) -> Layer | WithOperand:
    """Return what computes the first layer of a branch: with the operand, if it has another shape than the input."""
    operand, name = request.operand, request.operand_name
    if operand is None or name == "indices" or layer.operand != name:
        return layer
    # Operators count the channels of an image as planes, wherever they are.
    last = request.input.layout == "NHWC"
    channels = request.input.shape[-1] if last else request.channels or request.input.shape[-dims - 1]
    if name == "weights":
        return WithOperand(layer, 0, channels, request.start)
    return WithOperand(layer, operand.shape[0] - (name == "offsets"), channels if name == "boxes" else 1)


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
