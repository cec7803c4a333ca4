"""Results by definition, in plain NumPy and Python, for what torch.nn lacks."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    import poolrpc as p

HALVES = (torch.float16, torch.bfloat16)


def sides(layer: Any, plane: tuple[int, ...]) -> list[tuple[int, int, int, int, int]]:
    """Return (kernel, stride, before, after, dilation) for each axis of a plane."""
    made = []
    for axis, n in enumerate(plane):

        def of(value: Any, axis: int = axis) -> Any:
            return value[axis] if isinstance(value, tuple) else value

        k, d = of(layer.kernel_size), of(getattr(layer, "dilation", 1))
        s = k if layer.stride is None else of(layer.stride)
        padding = of(layer.padding)
        if isinstance(padding, str):
            total = max(0, ((n + s - 1) // s - 1) * s + d * (k - 1) + 1 - n)
            before, after = total // 2, total - total // 2
            padding = (after, before) if padding == "same_lower" else (before, after)
        before, after = padding if isinstance(padding, tuple) else (padding, padding)
        made.append((k, s, before, after, d))
    return made


def length(  # noqa: PLR0913, PLR0917 - the parameters of the rule
    n: int, k: int, s: int, before: int, after: int, d: int, *, ceil: bool
) -> int:
    """Return the number of windows of an axis."""
    rest = n + before + after - d * (k - 1) - 1
    if not ceil:
        return rest // s + 1
    out = (rest + s - 1) // s + 1
    return out - 1 if (out - 1) * s >= n + before else out


def windows(layer: Any, plane: tuple[int, ...]) -> tuple[tuple[int, ...], Iterator[tuple[Any, ...]]]:
    """Return the shape of the output, and for each window its index, its cells in raster order, and how many count.

    A cell is its position in the plane. The cells that count with the padding are a number.
    """
    axes = []
    for n, (k, s, before, after, d) in zip(plane, sides(layer, plane), strict=True):
        axis = []
        for o in range(length(n, k, s, before, after, d, ceil=layer.ceil_mode)):
            positions = [o * s - before + d * j for j in range(k)]
            real = [each for each in positions if 0 <= each < n]
            axis.append((real, sum(-before <= each < n + after for each in positions), positions))
        axes.append(axis)
    shape = tuple(map(len, axes))

    def each() -> Iterator[tuple[Any, ...]]:
        for index in product(*map(range, shape)):
            chosen = [axis[i] for axis, i in zip(axes, index, strict=True)]
            first = [next((c for c in positions if c >= 0), 0) for _, _, positions in chosen]
            yield index, [*product(*(real for real, _, _ in chosen))], prod(count for _, count, _ in chosen), first

    return shape, each()


def defined(layer: p.Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the output of a MaxPool or AvgPool with any padding, and its indices if it returns them."""
    dims = layer.spatial_dims
    plane = tuple(x.shape[-dims:])
    shape, made = windows(layer, plane)
    wide = x.float() if x.dtype in HALVES else x
    cells = np.moveaxis(wide.numpy().reshape(-1, *plane), 0, -1)
    output = np.zeros((*shape, cells.shape[-1]), cells.dtype)
    indices = np.zeros(output.shape, np.int64)
    compute = _max if layer.family == "max_pool" else _mean
    with np.errstate(all="ignore"):
        for index, places, counted, first in made:
            compute(layer, cells, places, counted, first, output[index], indices[index])
    lead = x.shape[:-dims]
    result = torch.from_numpy(np.moveaxis(output, -1, 0).reshape(*lead, *shape)).to(x.dtype)
    chosen = torch.from_numpy(np.moveaxis(indices, -1, 0).reshape(*lead, *shape).copy())
    return result, chosen if layer.returns_indices else None


