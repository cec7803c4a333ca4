"""Adaptive and global max pooling: the max of whole planes; and windows of different sizes, joined from equal ones."""

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from poolrpc_server.compute.kernels.blocks import TARGET_BYTES, Call, Cells, copy, maximum, scratch
from poolrpc_server.compute.kernels.cost import PREDICTED, UNPREDICTED, Case, Cost
from poolrpc_server.compute.kernels.padded import HALVES
from poolrpc_server.compute.kernels.plan import Plan, Row
from poolrpc_server.compute.kernels.separable_max import add_max, scratch_cells
from poolrpc_server.compute.kernels.windows import Windows

MAX_WINDOWS = 4096
"""Axes with more windows than this are left to torch, since each window's start is computed in Python."""


def add_global_max(plan: Plan, source: Cells, target: Cells, _: object) -> None:
    """Append the calls that write the maximum of each plane to the target: NaN if the plane has one."""
    program = source.program
    read, write = ([block.view(block.shape[0], -1) for block in cells.at()] for cells in (source, target))
    if plan.dtype not in HALVES:
        program.calls.append(lambda i: torch.amax(read[i], dim=1, keepdim=True, out=write[i]))
        return
    # torch's amax of 16-bit floats takes three times as long as converting them first.
    single = scratch(program, (plan.cells,), torch.float32).at()
    best = scratch(program, (1,), torch.float32).at()
    program.calls += [
        lambda i: single[i].copy_(read[i]),
        lambda i: torch.amax(single[i], dim=1, keepdim=True, out=best[i]),
        lambda i: write[i].copy_(best[i]),
    ]


def add_adaptive_max(plan: Plan, source: Cells, target: Cells, _: object) -> None:
    """Append the calls that pool the source into the target, whose shape determines the windows."""
    windows = Windows.dividing(plan.plane, plan.output_plane)
    if plan.plane == plan.output_plane:
        source.program.calls.append(copy(source.at(), target.at()))
    elif windows is None:
        _join_windows(source, target)
    else:
        add_max(source, windows, target)


def _scratch(plan: Plan) -> int:
    windows = Windows.dividing(plan.plane, plan.output_plane)
    if windows is not None:
        return scratch_cells(plan.plane, windows, plan.output_plane) * plan.dtype.itemsize
    # The tiles; for each axis its runs, what was joined and what was selected; and for each of these, add_max's.
    axes = sum(size != length for size, length in zip(plan.plane, plan.output_plane, strict=True))
    return (4 + 6 * axes) * max(plan.cells, prod(plan.output_plane)) * plan.dtype.itemsize


