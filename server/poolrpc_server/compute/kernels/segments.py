"""Segments: the cells between offsets, reduced to one value each; segments of one length are reduced together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from poolrpc.layers.reductions import reduction_of
from poolrpc_server.compute.kernels.reduce import PlaneCells
from poolrpc_server.compute.kernels.weighted import operand_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc_server.compute.with_operand import WithOperand

REMEMBERED_SEGMENTS, SPANNED_CELLS, REMEMBERED = 4096, 2**16, 64
"""The most segments of offsets whose division is remembered, the most cells that they span, and how many are."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """The segments of one length.

    Attributes:
        length: The number of cells of each.
        segments: Their numbers, in order: a slice if they follow each other.
        cells: Their cells: a slice if the segments follow each other.

    """

    length: int
    segments: slice | torch.Tensor
    cells: slice | torch.Tensor

    def to(self, device: torch.device) -> Bucket:
        """Return the bucket on a device."""
        segments, cells = (each if isinstance(each, slice) else each.to(device) for each in (self.segments, self.cells))
        return Bucket(self.length, segments, cells)


def buckets_of(offsets: torch.Tensor) -> tuple[Bucket, ...]:
    """Return the segments between offsets, which are in ascending order, by their length; without empty ones."""
    numbers = offsets.numpy()
    if len(numbers) > REMEMBERED_SEGMENTS or numbers[-1] - numbers[0] > SPANNED_CELLS:
        return _divide(numbers)
    return _divide_again(numbers.tobytes())


@lru_cache(REMEMBERED)
def _divide_again(data: bytes) -> tuple[Bucket, ...]:
    return _divide(np.frombuffer(data, np.int64))


def _divide(offsets: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> tuple[Bucket, ...]:
    lengths = np.diff(offsets)
    order = np.argsort(lengths, kind="stable")
    ends = np.flatnonzero(np.diff(lengths[order])) + 1
    buckets = []
    for segments in np.split(order, ends):
        length = int(lengths[segments[0]])
        if not length:
            continue
        first, last = int(segments[0]), int(segments[-1])
        if last - first + 1 == len(segments):
            cells = slice(int(offsets[first]), int(offsets[last + 1]))
            buckets.append(Bucket(length, slice(first, last + 1), cells))
        else:
            gathered = torch.from_numpy((offsets[segments][:, None] + np.arange(length)).reshape(-1))
            buckets.append(Bucket(length, torch.from_numpy(segments), gathered))
    return tuple(buckets)


def bind_segments(layer: WithOperand, dtype: torch.dtype) -> Callable[[torch.Tensor, tuple[Bucket, ...]], torch.Tensor]:
    """Return the function that reduces the segments of planes, (N, C, L); it also takes the segments' buckets."""
    reduction, size = reduction_of(layer.layer.reduce), layer.size

    def run(x: torch.Tensor, buckets: tuple[Bucket, ...]) -> torch.Tensor:
        wide = operand_dtype(reduction, dtype, x.device.type)
        planes = x.reshape(-1, x.shape[-1])
        output = planes.new_full((len(planes), size), reduction.empty)
        for bucket in buckets:
            where = bucket.cells
            cells = planes[:, where] if isinstance(where, slice) else planes.index_select(1, where)
            cells = cells.view(len(planes), -1, bucket.length).to(wide)
            output[:, bucket.segments] = reduction.of(PlaneCells(cells)).to(dtype)
        return output.view(*x.shape[:-1], size)

    return run
