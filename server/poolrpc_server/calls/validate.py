"""Validation of untrusted requests, in Python integers, before any tensor exists.

A request that passes can be run by torch. Layers validate their own parameters when they are constructed, which happens
earlier. This module checks what depends on the tensor: its dtype and shape, the shape after each layer, and the limits
on outputs, growth and work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poolrpc._shapes.limits import MAX_NUMEL
from poolrpc._shapes.rules import check_shape, clip
from poolrpc._wire.codec import Request, payload_specs
from poolrpc.chains import Chain, Planes, branch_shapes, spatial_dims
from poolrpc.errors import LimitExceededError, UnsupportedError
from poolrpc.tensors import ITEM_BYTES, Layout, TensorSpec
from poolrpc_server.compute.planes import block_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc._wire.codec import BranchResult
    from poolrpc.chains import Outputs, Shape

FREE_OUTPUT_BYTES = 4 * 2**20
"""Total size up to which outputs are exempt from the growth limit, in bytes: small inputs often grow a lot."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on one request, as the operator configured them.

    Attributes:
        input_bytes: Maximum size of a message, of an input in a client's shared memory, and of one plane of a streamed
            tensor, in bytes.
        output_bytes: Maximum size of all outputs of a request, and of the output of each layer of a chain, in bytes.
        output_growth: Maximum ratio of a request's output bytes to its input bytes.
        work: Maximum work of a request: the number of cells that the kernels of its layers visit, each weighted by
            what it costs compared with a cell of an ordinary max pooling, which takes a thread about a nanosecond.

    """

    input_bytes: int
    output_bytes: int
    output_growth: int
    work: int


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request that passed validation.

    Attributes:
        request: The request.
        spatial_dims: Number of spatial axes of its tensors.
        results: Shapes and specs of the results of all branches.
        output_bytes: Size of all outputs and returned indices, in bytes.
        schedule: How the request is computed.

    """

    request: Request
    spatial_dims: int
    results: tuple[BranchResult, ...]
    output_bytes: int
    schedule: Any

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The specs of the response's tensors, in order."""
        return payload_specs(self.results)


def check_request(
    request: Request, limits: Limits, schedule: Callable[[Request, int, tuple[BranchResult, ...]], Any]
) -> CheckedRequest:
    """Validate a request; its payload's length and the numbers of its operand are checked when it runs.

    Args:
        request: The request.
        limits: The limits.
        schedule: Returns how to compute a request, given the request, its number of spatial axes and its results. The
            schedule's `work` is the number of cells that its kernels visit, weighted by their cost.

    Raises:
        UnsupportedError: A layer does not support the dtype that it gets.
        InvalidArgumentError: A shape is invalid, or does not fit a layer.
        LimitExceededError: A limit is exceeded.

    """
    shape = request.input.shape
    results = request.check()
    _check_numel(shape)
    output_bytes = _check_outputs(request, results, limits)
    dims = check_shape(shape, spatial_dims(request.branches))
    scheduled = schedule(request, dims, results)
    _check_limit(
        "WORK_BUDGET", "cells to visit, weighted by their cost, over all planes and layers", scheduled.work, limits.work
    )
    return CheckedRequest(request, dims, results, output_bytes, scheduled)


def check_stream(
    request: Request, limits: Limits, schedule: Callable[[Request, int, tuple[BranchResult, ...]], Any]
) -> tuple[Planes, tuple[BranchResult, ...]]:
    """Validate a request whose tensor is streamed in blocks of planes; return the planes and the results.

    The tensor may have any size. The limits apply to each block, and so to one plane.

    Raises:
        UnsupportedError: A layer does not support the dtype that it gets, or a stream.
        InvalidArgumentError: A shape is invalid, or does not fit a layer.
        LimitExceededError: One plane exceeds a limit.

    """
    spec = request.input
    results = request.check()
    if request.operand_name == "boxes":
        names = ", ".join(dict.fromkeys(chain[0].name for chain in request.branches))
        msg = f"a stream has layers that compute each plane by itself, got {names}; send the images in one message"
        raise UnsupportedError(msg, reason="STREAM")
    planes = Planes(spec, check_shape(spec.shape, spatial_dims(request.branches)))
    _check_limit("TENSOR_TOO_LARGE", "bytes of one plane", planes.plane_bytes, limits.input_bytes)
    check_request(block_of(request, planes, 1, 0), limits, schedule)
    return planes, results


def check_payload(nbytes: int, limits: Limits) -> None:
    """Check the size of a payload that is outside the message, in a client's shared memory.

    Raises:
        LimitExceededError: The payload is too large.

    """
    _check_limit("TENSOR_TOO_LARGE", "bytes of input", nbytes, limits.input_bytes)


def check_message(nbytes: int, limits: Limits, kind: str) -> None:
    """Check the announced size of a message, "request" or "answer", before the message exists.

    Raises:
        LimitExceededError: The message is too large.

    """
    _check_limit("MESSAGE_TOO_LARGE", f"bytes of {kind} in a message (--max-message-bytes)", nbytes, limits.input_bytes)


def check_shapes(
    shape: Shape,
    branches: Sequence[Chain],
    layout: Layout,
    outputs: Sequence[Outputs] = (),
    operand_shape: Shape | None = None,
) -> list[tuple[Shape, ...]]:
    """Check a shape and return the shapes after each layer of each branch, which returns these outputs.

    Raises:
        InvalidArgumentError: The shape is invalid, or does not fit a layer, or a branch has no such outputs.
        LimitExceededError: The tensor has too many elements, or there are too many outputs.

    """
    shapes = branch_shapes(shape, branches, layout, outputs, operand_shape)
    _check_numel(shape)
    return shapes


def _check_numel(shape: Shape) -> None:
    _check_limit("TENSOR_TOO_LARGE", f"elements of the input {clip(shape)}", math.prod(shape), MAX_NUMEL)


def _check_outputs(request: Request, results: Sequence[BranchResult], limits: Limits) -> int:
    total = sum(spec.nbytes for spec in payload_specs(results))
    for chain, returned in request.by_branch(results):
        for layer, dtype, shape in zip(chain, request.dtypes(chain)[1:], returned[-1].shapes, strict=True):
            numel, output = math.prod(shape), f"{layer.name}'s output {clip(shape)}"
            nbytes = numel * (ITEM_BYTES[dtype] + (ITEM_BYTES["int64"] if layer.returns_indices else 0))
            _check_limit("OUTPUT_TOO_LARGE", f"bytes of {output}", nbytes, limits.output_bytes)
            _check_limit("TENSOR_TOO_LARGE", f"elements of {output}", numel, MAX_NUMEL)
    _check_limit("OUTPUT_TOO_LARGE", "bytes of all outputs", total, limits.output_bytes)
    input_bytes = request.input.nbytes
    limit = max(FREE_OUTPUT_BYTES, limits.output_growth * input_bytes)
    _check_limit("AMPLIFICATION", f"bytes of all outputs for {input_bytes} bytes of input", total, limit)
    return total


def _check_limit(reason: str, description: str, actual: int, limit: int) -> None:
    if actual > limit:
        msg = f"expected at most {limit} {description}, got {actual}"
        raise LimitExceededError(msg, reason=reason, metadata={"limit": str(limit), "actual": str(actual)})
