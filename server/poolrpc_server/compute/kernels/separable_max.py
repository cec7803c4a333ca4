"""Max pooling without indices, one axis at a time over contiguous runs of memory.

A max over a window is the max over its columns of the max over its rows. Long windows double: a max of 2t cells is that
of two maxima of t, so that the cost grows with the logarithm of the kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, inf, prod

import torch
from torch import Tensor

from poolrpc_server.compute.kernels.blocks import (
    Call,
    Cells,
    Index,
    Program,
    Turns,
    every,
    narrowing,
    padded,
    padded_shape,
    scratch,
)
from poolrpc_server.compute.kernels.windows import Windows, within

SHORT_ROW = 16
"""Rows of so few cells (times the stride) are pooled on a padded copy, as one run of memory."""

LONG_TILE = 14
"""Windows side by side, from this size on, are reduced rather than joined cell by cell."""


MOST_TAPS = 64
"""A strided pass joins at most so many cells; a kernel of more is doubled first, whatever its stride."""


@dataclass(frozen=True)
class Stage:
    """One pass along an axis: cell i becomes the maximum of the cells at i * stride + offset."""

    offsets: tuple[int, ...]
    stride: int
    length: int


@dataclass(frozen=True)
class Step:
    """One torch call of a stage: cells [first, last) of the target from taps at some offsets, or the lowest value."""

    offsets: tuple[int, ...]
    first: int
    last: int
    update: bool = False


def lowest(dtype: torch.dtype) -> float | int:
    """The value that no cell is below."""
    return -inf if dtype.is_floating_point else torch.iinfo(dtype).min


@lru_cache(maxsize=1024)
def axis_stages(kernel: int, stride: int, padding: int, dilation: int, length: int) -> tuple[Stage, ...]:
    """The cheapest passes for one axis: windows double at full resolution, then a strided pass joins the last ones."""
    if kernel == 1:
        return () if stride == 1 and padding == 0 else (Stage((-padding,), stride, length),)
    widths = [1 << i for i in range(kernel.bit_length()) if 1 << i < kernel <= MOST_TAPS << i]
    width = min(widths, key=lambda t: t.bit_length() - 1 + (ceil(kernel / t) - 1) / stride)
    stages = []
    base = -padding
    step = 1
    while step < width:
        full = (length - 1) * stride + (kernel - 2 * step) * dilation + 1
        stages.append(Stage((base, base + step * dilation), 1, full))
        base = 0
        step *= 2
    starts = [*range(0, kernel - width, width), kernel - width]
    stages.append(Stage(tuple(base + start * dilation for start in starts), stride, length))
    return tuple(stages)


@lru_cache(maxsize=1024)
def run_shifts(kernel: int, dilation: int) -> tuple[int, ...]:
    """The shifts that turn cells into maxima of `kernel` cells by doubling."""
    shifts = []
    width = 1
    while width < kernel:
        step = min(width, kernel - width)
        shifts.append(step * dilation)
        width += step
    return tuple(shifts)


@lru_cache(maxsize=1024)
def stage_steps(stage: Stage, size: int) -> tuple[Step, ...]:
    """The calls of a stage over an axis of `size` cells; cells outside it are never read."""
    reach = {}
    for offset in stage.offsets:
        first, last = within(offset, stage.stride, size, stage.length)
        if first < last:
            reach[offset] = (first, last)
    order = sorted(reach, key=lambda o: reach[o][0] - reach[o][1])
    if not order:
        return (Step((), 0, stage.length),)
    steps = []
    begin, end = reach[order[0]]
    merged = 1
    if len(order) > 1:
        other = reach[order[1]]
        first, last = max(begin, other[0]), min(end, other[1])
        if first < last:
            merged = 2
            steps.append(Step((order[0], order[1]), first, last))
            for offset in order[:2]:
                low, high = reach[offset]
                steps += [Step((offset,), low, first)] * (low < first) + [Step((offset,), last, high)] * (last < high)
            begin, end = min(begin, other[0]), max(end, other[1])
    if merged == 1:
        steps.append(Step((order[0],), begin, end))
    steps += [Step((), 0, begin)] * (begin > 0) + [Step((), end, stage.length)] * (end < stage.length)
    steps += [Step((offset,), *reach[offset], update=True) for offset in order[merged:]]
    return tuple(steps)


def max_pool(x: Tensor, windows: Windows, out: Tensor) -> None:
    """Write the pooled planes of x (P, *plane) into out (P, *output_plane); both are contiguous."""
    program = Program(x.shape[0], prod(x.shape[1:]) * x.element_size())
    add_max(Cells(program, x, reused=False), windows, Cells(program, out, reused=False))
    program.run()


def add_max(source: Cells, windows: Windows, target: Cells) -> None:
    """Append to the program the calls that pool the source's cells into the target."""
    stride = windows.stride[-1]
    if windows.kernel[-1] > stride and source.shape[-1] * stride <= SHORT_ROW:
        _pool_flat(source, windows, target)
    else:
        _pool_axes(source, windows, target)


