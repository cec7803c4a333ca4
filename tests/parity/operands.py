"""Definitions of the layers that take offsets, weights or boxes, in NumPy's float64, cell by cell."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import poolrpc as p

Array = np.ndarray[Any, np.dtype[Any]]


def reduced(reduce: Any, cells: Array, weights: Array) -> float:  # noqa: C901, PLR0911 - a case for each reduction
    """Return what becomes of cells, each of which counts as often as its weight says."""
    kind = reduce if isinstance(reduce, str) else type(reduce).__name__
    cells, weights = cells[weights > 0], weights[weights > 0]
    total = weights.sum()
    if not len(cells):
        return {"max": -math.inf, "min": math.inf, "sum": 0.0, "Norm": 0.0}.get(kind, math.nan)
    mean = (cells * weights).sum() / total
    match kind:
        case "max":
            return cells.max()
        case "min":
            return cells.min()
        case "sum":
            return (cells * weights).sum()
        case "mean":
            return mean
        case "median":
            order = np.argsort(cells)
            return math.nan if np.isnan(cells).any() else cells[order][np.cumsum(weights[order]) >= total / 2][0]
        case "var" | "std":
            variance = (weights * (cells - mean) ** 2).sum() / (total - 1) if total > 1 else math.nan
            return variance if kind == "var" else math.sqrt(variance)
        case "Norm":
            if reduce.p == math.inf:
                return np.abs(cells).max()
            return (weights * np.abs(cells) ** reduce.p).sum() ** (1 / reduce.p)
        case "PowerMean":
            return ((weights * np.maximum(cells, reduce.eps) ** reduce.p).sum() / total) ** (1 / reduce.p)
        case "LogSumExp":
            m = cells.max()
            return math.log((weights * np.exp(reduce.r * (cells - m))).sum() / total) / reduce.r + m
        case "Softmax":
            shares = weights * np.exp(reduce.t * (cells - cells.max()))
            return (shares * cells).sum() / shares.sum()
    raise NotImplementedError(f"a definition of {kind} with weights")


def segments(layer: p.SegmentPool, x: Array, offsets: Array) -> Array:
    """Return the output of SegmentPool for planes (..., L)."""
    planes = x.reshape(-1, x.shape[-1]).astype(np.float64)
    out = [[reduced(layer.reduce, plane[a:b], np.ones(b - a)) for a, b in pairwise(offsets)] for plane in planes]
    return np.array(out, np.float64).reshape(*x.shape[:-1], len(offsets) - 1)


def weighted(layer: p.Layer, x: Array, weights: Array) -> Array:
    """Return the output of GlobalPool with weights for (N, C, spatial...)."""
    dims = layer.spatial_dims
    out = [
        [reduced(layer.reduce, plane.reshape(-1).astype(np.float64), row.reshape(-1)) for plane in image]
        for image, row in zip(x, weights.astype(np.float64), strict=True)
    ]
    return np.array(out, np.float64).reshape(*x.shape[:2], *(1,) * dims)


def pairs(size: int | tuple[int, ...]) -> tuple[int, ...]:
    """Return an output size as (height, width)."""
    return size if isinstance(size, tuple) else (size, size)


def roi_pool(layer: p.RoIPool, x: Array, boxes: Array) -> Array:
    """Return torchvision's RoIPool of (N, C, H, W), whose coordinates are computed in the cells' dtype."""
    kind, (ph, pw) = x.dtype.type, pairs(layer.output_size)
    out = np.zeros((len(boxes), x.shape[1], ph, pw))
    for number, box in enumerate(boxes.astype(x.dtype)):
        scaled = [float(each * kind(layer.spatial_scale)) for each in box[1:]]
        x1, y1, x2, y2 = (int(math.copysign(math.floor(abs(each) + 0.5), each)) for each in scaled)
        width, height = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
        rows, columns = kind(height) / kind(ph), kind(width) / kind(pw)
        for i in range(ph):
            top, bottom = (
                min(max(int(each) + y1, 0), x.shape[2])
                for each in (np.floor(kind(i) * rows), np.ceil(kind(i + 1) * rows))
            )
            for j in range(pw):
                left, right = (
                    min(max(int(each) + x1, 0), x.shape[3])
                    for each in (np.floor(kind(j) * columns), np.ceil(kind(j + 1) * columns))
                )
                if top < bottom and left < right:
                    out[number, :, i, j] = x[int(box[0]), :, top:bottom, left:right].max((1, 2))
    return out


def bilinear(image: Array, y: float, x: float) -> Array:
    """Return the interpolated sample of (C, H, W) at a point, 0 if it is more than a cell outside."""
    height, width = image.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(image.shape[0])
    corners = []
    for at, size in ((y, height), (x, width)):
        low = int(max(at, 0.0))
        low, high, share = (size - 1, size - 1, 0.0) if low >= size - 1 else (low, low + 1, max(at, 0.0) - low)
        corners.append(((low, 1 - share), (high, share)))
    return sum(image[:, row, column] * a * b for row, a in corners[0] for column, b in corners[1])


def roi_align(layer: p.RoIAlign, x: Array, boxes: Array) -> Array:
    """Return torchvision's RoIAlign of (N, C, H, W), by its C++ operator."""
    ph, pw = pairs(layer.output_size)
    out = np.zeros((len(boxes), x.shape[1], ph, pw))
    offset = 0.5 if layer.aligned else 0.0
    for number, box in enumerate(boxes.astype(np.float64)):
        image = x[int(box[0])].astype(np.float64)
        x1, y1, x2, y2 = (each * layer.spatial_scale - offset for each in box[1:])
        width, height = (each if layer.aligned else max(each, 1.0) for each in (x2 - x1, y2 - y1))
        rows, columns = (layer.sampling_ratio or math.ceil(each / count) for each, count in ((height, ph), (width, pw)))
        for i in range(ph):
            for j in range(pw):
                total = np.zeros(x.shape[1])
                for a in range(rows):
                    for b in range(columns):
                        y = y1 + i * height / ph + (a + 0.5) * height / ph / rows
                        total += bilinear(image, y, x1 + j * width / pw + (b + 0.5) * width / pw / columns)
                out[number, :, i, j] = total / max(rows * columns, 1)
    return out
