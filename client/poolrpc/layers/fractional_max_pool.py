"""FractionalMaxPool2d and FractionalMaxPool3d."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from poolrpc._shapes.limits import MAX_FRACTIONAL_AXIS, MAX_NUMEL
from poolrpc._shapes.parameters import Axes, axes, boolean, integer, per_axis, ratios
from poolrpc._shapes.rules import fractional_size
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers.base import Layer

SEED_STEP = 0x9E3779B97F4A7C15
"""The constant that SplitMix64 adds to its state for each sample (Steele, Lea and Flood, OOPSLA 2014)."""


@dataclass(frozen=True, slots=True, repr=False)
class _FractionalMaxPool(Layer):
    family: ClassVar[str] = "fractional_max_pool"
    kernel_size: Axes
    output_size: Axes | None = None
    output_ratio: float | tuple[float, ...] | None = None
    return_indices: bool = False
    seed: int = 0
    spatial_dims: ClassVar[int]

    def __post_init__(self) -> None:
        dims = self.spatial_dims
        self._set(
            kernel_size=axes("kernel_size", self.kernel_size, dims),
            return_indices=boolean("return_indices", self.return_indices),
            seed=integer("seed", self.seed, 0, 2**64 - 1),
        )
        if (self.output_size is None) == (self.output_ratio is None):
            got = "neither" if self.output_size is None else "both"
            msg = f"expected either output_size or output_ratio, got {got}"
            raise InvalidArgumentError(msg, field="output_size")
        if self.output_size is not None:
            self._set(output_size=axes("output_size", self.output_size, dims, high=MAX_NUMEL))
        if self.output_ratio is not None:
            self._set(output_ratio=ratios("output_ratio", self.output_ratio, dims))

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        dims = self.spatial_dims
        if self.output_size is None:
            out = tuple(map(fractional_size, plane, per_axis(self.output_ratio, dims)))
            field = "output_ratio"
        else:
            out = per_axis(self.output_size, dims)
            field = "output_size"
        for size, kernel, cells in zip(plane, per_axis(self.kernel_size, dims), out, strict=True):
            if size > MAX_FRACTIONAL_AXIS:
                msg = f"expected spatial axes of at most {MAX_FRACTIONAL_AXIS} for {self.name}, got plane {plane}"
                raise InvalidArgumentError(msg)
            if cells < 1:
                msg = f"expected an output of at least 1 cell per axis, got {out} on plane {plane}"
                raise InvalidArgumentError(msg, field=field)
            # torch requires one more cell for the 3d layer than for the 2d layer (FractionalMaxPool3d.cpp).
            limit = size if dims == 2 else size - 1  # noqa: PLR2004 - the 2d layer
            if cells + kernel - 1 > limit:
                got = cells + kernel - 1
                msg = f"expected output + kernel_size - 1 of at most {limit} on an axis of {size}, got {got}"
                raise InvalidArgumentError(msg, field="kernel_size")
        return out

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        return per_axis(self.kernel_size, len(plane))

    @property
    def period(self) -> int:
        return 0

    def at_plane(self, first: int) -> Self:
        # Each plane takes one step of the generator per axis, and n steps add n * SEED_STEP to its state.
        return replace(self, seed=(self.seed + first * self.spatial_dims * SEED_STEP) % 2**64)


class FractionalMaxPool2d(_FractionalMaxPool):
    """The maximum of each of a set of pseudorandom windows of a 2d input, as in torch.nn.FractionalMaxPool2d.

    The windows of a plane are drawn from the seed and the plane's index in the tensor, n*C + c, by SplitMix64, so the
    same seed, layer and tensor have the same output, whatever else the server computes (Graham, "Fractional
    Max-Pooling", 2014, describes the method). The dtypes are float16, bfloat16, float32 and float64; the output has the
    input's.

    Args:
        kernel_size: Size of a window in cells, 1 to 65535: an int for both axes, or (height, width).
        output_size: Size of the output in cells, 1 or more: an int or a pair. Exactly one of output_size and
            output_ratio is required. Default: None.
        output_ratio: Size of the output as a fraction of the input's, in (0, 1): a float or a pair. Default: None.
        return_indices: Whether the result has the indices of the maxima too: int64, of the output's shape, each the
            position h*W + w in the input's plane. Default: False.
        seed: Seed of the windows, 0 to 2**64 - 1; takes the place of torch's _random_samples. Default: 0.

    Shape:
        Input: (N, C, H, W) or (C, H, W). Output: (N, C, H_out, W_out) or (C, H_out, W_out), where

            H_out = output_size, or int(H * output_ratio)

        and W_out likewise. H_out + kernel_size - 1 must be at most H, and H at most 2**22.

    Raises:
        InvalidArgumentError: A parameter has the wrong type or is out of range, or both or neither of output_size and
            output_ratio are set. `output_shape` and the calls of a client also raise it if the input has another rank,
            or doesn't fit the parameters as above.

    Examples:
        >>> from poolrpc import FractionalMaxPool2d
        >>> FractionalMaxPool2d(2, output_ratio=0.7, seed=1).output_shape((8, 64, 56, 56))
        (8, 64, 39, 39)

    """

    __slots__ = ()
    spatial_dims = 2


class FractionalMaxPool3d(_FractionalMaxPool):
    """The maximum of each of a set of pseudorandom windows of a 3d input, as in torch.nn.FractionalMaxPool3d.

    The parameters, dtypes and errors are those of FractionalMaxPool2d, with one value for all axes or (depth, height,
    width).

    Shape:
        Input: (N, C, D, H, W) or (C, D, H, W). Output: (N, C, D_out, H_out, W_out) or (C, D_out, H_out, W_out), where

            D_out = output_size, or int(D * output_ratio)

        and H_out and W_out likewise. As in torch, D_out + kernel_size - 1 must be less than D.

    Examples:
        >>> from poolrpc import FractionalMaxPool3d
        >>> FractionalMaxPool3d(2, output_size=(4, 20, 20)).output_shape((8, 64, 16, 56, 56))
        (8, 64, 4, 20, 20)

    """

    __slots__ = ()
    spatial_dims = 3