@lru_cache(maxsize=64)
def axis_runs(size: int, length: int) -> tuple[int, tuple[Tensor, ...]]:
    """Return the width of an axis's smallest window, and the starts of runs of that width that cover each window."""
    windows = [(i * size // length, -(-(i + 1) * size // length)) for i in range(length)]
    width = min(stop - start for start, stop in windows)
    widest = max(stop - start for start, stop in windows)
    return width, tuple(
        torch.tensor([min(start + shift, stop - width) for start, stop in windows]) for shift in range(0, widest, width)
    )


def _join_windows(source: Cells, target: Cells) -> None:
    """Append the calls for windows of different sizes: maxima of the smallest window's size, joined in pairs."""
    program, rank = source.program, len(target.shape)
    even = tuple(size // n if size % n == 0 else 1 for size, n in zip(source.shape, target.shape, strict=True))
    if max(even) > 1:
        shape = [size // k for size, k in zip(source.shape, even, strict=True)]
        tiles = scratch(program, shape, source.tensor.dtype)
        add_max(source, Windows.tiling(even), tiles)
        source = tiles
    # Axes that become longer come last, so that nothing in between is larger than the input and the output.
    axes = [axis for axis in range(rank) if source.shape[axis] != target.shape[axis]]
    axes.sort(key=lambda axis: source.shape[axis] < target.shape[axis])
    for axis in axes:
        width, (first, *others) = axis_runs(source.shape[axis], target.shape[axis])
        if width > 1:
            shape = list(source.shape)
            shape[axis] -= width - 1
            runs = scratch(program, shape, source.tensor.dtype)
            add_max(source, Windows.running(tuple(width if other == axis else 1 for other in range(rank))), runs)
            source = runs
        shape = list(source.shape)
        shape[axis] = target.shape[axis]
        joined = target if axis == axes[-1] else scratch(program, shape, source.tensor.dtype)
        program.calls.append(_select(source.at(), axis + 1, first, joined.at()))
        if others:
            selected = scratch(program, shape, source.tensor.dtype).at()
            for index in others:
                program.calls.append(_select(source.at(), axis + 1, index, selected))
                program.calls.append(maximum(joined.at(), selected, joined.at()))
        source = joined


def _select(source: list[Tensor], dim: int, index: Tensor, out: list[Tensor]) -> Call:
    return lambda i: torch.index_select(source[i], dim, index, out=out[i])


def _pays(_: Plan, case: Case) -> bool:
    cells, outputs, item = case.cells, case.outputs, case.dtype.itemsize
    if case.plane == case.result:
        return True
    if outputs >= UNPREDICTED or cells >= 1 << 17:
        width = float((cells / outputs) ** (1 / len(case.result)))
        eager = (cells * (0.7 + 6 / width) + outputs * 15) * (1.5 if len(case.result) == 3 else 1.0)
    else:
        eager = cells * 0.8 + outputs * 8
    if Windows.dividing(case.plane, case.result) is not None:
        ours = 2 * case.call + cells * (0.45 + 8 / case.plane[-1]) * max(item, 2) / 4
    else:
        # Each index of the last axis costs a call within torch, for each block.
        calls = case.result[-1] * (1 + cells * item / TARGET_BYTES)
        ours = 4 * case.call + (cells * (0.8 + 10 / case.plane[-1]) + outputs * 2.5) * max(1.0, item / 4) + calls * 300
    return ours < 0.85 * eager


GLOBAL_COST, COPY_COST, EVEN_COST = Cost(10.0, 0.1, 0.3), Cost(0.5, 0.1, 0.1), Cost(1.5, 0.5, 0.5)
JOINED_COST = Cost(0.0, 2.0, 2.0)
"""The work for whole planes, windows of one cell, windows of one size, and windows of different sizes."""


def _work(plan: Plan) -> float:
    if plan.plane == plan.output_plane:
        return COPY_COST.of(plan.dtype, plan.cells, plan.cells)
    if Windows.dividing(plan.plane, plan.output_plane) is not None:
        return EVEN_COST.of(plan.dtype, plan.cells, prod(plan.output_plane))
    # Cells of 16 bits are selected and compared as they are: they cost no more than those of 32.
    dtype = torch.float32 if plan.dtype in HALVES else plan.dtype
    return JOINED_COST.of(dtype, plan.cells, prod(plan.output_plane))


GLOBAL_MAX = Row(
    "global max",
    ("global_pool, max", "adaptive_max_pool"),
    add=add_global_max,
    work=lambda plan: GLOBAL_COST.of(plan.dtype, plan.cells, 1),
    scratch=lambda plan: 4 * (plan.cells + 1) if plan.dtype in HALVES else 0,
    # Only 16-bit floats are converted in scratch memory: larger blocks of others save calls.
    plane_bytes=lambda plan: plan.cells * 4 if plan.dtype in HALVES else -(-plan.cells * plan.dtype.itemsize // 8),
    pays=lambda _, case: case.cells >= PREDICTED,
    fits=lambda plan: prod(plan.output_plane) == 1,
)

ADAPTIVE_MAX = Row(
    "adaptive max",
    ("adaptive_max_pool",),
    add=add_adaptive_max,
    work=_work,
    scratch=_scratch,
    pays=_pays,
    fits=lambda plan: prod(plan.output_plane) > 1 and max(plan.output_plane) <= MAX_WINDOWS,
)
