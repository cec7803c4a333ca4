"""Average pooling that adds the cells of each window in raster order, as torch does, over contiguous runs of memory."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from math import frexp, prod, sqrt

import torch
from torch import Tensor

from poolrpc_server.compute.kernels.blocks import (
    Call,
    Cells,
    Program,
    copy,
    narrowing,
    padded,
    padded_axes,
    padded_shape,
    scratch,
    strided_copy,
)
from poolrpc_server.compute.kernels.cost import EAGER_CALL, UNPREDICTED, Case, Cost
from poolrpc_server.compute.kernels.counts import axis_counts, divisor
from poolrpc_server.compute.kernels.padded import HALVES, sum_divisor, sum_dtype
from poolrpc_server.compute.kernels.plan import Plan, Row
from poolrpc_server.compute.kernels.windows import Windows

SPARSE_STRIDE = 8
"""From this stride on, reading strided cells costs less than adding cells where no window starts."""

SHORT_RUN = 64
"""One more run of memory costs about as much as this many cells in a run."""

SUMS_BYTES = 2**19
"""The size of the sums of a part of a block, some rows of all its planes: they are read and written once for each cell
of a window, and should stay in the cache of one core, which the planes of large images would leave."""

MAX_TAPS = 1024
"""Windows of more cells than this are left to torch: each cell of a window is a torch call."""

BOUND_SHARE = 0.6
"""The part of the cost of float32 cells that remains if the program is kept, and its memory is in the cache."""

EXACT_DIVISOR = 2**53
"""Larger integers are rounded twice here, but once by torch: to float64, and then to the dtype of the sums."""

MAX_DIVISORS = 1 << 17
"""Output planes of more cells than this are left to torch if their cells have different divisors."""


def scratch_bytes(plan: Plan) -> int:
    """Return an upper bound of the bytes of a plane in the scratch memory of add_average."""
    # A padded copy, the sums of all its cells, those of the windows, and two copies of the divisors.
    padded_cells, outputs = (
        prod(padded_axes(plan.plane_shape, plan.windows, plan.result_shape)),
        prod(plan.result_shape),
    )
    return (2 * padded_cells + outputs) * sum_dtype(plan.dtype).itemsize + 16 * outputs


def add_average(
    source: Cells, windows: Windows, divided_by: Sequence[float | Tensor], sums: torch.dtype, target: Cells
) -> None:
    """Append the calls that add the source's windows in dtype `sums` and divide by one divisor after another."""
    program, result = source.program, target.shape
    last = len(result) - 1
    # The stride of a single window has no effect, but would cause padding.
    stride = tuple(s if length > 1 else 1 for s, length in zip(windows.stride, result, strict=True))
    windows = replace(windows, stride=stride)
    shape = padded_shape(source.shape, windows.padding, windows.span(tuple(result)))
    dense = stride[last] < SPARSE_STRIDE
    if dense and narrowing(sums.itemsize, stride[last]):
        shape[last] += -shape[last] % stride[last]
    if list(source.shape) != shape or source.tensor.dtype != sums:
        source = padded(source, windows.padding, shape, 0.0, sums)

    final = target if target.tensor.dtype == sums else scratch(program, result, sums)
    (_dense if dense else _sparse)(source, windows, divided_by, final)
    if final is not target:
        program.calls.append(copy(final.at(), target.at()))