def _pool_flat(source: Cells, windows: Windows, target: Cells) -> None:
    """Pool short rows: every axis at full resolution on a padded copy, then the cells that windows start at."""
    program, result = source.program, target.shape
    last = len(result) - 1
    stride = windows.stride
    shape = padded_shape(source.shape, windows.padding, windows.needs(tuple(result)))
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
    turns = Turns(source, (program.step + 1) * prod(shape))
    for shift in shifts:
        extra -= shift
        made = turns.take(shape)
        program.calls.append(_join(source.runs(0, extra), source.runs(shift, shift + extra), made.runs(0, extra)))
        source = made
    starts = tuple(slice(0, (n - 1) * s + 1, s) for n, s in zip(result[:last], stride[:last], strict=True))
    kept = Cells(program, source.tensor[(slice(None), *starts)], reused=source.reused)
    if stride[last] > 1:
        program.calls.append(every(kept, target, stride[last]))
    else:
        program.calls.append(_copy(kept.at((*(slice(None),) * last, slice(result[last]))), target.at()))


def _pool_axes(source: Cells, windows: Windows, target: Cells) -> None:
    """Pool the leading axes, where a cell's neighbours are whole rows, then the last along whole runs of rows."""
    program, result = source.program, target.shape
    last = len(result) - 1
    stages = _leading_stages(source.shape, windows, result)
    width, stride, padding = source.shape[last], windows.stride[last], windows.padding[last]
    if windows.kernel[last] == stride == 1 and padding == 0:
        turns = Turns(source, program.step * max((prod(shape) for _, _, shape in stages[:-1]), default=0))
        _run_leading(source, stages, turns, target)
        return
    pitch = max(padding + width, windows.needs(tuple(result))[last])
    if narrowing(source.tensor.element_size(), stride):
        pitch += -pitch % stride
    rows = [*(stages[-1][2] if stages else source.shape)[:last], pitch]
    turns = Turns(source, program.step * max([prod(rows), *(prod(shape) for _, _, shape in stages[:-1])]))
    if pitch != width or stages:
        pitched = scratch(program, source.tensor, rows)
        if pitch != width:
            pitched.tensor.fill_(lowest(source.tensor.dtype))
        inner = Cells(program, pitched.tensor[..., padding : padding + width], reused=True)
        _run_leading(source, stages, turns, inner)
        source = pitched
    _pool_last(source, windows, turns, target)


def _leading_stages(
    plane: Sequence[int], windows: Windows, result: Sequence[int]
) -> list[tuple[Stage | int, int, list[int]]]:
    """Give the passes over every axis but the last, each with its axis and the shape that it leaves.

    A pass is a stage, or the size of windows that lie side by side.
    """
    shape = list(plane)
    stages: list[tuple[Stage | int, int, list[int]]] = []
    for axis in range(len(plane) - 1):
        k, s = windows.kernel[axis], windows.stride[axis]
        p, d = windows.padding[axis], windows.dilation[axis]
        tiled = k == s >= LONG_TILE and p == 0 and d == 1 and result[axis] * k <= plane[axis]
        for part in [k] if tiled else axis_stages(k, s, p, d, result[axis]):
            shape[axis] = part.length if isinstance(part, Stage) else result[axis]
            stages.append((part, axis, list(shape)))
    return stages


