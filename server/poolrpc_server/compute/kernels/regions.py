"""Regions of interest: RoIPool's maxima of bins, and RoIAlign's means of interpolated samples.

The arithmetic of coordinates is that of torchvision's C++ operators (roi_pool_kernel.cpp, roi_align_common.h), in
float32, or in float64 for cells of float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from poolrpc._shapes.parameters import per_axis
from poolrpc_server.compute.kernels.padded import sum_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Floats = np.ndarray[tuple[int, ...], np.dtype[Any]]

ENTRIES = 1 << 20
"""About the most entries of a block of boxes: pairs of a cell and its weight."""

TABLE_BYTES = 200 * ENTRIES
"""More than the memory of the tables of a block of boxes."""

ENTRY_WORK, CELL_WORK, SAMPLE_WORK, CALL_WORK = 50.0, 0.5, 150.0, 5_000.0
"""The work of an entry, of each of its cells, of a sample along an axis, and of a call for a row or column of bins."""


def bind_regions(layer: Any, dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], Iterator[torch.Tensor]]:  # noqa: ANN401 - a layer
    """Return the function that pools boxes: it yields the outputs of some boxes.

    It takes the images, (N, C, H, W), on any device, and the boxes in the host's memory.
    """
    pool = _align if layer.family == "roi_align" else _pool
    return lambda x, boxes: pool(layer, x, boxes.to(sum_dtype(dtype)).numpy())


def _pool(layer: Any, x: torch.Tensor, boxes: Floats) -> Iterator[torch.Tensor]:  # noqa: ANN401
    height, width = per_axis(layer.output_size, 2)
    channels = x.shape[1]
    # With channels last, and in float32 for half precision, torch takes the maxima in vectors.
    cells = x.movedim(1, -1).to(sum_dtype(x.dtype)).contiguous()
    for image, rows, columns in zip(boxes[:, 0].astype(np.int64).tolist(), *_pool_bins(layer, x, boxes), strict=True):
        output = cells.new_zeros((height, width, channels))
        left, right = columns[0][0], columns[-1][1]
        filled = [i for i, (top, bottom) in enumerate(rows) if top < bottom and left < right]
        maxima = cells.new_empty((len(filled), max(0, right - left), channels))
        for number, i in enumerate(filled):
            top, bottom = rows[i]
            torch.amax(cells[image, top:bottom, left:right], 0, out=maxima[number])
        for j, (start, stop) in enumerate(columns):
            if filled and start < stop:
                # The rows with cells follow each other, since bins are clipped to the image.
                output[filled[0] : filled[-1] + 1, j] = maxima[:, start - left : stop - left].amax(1)
        yield output.movedim(-1, 0).unsqueeze(0).to(x.dtype)


def _pool_bins(layer: Any, x: torch.Tensor, boxes: Floats) -> tuple[list[Any], list[Any]]:  # noqa: ANN401
    """Return the rows and the columns of each box's bins."""
    corners = _rounded(boxes[:, 1:] * boxes.dtype.type(layer.spatial_scale))
    counts = per_axis(layer.output_size, 2)
    rows = _bins(corners[:, 1], corners[:, 3], counts[0], x.shape[2], boxes.dtype)
    columns = _bins(corners[:, 0], corners[:, 2], counts[1], x.shape[3], boxes.dtype)
    return rows.tolist(), columns.tolist()


def _rounded(numbers: Floats) -> Floats:
    """Round to the nearest integers, and halves away from zero, as C's round does."""
    whole: Floats = np.trunc(numbers)
    return whole + np.where(np.abs(numbers - whole) >= 0.5, np.sign(numbers), 0)


