"""Segments: the cells between offsets, reduced to one value each; segments of one length are reduced together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from poolrpc.errors import InvalidArgumentError
from poolrpc.layers.reductions import reduction_of
from poolrpc_server.compute.kernels.reduce import PlaneCells
from poolrpc_server.compute.kernels.weighted import VALUES, operand_bytes, operand_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from poolrpc_server.compute.with_operand import WithOperand

    Offsets = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

REMEMBERED_OFFSETS, REMEMBERED_LENGTH, REMEMBERED = 4096, 2**16, 64
"""The most offsets whose division is remembered, the most cells of their axis, and how many divisions are."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """The segments of one length.

    Attributes:
        length: The number of cells of each.
        segments: Their numbers, in order: a slice if they follow each other.
        cells: Their cells: a slice if the segments follow each other.

    """

    length: int
    segments: slice | torch.Tensor
    cells: slice | torch.Tensor

    def to(self, device: torch.device) -> Bucket:
        """Return the bucket on a device."""
        segments, cells = (each if isinstance(each, slice) else each.to(device) for each in (self.segments, self.cells))
        return Bucket(self.length, segments, cells)


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of planes, some of which may have others than the next ones.

    Attributes:
        parts: For planes with the same segments that follow each other, the number of the plane after the last of them,
            and their segments.

    """

    parts: tuple[tuple[int, tuple[Bucket, ...]], ...]

    @classmethod
    def joined(cls, operands: Sequence[Segments]) -> Segments:
        """Return the segments of the planes of several operands, which follow each other."""
        parts: list[tuple[int, tuple[Bucket, ...]]] = []
        first = 0
        for operand in operands:
            for end, buckets in operand.parts:
                if parts and parts[-1][1] is buckets:  # as equal offsets have that were divided once
                    parts.pop()
                parts.append((first + end, buckets))
            first = parts[-1][0]
        return cls(tuple(parts))

    def of(self, first: int, *tensors: torch.Tensor) -> Iterator[tuple[tuple[Bucket, ...], Sequence[torch.Tensor]]]:
        """Yield segments, with the planes that have them of tensors whose planes are those from number `first` on."""
        start, stop = 0, first + tensors[0].shape[0]
        for end, buckets in self.parts:
            if start <= first and stop <= end:
                yield buckets, tensors
            elif start < stop and first < end:
                planes = slice(max(start, first) - first, min(end, stop) - first)
                yield buckets, [each[planes] for each in tensors]
            start = end

    def to(self, device: torch.device) -> Segments:
        """Return the segments on a device."""
        return Segments(tuple((end, tuple(each.to(device) for each in buckets)) for end, buckets in self.parts))


def buckets_of(offsets: bytes, cells: int) -> tuple[Bucket, ...]:
    """Return the segments between offsets by their length; without empty ones.

    Args:
        offsets: The offsets, int64.
        cells: The number of cells of their axis.

    Raises:
        InvalidArgumentError: The offsets are not in the range of the axis, or not in ascending order.

    """
    remembered = len(offsets) <= REMEMBERED_OFFSETS * torch.int64.itemsize and cells <= REMEMBERED_LENGTH
    return (_remembered if remembered else _divide)(offsets, cells)


def _divide(data: bytes, axis: int) -> tuple[Bucket, ...]:
    offsets = np.frombuffer(data, np.int64)
    _check(offsets, axis)
    lengths = np.diff(offsets)
    order = np.argsort(lengths, kind="stable")
    ends = np.flatnonzero(np.diff(lengths[order])) + 1
    buckets = []
    for segments in np.split(order, ends):
        length = int(lengths[segments[0]])
        if not length:
            continue
        first, last = int(segments[0]), int(segments[-1])
        if last - first + 1 == len(segments):
            cells = slice(int(offsets[first]), int(offsets[last + 1]))
            buckets.append(Bucket(length, slice(first, last + 1), cells))
        else:
            gathered = torch.from_numpy((offsets[segments][:, None] + np.arange(length)).reshape(-1))
            buckets.append(Bucket(length, torch.from_numpy(segments), gathered))
    return tuple(buckets)


_remembered = lru_cache(REMEMBERED)(_divide)


def _check(offsets: Offsets, cells: int) -> None:
    low, high = int(offsets.min()), int(offsets.max())
    if low < 0 or high > cells:
        raise InvalidArgumentError(f"expected offsets in 0..{cells}, got {low}..{high}", field="offsets")
    descending = offsets[1:] < offsets[:-1]
    if descending.any():
        at = int(descending.argmax())
        pair = f"{offsets[at]} before {offsets[at + 1]}"
        msg = f"expected offsets in ascending order, got {pair} at position {at}"
        raise InvalidArgumentError(msg, field="offsets")


def bind_segments(layer: WithOperand, dtype: torch.dtype) -> Callable[[torch.Tensor, Segments, int], torch.Tensor]:
    """Return the function that reduces the segments of planes, (N, C, L).

    It also takes the segments of all planes, and the number of the first of these.
    """
    reduction, size = reduction_of(layer.layer.reduce), layer.size

    def run(x: torch.Tensor, segments: Segments, first: int) -> torch.Tensor:
        wide = operand_dtype(reduction, dtype, x.device.type)
        planes = x.reshape(-1, x.shape[-1])
        output = planes.new_full((planes.shape[0], size), reduction.empty)
        for buckets, (read, written) in segments.of(first, planes, output):
            for bucket in buckets:
                where = bucket.cells
                cells = read[:, where] if isinstance(where, slice) else read.index_select(1, where)
                cells = cells.view(cells.shape[0], -1, bucket.length).to(wide)
                written[:, bucket.segments] = reduction.of(PlaneCells(cells)).to(dtype)
        return output.view(*x.shape[:-1], size)

    return run


def segment_bytes(layer: WithOperand, dtype: torch.dtype, cells: int, outputs: int) -> int:
    """Return an upper bound of the memory that reducing a plane's segments takes, as operand_bytes does for weights."""
    reduction = reduction_of(layer.layer.reduce)
    if reduction.arithmetic == "float64" or reduction.gathers:
        return operand_bytes(layer, dtype, cells, outputs)
    # torch adds the cells and finds their maxima where they are: copies are those that are gathered, and converted.
    item = operand_dtype(reduction, dtype, "cpu").itemsize
    return cells * (dtype.itemsize + item) + VALUES * outputs * item
