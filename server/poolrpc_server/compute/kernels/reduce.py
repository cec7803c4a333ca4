"""Reductions of windows and of whole planes, by their formulas, in torch's operators on any device."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import nan, prod
from typing import TYPE_CHECKING, Any

import torch

from poolrpc.layers.reductions import Reduction, reduction_of
from poolrpc_server.compute.kernels.blocks import TARGET_BYTES
from poolrpc_server.compute.kernels.cells import upload
from poolrpc_server.compute.kernels.counts import divisor
from poolrpc_server.compute.kernels.padded import divided, highest, lowest, sum_dtype
from poolrpc_server.compute.kernels.windows import Sizes, Windows, taps_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc_server.compute.kernels.eager import Operator, Pooled


class PlaneCells:
    """The cells of whole planes, (planes, cells); a value has one number for each plane."""

    xp = torch

    def __init__(self, x: torch.Tensor, count: float | None = None) -> None:
        """Create the cells of planes.

        Args:
            x: The planes, in the dtype of the arithmetic.
            count: The number of cells that divides a mean. None: that of a plane.

        """
        self._x = x
        self.count = x.shape[-1]
        self._divisor = float(self.count) if count is None else count

    def max(self, of: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """As in WindowCells."""
        if not self.count:
            return self._empty(lowest(self._x.dtype))
        return (self._x if of is None else of(self._x)).amax(-1)

    def min(self) -> torch.Tensor:
        """As in WindowCells."""
        return self._x.amin(-1) if self.count else self._empty(highest(self._x.dtype))

    def median(self) -> torch.Tensor:
        """As in WindowCells."""
        if not self.count:
            return self._empty(nan if self._x.dtype.is_floating_point else highest(self._x.dtype))
        return self._x.median(-1).values

    def sum(self, of: Callable[..., torch.Tensor] | None = None, *values: torch.Tensor) -> torch.Tensor:
        """As in WindowCells."""
        return (self._x if of is None else of(self._x, *(each.unsqueeze(-1) for each in values))).sum(-1)

    def mean(self, of: Callable[..., torch.Tensor] | None = None, *values: torch.Tensor) -> torch.Tensor:
        """As in WindowCells."""
        return divided(self.sum(of, *values), max(self._divisor, 1.0))

    def _empty(self, value: float) -> torch.Tensor:
        return self._x.new_full(self._x.shape[:-1], value)


class SlidingCells:
    """The cells of sliding windows; a value has one number for each window, (planes, *result).

    A window's cells are taken one after the other, in raster order, from all windows at once. So no copy of a cell is
    made for each of its windows, and sums are added as torch's averages add them.
    """

    xp = torch

    def __init__(self, x: torch.Tensor, windows: Windows, result: Sizes, *, include_pad: bool) -> None:
        """Create the cells of windows over planes (planes, *plane), in the dtype of the arithmetic."""
        plane = tuple(x.shape[1:])
        self._x, self._shape = x, (x.shape[0], *result)
        taps = _remembered_taps if prod(windows.kernel) <= REMEMBERED_CELLS else taps_of
        self._taps = taps(plane, windows, result)
        self._divisor = divisor(plane, windows, result, include_pad=include_pad)
        self.count: Any = divisor(plane, windows, result, include_pad=False)
        if isinstance(self.count, torch.Tensor):
            self.count = upload(self.count, x, torch.float64 if x.dtype == torch.float64 else torch.float32)

    def max(self, of: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """As in WindowCells."""
        return self._extreme(self._x if of is None else of(self._x), torch.maximum, lowest(self._x.dtype))

    def min(self) -> torch.Tensor:
        """As in WindowCells."""
        return self._extreme(self._x, torch.minimum, highest(self._x.dtype))

    def _extreme(self, x: torch.Tensor, better: Callable[..., torch.Tensor], worst: float) -> torch.Tensor:
        best = x.new_full(self._shape, worst)
        for read, write in self._taps:
            better(best[write], x[read], out=best[write])
        return best

    def median(self) -> torch.Tensor:
        """As in WindowCells."""
        x = self._x
        # Behind the cells of a window are cells that sort last, as many as it lacks.
        cells = x.new_full((*self._shape, max(1, len(self._taps))), highest(x.dtype))
        for number, (read, write) in enumerate(self._taps):
            cells[write][..., number] = x[read]
        cells = cells.sort(-1).values
        count = torch.as_tensor(self.count, device=x.device)
        middles = count.sub(1).div(2, rounding_mode="floor").clamp(min=0).long().expand(self._shape).unsqueeze(-1)
        chosen = cells.gather(-1, middles).squeeze(-1)
        if not x.dtype.is_floating_point:
            return chosen
        last = cells[..., -1]
        return torch.where(last.isnan(), last, chosen).masked_fill_(count == 0, nan)

    def sum(self, of: Callable[..., torch.Tensor] | None = None, *values: torch.Tensor) -> torch.Tensor:
        """As in WindowCells."""
        x = self._x
        if of is not None and not values:  # once for each cell, rather than for each window that it is in
            x, of = of(x), None
        total = x.new_zeros(self._shape)
        for read, write in self._taps:
            total[write] += x[read] if of is None else of(x[read], *(each[write] for each in values))
        return total

    def mean(self, of: Callable[..., torch.Tensor] | None = None, *values: torch.Tensor) -> torch.Tensor:
        """As in WindowCells."""
        counts = self._divisor
        some = counts.clamp(min=1) if isinstance(counts, torch.Tensor) else max(counts, 1.0)
        return divided(self.sum(of, *values), some)


REMEMBERED_CELLS = 1024
"""The size of the largest windows whose taps are remembered."""

_remembered_taps = lru_cache(maxsize=64)(taps_of)


def arithmetic_dtype(reduction: Reduction, dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the dtype in which a reduction of cells of a dtype is computed on a device."""
    if not dtype.is_floating_point or reduction.arithmetic == "cells":
        return dtype
    # Metal has no float64.
    return sum_dtype(dtype) if reduction.arithmetic == "sums" or device == "mps" else torch.float64