def _run_leading(source: Cells, stages: list[tuple[Stage | int, int, list[int]]], turns: Turns, final: Cells) -> None:
    """Append the calls of these passes, the last of which writes to `final`."""
    calls = source.program.calls
    if not stages:
        calls.append(_copy(source.at(), final.at()))
    for number, (stage, axis, shape) in enumerate(stages, 1):
        made = turns.take(shape) if number < len(stages) else final
        if isinstance(stage, Stage):
            calls += _stage_calls(stage, axis, source, made)
        else:
            calls.append(_tile_call(stage, axis, source, made))
        source = made


def _pool_last(source: Cells, windows: Windows, turns: Turns, target: Cells) -> None:
    """Append the calls that pool the last axis as whole runs of memory.

    Windows that wrap into the next row are computed too, and never kept: that costs less than stopping at row ends.
    """
    calls, rows, result = source.program.calls, source.shape, target.shape
    last = len(result) - 1
    stride = windows.stride[last]
    shifts = run_shifts(windows.kernel[last], windows.dilation[last])
    total = 0
    for shift in shifts if stride > 1 else shifts[:-1]:
        made = turns.take(rows)
        total += shift
        calls.append(_join(source.runs(0, -total), source.runs(shift, shift - total), made.runs(0, -total)))
        source = made
    if stride > 1:
        calls.append(every(source, target, stride))
        return
    lead = (slice(None),) * last
    first = source.at((*lead, slice(result[last])))
    if shifts:
        second = source.at((*lead, slice(shifts[-1], shifts[-1] + result[last])))
        calls.append(_join(first, second, target.at()))
    else:
        calls.append(_copy(first, target.at()))


def _tile_call(kernel: int, axis: int, source: Cells, target: Cells) -> Call:
    """Reduce an axis whose windows lie side by side and are so long that this costs less than joining their cells."""
    length = target.shape[axis]
    whole = source.at((*(slice(None),) * axis, slice(length * kernel)))
    shape = (*target.shape[:axis], length, kernel, *target.shape[axis + 1 :])
    reads, write = [read.view(-1, *shape) for read in whole], target.at()
    return lambda i: torch.amax(reads[i], axis + 2, out=write[i])


def _stage_calls(stage: Stage, axis: int, source: Cells, target: Cells) -> list[Call]:
    calls: list[Call] = []
    lead = (slice(None),) * axis
    for step in stage_steps(stage, source.shape[axis]):
        whole: Index = () if (step.first, step.last) == (0, stage.length) else (*lead, slice(step.first, step.last))
        write = target.at(whole)
        reads = []
        for offset in step.offsets:
            start = step.first * stage.stride + offset
            stop = (step.last - 1) * stage.stride + offset + 1
            reads.append(source.at((*lead, slice(start, stop, stage.stride))))
        if step.update:
            calls.append(_join(write, reads[0], write))
        elif len(reads) > 1:
            calls.append(_join(reads[0], reads[1], write))
        elif reads:
            calls.append(_copy(reads[0], write))
        else:
            calls.append(_fill(write, lowest(source.tensor.dtype)))
    return calls


def _join(one: list[Tensor], two: list[Tensor], out: list[Tensor]) -> Call:
    return lambda i: torch.maximum(one[i], two[i], out=out[i])


def _copy(source: list[Tensor], out: list[Tensor]) -> Call:
    return lambda i: out[i].copy_(source[i])


def _fill(out: list[Tensor], value: float) -> Call:
    return lambda i: out[i].fill_(value)