def reduced(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the output of a Pool or GlobalPool in float64, or in the dtype of integers, window by window."""
    dims = layer.spatial_dims
    plane = tuple(x.shape[-dims:])
    floats = x.is_floating_point()
    limits = (-np.inf, np.inf) if floats else (torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max)
    # The cells of a plane are its first axes.
    cells = np.moveaxis((x.double() if floats else x.to(torch.int64)).numpy().reshape(-1, *plane), 0, -1)
    if layer.family == "global_pool":
        shape, made = (1,) * dims, [((0,) * dims, [*product(*map(range, plane))], prod(plane), None)]
    else:
        shape, made = windows(layer, plane)
    output = np.zeros((*shape, cells.shape[-1]), cells.dtype)
    with np.errstate(all="ignore"):
        for index, places, counted, _ in made:
            count = counted if getattr(layer, "count_include_pad", False) else len(places)
            window = (
                np.stack([cells[place] for place in places]) if places else np.zeros((0, cells.shape[-1]), cells.dtype)
            )
            output[index] = _value(layer.reduce, window, count, limits)
    return torch.from_numpy(np.moveaxis(output, -1, 0).reshape(*x.shape[:-dims], *shape).copy())


def blurred(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the output of a BlurPool in float64: timm's padding by reflection, and taps of a power of (0.5, 0.5)."""
    k, s = layer.kernel_size, layer.stride
    pad = ((s - 1) + (k - 1)) // 2
    taps = (np.poly1d((0.5, 0.5)) ** (k - 1)).coeffs if k > 1 else np.ones(1)
    cells = x.double().numpy().reshape(-1, *x.shape[-2:])
    cells = np.pad(cells, ((0, 0), (pad, pad), (pad, pad)), "reflect")
    rows, columns = ((size - k) // s + 1 for size in cells.shape[1:])
    output = np.zeros((len(cells), rows, columns))
    with np.errstate(all="ignore"):
        for i, j in product(range(rows), range(columns)):
            window = cells[:, i * s : i * s + k, j * s : j * s + k]
            output[:, i, j] = (window * np.outer(taps, taps)).sum((1, 2))
    return torch.from_numpy(output.reshape(*x.shape[:-2], rows, columns))


def _value(reduce: Any, x: Any, count: int, limits: tuple[Any, Any]) -> Any:  # noqa: C901, PLR0911 - a case for each reduction
    """Return the reduction of the first axis of a window's cells."""
    integers = x.dtype.kind == "i"
    if reduce == "max":
        return x.max(0, initial=limits[0])
    if reduce == "min":
        return x.min(0, initial=limits[1])
    if reduce == "sum":
        return x.sum(0)
    if reduce == "mean":
        return [_truncated(int(total), max(count, 1)) for total in x.sum(0)] if integers else x.sum(0) / max(count, 1)
    if reduce == "median":
        if not len(x):
            return limits[1] if integers else np.nan
        middle = np.sort(x, 0)[(len(x) - 1) // 2]
        return middle if integers else np.where(np.isnan(x).any(0), np.nan, middle)
    if reduce in {"std", "var"}:
        if len(x) < 2:
            return np.nan
        var = x.var(0, ddof=1)
        return np.sqrt(var) if reduce == "std" else var
    name = type(reduce).__name__
    if name == "Norm":
        if reduce.p == np.inf:
            return np.abs(x).max(0, initial=-np.inf)
        return (np.abs(x) ** reduce.p).sum(0) ** (1 / reduce.p)
    if name == "PowerMean":
        return ((np.maximum(x, reduce.eps) ** reduce.p).sum(0) / max(count, 1)) ** (1 / reduce.p)
    if name == "LogSumExp":
        # Without NaN from inf - inf.
        m = x.max(0, initial=-np.inf)
        m = np.where(np.isfinite(m), m, 0)
        return np.log(np.exp((x - m) * reduce.r).sum(0) / max(count, 1)) / reduce.r + m
    assert name == "Softmax"
    tx = reduce.t * (x - (x.max(0, initial=-np.inf) if reduce.t >= 0 else x.min(0, initial=np.inf)))
    return (np.exp(tx) * x).sum(0) / np.exp(tx).sum(0)


def _max(_: Any, cells: Any, places: Any, __: int, first: list[int], output: Any, indices: Any) -> None:
    plane = cells.shape[:-1]
    output[...] = -np.inf if cells.dtype.kind == "f" else np.iinfo(cells.dtype).min
    indices[...] = sum(c * prod(plane[axis + 1 :]) for axis, c in enumerate(first))
    for place in places:
        # The first of equal cells, and the last NaN.
        taken = (cells[place] > output) | (cells[place] != cells[place])
        output[taken] = cells[place][taken]
        indices[taken] = np.ravel_multi_index(place, plane)


def _mean(layer: Any, cells: Any, places: Any, counted: int, _: Any, output: Any, __: Any) -> None:
    for place in places:
        output += cells[place]
    divisor = getattr(layer, "divisor_override", None) or (counted if layer.count_include_pad else len(places))
    if cells.dtype.kind == "f":
        output /= cells.dtype.type(divisor)
    else:
        output[...] = [_truncated(int(total), divisor) for total in output]


def _truncated(total: int, divisor: int) -> int:
    quotient = abs(total) // abs(divisor)
    wrapped = quotient if (total < 0) == (divisor < 0) else -quotient
    return (wrapped + 2**63) % 2**64 - 2**63
