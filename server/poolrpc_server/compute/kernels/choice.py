"""When a kernel beats torch's own: estimates in nanoseconds of one thread, fitted to measurements.

The figures are those of one x86-64 machine (`python -m benchmarks kernels` measures another); what they decide is speed
alone, since every kernel gives the same answer. A kernel must be estimated to be somewhat faster to be chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, prod
from typing import TYPE_CHECKING

import torch

from poolrpc_server.compute.kernels.adaptive import uniform
from poolrpc_server.compute.kernels.blocks import TARGET_BYTES
from poolrpc_server.compute.kernels.separable_max import axis_stages, run_shifts
from poolrpc_server.compute.kernels.windows import Windows

if TYPE_CHECKING:
    from poolrpc_server.compute.kernels.windows import Sizes

HALVES = (torch.float16, torch.bfloat16)

CALL = 40_000
"""What a call of any of these kernels costs before it reads a cell."""

STEP = 9_000
"""What each torch call in it costs."""

TINY_CELLS, TINY_TAPS = 2_048, 16
"""NumPy's max is for so many cells of windows, each counted in every window that it is in, and cells of a window."""

PREDICTED, UNPREDICTED = 8_192, 16_384
"""Output cells of eager max: up to the first its branches are predicted, from the second on they are not."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a kernel would be called on.

    Attributes:
        dtype: Of the cells.
        planes: How many planes; images, where channels are last.
        plane: The shape of one, in memory.
        result: The shape of an output plane, in memory.
        windows: The windows, where they slide.

    """

    dtype: torch.dtype
    planes: int
    plane: Sizes
    result: Sizes
    windows: Windows | None = None

    @property
    def cells(self) -> int:
        """Cells of the input."""
        return self.planes * prod(self.plane)

    @property
    def outputs(self) -> int:
        """Cells of the output."""
        return self.planes * prod(self.result)

    @property
    def sliding(self) -> Windows:
        """The windows; those of a case that has none lie side by side."""
        return self.windows or Windows.tiling(uniform(self.plane, self.result) or self.plane)


def steps(windows: Windows) -> int:
    """Count the passes of separable_max over its cells."""
    last = len(run_shifts(windows.kernel[-1], 1)) + (windows.stride[-1] > 1)
    leading = zip(windows.kernel[:-1], windows.stride[:-1], strict=True)
    return last + sum(len(stage.offsets) - 1 for k, s in leading for stage in axis_stages(k, s, 0, 1, 8))


def _eager_max(case: Case) -> float:
    outputs = case.outputs
    mispredicted = 2 if outputs >= UNPREDICTED else 1.5 if outputs >= PREDICTED else 1
    return outputs * (6 + 0.6 * prod(case.sliding.kernel)) * mispredicted


def tiny_max_pays(case: Case) -> bool:
    """Tell whether tiny_max beats torch, as calls come: with nothing of either in the CPU's caches."""
    taps = prod(case.sliding.kernel)
    return taps <= TINY_TAPS and taps * case.outputs <= TINY_CELLS


def max_pays(case: Case) -> bool:
    """Tell whether separable_max beats torch on contiguous planes."""
    windows, width = case.sliding, case.plane[-1]
    kernel, stride = windows.kernel, windows.stride
    passes = steps(windows)
    fixed = CALL + STEP * passes
    if len(kernel) == 1 and case.dtype.is_floating_point:
        # torch's max_pool1d takes each tap of a whole row at once, and vectorises stride 1.
        if case.dtype in HALVES:
            return fixed + case.cells * (0.6 + 0.1 * passes + 7 / width) < 0.9 * case.outputs * (1 + 0.8 * kernel[0])
        eager = 0.35 + 0.08 * kernel[0] if stride[0] == 1 else 0.2 + 0.33 * kernel[0]
        ours = case.cells * (0.4 + 0.1 * passes + 7 / width) * case.dtype.itemsize / 4
        return fixed + ours < 0.9 * case.outputs * eager
    copied = kernel[-1] > stride[-1] or any(windows.padding) or width % stride[-1]
    rows = 14 if copied else 5
    return fixed + case.cells * (0.5 * max(case.dtype.itemsize, 2) / 4 + rows / width) < 0.95 * _eager_max(case)


