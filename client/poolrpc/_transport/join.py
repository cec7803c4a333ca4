"""Joins: the outputs of several branches as one array, in the client."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np

from poolrpc._shapes.parameters import choice
from poolrpc._shapes.rules import clip
from poolrpc._transport.result import PoolResult
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers import FLOATS
from poolrpc.tensors import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from poolrpc._transport.request import PreparedRequest
    from poolrpc.tensors import Array

Join: TypeAlias = Literal["cat", "flatten", "mean", "sum"]
"""How outputs become one array."""

JOINS: tuple[Join, ...] = get_args(Join)


class Joined:
    """The join of a request's outputs, checked before the request is sent.

    Args:
        join: How to join them.
        prepared: The request.

    Raises:
        InvalidArgumentError: There is no such join, or the outputs do not fit each other.

    """

    def __init__(self, join: Join, prepared: PreparedRequest) -> None:
        self._join = choice("join", join, JOINS)
        spec, dims = prepared.request.input, prepared.spatial_dims
        batched = len(spec.shape) == dims + 2
        self._lead = spec.shape[:batched]
        self._channels = -1 if spec.layout == "NHWC" else int(batched)
        outputs = [each.output for each in prepared.results]
        if any(each.indices is not None for each in prepared.results):
            raise InvalidArgumentError("expected layers without return_indices, got some with it", field="join")
        if len(dtypes := sorted({each.dtype for each in outputs})) > 1:
            raise InvalidArgumentError(f"expected outputs of one dtype, got {', '.join(dtypes)}", field="join")
        if self._join == "mean" and outputs[0].dtype not in FLOATS:
            raise InvalidArgumentError(f"expected floats for a mean, got {outputs[0].dtype}", field="join")
        shapes = [each.shape for each in outputs]
        if self._join != "flatten" and len(set(shapes)) > 1:  # a branch has the channels of the input
            msg = f"expected outputs of one shape for {self._join!r}, got {clip(shapes)}; 'flatten' takes any"
            raise InvalidArgumentError(msg, field="join")

    def __call__(self, results: Sequence[PoolResult]) -> PoolResult:
        """Return the join of the results' outputs as one result, whose only shape is that of its output."""
        made = self._joined([each.output for each in results])
        return PoolResult(made, (made.shape,), None, results[0].transport)

    def _joined(self, outputs: list[Array]) -> Array:
        if self._join == "cat":
            return np.concatenate(outputs, self._channels)
        if self._join == "flatten":
            # Not -1 for the last axis, which would be any if there is no tensor.
            flat = [each.reshape(*self._lead, prod(each.shape[len(self._lead) :])) for each in outputs]
            return np.concatenate(flat, -1)
        dtype = outputs[0].dtype
        # Half precision is added in float32, and rounded once.
        wide = np.dtype(np.float32) if dtype.itemsize == ITEM_BYTES["float16"] and dtype.kind not in "iu" else dtype
        total = outputs[0].astype(wide)
        for each in outputs[1:]:
            total += each.astype(wide, copy=False)
        if self._join == "mean":
            total /= len(outputs)
        return total.astype(dtype, copy=False)