def pool(layer: Any, dtype: torch.dtype, plane: Sizes) -> Operator:  # noqa: ANN401 - a Pool
    """Return the operator of a layer that reduces sliding windows."""
    reduction, windows = reduction_of(layer.reduce), Windows.of(layer.geometry())
    few = prod(windows.kernel) > prod(plane)  # few windows of many cells

    def run(x: torch.Tensor, *_: object) -> Pooled:
        cells = x.to(arithmetic_dtype(reduction, dtype, x.device.type)).flatten(0, 1)
        if few:
            made = _window_by_window(reduction, cells, windows, plane, include_pad=layer.count_include_pad)
        else:
            made = reduction.of(SlidingCells(cells, windows, plane, include_pad=layer.count_include_pad))
        return made.to(dtype).view(*x.shape[:2], *plane), None

    return run


def _window_by_window(
    reduction: Reduction, x: torch.Tensor, windows: Windows, result: Sizes, *, include_pad: bool
) -> torch.Tensor:
    """Reduce windows one at a time, each of all planes."""
    axes = [*zip(windows.stride, windows.kernel, windows.padding, windows.dilation, strict=True)]
    counts = divisor(tuple(x.shape[1:]), windows, result, include_pad=include_pad)
    made = x.new_empty((x.shape[0], *result))
    for index in product(*map(range, result)):
        cells: list[slice] = [slice(None)]
        for i, (stride, kernel, before, dilation) in zip(index, axes, strict=True):
            start = i * stride - before
            first = start if start >= 0 else start % dilation
            cells.append(slice(first, max(first, start + dilation * (kernel - 1) + 1), dilation))
        count = float(counts[index]) if isinstance(counts, torch.Tensor) else counts
        chosen: Any = (slice(None), *index)
        made[chosen] = reduction.of(PlaneCells(x[tuple(cells)].flatten(1), count))
    return made


def global_pool(layer: Any, dtype: torch.dtype, plane: Sizes) -> Operator:  # noqa: ANN401 - a GlobalPool
    """Return the operator of a layer that reduces whole planes."""
    reduction = reduction_of(layer.reduce)

    def run(x: torch.Tensor, *_: object) -> Pooled:
        cells = x.to(arithmetic_dtype(reduction, dtype, x.device.type)).flatten(2)
        return reduction.of(PlaneCells(cells)).to(dtype).view(*x.shape[:2], *plane), None

    return run


def reduction_bytes(layer: Any, dtype: torch.dtype, cells: int, outputs: int) -> int:  # noqa: ANN401 - a Pool or GlobalPool
    """Return an upper bound of the memory that a layer's operator takes for a plane, apart from its output, in bytes.

    Args:
        layer: The layer.
        dtype: The dtype of the cells.
        cells: The number of cells of a plane, with its channels if they are last.
        outputs: The same for an output plane.

    """
    reduction = reduction_of(layer.reduce)
    item = arithmetic_dtype(reduction, dtype, "cpu").itemsize
    # The cells in another dtype, and as functions of them; the numbers of the windows, and a function of their cells.
    nbytes = FUNCTIONS * cells * item + VALUES * outputs * item
    if reduction.gathers:  # and torch sorts copies of them, with their numbers
        visits = cells if layer.family == "global_pool" else outputs * prod(layer.window((0,) * layer.spatial_dims))
        nbytes += visits * (2 * item + torch.int64.itemsize)
    return nbytes


def reduction_work(layer: Any, cells: int, outputs: int, visits: int) -> float:  # noqa: ANN401 - a Pool or GlobalPool
    """Return the work of a layer's operator for one plane, in nanoseconds of one thread.

    Args:
        layer: The layer.
        cells: The number of cells of a plane.
        outputs: The number of cells of an output plane.
        visits: The number of cells of all windows together.

    """
    reduction = reduction_of(layer.reduce)
    # Each cell of a window, or else each window, is a few calls for all planes of a block.
    calls = min(visits // outputs, outputs) if layer.family == "pool" else 1
    planes = max(1, TARGET_BYTES // (torch.float64.itemsize * cells))
    cell, visit = reduction.work
    return PLANE_NS + cell * cells + OUTPUT_NS * outputs + visit * visits + CALL_NS * calls / planes


PLANE_NS, OUTPUT_NS, CALL_NS = 20.0, 2.0, 6_000.0
"""The work for a plane, for a cell of the output, and for the calls of torch for a cell of all windows."""

FUNCTIONS, VALUES = 4, 8
"""The most copies of all cells, and of the outputs, that the formula of a reduction has at a time."""
