"""The number of cells of each window, by which sums are divided."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from poolrpc_server.compute.kernels.windows import Sizes, Windows


@lru_cache(maxsize=16)
def divisor(plane: Sizes, windows: Windows, result: Sizes, *, include_pad: bool) -> float | torch.Tensor:
    """Return what each sum is divided by: one number, or a float64 tensor of the output plane's shape.

    Args:
        plane: The shape of an input plane.
        windows: The windows over its axes.
        result: The shape of an output plane.
        include_pad: Whether the cells of the padding count, but not what ceil_mode adds to it.

    """
    counts = axis_counts(plane, windows, result, include_pad=include_pad)
    if all(each.uniform() for each in counts):
        return float(prod(each.at(0) for each in counts))
    cells = torch.ones((), dtype=torch.float64)
    for each in counts:
        cells = cells.unsqueeze(-1) * torch.tensor([each.at(i) for i in range(each.length)], dtype=torch.float64)
    return cells


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

    def at(self, index: int) -> int:
        """Return the number of cells of a window."""
        start = index * self.stride - self.before
        low, high = (-self.before, self.size + self.after) if self.include_pad else (0, self.size)
        # The first of its cells in the range, and the one after the last.
        first, last = (max(0, -((start - bound) // self.dilation)) for bound in (low, high))
        return max(0, min(last, self.kernel) - first)

    def uniform(self) -> bool:
        """Return whether all windows have the same number."""
        # Along an axis the numbers rise, stay and fall, so all are equal if three are; but not with a dilation.
        some = range(self.length) if self.dilation > 1 else (self.length // 2, self.length - 1)
        return all(self.at(0) == self.at(index) for index in some)


def axis_counts(plane: Sizes, windows: Windows, result: Sizes, *, include_pad: bool) -> list[AxisCounts]:
    """Return the numbers of every axis; all else is as in `divisor`."""
    after = windows.padding_end or windows.padding
    sizes = zip(plane, windows.kernel, windows.stride, strict=True)
    paddings = zip(windows.padding, after, windows.dilation, strict=True)
    return [
        AxisCounts(*each, *padding, length, include_pad)
        for each, padding, length in zip(sizes, paddings, result, strict=True)
    ]
