"""SegmentPool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from poolrpc.layers.base import FLOATS, Layer
from poolrpc.layers.reductions import Reduce, check_reduce


@dataclass(frozen=True, slots=True, repr=False)
class _Segments(Layer):
    family: ClassVar[str] = "segment_pool"
    dtypes: ClassVar[tuple[str, ...]] = FLOATS
    spatial_dims: ClassVar[int] = 1
    operand: ClassVar[str] = "offsets"
    reduce: Reduce

    def __post_init__(self) -> None:
        self._set(reduce=check_reduce("reduce", self.reduce))

    def pooled_shape(
        self, shape: tuple[int, ...], dims: int, operand_shape: tuple[int, ...] | None = None
    ) -> tuple[int, ...]:
        """Return the shape of the output, whose last axis has a cell for each segment."""
        return (*shape[:-dims], self._size_of(operand_shape) - 1)

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        return plane

    def work(self, plane: tuple[int, ...]) -> int:
        return plane[0]


class SegmentPool(_Segments):
    """One value for each segment of a sequence, for segments of any length, as torch.segment_reduce computes them.

    Segment i has the cells from `offsets[i]` up to, but without, `offsets[i + 1]`. The offsets are the operand of the
    call: `offsets=`, int64, of shape (S + 1,), in ascending order, from 0 to L. Two equal offsets are an empty segment,
    whose maximum is -inf, whose minimum inf, whose sum and norm 0, and whose other reductions are NaN. In place of
    offsets, a client also takes `lengths=`, the length of each segment from the first cell on, or `ids=`, the number of
    the segment of each cell, in ascending order. float16 and bfloat16 are computed in float32, and rounded once.

    Args:
        reduce: What becomes of a segment's cells, as in GlobalPool2d.

    Shape:
        Input: (N, C, L) or (C, L). Offsets: (S + 1,), the same for every plane. Output: (N, C, S) or (C, S), so

            L_out = S

    Raises:
        InvalidArgumentError: `reduce` is another value. `output_shape` and the calls of a client also raise it if the
            input has another rank, or the offsets have; the calls, if offsets are out of order or out of range.

    Examples:
        >>> import numpy as np
        >>> from poolrpc import PoolClient, SegmentPool
        >>> SegmentPool("mean").output_shape((8, 64, 50), operand_shape=(4,))
        (8, 64, 3)
        >>> x = np.arange(6, dtype=np.float32).reshape(1, 6)
        >>> with PoolClient("127.0.0.1:50051") as client:
        ...     client.pool(x, SegmentPool("mean"), lengths=[1, 2, 3]).output.tolist()
        [[0.0, 1.5, 4.0]]

    """

    __slots__ = ()
