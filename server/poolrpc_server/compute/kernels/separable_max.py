"""Max pooling without indices, one axis at a time over contiguous runs of memory.

The max over a window is the max over its columns of the max over its rows. Long windows are doubled: a max of 2t cells
is the max of two maxima of t cells, so the cost grows with the logarithm of the kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

import torch
from torch import Tensor

from poolrpc_server.compute.kernels.blocks import (
    Call,
    Cells,
    DoubleBuffer,
    Index,
    copy,
    maximum,
    narrowing,
    padded,
    padded_axes,
    padded_shape,
    scratch,
    strided_copy,
)
from poolrpc_server.compute.kernels.cost import PREDICTED, Case, Cost, eager_max
from poolrpc_server.compute.kernels.padded import HALVES, lowest
from poolrpc_server.compute.kernels.plan import Plan, Row
from poolrpc_server.compute.kernels.windows import Windows, reading_windows

SHORT_ROW = 16
"""Rows of at most so many cells (times the stride) are pooled on a padded copy, as one run of memory."""

LONG_TILE = 14
"""Adjacent windows (without overlap) that are at least this long are reduced rather than joined cell by cell."""

MAX_STRIDED_TAPS = 64
"""The most cells that a strided pass joins. A kernel with more is doubled first, whatever its stride."""


@dataclass(frozen=True)
class Pass:
    """One pass along an axis: cell i becomes the maximum of the cells at i * stride + offset, for each offset."""

    offsets: tuple[int, ...]
    stride: int
    length: int


@dataclass(frozen=True)
class Operation:
    """One torch call of a pass: it computes cells [first, last) from those at some offsets, or fills them if none."""

    offsets: tuple[int, ...]
    first: int
    last: int
    update: bool = False


_AxisPass = tuple[Pass | int, int, list[int]]
"""A pass, its axis, and the shape of its result. A number is the size of adjacent windows."""


@lru_cache(maxsize=256)
def axis_passes(kernel: int, stride: int, padding: int, dilation: int, length: int) -> tuple[Pass, ...]:
    """Return the cheapest passes for one axis: some double the windows at stride 1, then a strided one joins these."""
    if kernel == 1:
        return () if stride == 1 and padding == 0 else (Pass((-padding,), stride, length),)
    widths = [1 << i for i in range(kernel.bit_length()) if 1 << i < kernel <= MAX_STRIDED_TAPS << i]
    width = min(widths, key=lambda t: t.bit_length() - 1 + (ceil(kernel / t) - 1) / stride)
    passes = []
    base = -padding
    step = 1
    while step < width:
        full = (length - 1) * stride + (kernel - 2 * step) * dilation + 1
        passes.append(Pass((base, base + step * dilation), 1, full))
        base = 0
        step *= 2
    starts = [*range(0, kernel - width, width), kernel - width]
    passes.append(Pass(tuple(base + start * dilation for start in starts), stride, length))
    return tuple(passes)


@lru_cache(maxsize=256)
def run_shifts(kernel: int, dilation: int) -> tuple[int, ...]:
    """Return the shifts that turn cells into maxima of `kernel` cells by doubling."""
    shifts = []
    width = 1
    while width < kernel:
        step = min(width, kernel - width)
        shifts.append(step * dilation)
        width += step
    return tuple(shifts)


@lru_cache(maxsize=256)
def pass_operations(one_pass: Pass, size: int) -> tuple[Operation, ...]:
    """Return the torch calls of a pass over an axis of `size` cells; no cell outside it is read."""
    reach = {}
    for offset in one_pass.offsets:
        first, last = reading_windows(offset, one_pass.stride, size, one_pass.length)
        if first < last:
            reach[offset] = (first, last)
    order = sorted(reach, key=lambda o: reach[o][0] - reach[o][1])
    if not order:
        return (Operation((), 0, one_pass.length),)
    made = []
    begin, end = reach[order[0]]
    merged = 1
    if len(order) > 1:
        other = reach[order[1]]
        first, last = max(begin, other[0]), min(end, other[1])
        if first < last:
            merged = 2
            made.append(Operation((order[0], order[1]), first, last))
            for offset in order[:2]:
                low, high = reach[offset]
                made += [Operation((offset,), low, first)] * (low < first)
                made += [Operation((offset,), last, high)] * (last < high)
            begin, end = min(begin, other[0]), max(end, other[1])
    if merged == 1:
        made.append(Operation((order[0],), begin, end))
    made += [Operation((), 0, begin)] * (begin > 0) + [Operation((), end, one_pass.length)] * (end < one_pass.length)
    made += [Operation((offset,), *reach[offset], update=True) for offset in order[merged:]]
    return tuple(made)


def count_passes(windows: Windows) -> int:
    """Return how many times the kernel visits each cell."""
    last = len(run_shifts(windows.kernel[-1], 1)) + (windows.stride[-1] > 1)
    leading = zip(windows.kernel[:-1], windows.stride[:-1], strict=True)
    return last + sum(len(each.offsets) - 1 for k, s in leading for each in axis_passes(k, s, 0, 1, 8))


def scratch_cells(plane: Sequence[int], windows: Windows, result: Sequence[int]) -> int:
    """Return an upper bound of the cells of a plane in the scratch memory of add_max."""
    # A padded copy, and two buffers.
    return 3 * prod(padded_axes(plane, windows, result))


def add_max(source: Cells, windows: Windows, target: Cells) -> None:
    """Append the calls that pool the source's cells into the target to the program."""
    stride = windows.stride[-1]
    if windows.kernel[-1] > stride and source.shape[-1] * stride <= SHORT_ROW:
        _pool_flat(source, windows, target)
    else:
        _pool_axes(source, windows, target)


