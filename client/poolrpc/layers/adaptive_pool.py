"""AdaptiveMaxPool1d to 3d and AdaptiveAvgPool1d to 3d."""

from dataclasses import dataclass
from typing import ClassVar

from poolrpc._shapes.limits import MAX_NUMEL
from poolrpc._shapes.parameters import OptionalAxes, boolean, optional_axes, per_axis
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers.base import Layer


class _AdaptivePool(Layer):
    """The base class of layers whose windows follow from the size of the output."""

    __slots__ = ()
    output_size: OptionalAxes

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        sizes = per_axis(self.output_size, self.spatial_dims)
        out = tuple(size if cells is None else cells for size, cells in zip(plane, sizes, strict=True))
        for size, cells in zip(plane, out, strict=True):
            # The bounds of windows are products of the two, in 32 bits on CUDA (PyTorch issue 176784).
            if size * cells > MAX_NUMEL:
                msg = f"expected output * input of at most {MAX_NUMEL} per axis, got {cells} * {size}"
                raise InvalidArgumentError(msg, field="output_size")
        return out

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        # A window spans ceil(size/cells) cells, and one more if its start and its end are both rounded outwards.
        return tuple(
            min(size, -(-size // cells) + (1 if size % cells else 0))
            for size, cells in zip(plane, self.output_plane(plane), strict=True)
        )


@dataclass(frozen=True, slots=True, repr=False)
class _AdaptiveMaxPool(_AdaptivePool):
    family: ClassVar[str] = "adaptive_max_pool"
    output_size: OptionalAxes
    return_indices: bool = False

    def __post_init__(self) -> None:
        self._set(
            output_size=optional_axes("output_size", self.output_size, self.spatial_dims, high=MAX_NUMEL),
            return_indices=boolean("return_indices", self.return_indices),
        )


@dataclass(frozen=True, slots=True, repr=False)
class _AdaptiveAvgPool(_AdaptivePool):
    family: ClassVar[str] = "adaptive_avg_pool"
    output_size: OptionalAxes

    def __post_init__(self) -> None:
        self._set(output_size=optional_axes("output_size", self.output_size, self.spatial_dims, high=MAX_NUMEL))


class AdaptiveMaxPool1d(_AdaptiveMaxPool):
    """The maximum of each window of a 1d input, for a given output size, as torch.nn.AdaptiveMaxPool1d computes it.

    The parameters, dtypes and errors are those of AdaptiveMaxPool2d, with one value for the single axis.

    Shape:
        Input: (N, C, L) or (C, L). Output: (N, C, L_out) or (C, L_out), where

            L_out = output_size
            window i covers floor(i*L / L_out) to ceil((i + 1)*L / L_out)

    Examples:
        >>> from poolrpc import AdaptiveMaxPool1d
        >>> AdaptiveMaxPool1d(5).output_shape((8, 64, 50))
        (8, 64, 5)

    """

    __slots__ = ()
    spatial_dims = 1


class AdaptiveMaxPool2d(_AdaptiveMaxPool):
    """The maximum of each window of a 2d input, for a given output size, as torch.nn.AdaptiveMaxPool2d computes it.

    If a window contains NaN, its maximum is NaN. The dtypes are float16, bfloat16, float32 and float64; the output has
    the input's.

    Args:
        output_size: Size of the output in cells, 1 or more: an int for both axes, or (height, width), in which None
            keeps the input's size. Its product with the input's size is at most 2**31 - 1 on each axis.
        return_indices: Whether the result has the indices of the maxima too: int64, of the output's shape, each the
            position h*W + w in the input's plane. Default: False.

    Shape:
        Input: (N, C, H, W) or (C, H, W). Output: (N, C, H_out, W_out) or (C, H_out, W_out), where

            H_out = output_size
            window i covers rows floor(i*H / H_out) to ceil((i + 1)*H / H_out)

        and likewise for W_out and columns. The rule is in PyTorch's aten/src/ATen/native/AdaptivePooling.h.

    Raises:
        InvalidArgumentError: A parameter has the wrong type or is out of range. `output_shape` and the calls of a
            client also raise it if the input has another rank, or is too large for the output size.

    Examples:
        >>> from poolrpc import AdaptiveMaxPool2d
        >>> AdaptiveMaxPool2d(7).output_shape((8, 64, 56, 56))
        (8, 64, 7, 7)
        >>> AdaptiveMaxPool2d((None, 7)).output_shape((8, 64, 56, 56))
        (8, 64, 56, 7)

    """

    __slots__ = ()
    spatial_dims = 2


class AdaptiveMaxPool3d(_AdaptiveMaxPool):
    """The maximum of each window of a 3d input, for a given output size, as torch.nn.AdaptiveMaxPool3d computes it.

    The parameters, dtypes and errors are those of AdaptiveMaxPool2d, with one value for all axes or (depth, height,
    width).

    Shape:
        Input: (N, C, D, H, W) or (C, D, H, W). Output: (N, C, D_out, H_out, W_out) or (C, D_out, H_out, W_out), where

            D_out = output_size
            window i covers floor(i*D / D_out) to ceil((i + 1)*D / D_out)

        and likewise for H_out and W_out.

    Examples:
        >>> from poolrpc import AdaptiveMaxPool3d
        >>> AdaptiveMaxPool3d(7).output_shape((8, 64, 16, 56, 56))
        (8, 64, 7, 7, 7)

    """

    __slots__ = ()
    spatial_dims = 3


class AdaptiveAvgPool1d(_AdaptiveAvgPool):
    """The mean of each window of a 1d input, for a given output size, as torch.nn.AdaptiveAvgPool1d computes it.

    The parameter, dtypes and errors are those of AdaptiveAvgPool2d, with one value for the single axis.

    Shape:
        Input: (N, C, L) or (C, L). Output: (N, C, L_out) or (C, L_out), where

            L_out = output_size
            window i covers floor(i*L / L_out) to ceil((i + 1)*L / L_out)

    Examples:
        >>> from poolrpc import AdaptiveAvgPool1d
        >>> AdaptiveAvgPool1d(5).output_shape((8, 64, 50))
        (8, 64, 5)

    """

    __slots__ = ()
    spatial_dims = 1


class AdaptiveAvgPool2d(_AdaptiveAvgPool):
    """The mean of each window of a 2d input, for a given output size, as torch.nn.AdaptiveAvgPool2d computes it.

    The dtypes are float16, bfloat16, float32 and float64; the output has the input's.

    Args:
        output_size: Size of the output in cells, 1 or more: an int for both axes, or (height, width), in which None
            keeps the input's size. Its product with the input's size is at most 2**31 - 1 on each axis.

    Shape:
        Input: (N, C, H, W) or (C, H, W). Output: (N, C, H_out, W_out) or (C, H_out, W_out), where

            H_out = output_size
            window i covers rows floor(i*H / H_out) to ceil((i + 1)*H / H_out)

        and likewise for W_out and columns. The rule is in PyTorch's aten/src/ATen/native/AdaptivePooling.h.

    Raises:
        InvalidArgumentError: The parameter has the wrong type or is out of range. `output_shape` and the calls of a
            client also raise it if the input has another rank, or is too large for the output size.

    Examples:
        >>> from poolrpc import AdaptiveAvgPool2d
        >>> AdaptiveAvgPool2d(1).output_shape((8, 64, 56, 56))
        (8, 64, 1, 1)

    """

    __slots__ = ()
    spatial_dims = 2


class AdaptiveAvgPool3d(_AdaptiveAvgPool):
    """The mean of each window of a 3d input, for a given output size, as torch.nn.AdaptiveAvgPool3d computes it.

    The parameter, dtypes and errors are those of AdaptiveAvgPool2d, with one value for all axes or (depth, height,
    width).

    Shape:
        Input: (N, C, D, H, W) or (C, D, H, W). Output: (N, C, D_out, H_out, W_out) or (C, D_out, H_out, W_out), where

            D_out = output_size
            window i covers floor(i*D / D_out) to ceil((i + 1)*D / D_out)

        and likewise for H_out and W_out.

    Examples:
        >>> from poolrpc import AdaptiveAvgPool3d
        >>> AdaptiveAvgPool3d((None, 1, 1)).output_shape((8, 64, 16, 56, 56))
        (8, 64, 16, 1, 1)

    """

    __slots__ = ()
    spatial_dims = 3
