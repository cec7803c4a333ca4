"""RoIPool and RoIAlign: regions of interest, with torchvision's names."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, prod
from typing import ClassVar

from poolrpc._shapes.limits import MAX_BINS, MAX_SAMPLES
from poolrpc._shapes.parameters import Axes, axes, boolean, integer, per_axis, real
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers.base import FLOATS, Layer


@dataclass(frozen=True, slots=True, repr=False)
class _RegionLayer(Layer):
    dtypes: ClassVar[tuple[str, ...]] = FLOATS
    spatial_dims: ClassVar[int] = 2
    operand: ClassVar[str] = "boxes"
    output_size: Axes
    spatial_scale: float = 1.0

    def __post_init__(self) -> None:
        self._set(
            output_size=axes("output_size", self.output_size, self.spatial_dims, high=MAX_BINS),
            spatial_scale=real("spatial_scale", self.spatial_scale),
        )
        if not isfinite(self.spatial_scale):
            raise InvalidArgumentError(f"expected a finite number, got {self.spatial_scale}", field="spatial_scale")

    @property
    def splittable(self) -> bool:
        # A box has all channels of an image, and an image any number of boxes.
        return False

    def pooled_shape(
        self, shape: tuple[int, ...], dims: int, operand_shape: tuple[int, ...] | None = None
    ) -> tuple[int, ...]:
        """Return the shape of the output, which has a row for each box."""
        return (self._size_of(operand_shape), shape[-dims - 1], *self.output_plane(shape[-dims:]))

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        return per_axis(self.output_size, len(plane))

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        return plane

    def work(self, plane: tuple[int, ...]) -> int:
        return 4 * prod(self.output_plane(plane))


class RoIPool(_RegionLayer):
    """The maximum of each bin of regions of interest, as torchvision.ops.RoIPool and ONNX's MaxRoiPool compute it.

    The boxes are the operand of the call: `boxes=`, of shape (K, 5), each the number of an image, x1, y1, x2 and y2; or
    a list with the boxes (K_n, 4) of each image. Their coordinates are multiplied by spatial_scale and rounded, halves
    away from zero; the cells x1 to x2 and y1 to y2, both included, are divided into bins, which may share a row or a
    column of cells. A bin without a cell in the input is 0. Unlike torchvision's, a bin with NaN is NaN.

    Args:
        output_size: Number of bins, 1 to 1024: an int for both axes, or (height, width).
        spatial_scale: What the coordinates are multiplied by, such as 1/16 for a feature map of a 16th of the image's
            size. Default: 1.0.

    Shape:
        Input: (N, C, H, W) or (C, H, W), which is one image. Boxes: (K, 5). Output: (K, C, H_out, W_out), where

            H_out = output_size

        and W_out likewise. K may be 0.

    Raises:
        InvalidArgumentError: A parameter has the wrong type or is out of range. `output_shape` and the calls of a
            client also raise it if the input or the boxes have another rank; the calls, if a box is not finite, or
            names an image that there is not.

    Examples:
        >>> import numpy as np
        >>> from poolrpc import PoolClient, RoIPool
        >>> RoIPool(7, 0.25).output_shape((2, 64, 56, 56), operand_shape=(100, 5))
        (100, 64, 7, 7)
        >>> x = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8)
        >>> with PoolClient("127.0.0.1:50051") as client:
        ...     client.pool(x, RoIPool(2), boxes=[[0, 1, 1, 4, 4]]).output.tolist()
        [[[[18.0, 20.0], [34.0, 36.0]]]]

    """

    __slots__ = ()
    family = "roi_pool"


@dataclass(frozen=True, slots=True, repr=False)
class _Samples(_RegionLayer):
    family: ClassVar[str] = "roi_align"
    sampling_ratio: int = 0
    aligned: bool = False

    def __post_init__(self) -> None:
        _RegionLayer.__post_init__(self)  # not super(), which a class with slots lacks here
        ratio = integer("sampling_ratio", self.sampling_ratio, -1, MAX_SAMPLES)
        self._set(sampling_ratio=max(0, ratio), aligned=boolean("aligned", self.aligned))


class RoIAlign(_Samples):
    """The mean of interpolated samples in each bin of regions of interest, as torchvision.ops.RoIAlign computes it.

    The boxes are those of RoIPool, but their coordinates are not rounded. Each bin has a grid of samples, interpolated
    between the four cells around them; a sample more than a cell outside of the input is 0. float16 and bfloat16 are
    computed in float32, and rounded once.

    Args:
        output_size: Number of bins, 1 to 1024: an int for both axes, or (height, width).
        spatial_scale: What the coordinates are multiplied by. Default: 1.0.
        sampling_ratio: Samples of a bin along each axis, up to 64. 0, or -1 as in torchvision: as many as the bin has
            cells, rounded up. Default: 0.
        aligned: Whether the centre of a cell is at its coordinate, rather than half a cell after it, as torchvision
            recommends. If not, a box has at least the size of a cell. Default: False.

    Shape:
        Input: (N, C, H, W) or (C, H, W), which is one image. Boxes: (K, 5). Output: (K, C, H_out, W_out), where

            H_out = output_size

        and W_out likewise. K may be 0.

    Raises:
        InvalidArgumentError: As in RoIPool.

    Examples:
        >>> import numpy as np
        >>> from poolrpc import PoolClient, RoIAlign
        >>> RoIAlign((7, 5), 0.25).output_shape((2, 64, 56, 56), operand_shape=(100, 5))
        (100, 64, 7, 5)
        >>> x = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8)
        >>> with PoolClient("127.0.0.1:50051") as client:
        ...     client.pool(x, RoIAlign(2, sampling_ratio=2), boxes=[[0, 1, 1, 5, 5]]).output.tolist()
        [[[[18.0, 20.0], [34.0, 36.0]]]]

    """

    __slots__ = ()