def _pool_flat(source: Cells, windows: Windows, target: Cells) -> None:
    """Pool short rows: every axis at stride 1 on a padded copy, of which the cells where windows start are kept."""
    program, result = source.program, target.shape
    last = len(result) - 1
    stride = windows.stride
    shape = padded_shape(source.shape, windows.padding, windows.span(tuple(result)))
    if narrowing(source.tensor.element_size(), stride[last]):
        shape[last] += -shape[last] % stride[last]
    if list(source.shape) != shape:
        dtype = source.tensor.dtype
        source = padded(source, windows.padding, shape, lowest(dtype), dtype)
    pitches = [prod(shape[axis + 1 :]) for axis in range(last + 1)]
    shifts = [
        shift * pitch
        for k, d, pitch in zip(windows.kernel, windows.dilation, pitches, strict=True)
        for shift in run_shifts(k, d)
    ]
    extra = sum((n - 1) * s * pitch for n, s, pitch in zip(result, stride, pitches, strict=True)) + 1 - prod(shape)
    extra += sum(shifts)
    buffers = DoubleBuffer(program, source.tensor.dtype, (program.step + 1) * prod(shape))
    for shift in shifts:
        extra -= shift
        made = buffers.swap(shape)
        program.calls.append(maximum(source.runs(0, extra), source.runs(shift, shift + extra), made.runs(0, extra)))
        source = made
    starts = tuple(slice(0, (n - 1) * s + 1, s) for n, s in zip(result[:last], stride[:last], strict=True))
    kept = Cells(program, source.tensor[(slice(None), *starts)], reused=source.reused)
    if stride[last] > 1:
        program.calls.append(strided_copy(kept, target, stride[last]))
    else:
        program.calls.append(copy(kept.at((*(slice(None),) * last, slice(result[last]))), target.at()))


def _pool_axes(source: Cells, windows: Windows, target: Cells) -> None:
    """Pool the leading axes, where a cell's neighbours are whole rows, then the last along whole runs of rows."""
    program, result = source.program, target.shape
    last = len(result) - 1
    passes = _leading_passes(source.shape, windows, result)
    width, stride, padding = source.shape[last], windows.stride[last], windows.padding[last]
    if windows.kernel[last] == stride == 1 and padding == 0:
        buffers = DoubleBuffer(
            program, source.tensor.dtype, program.step * max((prod(shape) for _, _, shape in passes[:-1]), default=0)
        )
        _run_leading(source, passes, buffers, target)
        return
    pitch = max(padding + width, windows.span(tuple(result))[last])
    if narrowing(source.tensor.element_size(), stride):
        pitch += -pitch % stride
    rows = [*(passes[-1][2] if passes else source.shape)[:last], pitch]
    buffers = DoubleBuffer(
        program, source.tensor.dtype, program.step * max([prod(rows), *(prod(shape) for _, _, shape in passes[:-1])])
    )
    if pitch != width or passes:
        dtype = source.tensor.dtype
        pitched = scratch(program, rows, dtype, lowest(dtype) if pitch != width else None)
        inner = Cells(program, pitched.tensor[..., padding : padding + width], reused=True)
        _run_leading(source, passes, buffers, inner)
        source = pitched
    _pool_last(source, windows, buffers, target)


def _leading_passes(plane: Sequence[int], windows: Windows, result: Sequence[int]) -> list[_AxisPass]:
    """Return the passes over every axis but the last, each with its axis and the shape of its result."""
    shape = list(plane)
    passes: list[_AxisPass] = []
    for axis in range(len(plane) - 1):
        k, s = windows.kernel[axis], windows.stride[axis]
        p, d = windows.padding[axis], windows.dilation[axis]
        tiled = k == s >= LONG_TILE and p == 0 and d == 1 and result[axis] * k <= plane[axis]
        for part in [k] if tiled else axis_passes(k, s, p, d, result[axis]):
            shape[axis] = part.length if isinstance(part, Pass) else result[axis]
            passes.append((part, axis, list(shape)))
    return passes


def _run_leading(source: Cells, passes: list[_AxisPass], buffers: DoubleBuffer, final: Cells) -> None:
    """Append the calls of these passes, the last of which writes to `final`."""
    calls = source.program.calls
    if not passes:
        calls.append(copy(source.at(), final.at()))
    for number, (part, axis, shape) in enumerate(passes, 1):
        made = buffers.swap(shape) if number < len(passes) else final
        if isinstance(part, Pass):
            calls += _pass_calls(part, axis, source, made)
        else:
            calls.append(_tile_call(part, axis, source, made))
        source = made


