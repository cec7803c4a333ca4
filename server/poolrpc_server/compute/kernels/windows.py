"""The sliding windows of a layer, axis by axis, as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

Sizes = tuple[int, ...]


def within(offset: int, stride: int, size: int, count: int) -> tuple[int, int]:
    """Give which of `count` windows, [first, last), have a cell at an offset from their start inside of an axis.

    That cell of window i is at i * stride + offset, of an axis of `size` cells.
    """
    return max(0, -(offset // stride)), min(count, (size - 1 - offset) // stride + 1)


@dataclass(frozen=True, slots=True)
class Windows:
    """Sliding windows: for each axis of a plane, in cells.

    Attributes:
        kernel: The windows' size.
        stride: The step from one to the next.
        padding: Cells before the axis (and, as far as windows reach, after it).
        dilation: The step between the cells of a window.

    """

    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes

    @classmethod
    def of(cls, geometry: tuple[tuple[int, int, int, int], ...]) -> Self:
        """Give the windows of a layer's `geometry()`."""
        return cls(*zip(*geometry, strict=True))

    @classmethod
    def tiling(cls, kernel: Sizes) -> Self:
        """Give windows that lie side by side."""
        return cls(kernel, kernel, (0,) * len(kernel), (1,) * len(kernel))

    @classmethod
    def running(cls, kernel: Sizes) -> Self:
        """Give windows that start at every cell."""
        return cls(kernel, (1,) * len(kernel), (0,) * len(kernel), (1,) * len(kernel))

    def with_channels(self) -> Self:
        """Give the same windows on (*plane, C) memory: C is one more axis, of which each cell is a window."""
        return type(self)((*self.kernel, 1), (*self.stride, 1), (*self.padding, 0), (*self.dilation, 1))

    def needs(self, result: Sizes) -> Sizes:
        """Give how many cells of each axis, padding included, that many windows span."""
        return tuple(
            (count - 1) * s + (k - 1) * d + 1
            for count, k, s, d in zip(result, self.kernel, self.stride, self.dilation, strict=True)
        )
