"""Every check on an untrusted call, in Python ints, before any tensor exists: what passes, torch runs.

The layers check their own parameters when they are made, which is before this; here come the checks that need the
tensor: dtype, shape and payload, then shapes step by step, then the limits on outputs, growth and work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poolrpc._shapes.limits import MAX_NUMEL
from poolrpc._shapes.rules import check_shape, clip
from poolrpc._wire.codec import Request, payload_specs
from poolrpc.chains import Chain, Planes, branch_shapes, layer_path, spatial_dims
from poolrpc.errors import InvalidArgumentError, LimitExceededError, UnsupportedError
from poolrpc.tensors import ITEM_BYTES, TensorSpec
from poolrpc_server.compute.planes import block_of, steps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc._wire.codec import BranchResult
    from poolrpc.chains import Shape

FREE_OUTPUT_BYTES = 4 * 2**20
"""Outputs up to this size are not held to the growth limit: a small map may well become a larger one."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request is held to; each is an operator's setting.

    Attributes:
        input_bytes: Of one plane of a tensor that comes in blocks, of what lies in a client's memory, and of an answer
            in one message; gRPC bounds what comes in one.
        output_bytes: Of a request's outputs, and of each step of a chain.
        output_growth: A request's output bytes over its input bytes.
        work: Cells that a request's layers visit: eager torch visits each window's, faster kernels fewer.

    """

    input_bytes: int
    output_bytes: int
    output_growth: int
    work: int


@dataclass(frozen=True, slots=True)
class Checked:
    """A request that torch can run.

    Attributes:
        request: What was asked.
        spatial_dims: How many axes of its tensors are spatial.
        results: What comes of each branch.
        output_bytes: Of all outputs and returned indices.
        schedule: How it is computed.

    """

    request: Request
    spatial_dims: int
    results: tuple[BranchResult, ...]
    output_bytes: int
    schedule: Any

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors of the answer's payload, in order."""
        return payload_specs(self.results)


@dataclass(frozen=True, slots=True)
class TorchsWork:
    """What torch would do for a request, cell by cell; an engine's schedule says what it does itself."""

    request: Request
    spatial_dims: int
    results: tuple[BranchResult, ...]

    @property
    def work(self) -> int:
        """The cells that are visited."""
        return sum(
            spec.numel // math.prod(plane) * layer.work(plane)
            for chain in steps(self.request, self.spatial_dims, self.results)
            for layer, spec, plane in chain
        )


def check_request(
    request: Request, limits: Limits, schedule: Callable[[Request, int, tuple[BranchResult, ...]], Any] = TorchsWork
) -> Checked:
    """Check a request; whether its payload is of the right length, and its indices in range, is seen when it is run.

    Args:
        request: The request.
        limits: What it is held to.
        schedule: Says, for a request, its spatial axes and its results, how it is computed: its `work` is the cells
            that are visited.

    Raises:
        UnsupportedError: A layer lacks the input's dtype.
        InvalidArgumentError: A shape or a parameter is wrong.
        LimitExceededError: A limit is exceeded, for good.

    """
    _check_dtypes(request)
    shape = request.input.shape
    results = request.results()
    shapes = [each.shapes for each in results]
    _check_numel(shape)
    _check_indices_spec(request)
    output_bytes = _check_outputs(request, shapes, limits)
    dims = check_shape(shape, spatial_dims(request.branches))
    scheduled = schedule(request, dims, results)
    _limit("WORK_BUDGET", "cells to visit, over all planes and layers", scheduled.work, limits.work)
    return Checked(request, dims, results, output_bytes, scheduled)


def check_stream(
    request: Request, limits: Limits, schedule: Callable[[Request, int, tuple[BranchResult, ...]], Any] = TorchsWork
) -> tuple[Planes, tuple[BranchResult, ...]]:
    """Check a request whose tensor comes in blocks of planes, and give its planes and what comes of it.

    The tensor may be of any size; every limit holds for a block, and so for one plane.

    Raises:
        UnsupportedError: A layer lacks the input's dtype.
        InvalidArgumentError: A shape or a parameter is wrong.
        LimitExceededError: One plane exceeds a limit, for good.

    """
    _check_dtypes(request)
    spec = request.input
    results = request.results()
    _check_indices_spec(request)
    planes = Planes(spec, check_shape(spec.shape, spatial_dims(request.branches)))
    _limit("TENSOR_TOO_LARGE", "bytes of one plane", planes.plane_bytes, limits.input_bytes)
    check_request(block_of(request, planes, 1, 0), limits, schedule)
    return planes, results


def check_payload(nbytes: int, limits: Limits) -> None:
    """Check the size of a payload that didn't come in a message.

    Raises:
        LimitExceededError: It is too large.

    """
    _limit("TENSOR_TOO_LARGE", "bytes of input", nbytes, limits.input_bytes)


def check_message(nbytes: int, limits: Limits, what: str) -> None:
    """Check the size of a message that isn't there yet, a "request" or an "answer": gRPC would find out when it is.

    Raises:
        LimitExceededError: It is larger than a message may be.

    """
    _limit("MESSAGE_TOO_LARGE", f"bytes of {what} in a message (--max-message-bytes)", nbytes, limits.input_bytes)


def check_shapes(shape: Shape, branches: Sequence[Chain], layout: str) -> list[tuple[Shape, ...]]:
    """Check a shape and give the shapes of each branch.

    Raises:
        InvalidArgumentError: The shape is wrong, or a layer can't pool it.
        LimitExceededError: The tensor has too many elements.

    """
    shapes = branch_shapes(shape, branches, layout)
    _check_numel(shape)
    return shapes


def _check_numel(shape: Shape) -> None:
    _limit("TENSOR_TOO_LARGE", f"elements of the input {clip(shape)}", math.prod(shape), MAX_NUMEL)


def _check_dtypes(request: Request) -> None:
    for i, chain in enumerate(request.branches):
        for j, layer in enumerate(chain):
            if request.input.dtype not in layer.dtypes:
                has = ", ".join(layer.dtypes)
                msg = f"{layer_path(i, j, layer)}: {layer.name} takes {has}, got {request.input.dtype}"
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
    for chain, chain_shapes in zip(request.branches, shapes, strict=True):
        for layer, shape in zip(chain, chain_shapes, strict=True):
            numel = math.prod(shape)
            last = numel * (item + (ITEM_BYTES["int64"] if layer.returns_indices else 0))
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
