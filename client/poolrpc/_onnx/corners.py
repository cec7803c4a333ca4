"""ONNX's RoiAlign with mode="max", which no layer computes: the maximum of weighted corners."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from poolrpc.layers import RoIAlign
    from poolrpc.tensors import Array


def max_of_corners(x: Array, boxes: Array, layer: RoIAlign) -> Array:
    """Return the output of a RoiAlign with mode="max".

    A sample lies between four cells, the corners, each with a weight of the bilinear interpolation. ONNX's test vectors
    demand the largest of the products of corner and weight, over all samples of a bin, where one would expect the
    largest of the interpolated samples (onnx issue 4764, onnxruntime issue 6146).

    Args:
        x: The input, (N, C, H, W).
        boxes: The boxes, (K, 5): number of the tensor in the batch, x1, y1, x2, y2.
        layer: The parameters, which are those of the mean.

    Returns:
        The output, (K, C, height, width), of the input's dtype.

    """
    size = layer.output_size
    height, width = size if isinstance(size, tuple) else (size, size)
    kind = np.result_type(x.dtype, np.float32)
    output = np.zeros((len(boxes), x.shape[1], height, width), kind)
    for i, (number, *corners) in enumerate(boxes):
        x1, y1, x2, y2 = (kind.type(each) * kind.type(layer.spatial_scale) for each in corners)
        rows = _samples(y1, y2, height, x.shape[2], layer)
        columns = _samples(x1, x2, width, x.shape[3], layer)
        if rows is None or columns is None:  # a box without samples has zeros
            continue
        image = x[int(number)].astype(kind)
        products = [
            image[:, row][:, :, column] * (row_weight[:, None] * column_weight)
            for row, row_weight in rows
            for column, column_weight in columns
        ]
        largest = np.maximum.reduce(products)
        bins = (len(largest), height, largest.shape[1] // height, width, largest.shape[2] // width)
        output[i] = largest.reshape(bins).max((2, 4))
    return output.astype(x.dtype)


def _samples(start: Any, end: Any, bins: int, cells: int, layer: RoIAlign) -> list[tuple[Array, Array]] | None:  # noqa: ANN401 - numbers of NumPy
    """Return the lower and the upper corners of the samples of an axis: the cells, and their weights; None without."""
    kind = type(start)
    length = end - start
    if layer.aligned:
        start -= kind(0.5)
    else:
        length = max(length, kind(1))
    count = layer.sampling_ratio or ceil(length / bins)  # per bin
    if count < 1:
        return None
    size = length / kind(bins)
    at = (
        start + size * np.arange(bins, dtype=kind)[:, None] + (np.arange(count) + kind(0.5)) * size / kind(count)
    ).ravel()
    inside = (at >= -1) & (at <= cells)
    at = np.where(inside, at, 0).clip(0, cells - 1).astype(kind)
    low = at.astype(np.int64)
    upper_weight = at - low
    high = np.minimum(low + 1, cells - 1)
    return [(low, (1 - upper_weight) * inside), (high, upper_weight * inside)]
