"""MaxPool1d, MaxPool2d and MaxPool3d."""

from dataclasses import dataclass
from typing import ClassVar

from poolrpc._shapes.parameters import Axes, Padding, axes, boolean
from poolrpc.layers.base import FLOATS, INTEGERS, SlidingWindowLayer


@dataclass(frozen=True, slots=True, repr=False)
class _MaxPool(SlidingWindowLayer):
    family: ClassVar[str] = "max_pool"
    dtypes: ClassVar[tuple[str, ...]] = FLOATS + INTEGERS
    kernel_size: Axes
    stride: Axes | None = None
    padding: Padding = 0
    dilation: Axes = 1
    return_indices: bool = False
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        dims = self.spatial_dims
        self._check_window()
        self._set(
            dilation=axes("dilation", self.dilation, dims),
            return_indices=boolean("return_indices", self.return_indices),
            ceil_mode=boolean("ceil_mode", self.ceil_mode),
        )
        self._check_padding(self.padding)


class MaxPool1d(_MaxPool):
    """The maximum of each window of a 1d input, as torch.nn.MaxPool1d computes it.

    The parameters, dtypes and errors are those of MaxPool2d, with one value for the single axis.

    Shape:
        Input: (N, C, L) or (C, L). Output: (N, C, L_out) or (C, L_out), where

            L_out = floor((L + 2*padding - dilation*(kernel_size - 1) - 1) / stride) + 1

        with ceil in place of floor if ceil_mode is set.

    Examples:
        >>> from poolrpc import MaxPool1d
        >>> MaxPool1d(3, stride=2).output_shape((8, 64, 50))
        (8, 64, 24)

    """

    __slots__ = ()
    spatial_dims = 1


class MaxPool2d(_MaxPool):
    """The maximum of each window of a 2d input, as torch.nn.MaxPool2d computes it.

    Padding counts as minus infinity. If a window contains NaN, its maximum is NaN. The dtypes are float16, bfloat16,
    float32, float64, uint8, uint16, int8, int16, int32 and int64; the output has the input's.

    Args:
        kernel_size: Size of a window in cells, 1 to 65535: an int for both axes, or (height, width).
        stride: Distance between windows in cells, 1 to 65535: an int or a pair. Default: None, which is kernel_size.
        padding: Cells added on both ends of an axis, less than the span of a window, dilation*(kernel_size - 1) + 1: an
            int or a pair; or a pair (before, after) for each axis, such as ((0, 1), (0, 1)); or "same" or "same_lower",
            which add what ceil(H / stride) windows need, half of it before the input and half after it, and an odd cell
            after or before it; or "valid", which is 0. torch takes only one number per axis, up to half of a kernel.
            Default: 0.
        dilation: Distance between the cells of a window, 1 to 65535: an int or a pair. Default: 1.
        return_indices: Whether the result has the indices of the maxima too: int64, of the output's shape, each the
            position h*W + w in the input's plane. Default: False.
        ceil_mode: Whether to round the output's size up instead of down, which adds a last, partial window on an axis
            if it starts in the input or the left padding. Default: False.

    Shape:
        Input: (N, C, H, W) or (C, H, W). Output: (N, C, H_out, W_out) or (C, H_out, W_out), where

            H_out = floor((H + 2*padding - dilation*(kernel_size - 1) - 1) / stride) + 1

        with ceil in place of floor if ceil_mode is set, and W_out likewise, from W and the second value of each pair.
        The rule is pooling_output_shape in PyTorch's aten/src/ATen/native/Pool.h.

    Raises:
        InvalidArgumentError: A parameter has the wrong type or is out of range. `output_shape` and the calls of a
            client also raise it if the input has another rank, if no window fits the padded input, or if dilation is
            larger than the padded input.

    Examples:
        >>> import numpy as np
        >>> import poolrpc_server
        >>> from poolrpc import MaxPool2d
        >>> MaxPool2d(3, stride=2, padding=1).output_shape((8, 64, 56, 56))
        (8, 64, 28, 28)
        >>> x = np.array([[[[1, 3, 2, 4], [5, 6, 8, 7]]]], np.float32)
        >>> with poolrpc_server.embedded() as client:
        ...     result = client.pool(x, MaxPool2d(2, return_indices=True))
        >>> result.output.tolist(), result.indices.tolist()
        ([[[[6.0, 8.0]]]], [[[[5, 6]]]])

    """

    __slots__ = ()
    spatial_dims = 2


class MaxPool3d(_MaxPool):
    """The maximum of each window of a 3d input, as torch.nn.MaxPool3d computes it.

    The parameters, dtypes and errors are those of MaxPool2d, with one value for all axes or (depth, height, width).

    Shape:
        Input: (N, C, D, H, W) or (C, D, H, W). Output: (N, C, D_out, H_out, W_out) or (C, D_out, H_out, W_out), where

            D_out = floor((D + 2*padding - dilation*(kernel_size - 1) - 1) / stride) + 1

        with ceil in place of floor if ceil_mode is set, and H_out and W_out likewise.

    Examples:
        >>> from poolrpc import MaxPool3d
        >>> MaxPool3d((1, 2, 2)).output_shape((8, 64, 16, 56, 56))
        (8, 64, 16, 28, 28)

    """

    __slots__ = ()
    spatial_dims = 3