def max_last_pays(case: Case) -> bool:
    """Tell whether separable_max beats torch where channels are last."""
    windows, channels, outputs = case.sliding, case.plane[-1], case.outputs
    if channels > 32:
        return all(s == 1 for s in windows.stride) and prod(windows.kernel) >= 9 and outputs >= 1 << 18
    return outputs >= (PREDICTED if channels <= 8 else 1 << 16)


def indexed_max_pays(case: Case) -> bool:
    """Tell whether indexed_max beats torch on contiguous planes."""
    passes, width = steps(case.sliding), case.plane[-1]
    short = case.dtype.itemsize <= 2 and prod(case.plane) <= 1 << 16
    cell = 1.5 + 12 / width + 0.12 * passes if short else 2.6 + 20 / width + 0.25 * passes
    eager = _eager_max(case) / (2 if len(case.plane) == 1 else 1)
    return 3 * CALL + STEP * (passes + 14) + case.cells * cell < 0.95 * eager


def _averages(case: Case) -> tuple[float, float]:
    windows, result = case.sliding, case.result
    stride, taps = windows.stride, prod(windows.kernel)
    wide = 2.0 if case.dtype == torch.float64 else 1.0
    spread = max(case.plane[-1], (result[-1] - 1) * stride[-1] + windows.kernel[-1]) / result[-1]
    add = 0.11 if spread < 1.5 else 0.17 if spread < 2.5 else 0.3
    waste = 1.0
    for size, length, s in zip(case.plane[:-1], result[:-1], stride[:-1], strict=True):
        waste *= size / length if s == 1 else 1.0
    copied = any(windows.padding) or case.plane[-1] % stride[-1] or case.dtype in HALVES
    ours: float = CALL + STEP * (taps + 3)
    ours += case.outputs * (taps * spread * waste * add * wide + 2 * wide + 4 / result[-1])
    ours += case.cells * (0.15 + 6 / case.plane[-1]) if copied else 0
    ours *= 1.5 if len(result) == 3 else 1.0
    return ours, case.outputs * (6.0 + 1.3 * taps if len(result) == 1 else 4.5 + 0.55 * taps)


def avg_pays(case: Case) -> bool:
    """Tell whether raster_average beats torch on contiguous planes."""
    ours, eager = _averages(case)
    return ours < 0.9 * eager


def avg_last_pays(case: Case) -> bool:
    """Tell whether raster_average beats torch where channels are last."""
    return case.plane[-1] < 8 and case.outputs >= UNPREDICTED


def lp_pays(case: Case, norm: float) -> bool:
    """Tell whether lp beats torch on contiguous planes."""
    if norm == inf:
        return max_pays(case)
    ours, eager = _averages(case)
    wide = case.dtype.itemsize / 4
    eager += case.cells if case.dtype in HALVES else (0.5 * case.cells + 1.5 * case.outputs) * wide
    return ours + (0.15 * case.cells + 0.3 * case.outputs) * wide < 0.9 * eager


def whole_max_pays(case: Case) -> bool:
    """Tell whether whole_plane beats torch's adaptive max to one cell."""
    return case.cells >= PREDICTED


def adaptive_max_pays(case: Case) -> bool:
    """Tell whether adaptive_max beats torch on contiguous planes."""
    cells, outputs, item = case.cells, case.outputs, case.dtype.itemsize
    if case.plane == case.result:
        return True
    if outputs >= UNPREDICTED or cells >= 1 << 17:
        width = float((cells / outputs) ** (1 / len(case.result)))
        eager = (cells * (0.7 + 6 / width) + outputs * 15) * (1.5 if len(case.result) == 3 else 1.0)
    else:
        eager = cells * 0.8 + outputs * 8
    if uniform(case.plane, case.result) is not None:
        ours = 2 * CALL + cells * (0.45 + 8 / case.plane[-1]) * max(item, 2) / 4
    else:
        # Each index of the last axis costs a call within torch, for each block.
        calls = case.result[-1] * (1 + cells * item / TARGET_BYTES)
        ours = 4 * CALL + (cells * (0.8 + 10 / case.plane[-1]) + outputs * 2.5) * max(1.0, item / 4) + calls * 300
    return ours < 0.85 * eager


def adaptive_avg_pays(case: Case) -> bool:
    """Tell whether adaptive_avg beats torch on contiguous planes, its windows being uniform."""
    if case.plane == case.result:
        return True
    return not (len(case.plane) == 3 and case.dtype in HALVES) and avg_pays(case)
