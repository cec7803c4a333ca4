"""Adaptive pooling: plain pooling where all windows are alike, otherwise windows of one width joined in pairs."""

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from poolrpc_server.compute.kernels.blocks import Call, Cells, Program, scratch
from poolrpc_server.compute.kernels.raster_average import add_average, sum_dtype
from poolrpc_server.compute.kernels.separable_max import add_max
from poolrpc_server.compute.kernels.windows import Windows

MOST_WINDOWS = 4096
"""An axis of more windows than this is left to torch: each is placed one by one."""


def uniform(plane: Sequence[int], result: Sequence[int]) -> tuple[int, ...] | None:
    """The kernel, and stride, that all windows share, if they do."""
    if any(size % length for size, length in zip(plane, result, strict=True)):
        return None
    return tuple(size // length for size, length in zip(plane, result, strict=True))


@lru_cache(maxsize=256)
def axis_joins(size: int, length: int) -> tuple[int, tuple[Tensor, ...]]:
    """The width of an axis's least window, and where runs of that width start that together cover each window."""
    windows = [(i * size // length, -(-(i + 1) * size // length)) for i in range(length)]
    width = min(stop - start for start, stop in windows)
    wide = max(stop - start for start, stop in windows)
    return width, tuple(
        torch.tensor([min(start + shift, stop - width) for start, stop in windows]) for shift in range(0, wide, width)
    )


def adaptive_max(x: Tensor, out: Tensor) -> None:
    """Write the pooled planes of x (P, *plane) into out (P, *output_plane), whose shape says the windows."""
    plane, result = x.shape[1:], out.shape[1:]
    if plane == result:
        out.copy_(x)
        return
    program = Program(x.shape[0], prod(plane) * x.element_size())
    source, target = Cells(program, x, reused=False), Cells(program, out, reused=False)
    kernel = uniform(plane, result)
    if kernel is None:
        _join_windows(source, target)
    else:
        add_max(source, Windows.tiling(kernel), target)
    program.run()


def adaptive_avg(x: Tensor, out: Tensor) -> None:
    """Write the averaged planes of a floating x (P, *plane) into out (P, *output_plane); windows must be uniform."""
    plane, result = x.shape[1:], out.shape[1:]
    if plane == result:
        # A sum that starts from 0.0 is never -0.0.
        torch.add(x, 0.0, out=out)
        return
    kernel = uniform(plane, result)
    if kernel is None:
        raise ValueError(f"expected windows that are all alike, got {tuple(plane)} to {tuple(result)}")
    # In three dimensions torch adds and divides in the dtype of the cells, and rounds after each.
    sums = x.dtype if len(result) == 3 else sum_dtype(x.dtype)  # noqa: PLR2004 - three dimensions
    program = Program(x.shape[0], prod(plane) * sums.itemsize)
    source, target = Cells(program, x, reused=False), Cells(program, out, reused=False)
    # torch divides once an axis, which rounds otherwise than dividing by the product.
    add_average(source, Windows.tiling(kernel), [float(k) for k in kernel], sums, target)
    program.run()


def _join_windows(source: Cells, target: Cells) -> None:
    """Append the calls for windows of different sizes: maxima of the least window's size, joined in pairs."""
    program, rank = source.program, len(target.shape)
    even = tuple(size // n if size % n == 0 else 1 for size, n in zip(source.shape, target.shape, strict=True))
    if max(even) > 1:
        shape = [size // k for size, k in zip(source.shape, even, strict=True)]
        tiles = scratch(program, source.tensor, shape)
        add_max(source, Windows.tiling(even), tiles)
        source = tiles
    axes = [axis for axis in range(rank) if source.shape[axis] != target.shape[axis]]
    for axis in axes:
        width, (first, *others) = axis_joins(source.shape[axis], target.shape[axis])
        if width > 1:
            shape = list(source.shape)
            shape[axis] -= width - 1
            runs = scratch(program, source.tensor, shape)
            add_max(source, Windows.running(tuple(width if other == axis else 1 for other in range(rank))), runs)
            source = runs
        shape = list(source.shape)
        shape[axis] = target.shape[axis]
        made = target if axis == axes[-1] else scratch(program, source.tensor, shape)
        program.calls.append(_pick(source.at(), axis + 1, first, made.at()))
        if others:
            more = scratch(program, source.tensor, shape).at()
            for index in others:
                program.calls += [_pick(source.at(), axis + 1, index, more), _join(made.at(), more)]
        source = made


def _pick(source: list[Tensor], dim: int, index: Tensor, out: list[Tensor]) -> Call:
    return lambda i: torch.index_select(source[i], dim, index, out=out[i])


def _join(one: list[Tensor], two: list[Tensor]) -> Call:
    return lambda i: torch.maximum(one[i], two[i], out=one[i])
