"""The windows of a layer, axis by axis, in the form that the kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Self

Sizes = tuple[int, ...]

Tap = tuple[tuple[slice, ...], tuple[slice, ...]]
"""Where windows have one of their cells: the cells of the planes, and the windows."""


def reading_windows(offset: int, stride: int, size: int, count: int) -> tuple[int, int]:
    """Return the range [first, last) of windows whose cell at an offset is inside an axis.

    Args:
        offset: The cell of window i is at i * stride + offset.
        stride: The step from one window to the next.
        size: The number of cells of the axis.
        count: The number of windows.

    """
    return max(0, -(offset // stride)), min(count, (size - 1 - offset) // stride + 1)


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows over each axis of a plane. All attributes are in cells, one number for each axis.

    Attributes:
        kernel: The size of a window.
        stride: The step from one window to the next.
        padding: The cells before the axis, and, as far as windows reach, after it.
        dilation: The step between the cells of a window.
        padding_end: The cells after the axis that count in a mean, if they are not as many as before it; else empty.

    """

    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    padding_end: Sizes = ()

    @classmethod
    def of(cls, geometry: tuple[tuple[int, int, int, int, int], ...]) -> Self:
        """Return the windows of a layer's `geometry()`."""
        kernel, stride, before, after, dilation = zip(*geometry, strict=True)
        return cls(kernel, stride, before, dilation, () if after == before else after)

    @classmethod
    def tiling(cls, kernel: Sizes) -> Self:
        """Return adjacent windows, which share no cell."""
        return cls(kernel, kernel, (0,) * len(kernel), (1,) * len(kernel))

    @classmethod
    def dividing(cls, plane: Sizes, result: Sizes) -> Self | None:
        """Return the windows of an adaptive layer if all have the same size, else None."""
        if any(size % count for size, count in zip(plane, result, strict=True)):
            return None
        return cls.tiling(tuple(size // count for size, count in zip(plane, result, strict=True)))

    @classmethod
    def running(cls, kernel: Sizes) -> Self:
        """Return windows of stride 1."""
        return cls(kernel, (1,) * len(kernel), (0,) * len(kernel), (1,) * len(kernel))

    def with_channels(self) -> Self:
        """Return the same windows over (*plane, C), where each channel is a window of its own."""
        after = (*self.padding_end, 0) if self.padding_end else ()
        return type(self)((*self.kernel, 1), (*self.stride, 1), (*self.padding, 0), (*self.dilation, 1), after)

    def span(self, result: Sizes) -> Sizes:
        """Return the length of each axis, with padding, from the first window's start to the end of the last one."""
        return tuple(
            (count - 1) * s + (k - 1) * d + 1
            for count, k, s, d in zip(result, self.kernel, self.stride, self.dilation, strict=True)
        )


def taps_of(plane: Sizes, windows: Windows, result: Sizes) -> list[Tap]:
    """Return where windows have each of their cells, in raster order, without cells that all have in the padding.

    Args:
        plane: The shape of the input's planes.
        windows: The windows.
        result: The shape of the output's planes.

    Returns:
        For each cell, the input cells that windows have there, and the windows; both with all planes first.

    """
    taps = []
    for cell in product(*map(range, windows.kernel)):
        read, write = [slice(None)], [slice(None)]
        for axis, position in enumerate(cell):
            stride = windows.stride[axis]
            offset = position * windows.dilation[axis] - windows.padding[axis]
            first, last = reading_windows(offset, stride, plane[axis], result[axis])
            if first >= last:
                break
            read.append(slice(first * stride + offset, (last - 1) * stride + offset + 1, stride))
            write.append(slice(first, last))
        else:
            taps.append((tuple(read), tuple(write)))
    return taps
