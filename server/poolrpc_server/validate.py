"""Every check on an untrusted call, in Python ints, before any tensor exists: what passes, torch runs.

The layers check their own parameters when they are made, which is before this; here come the checks that need the
tensor: dtype, shape and payload, then shapes step by step, then the limits on outputs, growth and work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from poolrpc.chains import Chain, branch_shapes, channels_first, spatial_dims, step_path
from poolrpc.errors import InvalidArgumentError, LimitExceededError, UnsupportedError
from poolrpc.limits import MAX_NUMEL
from poolrpc.shapes import check_shape, clip
from poolrpc.tensors import ITEM_BYTES, TensorSpec, split

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from poolrpc.chains import Shape
    from poolrpc.codec import Request
    from poolrpc.layers import Layer

FREE_OUTPUT_BYTES = 4 * 2**20
"""Outputs up to this size are not held to the growth limit: a small map may well become a larger one."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request is held to; each is an operator's setting.

    Attributes:
        output_bytes: Of a request's outputs, and of each step of a chain.
        output_growth: A request's output bytes over its input bytes.
        work: Cells that a request's layers visit: eager torch visits each window's, faster kernels fewer.

    """

    output_bytes: int
    output_growth: int
    work: int


@dataclass(frozen=True, slots=True)
class Checked:
    """A request that torch can run.

    Attributes:
        request: What was asked.
        spatial_dims: How many axes of its tensors are spatial.
        shapes: For each branch, the shape after every layer.
        input: The input's bytes.
        indices: The bytes of the indices, where there are any.
        output_bytes: Of all outputs and returned indices.

    """

    request: Request
    spatial_dims: int
    shapes: list[tuple[Shape, ...]]
    input: memoryview
    indices: memoryview | None
    output_bytes: int


def torchs_work(layer: Layer, spec: TensorSpec, spatial_dims: int) -> int:
    """Count the cells that torch visits for a layer on a tensor of that many spatial axes."""
    plane = channels_first(spec.shape, spatial_dims, spec.layout)[-spatial_dims:]
    return spec.numel // math.prod(plane) * layer.work(plane)


def check_request(
    request: Request, payload: bytes, limits: Limits, work: Callable[[Layer, TensorSpec, int], int] = torchs_work
) -> Checked:
    """Check a request.

    Args:
        request: The request.
        payload: The bytes of its tensors.
        limits: What it is held to.
        work: Counts the cells that are visited for a layer on a tensor of that many spatial axes.

    Raises:
        UnsupportedError: A layer lacks the input's dtype.
        InvalidArgumentError: A shape, the payload or a parameter is wrong.
        LimitExceededError: A limit is exceeded, for good.

    """
    _check_dtypes(request)
    shape = request.input.shape
    try:
        shapes = check_shapes(shape, request.branches, request.input.layout)
    except InvalidArgumentError as error:
        raise error.under("input") if error.violations[0].field == "shape" else error from None
    _check_indices_spec(request)
    views = split(payload, request.specs)
    output_bytes = _check_outputs(request, shapes, limits)
    dims = check_shape(shape, spatial_dims(request.branches))
    total = sum(
        work(layer, TensorSpec(request.input.dtype, before, request.input.layout), dims)
        for chain, steps in zip(request.branches, shapes, strict=True)
        for layer, before in zip(chain, (shape, *steps), strict=False)
    )
    _limit("WORK_BUDGET", "cells to visit, over all planes and layers", total, limits.work)
    return Checked(request, dims, shapes, views[0], views[1] if len(views) > 1 else None, output_bytes)


def check_shapes(shape: Shape, branches: Sequence[Chain], layout: str) -> list[tuple[Shape, ...]]:
    """Check a shape and give the shapes of each branch.

    Raises:
        InvalidArgumentError: The shape is wrong, or a layer can't pool it.
        LimitExceededError: The tensor has too many elements.

    """
    check_shape(shape, spatial_dims(branches))
    _limit("TENSOR_TOO_LARGE", f"elements of the input {clip(shape)}", math.prod(shape), MAX_NUMEL)
    return branch_shapes(shape, branches, layout)


def check_indices(indices: np.ndarray[tuple[int, ...], np.dtype[np.int64]], checked: Checked) -> None:
    """Check that MaxUnpool's indices lie in every output plane that they are for.

    Args:
        indices: The server's own copy, so that what is checked is what is used.
        checked: The request.

    Raises:
        InvalidArgumentError: An index is out of its plane.

    """
    if not indices.size:
        return
    low, high = int(indices.min()), int(indices.max())
    for chain, shapes in zip(checked.request.branches, checked.shapes, strict=True):
        if chain[0].takes_indices:
            dims = checked.spatial_dims
            cells = math.prod(channels_first(shapes[0], dims, checked.request.input.layout)[-dims:])
            if low < 0 or high >= cells:
                msg = f"expected indices in 0..{cells - 1}, the cells of an output plane, got {low}..{high}"
                raise InvalidArgumentError(msg, field="indices")


def _check_dtypes(request: Request) -> None:
    for i, chain in enumerate(request.branches):
        for j, layer in enumerate(chain):
            if request.input.dtype not in layer.dtypes:
                has = ", ".join(layer.dtypes)
                msg = f"{step_path(i, j, layer)}: {layer.name} takes {has}, got {request.input.dtype}"
                raise UnsupportedError(msg, reason="DTYPE", metadata={"layer": layer.name, "dtypes": has})


def _check_indices_spec(request: Request) -> None:
    taken = any(chain[0].takes_indices for chain in request.branches)
    spec = request.indices
    if spec is None:
        if taken:
            raise InvalidArgumentError(
                "expected the indices of a MaxPool beside a MaxUnpool, got none", field="indices"
            )
        return
    if not taken:
        raise InvalidArgumentError("expected no indices without a MaxUnpool, got some", field="indices")
    if spec.dtype != "int64":
        raise InvalidArgumentError(f"expected int64, got {spec.dtype}", field="indices.dtype")
    if (spec.shape, spec.layout) != (request.input.shape, request.input.layout):
        expected = f"{request.input.shape} in {request.input.layout}"
        msg = f"expected the input's {expected}, got {clip(spec.shape)} in {spec.layout}"
        raise InvalidArgumentError(msg, field="indices.shape")


def _check_outputs(request: Request, shapes: list[tuple[Shape, ...]], limits: Limits) -> int:
    item = ITEM_BYTES[request.input.dtype]
    total = 0
    for chain, steps in zip(request.branches, shapes, strict=True):
        for layer, shape in zip(chain, steps, strict=True):
            numel = math.prod(shape)
            last = numel * (item + (ITEM_BYTES["int64"] if layer.gives_indices else 0))
            _limit("OUTPUT_TOO_LARGE", f"bytes of {layer.name}'s output {clip(shape)}", last, limits.output_bytes)
            _limit("TENSOR_TOO_LARGE", f"elements of {layer.name}'s output {clip(shape)}", numel, MAX_NUMEL)
        total += last
    _limit("OUTPUT_TOO_LARGE", "bytes of all outputs", total, limits.output_bytes)
    most = max(FREE_OUTPUT_BYTES, limits.output_growth * request.input.nbytes)
    _limit("AMPLIFICATION", f"bytes of all outputs for {request.input.nbytes} bytes of input", total, most)
    return total


def _limit(reason: str, what: str, actual: int, most: int) -> None:
    if actual > most:
        msg = f"expected at most {most} {what}, got {actual}"
        raise LimitExceededError(msg, reason=reason, metadata={"limit": str(most), "actual": str(actual)})
