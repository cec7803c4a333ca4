"""Average pooling that adds the cells of each window in torch's own order, over contiguous runs of memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import frexp, prod

import torch
from torch import Tensor

from poolrpc_server.compute.kernels.blocks import Call, Cells, Program, every, narrowing, padded, padded_shape, scratch
from poolrpc_server.compute.kernels.windows import Sizes, Windows

# From this stride on, reading strided cells costs less than adding cells that no window starts at.
_SPARSE_STRIDE = 8

# One more run of memory costs about as much as this many cells in a run.
_SHORT_RUN = 64


MOST_TAPS = 1024
"""A window of more cells than this is left to torch: each is a call of its own."""

MOST_DIVISORS = 1 << 17
"""An output plane of more cells than this is left to torch where its cells are divided by different counts."""


def divisible(plane: Sizes, windows: Windows, result: Sizes, *, include_pad: bool) -> bool:
    """Tell whether `divisor` gives one number, or one a cell of an output plane that isn't too large."""
    counts = _axis_counts(plane, windows, result, include_pad=include_pad)
    return prod(result) <= MOST_DIVISORS or all(each.uniform() for each in counts)


@lru_cache(maxsize=64)
def divisor(plane: Sizes, windows: Windows, result: Sizes, *, include_pad: bool) -> float | Tensor:
    """Give what each sum is divided by: one number, or a float64 tensor of the output plane's shape."""
    counts = _axis_counts(plane, windows, result, include_pad=include_pad)
    if all(each.uniform() for each in counts):
        return float(prod(each.at(0) for each in counts))
    cells = torch.ones((), dtype=torch.float64)
    for each in counts:
        cells = cells.unsqueeze(-1) * torch.tensor([each.at(i) for i in range(each.length)], dtype=torch.float64)
    return cells


@dataclass(frozen=True)
class _Counts:
    """How many cells of one axis each window counts; padding counts, but not what ceil_mode adds beyond it."""

    size: int
    kernel: int
    stride: int
    padding: int
    length: int
    include_pad: bool

    def at(self, index: int) -> int:
        start = index * self.stride - self.padding
        stop = min(start + self.kernel, self.size + self.padding)
        return stop - start if self.include_pad else min(stop, self.size) - max(start, 0)

    def uniform(self) -> bool:
        # Counts rise, stay and fall along an axis, so three of them tell of all.
        return self.at(0) == self.at(self.length // 2) == self.at(self.length - 1)


def _axis_counts(plane: Sizes, windows: Windows, result: Sizes, *, include_pad: bool) -> list[_Counts]:
    axes = zip(plane, windows.kernel, windows.stride, windows.padding, result, strict=True)
    return [_Counts(*axis, include_pad) for axis in axes]


def avg_pool(x: Tensor, windows: Windows, divided_by: float | Tensor, out: Tensor) -> None:
    """Write the averaged planes of x (P, *plane) into out (P, *output_plane); both are contiguous."""
    program = Program(x.shape[0], prod(x.shape[1:]) * sum_dtype(x.dtype).itemsize)
    source, target = Cells(program, x, reused=False), Cells(program, out, reused=False)
    add_average(source, windows, [divided_by], sum_dtype(x.dtype), target)
    program.run()


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which torch adds up the cells of a window."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def add_average(
    source: Cells, windows: Windows, divided_by: Sequence[float | Tensor], sums: torch.dtype, target: Cells
) -> None:
    """Append the calls that add up the source's windows in dtype `sums` and divide them, one divisor after another."""
    program, result = source.program, target.shape
    last = len(result) - 1
    # The stride of a single window means nothing, and would have memory padded for it.
    stride = tuple(s if length > 1 else 1 for s, length in zip(windows.stride, result, strict=True))
    windows = replace(windows, stride=stride)
    shape = padded_shape(source.shape, windows.padding, windows.needs(tuple(result)))
    dense = stride[last] < _SPARSE_STRIDE
    if dense and narrowing(sums.itemsize, stride[last]):
        shape[last] += -shape[last] % stride[last]
    if list(source.shape) != shape or source.tensor.dtype != sums:
        source = padded(source, windows.padding, shape, 0.0, sums)

    final = target if target.tensor.dtype == sums else scratch(program, target.tensor, result, sums)
    (_dense if dense else _sparse)(source, windows, divided_by, final)
    if final is not target:
        read, write = final.at(), target.at()
        program.calls.append(lambda i: write[i].copy_(read[i]))


