"""The number of cells of each window, by which sums are divided."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from typing import TypeAlias

    from poolrpc_server.compute.kernels.windows import Sizes, Windows

    IntegerArray: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


CACHED_CELLS = 2**15
"""Cells of an output plane up to which its divisor is kept for later requests: 256 KiB each."""


def divisor(plane: Sizes, windows: Windows, result: Sizes, *, include_pad: bool) -> float | torch.Tensor:
    """Return what each sum is divided by: one number, or a float64 tensor of the output plane's shape.

    Args:
        plane: The shape of an input plane.
        windows: The windows over its axes.
        result: The shape of an output plane.
        include_pad: Whether the cells of the padding count, but not what ceil_mode adds to it.

    """
    compute = _cached_divisor if prod(result) <= CACHED_CELLS else _divisor
    return compute(plane, windows, result, include_pad=include_pad)


def _divisor(plane: Sizes, windows: Windows, result: Sizes, *, include_pad: bool) -> float | torch.Tensor:
    counts = axis_counts(plane, windows, result, include_pad=include_pad)
    if all(each.uniform() for each in counts):
        return float(prod(each.first() for each in counts))
    cells = torch.ones((), dtype=torch.float64)
    for each in counts:
        cells = cells.unsqueeze(-1) * torch.from_numpy(each.all()).double()
    return cells


_cached_divisor = lru_cache(maxsize=16)(_divisor)


@dataclass(frozen=True, slots=True)
class AxisCounts:
    """The number of cells of one axis that each window counts."""

    size: int
    kernel: int
    stride: int
    before: int
    after: int
    dilation: int
    length: int
    include_pad: bool

    def first(self) -> int:
        """Return the number of cells of the first window."""
        return int(self._at(np.zeros(1, np.int64))[0])

    def all(self) -> IntegerArray:
        """Return the number of cells of every window."""
        return self._at(np.arange(self.length))

    def _at(self, indices: IntegerArray) -> IntegerArray:
        start = indices * self.stride - self.before
        low, high = (-self.before, self.size + self.after) if self.include_pad else (0, self.size)
        # The first of its cells in the range, and the one after the last.
        first, last = (np.maximum(0, -((start - bound) // self.dilation)) for bound in (low, high))
        counts: IntegerArray = np.maximum(0, np.minimum(last, self.kernel) - first)
        return counts

    def uniform(self) -> bool:
        """Return whether all windows have the same number."""
        # Along an axis the numbers rise, stay and fall, so all are equal if three are; but not with a dilation.
        some = self.all() if self.dilation > 1 else self._at(np.array([0, self.length // 2, self.length - 1]))
        return bool((some == some[0]).all())


def axis_counts(plane: Sizes, windows: Windows, result: Sizes, *, include_pad: bool) -> list[AxisCounts]:
    """Return the numbers of every axis; all else is as in `divisor`."""
    after = windows.padding_end or windows.padding
    sizes = zip(plane, windows.kernel, windows.stride, strict=True)
    paddings = zip(windows.padding, after, windows.dilation, strict=True)
    return [
        AxisCounts(*each, *padding, length, include_pad)
        for each, padding, length in zip(sizes, paddings, result, strict=True)
    ]
