"""LPPool1d, LPPool2d and LPPool3d."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from poolrpc._shapes.limits import MAX_NORM
from poolrpc._shapes.parameters import Axes, boolean, real
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers.base import WIDE_FLOATS, SlidingWindowLayer


@dataclass(frozen=True, slots=True, repr=False)
class _LPPool(SlidingWindowLayer):
    family: ClassVar[str] = "lp_pool"
    norm_type: float
    kernel_size: Axes
    stride: Axes | None = None
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        norm = real("norm_type", self.norm_type)
        if not 1 / MAX_NORM <= norm <= MAX_NORM and norm != inf:
            msg = f"expected a number in 1/{MAX_NORM} to {MAX_NORM}, or inf, got {norm!r}"
            raise InvalidArgumentError(msg, field="norm_type")
        self._set(norm_type=norm, ceil_mode=boolean("ceil_mode", self.ceil_mode))
        self._check_window()

    @property
    def splittable(self) -> bool:
        # torch's pow is vectorised except for the last cells of a tensor, whose scalar pow differs in the last bit.
        return self.norm_type in (1, 2, inf)


class LPPool1d(_LPPool):
    """The power average of each window of a 1d input, as torch.nn.LPPool1d computes it.

    The parameters, dtypes and errors are those of LPPool2d, with one value for the single axis.

    Shape:
        Input: (N, C, L) or (C, L). Output: (N, C, L_out) or (C, L_out), where

            L_out = floor((L - kernel_size) / stride) + 1

        with ceil in place of floor if ceil_mode is set.

    Examples:
        >>> from poolrpc import LPPool1d
        >>> LPPool1d(2, 3, stride=2).output_shape((8, 64, 50))
        (8, 64, 24)

    """

    __slots__ = ()
    spatial_dims = 1


class LPPool2d(_LPPool):
    """The power average of each window of a 2d input, as torch.nn.LPPool2d computes it.

    With the exponent p, this is (sum of x^p)^(1/p) over the window's cells x; with an infinite p, the maximum of their
    absolute values. The dtypes are float16, bfloat16, float32 and float64; the output has the input's.

    Args:
        norm_type: The exponent p, 1/32768 to 32768, or infinity.
        kernel_size: Size of a window in cells, 1 to 65535: an int for both axes, or (height, width).
        stride: Distance between windows in cells, 1 to 65535: an int or a pair. Default: None, which is kernel_size.
        ceil_mode: Whether to round the output's size up instead of down, which adds a last, partial window on an axis
            if it starts in the input. Default: False.

    Shape:
        Input: (N, C, H, W) or (C, H, W). Output: (N, C, H_out, W_out) or (C, H_out, W_out), where

            H_out = floor((H - kernel_size) / stride) + 1

        with ceil in place of floor if ceil_mode is set, and W_out likewise, from W and the second value of each pair.
        The rule is pooling_output_shape in PyTorch's aten/src/ATen/native/Pool.h.

    Raises:
        InvalidArgumentError: A parameter has the wrong type or is out of range. `output_shape` and the calls of a
            client also raise it if the input has another rank, or if no window fits the input.

    Examples:
        >>> from poolrpc import LPPool2d
        >>> LPPool2d(2, 3, stride=2).output_shape((8, 64, 57, 57))
        (8, 64, 28, 28)

    """

    __slots__ = ()
    spatial_dims = 2


class LPPool3d(_LPPool):
    """The power average of each window of a 3d input, as torch.nn.LPPool3d computes it.

    The parameters and errors are those of LPPool2d, with one value for all axes or (depth, height, width). The dtypes
    are float32 and float64. As in torch, which computes an average first, kernel_size must fit the input with ceil_mode
    too, unless the norm is infinite.

    Shape:
        Input: (N, C, D, H, W) or (C, D, H, W). Output: (N, C, D_out, H_out, W_out) or (C, D_out, H_out, W_out), where

            D_out = floor((D - kernel_size) / stride) + 1

        with ceil in place of floor if ceil_mode is set, and H_out and W_out likewise.

    Examples:
        >>> from poolrpc import LPPool3d
        >>> LPPool3d(2, 2).output_shape((8, 64, 16, 56, 56))
        (8, 64, 8, 28, 28)

    """

    __slots__ = ()
    dtypes = WIDE_FLOATS
    spatial_dims = 3

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial shape of the output, if the kernel fits the plane or the norm is infinite."""
        if self.norm_type != inf:
            self._check_fits_unpadded(plane)
        return super().output_plane(plane)