def _dense(source: Cells, windows: Windows, divided_by: Sequence[float | Tensor], final: Cells) -> None:
    """Sum at every cell of the last axes, where a tap is one run of memory, and keep the sums that windows start at."""
    program, stride = source.program, windows.stride
    shape, result = source.shape, final.shape
    last = len(shape) - 1
    split = last
    while split > 0 and prod(shape[split:]) * (shape[split - 1] / result[split - 1] - 1) < _SHORT_RUN:
        split -= 1
    sizes = [*result[:split], *shape[split:]]
    acc = scratch(program, source.tensor, sizes)
    pitches = [prod(shape[axis + 1 :]) for axis in range(last + 1)]
    steps = [s * pitch for s, pitch in zip(stride, pitches, strict=True)]
    run = sum((n - 1) * step for n, step in zip(result[split:], steps[split:], strict=True)) + 1
    shifts = [sum(t * pitch for t, pitch in zip(tap, pitches, strict=True)) for tap in _taps(windows.kernel)]
    if split == 0:
        extra = run - prod(shape)
        reads = [source.runs(shift, shift + extra) for shift in shifts]
        write = acc.runs(0, extra)
    else:
        reads = [source.windows(shift, (*result[:split], run), (*steps[:split], 1)) for shift in shifts]
        acc_steps = [prod(sizes[axis + 1 :]) for axis in range(split)]
        write = acc.windows(0, (*result[:split], run), (*acc_steps, 1))
    _add_up(program, reads, write)

    starts = (slice(0, (n - 1) * s + 1, s) for n, s in zip(result[split:last], stride[split:last], strict=True))
    keep = (*(slice(None),) * split, *starts)
    kept = Cells(program, acc.tensor[(slice(None), *keep)], reused=True)
    write = final.at()
    if stride[last] > 1:
        program.calls.append(every(kept, final, stride[last]))
        _divide(program, write, write, divided_by)
        return
    rows = kept.at((*(slice(None),) * last, slice(result[last])))
    if result[last] >= _SHORT_RUN or any(isinstance(divisor, Tensor) for divisor in divided_by):
        _divide(program, rows, write, divided_by)
        return
    sums = acc.runs(0, 0)
    _divide(program, sums, sums, divided_by)
    program.calls.append(lambda i: write[i].copy_(rows[i]))


def _sparse(source: Cells, windows: Windows, divided_by: Sequence[float | Tensor], final: Cells) -> None:
    """Sum only where windows start, over strided cells."""
    program = source.program
    pitches = [prod(source.shape[axis + 1 :]) for axis in range(len(source.shape))]
    steps = [s * pitch for s, pitch in zip(windows.stride, pitches, strict=True)]
    shifts = (sum(t * pitch for t, pitch in zip(tap, pitches, strict=True)) for tap in _taps(windows.kernel))
    reads = [source.windows(shift, final.shape, steps) for shift in shifts]
    write = final.at()
    _add_up(program, reads, write)
    _divide(program, write, write, divided_by)


def _taps(kernel: Sequence[int]) -> list[tuple[int, ...]]:
    """The cells of a window in raster order."""
    return list(product(*(range(k) for k in kernel)))


def _add_up(program: Program, reads: list[list[Tensor]], write: list[Tensor]) -> None:
    if len(reads) == 1:
        program.calls.append(lambda i: write[i].copy_(reads[0][i]))
    else:
        program.calls.append(_add(reads[0], reads[1], write))
        program.calls += [_add(write, read, write) for read in reads[2:]]


def _add(one: list[Tensor], two: list[Tensor], out: list[Tensor]) -> Call:
    return lambda i: torch.add(one[i], two[i], out=out[i])


def _divide(program: Program, sums: list[Tensor], write: list[Tensor], divided_by: Sequence[float | Tensor]) -> None:
    """Divide into `write`, once for each divisor; 0.0 is added since torch's sum starts from it and is never -0.0."""
    dtype = write[0].dtype
    rest = [divisor for divisor in divided_by if isinstance(divisor, Tensor) or divisor != 1.0]
    if len(rest) == 1 and isinstance(rest[0], float) and frexp(rest[0])[0] == 0.5 and rest[0] <= 2.0**20:  # noqa: PLR2004
        # A power of two (0.5 is its mantissa): multiplying by its inverse is the same, and add() does it on its way.
        zero, inverse = torch.zeros((), dtype=dtype), 1.0 / rest[0]
        program.calls.append(lambda i: torch.add(zero, sums[i], alpha=inverse, out=write[i]))
        return
    program.calls.append(lambda i: torch.add(sums[i], 0.0, out=write[i]))
    program.calls += [_div(write, d.to(dtype) if isinstance(d, Tensor) else d) for d in rest]


def _div(cells: list[Tensor], divisor: float | Tensor) -> Call:
    return lambda i: cells[i].div_(divisor)
