"""AvgPool1d, AvgPool2d and AvgPool3d."""

from dataclasses import dataclass
from typing import ClassVar

from poolrpc._shapes.parameters import Axes, Padding, boolean, integer
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers.base import FLOATS, WIDE_FLOATS, SlidingWindowLayer

MAX_DIVISOR = 2**63 - 1
"""The largest divisor_override that torch takes."""


@dataclass(frozen=True, slots=True, repr=False)
class _AvgPool(SlidingWindowLayer):
    family: ClassVar[str] = "avg_pool"
    dtypes: ClassVar[tuple[str, ...]] = (*FLOATS, "int64")
    kernel_size: Axes
    stride: Axes | None = None
    padding: Padding = 0
    ceil_mode: bool = False
    count_include_pad: bool = True

    def __post_init__(self) -> None:
        self._check_window()
        self._set(
            ceil_mode=boolean("ceil_mode", self.ceil_mode),
            count_include_pad=boolean("count_include_pad", self.count_include_pad),
        )
        self._check_padding(self.padding)


@dataclass(frozen=True, slots=True, repr=False)
class _AvgPoolWithDivisor(_AvgPool):
    divisor_override: int | None = None

    def __post_init__(self) -> None:
        _AvgPool.__post_init__(self)
        if self.divisor_override is not None:
            divisor = integer("divisor_override", self.divisor_override, -MAX_DIVISOR - 1, MAX_DIVISOR)
            if not divisor:
                raise InvalidArgumentError("expected an integer other than 0, got 0", field="divisor_override")
            self._set(divisor_override=divisor)


class AvgPool1d(_AvgPool):
    """The mean of each window of a 1d input, as torch.nn.AvgPool1d computes it.

    The parameters, dtypes and errors are those of AvgPool2d, with one value for the single axis,
    except that there is no divisor_override, as in torch.

    Shape:
        Input: (N, C, L) or (C, L). Output: (N, C, L_out) or (C, L_out), where

            L_out = floor((L + 2*padding - kernel_size) / stride) + 1

        with ceil in place of floor if ceil_mode is set.

    Examples:
        >>> from poolrpc import AvgPool1d
        >>> AvgPool1d(4).output_shape((8, 64, 50))
        (8, 64, 12)

    """

    __slots__ = ()
    spatial_dims = 1


class AvgPool2d(_AvgPoolWithDivisor):
    """The mean of each window of a 2d input, as torch.nn.AvgPool2d computes it.

    Padding counts as zeros. The dtypes are float16, bfloat16, float32, float64 and int64; the output has the input's,
    and the mean of integers is truncated towards zero. For other integers, put a ToDtype before the layer.

    Args:
        kernel_size: Size of a window in cells, 1 to 65535: an int for both axes, or (height, width).
        stride: Distance between windows in cells, 1 to 65535: an int or a pair. Default: None, which is kernel_size.
        padding: Cells added on both ends of an axis, less than kernel_size: an int or a pair; or a pair (before, after)
            for each axis, such as ((0, 1), (0, 1)); or "same" or "same_lower", which add what ceil(H / stride) windows
            need, half of it before the input and half after it, and an odd cell after or before it; or "valid", which
            is 0. torch takes only one number per axis, up to half of a kernel. Default: 0.
        ceil_mode: Whether to round the output's size up instead of down, which adds a last, partial window on an axis
            if it starts in the input or the left padding. Default: False.
        count_include_pad: Whether cells of the padding count in the divisor. Default: True.
        divisor_override: What the sum of a window is divided by, any integer of 64 bits but 0. Default: None, which is
            the number of the window's cells.

    Shape:
        Input: (N, C, H, W) or (C, H, W). Output: (N, C, H_out, W_out) or (C, H_out, W_out), where

            H_out = floor((H + 2*padding - kernel_size) / stride) + 1

        with ceil in place of floor if ceil_mode is set, and W_out likewise, from W and the second value of each pair.
        The rule is pooling_output_shape in PyTorch's aten/src/ATen/native/Pool.h.

    Raises:
        InvalidArgumentError: A parameter has the wrong type or is out of range. `output_shape` and the calls of a
            client also raise it if the input has another rank, or if no window fits the padded input.

    Examples:
        >>> from poolrpc import AvgPool2d
        >>> AvgPool2d(2).output_shape((8, 64, 57, 57))
        (8, 64, 28, 28)
        >>> AvgPool2d(2, ceil_mode=True).output_shape((8, 64, 57, 57))
        (8, 64, 29, 29)

    """

    __slots__ = ()
    spatial_dims = 2


class AvgPool3d(_AvgPoolWithDivisor):
    """The mean of each window of a 3d input, as torch.nn.AvgPool3d computes it.

    The parameters and errors are those of AvgPool2d, with one value for all axes or (depth, height, width). The dtypes
    are float32, float64 and int64. As in torch, and unlike in other layers, kernel_size must fit the input without
    padding; Pool3d("mean") has no such rule.

    Shape:
        Input: (N, C, D, H, W) or (C, D, H, W). Output: (N, C, D_out, H_out, W_out) or (C, D_out, H_out, W_out), where

            D_out = floor((D + 2*padding - kernel_size) / stride) + 1

        with ceil in place of floor if ceil_mode is set, and H_out and W_out likewise.

    Examples:
        >>> from poolrpc import AvgPool3d
        >>> AvgPool3d(2).output_shape((8, 64, 16, 56, 56))
        (8, 64, 8, 28, 28)

    """

    __slots__ = ()
    dtypes = (*WIDE_FLOATS, "int64")
    spatial_dims = 3

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial shape of the output, if the kernel fits the plane without padding."""
        self._check_fits_unpadded(plane)
        return super().output_plane(plane)
