"""BlurPool2d."""

from dataclasses import dataclass
from typing import ClassVar

from poolrpc._shapes.parameters import integer
from poolrpc._shapes.rules import pooled_size
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers.base import Layer

MAX_BLUR_KERNEL = 127
"""Largest filter of a BlurPool in cells: the outer coefficients of a larger one are far below what changes a result."""

MAX_BLUR_STRIDE = 255
"""Largest stride of a BlurPool in cells, which determines its padding too."""


@dataclass(frozen=True, slots=True, repr=False)
class BlurPool2d(Layer):
    """A binomial filter with a stride, an average that does not alias: timm's BlurPool2d.

    The filter's coefficients along each axis are the binomial ones, (1, 2, 1)/4 for 3 cells. The input is first padded
    on both sides by (stride + kernel_size - 2) // 2 cells, by reflection without the edge. If a window contains NaN,
    its value is NaN. The dtypes are float16, bfloat16, float32 and float64; the output has the input's. Half precision
    is computed in float32, and rounded once.

    Args:
        kernel_size: Size of the filter in cells, 1 to 127, for both axes. Default: 3.
        stride: Distance between windows in cells, 1 to 255, for both axes. Default: 2.

    Shape:
        Input: (N, C, H, W) or (C, H, W). Output: (N, C, H_out, W_out) or (C, H_out, W_out), where

            H_out = floor((H + 2*((stride + kernel_size - 2) // 2) - kernel_size) / stride) + 1

        and W_out likewise.

    Raises:
        InvalidArgumentError: A parameter has the wrong type or is out of range. `output_shape` and the calls of a
            client also raise it if the input has another rank, no more cells along an axis than the padding, or fewer
            than the filter with the padding.

    Examples:
        >>> import numpy as np
        >>> import poolrpc_server
        >>> from poolrpc import BlurPool2d
        >>> BlurPool2d().output_shape((8, 64, 56, 56))
        (8, 64, 28, 28)
        >>> x = np.arange(1, 26, dtype=np.float32).reshape(1, 1, 5, 5)
        >>> with poolrpc_server.embedded() as client:
        ...     client.pool(x, BlurPool2d(stride=2)).output.tolist()
        [[[[4.0, 5.5, 7.0], [11.5, 13.0, 14.5], [19.0, 20.5, 22.0]]]]

    """

    family: ClassVar[str] = "blur_pool"
    spatial_dims = 2
    kernel_size: int = 3
    stride: int = 2

    def __post_init__(self) -> None:
        self._set(
            kernel_size=integer("kernel_size", self.kernel_size, 1, MAX_BLUR_KERNEL),
            stride=integer("stride", self.stride, 1, MAX_BLUR_STRIDE),
        )

    @property
    def padding(self) -> int:
        """The cells that reflect the input, on both sides of each axis."""
        return (self.stride - 1 + self.kernel_size - 1) // 2

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial shape of the output, if the plane is large enough to be reflected."""
        if self.padding >= min(plane):
            padding = f"(stride + kernel_size - 2) // 2 = {self.padding}"
            msg = f"expected a padding of less than the input {plane}, to reflect it, got {padding}"
            raise InvalidArgumentError(msg, field="kernel_size")
        out = tuple(pooled_size(size, self.kernel_size, self.stride, self.padding) for size in plane)
        if min(out) < 1:  # two cells with a stride of one are not padded
            msg = f"expected at most the padded input, {min(plane) + 2 * self.padding}, got {self.kernel_size}"
            raise InvalidArgumentError(f"{msg} on plane {plane}", field="kernel_size")
        return out

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size of the filter."""
        return (self.kernel_size,) * len(plane)