def _pool_last(source: Cells, windows: Windows, buffers: DoubleBuffer, target: Cells) -> None:
    """Append the calls that pool the last axis as whole runs of memory.

    Windows that extend into the next row are computed too, and discarded: that costs less than stopping at row ends.
    """
    calls, rows, result = source.program.calls, source.shape, target.shape
    last = len(result) - 1
    stride = windows.stride[last]
    shifts = run_shifts(windows.kernel[last], windows.dilation[last])
    total = 0
    for shift in shifts if stride > 1 else shifts[:-1]:
        made = buffers.swap(rows)
        total += shift
        calls.append(maximum(source.runs(0, -total), source.runs(shift, shift - total), made.runs(0, -total)))
        source = made
    if stride > 1:
        calls.append(strided_copy(source, target, stride))
        return
    lead = (slice(None),) * last
    first = source.at((*lead, slice(result[last])))
    if shifts:
        second = source.at((*lead, slice(shifts[-1], shifts[-1] + result[last])))
        calls.append(maximum(first, second, target.at()))
    else:
        calls.append(copy(first, target.at()))


def _tile_call(kernel: int, axis: int, source: Cells, target: Cells) -> Call:
    """Return the call that reduces an axis whose windows are adjacent and long."""
    length = target.shape[axis]
    whole = source.at((*(slice(None),) * axis, slice(length * kernel)))
    shape = (*target.shape[:axis], length, kernel, *target.shape[axis + 1 :])
    reads, write = [read.view(-1, *shape) for read in whole], target.at()
    return lambda i: torch.amax(reads[i], axis + 2, out=write[i])


def _pass_calls(one_pass: Pass, axis: int, source: Cells, target: Cells) -> list[Call]:
    calls: list[Call] = []
    lead = (slice(None),) * axis
    for operation in pass_operations(one_pass, source.shape[axis]):
        first, last = operation.first, operation.last
        index: Index = () if (first, last) == (0, one_pass.length) else (*lead, slice(first, last))
        write = target.at(index)
        reads = []
        for offset in operation.offsets:
            start = first * one_pass.stride + offset
            stop = (last - 1) * one_pass.stride + offset + 1
            reads.append(source.at((*lead, slice(start, stop, one_pass.stride))))
        if operation.update:
            calls.append(maximum(write, reads[0], write))
        elif len(reads) > 1:
            calls.append(maximum(reads[0], reads[1], write))
        elif reads:
            calls.append(copy(reads[0], write))
        else:
            calls.append(_fill(write, lowest(source.tensor.dtype)))
    return calls


def _fill(out: list[Tensor], value: float) -> Call:
    return lambda i: out[i].fill_(value)


def pays(plan: Plan, case: Case) -> bool:
    """Return whether this kernel is estimated to be faster than torch."""
    windows, outputs = case.windows, case.outputs
    kernel, stride = windows.kernel, windows.stride
    if plan.channels is not None:
        if plan.channels > 32:
            return all(s == 1 for s in stride) and prod(kernel) >= 9 and outputs >= 1 << 18
        return outputs >= (PREDICTED if plan.channels <= 8 else 1 << 16)
    width, passes = case.plane[-1], count_passes(windows)
    fixed = case.call + case.step * passes
    if len(kernel) == 1 and case.dtype.is_floating_point:
        # torch's max_pool1d computes a whole row for each cell of the window, and vectorises stride 1.
        if case.dtype in HALVES:
            return fixed + case.cells * (0.6 + 0.1 * passes + 7 / width) < 0.9 * outputs * (1 + 0.8 * kernel[0])
        eager = 0.35 + 0.08 * kernel[0] if stride[0] == 1 else 0.2 + 0.33 * kernel[0]
        ours = case.cells * (0.4 + 0.1 * passes + 7 / width) * case.dtype.itemsize / 4
        return fixed + ours < 0.9 * outputs * eager
    copied = kernel[-1] > stride[-1] or any(windows.padding) or width % stride[-1]
    row = 14 if copied else 5
    return fixed + case.cells * (0.5 * max(case.dtype.itemsize, 2) / 4 + row / width) < 0.95 * eager_max(case)


MAX_COST = Cost(1.5, 0.35, 0.15, 0.02)
"""The visited cells are those of a padded plane, in each pass."""


def work(plan: Plan) -> float:
    """Return the estimated work for a plane."""
    cells = max(prod(padded_axes(plan.plane_shape, plan.windows, plan.result_shape)), prod(plan.result_shape))
    return MAX_COST.of(plan.dtype, cells, prod(plan.result_shape), cells * count_passes(plan.windows))


SEPARABLE_MAX = Row(
    "separable max",
    ("max_pool",),
    add=lambda plan, source, target, _: add_max(source, plan.windows, target),
    scratch=lambda plan: scratch_cells(plan.plane_shape, plan.windows, plan.result_shape) * plan.dtype.itemsize,
    pays=pays,
    work=work,
    channels_last=True,
)