def _dense(source: Cells, windows: Windows, divided_by: Sequence[float | Tensor], final: Cells) -> None:
    """Compute sums at every cell of the last axes, where a tap is one run of memory, and keep those of windows."""
    program, stride = source.program, windows.stride
    shape, result = source.shape, final.shape
    last = len(shape) - 1
    split = last
    while split > 0 and prod(shape[split:]) * (shape[split - 1] / result[split - 1] - 1) < SHORT_RUN:
        split -= 1
    sizes = [*result[:split], *shape[split:]]
    nbytes = program.step * prod(sizes) * source.tensor.dtype.itemsize
    parts = min(result[0], -(-nbytes // SUMS_BYTES)) if split else 1
    sizes[0] = -(-sizes[0] // parts)
    acc = scratch(program, sizes, source.tensor.dtype)
    pitches = [prod(shape[axis + 1 :]) for axis in range(last + 1)]
    steps = [s * pitch for s, pitch in zip(stride, pitches, strict=True)]
    run = sum((n - 1) * step for n, step in zip(result[split:], steps[split:], strict=True)) + 1
    shifts = [sum(t * pitch for t, pitch in zip(tap, pitches, strict=True)) for tap in _taps(windows.kernel)]
    acc_steps = [prod(sizes[axis + 1 :]) for axis in range(split)]
    starts = [slice(0, (n - 1) * s + 1, s) for n, s in zip(result[split:last], stride[split:last], strict=True)]
    for begin, end in pairwise(result[0] * part // parts for part in range(parts + 1)):
        if split == 0:
            extra = run - prod(shape)
            reads = [source.runs(shift, shift + extra) for shift in shifts]
            write = acc.runs(0, extra)
            rows = starts
        else:
            counts = end - begin, *result[1:split]
            reads = [source.windows(shift + begin * steps[0], (*counts, run), (*steps[:split], 1)) for shift in shifts]
            write = acc.windows(0, (*counts, run), (*acc_steps, 1))
            rows = [*map(slice, counts), *starts]
        _add_up(program, reads, write)
        divisors = [each[begin:end] if isinstance(each, Tensor) else each for each in divided_by]
        written = Cells(program, final.tensor[:, begin:end], reused=final.reused)
        _keep(acc, rows, stride[last], divisors, written)


def _keep(acc: Cells, rows: Sequence[slice], stride: int, divided_by: Sequence[float | Tensor], final: Cells) -> None:
    """Append the calls that divide those sums, in some rows and at every `stride`-th cell, that are of windows."""
    program, count = acc.program, final.shape[-1]
    kept = Cells(program, acc.tensor[(slice(None), *rows)], reused=True)
    write = final.at()
    if stride > 1:
        program.calls.append(strided_copy(kept, final, stride))
        _divide(program, write, write, divided_by)
        return
    read = kept.at((*(slice(None),) * len(rows), slice(count)))
    if count >= SHORT_RUN or any(isinstance(divisor, Tensor) for divisor in divided_by):
        _divide(program, read, write, divided_by)
        return
    sums = acc.runs(0, 0)
    _divide(program, sums, sums, divided_by)
    program.calls.append(copy(read, write))


def _sparse(source: Cells, windows: Windows, divided_by: Sequence[float | Tensor], final: Cells) -> None:
    """Compute sums only where windows start, from strided cells."""
    program = source.program
    pitches = [prod(source.shape[axis + 1 :]) for axis in range(len(source.shape))]
    steps = [s * pitch for s, pitch in zip(windows.stride, pitches, strict=True)]
    shifts = (sum(t * pitch for t, pitch in zip(tap, pitches, strict=True)) for tap in _taps(windows.kernel))
    reads = [source.windows(shift, final.shape, steps) for shift in shifts]
    write = final.at()
    _add_up(program, reads, write)
    _divide(program, write, write, divided_by)


def _taps(kernel: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the cells of a window in raster order."""
    return list(product(*(range(k) for k in kernel)))


def _add_up(program: Program, reads: list[list[Tensor]], write: list[Tensor]) -> None:
    if len(reads) == 1:
        program.calls.append(copy(reads[0], write))
    else:
        program.calls.append(_add(reads[0], reads[1], write))
        program.calls += [_add(write, read, write) for read in reads[2:]]


def _add(one: list[Tensor], two: list[Tensor], out: list[Tensor]) -> Call:
    return lambda i: torch.add(one[i], two[i], out=out[i])


def _divide(program: Program, sums: list[Tensor], write: list[Tensor], divided_by: Sequence[float | Tensor]) -> None:
    """Append the calls that divide the sums into `write`, once for each divisor.

    They add 0.0 first: torch's sum starts from it, and so is never -0.0.
    """
    dtype = write[0].dtype
    rest = [divisor for divisor in divided_by if isinstance(divisor, Tensor) or divisor != 1.0]
    if len(rest) == 1 and isinstance(rest[0], float) and frexp(rest[0])[0] == 0.5 and rest[0] <= 2.0**20:
        # A power of two, whose mantissa is 0.5: multiplying by its inverse is exact, and add() does it as well.
        zero, inverse = torch.zeros((), dtype=dtype), 1.0 / rest[0]
        program.calls.append(lambda i: torch.add(zero, sums[i], alpha=inverse, out=write[i]))
        return
    program.calls.append(lambda i: torch.add(sums[i], 0.0, out=write[i]))
    program.calls += [_div(write, d.to(dtype) if isinstance(d, Tensor) else d) for d in rest]


def _div(cells: list[Tensor], divisor: float | Tensor) -> Call:
    return lambda i: cells[i].div_(divisor)


def can_divide(plan: Plan) -> bool:
    """Return whether a window isn't too large, and the sums have one divisor, or not too many."""
    windows, layer = plan.windows, plan.layer
    if prod(windows.kernel) > MAX_TAPS:
        return False
    if layer.family == "pool" and max(windows.dilation) > 1:
        return False
    override = sum_divisor(layer)
    if override is not None and abs(override) > EXACT_DIVISOR:
        return False
    if override is not None or prod(plan.result_shape) <= MAX_DIVISORS:
        return True
    include_pad = getattr(layer, "count_include_pad", True)
    counts = axis_counts(plan.plane_shape, windows, plan.result_shape, include_pad=include_pad)
    return all(each.uniform() for each in counts)


def costs(case: Case) -> tuple[float, float]:
    """Return the estimated costs of this kernel and of torch, if channels are first."""
    windows, result = case.windows, case.result
    stride, taps = windows.stride, prod(windows.kernel)
    wide = 2.0 if case.dtype == torch.float64 else 1.0
    spread = max(case.plane[-1], (result[-1] - 1) * stride[-1] + windows.kernel[-1]) / result[-1]
    add = 0.11 if spread < 1.5 else 0.17 if spread < 2.5 else 0.3
    waste = 1.0
    for size, length, s in zip(case.plane[:-1], result[:-1], stride[:-1], strict=True):
        waste *= size / length if s == 1 else 1.0
    copied = any(windows.padding) or case.plane[-1] % stride[-1] or case.dtype in HALVES
    cells: float = case.outputs * (taps * spread * waste * add * wide + 2 * wide + 4 / result[-1])
    cells += case.cells * (0.15 + 6 / case.plane[-1]) if copied else 0
    ours = (
        case.call
        + case.step * (taps + 3)
        + cells * (BOUND_SHARE if case.bound and case.dtype == torch.float32 else 1.0)
    )
    ours *= 1.5 if len(result) == 3 else 1.0
    return ours, EAGER_CALL + case.outputs * (6.0 + 1.3 * taps if len(result) == 1 else 4.5 + 0.55 * taps)


def is_faster(case: Case) -> bool:
    """Return whether this kernel is estimated to be faster than torch, if channels are first."""
    ours, eager = costs(case)
    return ours < 0.9 * eager


def _add_layer(plan: Plan, source: Cells, target: Cells, _: object) -> None:
    layer = plan.layer
    if (override := sum_divisor(layer)) is not None:
        divided_by: float | Tensor = float(override)
    else:
        divided_by = divisor(plan.plane_shape, plan.windows, plan.result_shape, include_pad=layer.count_include_pad)
    add_average(source, plan.windows, [divided_by], sum_dtype(plan.dtype), target)


def _pays(plan: Plan, case: Case) -> bool:
    if plan.channels is None:
        return is_faster(case)
    return plan.channels < 8 and case.outputs >= UNPREDICTED


AVERAGE_COST = Cost(2.3, 0.3, 0.1, 0.22)
"""The visited cells are between those that windows need and those of a padded plane, for each cell of a window."""


def work(plan: Plan) -> float:
    """Return the estimated work for a plane."""
    outputs = prod(plan.result_shape)
    cells = max(prod(padded_axes(plan.plane_shape, plan.windows, plan.result_shape)), outputs)
    return AVERAGE_COST.of(plan.dtype, cells, outputs, prod(plan.windows.kernel) * sqrt(outputs * cells))


RASTER_AVERAGE = Row(
    "raster average",
    ("avg_pool", "pool, sum"),
    add=_add_layer,
    work=work,
    scratch=scratch_bytes,
    plane_bytes=lambda plan: plan.cells * sum_dtype(plan.dtype).itemsize,
    pays=_pays,
    fits=can_divide,
    takes=lambda dtype: dtype.is_floating_point,
    channels_last=True,
)