def _bins(
    low: Floats, high: Floats, count: int, size: int, dtype: np.dtype[Any]
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the first cell of each bin of each box, and the one after its last: (boxes, bins, 2)."""
    length = np.maximum(high - low + 1, 1).astype(dtype)
    each = (length / dtype.type(count))[:, None]
    numbers = np.arange(count, dtype=dtype)
    starts, ends = np.floor(numbers * each), np.ceil((numbers + 1) * each)
    return np.asarray(np.stack([starts, ends], -1).astype(np.int64) + low.astype(np.int64)[:, None, None]).clip(0, size)


def _align(layer: Any, x: torch.Tensor, boxes: Floats) -> Iterator[torch.Tensor]:  # noqa: ANN401
    channels, height, width = x.shape[1:]
    bins = per_axis(layer.output_size, 2)
    cells = x.movedim(1, -1).reshape(-1, channels).to(sum_dtype(x.dtype))
    if cells.stride() != (channels, 1):  # as for one channel, which torch would add up by another of its loops
        cells = torch.empty(cells.shape, dtype=cells.dtype, device=x.device).copy_(cells)
    for start, stop in _blocks([_Samples.of(layer, boxes, axis, (height, width)[axis]) for axis in (0, 1)]):
        part = boxes[start:stop]
        rows, columns = (_Samples.of(layer, part, axis, (height, width)[axis]).table() for axis in (0, 1))
        outputs = [
            embedding_bag(
                torch.from_numpy(entries).to(x.device),
                cells,
                torch.from_numpy(starts).to(x.device),
                mode="sum",
                per_sample_weights=torch.from_numpy(weights).to(x.device),
            )
            for entries, starts, weights in _entries(rows, columns, part[:, 0].astype(np.int64) * height, width)
        ]
        yield torch.cat(outputs).view(len(part), *bins, channels).movedim(-1, 1).to(x.dtype)


@dataclass(frozen=True)
class _Table:
    """The cells that the samples of bins along one axis are interpolated from, with their weights.

    Attributes:
        cells: The cells, bin by bin.
        weights: The weight of each.
        counts: The number of cells of each bin of each box, (boxes, bins).

    """

    cells: np.ndarray[Any, np.dtype[np.int64]]
    weights: Floats
    counts: np.ndarray[Any, np.dtype[np.int64]]

    @cached_property
    def starts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The number of the first cell of each bin, (boxes, bins)."""
        return (np.cumsum(self.counts) - self.counts.reshape(-1)).reshape(self.counts.shape)


@dataclass(frozen=True)
class _Samples:
    """The samples of boxes along one axis.

    Attributes:
        size: The cells of the axis.
        starts: Where each bin of each box begins, (boxes, bins).
        each: The length of a bin of each box.
        grid: The number of samples of a bin of each box.
        first: The number of the first sample of each bin that may be inside, (boxes, bins).
        counts: The number of samples of each bin that may be inside, likewise.

    """

    size: int
    starts: Floats
    each: Floats
    grid: np.ndarray[Any, np.dtype[np.int64]]
    first: np.ndarray[Any, np.dtype[np.int64]]
    counts: np.ndarray[Any, np.dtype[np.int64]]

    @classmethod
    def of(cls, layer: Any, boxes: Floats, axis: int, size: int) -> _Samples:  # noqa: ANN401
        """Return the samples along an axis: 0 for rows, 1 for columns."""
        kind, bins = boxes.dtype.type, per_axis(layer.output_size, 2)[axis]
        low, high = boxes[:, 2 - axis], boxes[:, 4 - axis]
        offset = kind(0.5 if layer.aligned else 0.0)
        start = low * kind(layer.spatial_scale) - offset
        length = high * kind(layer.spatial_scale) - offset - start
        if not layer.aligned:
            length = np.maximum(length, kind(1))
        each = length / kind(bins)
        grid = np.full(len(boxes), layer.sampling_ratio, np.int64)
        if not layer.sampling_ratio:
            grid = np.maximum(np.ceil(each), 0).astype(np.int64)
        starts = start[:, None] + np.arange(bins, dtype=boxes.dtype) * each[:, None]
        # The samples that are certainly outside are left out: a box may be much larger than the image.
        step = (each.astype(np.float64) / np.maximum(grid, 1))[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            bounds = np.stack([(-1.0 - starts) / step, (size - starts) / step]) - 0.5
        bounds = np.where(step == 0, np.array([0.0, np.inf])[:, None, None], bounds)
        most = grid[:, None].astype(np.float64)
        first = np.clip(np.floor(bounds.min(0)) - 1, 0, most).astype(np.int64)
        stop = np.clip(np.ceil(bounds.max(0)) + 2, 0, most).astype(np.int64)
        return cls(size, starts, each, grid, first, np.maximum(stop - first, 0))

    @cached_property
    def most_cells(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """An upper bound of the cells of all bins of each box, each counted once for a bin."""
        most: np.ndarray[Any, np.dtype[np.int64]] = np.minimum(2 * self.counts, self.size).sum(1)
        return most.clip(max=self.size + 3 * self.counts.shape[1])

    def table(self) -> _Table:
        """Return the cells of each bin, each once, with the sum of its weights divided by the number of samples."""
        kind, bins = self.starts.dtype.type, self.starts.shape[1]
        counts = self.counts.reshape(-1)
        owner = np.repeat(np.arange(counts.size), counts)
        number = np.arange(owner.size) - np.repeat(np.cumsum(counts) - counts - self.first.reshape(-1), counts)
        box = owner // bins
        inside = (number.astype(kind) + kind(0.5)) * self.each[box] / self.grid[box].astype(kind)
        at = self.starts.reshape(-1)[owner] + inside
        valid = (at >= -1) & (at <= self.size)
        owner, box, at = owner[valid], box[valid], np.maximum(at[valid], 0)
        low = np.minimum(at.astype(np.int64), self.size - 1)
        high = np.minimum(low + 1, self.size - 1)
        share = np.where(low == high, kind(0), at - low.astype(kind))
        weights = np.concatenate([1 - share, share]) / np.concatenate([self.grid[box]] * 2)
        keys = np.concatenate([owner, owner]) * self.size + np.concatenate([low, high])
        unique, inverse = np.unique(keys, return_inverse=True)
        summed = np.bincount(inverse.reshape(-1), weights, len(unique)).astype(kind)
        found = np.bincount(unique // self.size, minlength=counts.size).reshape(self.counts.shape)
        return _Table(unique % self.size, summed, found)


def _blocks(axes: list[_Samples]) -> Iterator[tuple[int, int]]:
    """Yield ranges of boxes, each with about ENTRIES entries, or a single box."""
    ends = np.cumsum(axes[0].most_cells * axes[1].most_cells)
    start, done = 0, 0
    while start < len(ends):
        stop = max(start + 1, int(np.searchsorted(ends, done + ENTRIES, "right")))
        yield start, stop
        start, done = stop, int(ends[stop - 1])


def _entries(
    rows: _Table, columns: _Table, bases: np.ndarray[Any, np.dtype[np.int64]], width: int
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Floats]]:
    """Yield the entries of some bins: the numbers of their cells, where each bin begins, and the cells' weights.

    Args:
        rows: The rows of each box's bins.
        columns: The columns.
        bases: The number of the first row of each box's image.
        width: The cells of a row.

    """
    boxes, height = rows.counts.shape
    across = columns.counts.sum(1)
    ends = np.cumsum(rows.counts.reshape(-1) * np.repeat(across, height))
    start, done = 0, 0
    while start < boxes * height:
        stop = max(start + 1, int(np.searchsorted(ends, done + 2 * ENTRIES, "right")))
        box = np.arange(start, stop) // height
        down, first_row = rows.counts.reshape(-1)[start:stop], rows.starts.reshape(-1)[start:stop]
        along, first_column = columns.counts[box], columns.starts[box]
        sizes = (down[:, None] * along).reshape(-1)
        begins = np.cumsum(sizes) - sizes
        bag = np.repeat(np.arange(sizes.size), sizes)
        position = np.arange(bag.size) - begins[bag]
        row, column = np.divmod(position, along.reshape(-1)[bag])
        unit = bag // along.shape[1]
        row += first_row[unit]
        column += first_column.reshape(-1)[bag]
        entries = (bases[box][unit] + rows.cells[row]) * width + columns.cells[column]
        yield entries, begins, rows.weights[row] * columns.weights[column]
        start, done = stop, int(ends[stop - 1])


def regions_work(layer: Any, shape: Sequence[int], boxes: torch.Tensor, dtype: torch.dtype) -> float:  # noqa: ANN401
    """Return the work of pooling boxes, in nanoseconds of one thread.

    Args:
        layer: The layer.
        shape: The shape of the images, (N, C, H, W).
        boxes: The boxes.
        dtype: The dtype of the images.

    """
    channels, height, width = shape[1:]
    numbers = boxes.to(sum_dtype(dtype)).numpy()
    bins = per_axis(layer.output_size, 2)
    if layer.family == "roi_align":
        down, across = (_Samples.of(layer, numbers, axis, (height, width)[axis]) for axis in (0, 1))
        entries = float((down.most_cells.astype(np.float64) * across.most_cells).sum())
        samples = float(down.counts.sum() + across.counts.sum())
        return entries * (ENTRY_WORK + CELL_WORK * channels) + samples * SAMPLE_WORK
    corners = _rounded(numbers[:, 1:] * numbers.dtype.type(layer.spatial_scale))
    sizes = np.clip(corners, 0, np.array([width, height, width, height]))
    tall, wide = (np.maximum(sizes[:, 2 + i] - sizes[:, i] + 1, 1).astype(np.float64) for i in (1, 0))
    visited = (tall + bins[0]) * wide + (wide + bins[1]) * bins[0]
    return float(visited.sum() * CELL_WORK * channels + len(numbers) * sum(bins) * CALL_WORK)
