"""The pooling layers: frozen values with torch.nn's names, parameters, order and defaults, that know their shapes.

A layer holds parameters and computes nothing: the server does. What it knows, without torch, is which dtypes it takes
(`dtypes`), the shape of its output (`output_shape`), and how many cells each of its windows has (`window`), in which
the work of a call is counted.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from math import inf, prod
from typing import ClassVar, Self

from poolrpc._shapes.limits import MAX_FRACTIONAL_AXIS, MAX_NORM, MAX_NUMEL
from poolrpc._shapes.parameters import Axes, OptionalAxes, axes, boolean, integer, optional_axes, per_axis, ratios, real
from poolrpc._shapes.rules import check_shape, fractional_size, pooled_size, unpooled_size
from poolrpc.errors import InvalidArgumentError

FLOATS = ("float16", "bfloat16", "float32", "float64")
WIDE_FLOATS = ("float32", "float64")
INTEGERS = ("uint8", "int8", "int16", "int32", "int64")

# The dtypes of each family: those that torch has on the CPU and that are the same for every device. Layers that select
# values take integers: torch has them for these on the CPU alone, so a server with a GPU computes them on its CPU.
# Averages of integers (torch has int64's, on the CPU, truncated) and half precision for the 3d averages (torch has it
# on CUDA alone) are left out.
DTYPES: dict[str, tuple[str, ...]] = {
    "MaxPool1d": FLOATS + INTEGERS,
    "MaxPool2d": FLOATS + INTEGERS,
    "MaxPool3d": FLOATS + INTEGERS,
    "AvgPool1d": FLOATS,
    "AvgPool2d": FLOATS,
    "AvgPool3d": WIDE_FLOATS,
    "LPPool1d": FLOATS,
    "LPPool2d": FLOATS,
    "LPPool3d": WIDE_FLOATS,
    "FractionalMaxPool2d": FLOATS,
    "FractionalMaxPool3d": FLOATS,
    "AdaptiveMaxPool1d": FLOATS,
    "AdaptiveMaxPool2d": FLOATS,
    "AdaptiveMaxPool3d": FLOATS,
    "AdaptiveAvgPool1d": FLOATS,
    "AdaptiveAvgPool2d": FLOATS,
    "AdaptiveAvgPool3d": FLOATS,
    "MaxUnpool1d": FLOATS,
    "MaxUnpool2d": FLOATS,
    "MaxUnpool3d": FLOATS,
    "GlobalMaxPool": FLOATS + INTEGERS,
    "GlobalAvgPool": FLOATS,
}

SEED_STEP = 0x9E3779B97F4A7C15
"""SplitMix64's: what its state grows by from one sample to the next (Steele, Lea and Flood, OOPSLA 2014)."""


class Layer:
    """The base of every layer.

    Attributes:
        family: The layer's field in the proto's `oneof layer`.
        spatial_dims: How many axes are spatial: 1, 2 or 3; None where the layer takes any of these.
        returns_indices: Whether the output comes with the indices of the maxima.
        takes_indices: Whether the layer needs indices beside its input.

    """

    __slots__ = ()
    family: ClassVar[str]
    spatial_dims: ClassVar[int | None] = None
    takes_indices: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The layer's name in torch.nn."""
        return type(self).__name__

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that the layer takes, the same on every device."""
        return DTYPES[self.name]

    @property
    def splittable(self) -> bool:
        """Whether planes that travel apart, or beside other tensors', give torch's bits for the tensor as it is."""
        return True

    @property
    def returns_indices(self) -> bool:
        """Whether the output comes with the indices of the maxima."""
        return bool(getattr(self, "return_indices", False))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Give the shape of the output, exactly as torch computes it.

        Args:
            shape: (N, C, spatial...) or (C, spatial...).

        Raises:
            InvalidArgumentError: The layer can't pool such a tensor.

        """
        shape = tuple(integer("shape", size, 0, MAX_NUMEL) for size in shape)
        dims = check_shape(shape, self.spatial_dims)
        return shape[:-dims] + self.output_plane(shape[-dims:])

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Give the spatial shape of the output for that of a plane, every axis at least 1.

        Raises:
            InvalidArgumentError: The layer can't pool such a plane.

        """
        raise NotImplementedError

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Give the size of the layer's largest window on such a plane, in cells an axis."""
        raise NotImplementedError

    def work(self, plane: tuple[int, ...]) -> int:
        """Count the cells that torch visits on such a plane: those of every window."""
        return prod(self.output_plane(plane)) * prod(self.window(plane))

    def at_plane(self, first: int) -> Self:  # noqa: ARG002 - for layers to which it makes a difference
        """Give the layer that pools a tensor's planes from number `first` on as this one pools the whole tensor."""
        return self

    def __repr__(self) -> str:
        """Give an expression that parse_layer reads back: required parameters in order, others where not default."""
        parts = []
        for each in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, each.name)
            if each.default is MISSING:
                parts.append(repr(value))
            elif value != each.default:
                parts.append(f"{each.name}={value!r}")
        return f"{self.name}({', '.join(parts)})"

    def _set(self, **values: object) -> None:
        # A frozen dataclass refuses plain assignment, in its own __post_init__ too.
        for name, value in values.items():
            object.__setattr__(self, name, value)


class _Windowed(Layer):
    """The base of layers whose window slides: kernel_size and stride, with padding and dilation where they have it."""

    __slots__ = ()
    spatial_dims: ClassVar[int]
    kernel_size: Axes
    stride: Axes | None

    def geometry(self) -> tuple[tuple[int, int, int, int], ...]:
        """Give (kernel, stride, padding, dilation) for each axis."""
        dims = self.spatial_dims
        kernel = per_axis(self.kernel_size, dims)
        stride = kernel if self.stride is None else per_axis(self.stride, dims)
        padding = per_axis(getattr(self, "padding", 0), dims)
        dilation = per_axis(getattr(self, "dilation", 1), dims)
        return tuple(zip(kernel, stride, padding, dilation, strict=True))

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        out = []
        ceil_mode = self.ceil_mode  # type: ignore[attr-defined]  # every subclass has it
        for size, (kernel, stride, padding, dilation) in zip(plane, self.geometry(), strict=True):
            if dilation > size + 2 * padding:
                msg = f"expected at most input + 2*padding = {size + 2 * padding}, got {dilation}"
                raise InvalidArgumentError(msg, field="dilation")
            cells = pooled_size(size, kernel, stride, padding, dilation, ceil_mode=ceil_mode)
            if cells < 1:
                extent = dilation * (kernel - 1) + 1
                msg = (
                    f"expected an effective kernel of at most input + 2*padding = {size + 2 * padding}, "
                    f"got dilation*(kernel_size - 1) + 1 = {extent} on plane {plane}"
                )
                raise InvalidArgumentError(msg, field="kernel_size")
            out.append(cells)
        return tuple(out)

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        return per_axis(self.kernel_size, len(plane))

    def _set_window(self) -> None:
        dims = self.spatial_dims
        self._set(kernel_size=axes("kernel_size", self.kernel_size, dims))
        if self.stride is not None:
            self._set(stride=axes("stride", self.stride, dims))

    def _set_padding(self, padding: Axes) -> None:
        dims = self.spatial_dims
        pads = axes("padding", padding, dims, low=0)
        self._set(padding=pads)
        for pad, kernel in zip(per_axis(pads, dims), per_axis(self.kernel_size, dims), strict=True):
            if pad > kernel // 2:
                msg = f"expected at most half of kernel_size = {kernel // 2}, got {pad}"
                raise InvalidArgumentError(msg, field="padding")


@dataclass(frozen=True, slots=True, repr=False)
class _MaxPool(_Windowed):
    family: ClassVar[str] = "max_pool"
    kernel_size: Axes
    stride: Axes | None = None
    padding: Axes = 0
    dilation: Axes = 1
    return_indices: bool = False
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        dims = self.spatial_dims
        self._set_window()
        self._set(
            dilation=axes("dilation", self.dilation, dims),
            return_indices=boolean("return_indices", self.return_indices),
            ceil_mode=boolean("ceil_mode", self.ceil_mode),
        )
        self._set_padding(self.padding)


class MaxPool1d(_MaxPool):
    """Take the max of each window of an (N, C, L) or (C, L) tensor: torch.nn.MaxPool1d.

    Args:
        kernel_size: The window's size in cells, 1..65535.
        stride: The step between windows. None: kernel_size.
        padding: Cells of minus infinity on both sides, at most half of the kernel.
        dilation: The step between the cells of a window.
        return_indices: Whether the places of the maxima come too.
        ceil_mode: Whether a last, partial window counts, provided that it starts in the input or the left padding.

    Shape:
        L becomes floor((L + 2*padding - dilation*(kernel_size - 1) - 1) / stride) + 1, ceil with ceil_mode.

    Raises:
        InvalidArgumentError: A parameter is out of its range.

    """

    __slots__ = ()
    spatial_dims = 1


class MaxPool2d(_MaxPool):
    """Take the max of each window of an (N, C, H, W) or (C, H, W) tensor: torch.nn.MaxPool2d.

    Parameters, shape rule and errors are those of MaxPool1d; each may be one value or a pair for H and W.
    """

    __slots__ = ()
    spatial_dims = 2


class MaxPool3d(_MaxPool):
    """Take the max of each window of an (N, C, D, H, W) or (C, D, H, W) tensor: torch.nn.MaxPool3d.

    Parameters, shape rule and errors are those of MaxPool1d; each may be one value or three for D, H and W.
    """

    __slots__ = ()
    spatial_dims = 3


@dataclass(frozen=True, slots=True, repr=False)
class _AvgPool(_Windowed):
    family: ClassVar[str] = "avg_pool"
    kernel_size: Axes
    stride: Axes | None = None
    padding: Axes = 0
    ceil_mode: bool = False
    count_include_pad: bool = True

    def __post_init__(self) -> None:
        self._set_window()
        self._set(
            ceil_mode=boolean("ceil_mode", self.ceil_mode),
            count_include_pad=boolean("count_include_pad", self.count_include_pad),
        )
        self._set_padding(self.padding)


@dataclass(frozen=True, slots=True, repr=False)
class _AvgPoolWithDivisor(_AvgPool):
    divisor_override: int | None = None

    def __post_init__(self) -> None:
        _AvgPool.__post_init__(self)
        if self.divisor_override is not None:
            # torch takes negative divisors too and negates the output (PyTorch PR 185361): refused here.
            self._set(divisor_override=integer("divisor_override", self.divisor_override, 1, MAX_NUMEL))


class AvgPool1d(_AvgPool):
    """Take the mean of each window of an (N, C, L) or (C, L) tensor: torch.nn.AvgPool1d.

    Args:
        kernel_size: The window's size in cells, 1..65535.
        stride: The step between windows. None: kernel_size.
        padding: Cells of zero on both sides, at most half of kernel_size.
        ceil_mode: Whether a last, partial window counts, provided that it starts in the input or the left padding.
        count_include_pad: Whether padding counts in the divisor.

    Shape:
        L becomes floor((L + 2*padding - kernel_size) / stride) + 1, ceil with ceil_mode.

    Raises:
        InvalidArgumentError: A parameter is out of its range.

    """

    __slots__ = ()
    spatial_dims = 1


class AvgPool2d(_AvgPoolWithDivisor):
    """Take the mean of each window of an (N, C, H, W) or (C, H, W) tensor: torch.nn.AvgPool2d.

    Parameters, shape rule and errors are those of AvgPool1d, with one value or a pair for H and W, and
    divisor_override: what the sum is divided by, at least 1. None: the number of cells.
    """

    __slots__ = ()
    spatial_dims = 2


class AvgPool3d(_AvgPoolWithDivisor):
    """Take the mean of each window of an (N, C, D, H, W) or (C, D, H, W) tensor: torch.nn.AvgPool3d.

    Parameters, shape rule and errors are those of AvgPool2d, with one value or three for D, H and W. As in torch, and
    unlike every other layer, the kernel must fit the input without its padding.
    """

    __slots__ = ()
    spatial_dims = 3

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Give the spatial shape of the output, where the kernel fits the plane."""
        _check_fits(self, plane)
        return _AvgPoolWithDivisor.output_plane(self, plane)


def _check_fits(layer: _Windowed, plane: tuple[int, ...]) -> None:
    # torch's avg_pool3d alone asks for this (pool3d_shape_check with check_input_size, in aten's Pool.h).
    kernel = per_axis(layer.kernel_size, layer.spatial_dims)
    if any(k > size for k, size in zip(kernel, plane, strict=True)):
        msg = f"expected at most the input {plane}, without its padding, for a 3d average, got {kernel}"
        raise InvalidArgumentError(msg, field="kernel_size")


@dataclass(frozen=True, slots=True, repr=False)
class _LPPool(_Windowed):
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
        self._set_window()

    @property
    def splittable(self) -> bool:
        # torch's pow is vectorised but for a tensor's last cells, where another one differs in the last bit.
        return self.norm_type in (1, 2, inf)


class LPPool1d(_LPPool):
    """Take the power average of each window of an (N, C, L) or (C, L) tensor: torch.nn.LPPool1d.

    Args:
        norm_type: The exponent p in (sum of x^p)^(1/p), 1/32768 to 32768, or infinity: the max of absolute values.
        kernel_size: The window's size in cells, 1..65535.
        stride: The step between windows. None: kernel_size.
        ceil_mode: Whether a last, partial window counts.

    Shape:
        L becomes floor((L - kernel_size) / stride) + 1, ceil with ceil_mode.

    Raises:
        InvalidArgumentError: A parameter is out of its range.

    """

    __slots__ = ()
    spatial_dims = 1


class LPPool2d(_LPPool):
    """Take the power average of each window of an (N, C, H, W) or (C, H, W) tensor: torch.nn.LPPool2d.

    Parameters, shape rule and errors are those of LPPool1d, with one value or a pair for H and W.
    """

    __slots__ = ()
    spatial_dims = 2


class LPPool3d(_LPPool):
    """Take the power average of each window of an (N, C, D, H, W) or (C, D, H, W) tensor: torch.nn.LPPool3d.

    Parameters, shape rule and errors are those of LPPool1d, with one value or three for D, H and W. As in torch, which
    averages first, the kernel must fit the input in ceil_mode too, unless the norm is infinite.
    """

    __slots__ = ()
    spatial_dims = 3

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Give the spatial shape of the output, where the kernel fits the plane."""
        if self.norm_type != inf:
            _check_fits(self, plane)
        return _LPPool.output_plane(self, plane)


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
            msg = (
                f"expected either output_size or output_ratio, got {'neither' if self.output_size is None else 'both'}"
            )
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
                msg = f"expected an output of at least 1 cell an axis, got {out} on plane {plane}"
                raise InvalidArgumentError(msg, field=field)
            # torch asks one cell more of the 3d layer than of the 2d one (FractionalMaxPool3d.cpp).
            most = size if dims == 2 else size - 1  # noqa: PLR2004 - the 2d layer
            if cells + kernel - 1 > most:
                got = cells + kernel - 1
                msg = f"expected output + kernel_size - 1 of at most {most} on an axis of {size}, got {got}"
                raise InvalidArgumentError(msg, field="kernel_size")
        return out

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        return per_axis(self.kernel_size, len(plane))

    def at_plane(self, first: int) -> Self:
        # A plane takes as many steps of the generator as it has axes, and to begin some steps on is to add them.
        return replace(self, seed=(self.seed + first * self.spatial_dims * SEED_STEP) % 2**64)


class FractionalMaxPool2d(_FractionalMaxPool):
    """Take the max of windows at pseudorandom places: torch.nn.FractionalMaxPool2d, of (N, C, H, W) or (C, H, W).

    The places are drawn for each plane from the seed and the plane's number in the tensor, n*C + c, so that the same
    seed, layer and tensor give the same output, whatever else the server computes.

    Args:
        kernel_size: The window's size in cells, 1..65535.
        output_size: The output's size in cells. Either this or output_ratio.
        output_ratio: The output's size as a part of the input's, in (0, 1); truncated to whole cells.
        return_indices: Whether the places of the maxima come too.
        seed: 0..2**64-1, in place of torch's _random_samples.

    Shape:
        H and W become output_size, or int(H * output_ratio); output + kernel_size - 1 must be at most the input.

    Raises:
        InvalidArgumentError: A parameter is out of its range.

    """

    __slots__ = ()
    spatial_dims = 2


class FractionalMaxPool3d(_FractionalMaxPool):
    """Take the max of windows at pseudorandom places, of (N, C, D, H, W) or (C, D, H, W): torch.nn.FractionalMaxPool3d.

    Parameters, shape rule and errors are those of FractionalMaxPool2d, with one value or three for D, H and W; as in
    torch, output + kernel_size - 1 must be less than the input.
    """

    __slots__ = ()
    spatial_dims = 3


class _Adaptive(Layer):
    """The base of layers that are told the size of their output."""

    __slots__ = ()
    spatial_dims: ClassVar[int]
    output_size: OptionalAxes

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        sizes = per_axis(self.output_size, self.spatial_dims)
        out = tuple(size if cells is None else cells for size, cells in zip(plane, sizes, strict=True))
        for size, cells in zip(plane, out, strict=True):
            # The windows' bounds are products of the two, in 32 bits on CUDA (PyTorch issue 176784).
            if size * cells > MAX_NUMEL:
                msg = f"expected output * input of at most {MAX_NUMEL} an axis, got {cells} * {size}"
                raise InvalidArgumentError(msg, field="output_size")
        return out

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        # A window spans ceil(size/cells) cells, and one more where its start and end both round outwards.
        return tuple(
            min(size, -(-size // cells) + (1 if size % cells else 0))
            for size, cells in zip(plane, self.output_plane(plane), strict=True)
        )


@dataclass(frozen=True, slots=True, repr=False)
class _AdaptiveMaxPool(_Adaptive):
    family: ClassVar[str] = "adaptive_max_pool"
    output_size: OptionalAxes
    return_indices: bool = False

    def __post_init__(self) -> None:
        self._set(
            output_size=optional_axes("output_size", self.output_size, self.spatial_dims, high=MAX_NUMEL),
            return_indices=boolean("return_indices", self.return_indices),
        )


@dataclass(frozen=True, slots=True, repr=False)
class _AdaptiveAvgPool(_Adaptive):
    family: ClassVar[str] = "adaptive_avg_pool"
    output_size: OptionalAxes

    def __post_init__(self) -> None:
        self._set(output_size=optional_axes("output_size", self.output_size, self.spatial_dims, high=MAX_NUMEL))


class AdaptiveMaxPool1d(_AdaptiveMaxPool):
    """Take the max of windows that give the output size, of an (N, C, L) or (C, L) tensor: torch.nn.AdaptiveMaxPool1d.

    Args:
        output_size: The output's size in cells; None in a tuple keeps the input's.
        return_indices: Whether the places of the maxima come too.

    Shape:
        L becomes output_size. Window i spans floor(i*L/output_size) to ceil((i+1)*L/output_size).

    Raises:
        InvalidArgumentError: A parameter is out of its range.

    """

    __slots__ = ()
    spatial_dims = 1


class AdaptiveMaxPool2d(_AdaptiveMaxPool):
    """Take the max of windows that give the output size, of an (N, C, H, W) or (C, H, W) tensor.

    Parameters, shape rule and errors are those of AdaptiveMaxPool1d, with one value or a pair for H and W.
    """

    __slots__ = ()
    spatial_dims = 2


class AdaptiveMaxPool3d(_AdaptiveMaxPool):
    """Take the max of windows that give the output size, of an (N, C, D, H, W) or (C, D, H, W) tensor.

    Parameters, shape rule and errors are those of AdaptiveMaxPool1d, with one value or three for D, H and W.
    """

    __slots__ = ()
    spatial_dims = 3


class AdaptiveAvgPool1d(_AdaptiveAvgPool):
    """Take the mean of windows that give the output size, of an (N, C, L) or (C, L) tensor: torch.nn.AdaptiveAvgPool1d.

    Args:
        output_size: The output's size in cells; None in a tuple keeps the input's.

    Shape:
        L becomes output_size. Window i spans floor(i*L/output_size) to ceil((i+1)*L/output_size).

    Raises:
        InvalidArgumentError: A parameter is out of its range.

    """

    __slots__ = ()
    spatial_dims = 1


class AdaptiveAvgPool2d(_AdaptiveAvgPool):
    """Take the mean of windows that give the output size, of an (N, C, H, W) or (C, H, W) tensor.

    Parameters, shape rule and errors are those of AdaptiveAvgPool1d, with one value or a pair for H and W.
    """

    __slots__ = ()
    spatial_dims = 2


class AdaptiveAvgPool3d(_AdaptiveAvgPool):
    """Take the mean of windows that give the output size, of an (N, C, D, H, W) or (C, D, H, W) tensor.

    Parameters, shape rule and errors are those of AdaptiveAvgPool1d, with one value or three for D, H and W.
    """

    __slots__ = ()
    spatial_dims = 3


@dataclass(frozen=True, slots=True, repr=False)
class _MaxUnpool(_Windowed):
    family: ClassVar[str] = "max_unpool"
    kernel_size: Axes
    stride: Axes | None = None
    padding: Axes = 0
    output_size: tuple[int, ...] | None = None
    takes_indices: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._set_window()
        self._set(padding=axes("padding", self.padding, self.spatial_dims, low=0))
        if self.output_size is not None:
            sizes = axes("output_size", self.output_size, self.spatial_dims, high=MAX_NUMEL)
            self._set(output_size=per_axis(sizes, self.spatial_dims))

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        geometry = self.geometry()
        default = tuple(unpooled_size(size, k, s, p) for size, (k, s, p, _) in zip(plane, geometry, strict=True))
        out = default if self.output_size is None else self.output_size
        for cells, usual, (_, stride, _, _) in zip(out, default, geometry, strict=True):
            if self.output_size is not None and not abs(cells - usual) < stride:
                msg = f"expected less than a stride of {stride} from the default {default}, got {out}"
                raise InvalidArgumentError(msg, field="output_size")
            if cells < 1:
                msg = f"expected an output of at least 1 cell an axis, got {out} on plane {plane}"
                raise InvalidArgumentError(msg, field="padding")
        return out

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        # Each output cell is written as a zero, each input cell once: at most two cells of work an output cell.
        return (2,) + (1,) * (len(plane) - 1)


class MaxUnpool1d(_MaxUnpool):
    """Put each value of an (N, C, L) or (C, L) tensor where its index says, and zeros elsewhere: torch.nn.MaxUnpool1d.

    The indices are a second input of the call, those of a MaxPool with return_indices.

    Args:
        kernel_size: That of the MaxPool, 1..65535.
        stride: That of the MaxPool. None: kernel_size.
        padding: That of the MaxPool.
        output_size: The output's spatial size where the default is not meant; an argument of the call in torch.

    Shape:
        L becomes output_size, less than a stride from the default (L - 1)*stride - 2*padding + kernel_size.

    Raises:
        InvalidArgumentError: A parameter is out of its range.

    """

    __slots__ = ()
    spatial_dims = 1


class MaxUnpool2d(_MaxUnpool):
    """Put each value of an (N, C, H, W) or (C, H, W) tensor where its index says, and zeros elsewhere.

    Parameters, shape rule and errors are those of MaxUnpool1d, with one value or a pair for H and W.
    """

    __slots__ = ()
    spatial_dims = 2


class MaxUnpool3d(_MaxUnpool):
    """Put each value of an (N, C, D, H, W) or (C, D, H, W) tensor where its index says, and zeros elsewhere.

    Parameters, shape rule and errors are those of MaxUnpool1d, with one value or three for D, H and W.
    """

    __slots__ = ()
    spatial_dims = 3


class _Global(Layer):
    """The base of layers whose window is the whole plane."""

    __slots__ = ()

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * len(plane)

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        return plane


@dataclass(frozen=True, slots=True, repr=False)
class GlobalMaxPool(_Global):
    """Take the max of each plane of an (N, C, spatial...) tensor, 1 to 3 spatial axes: ONNX's GlobalMaxPool.

    The same as the AdaptiveMaxPool of that rank to 1. The tensor must be batched, since nothing else tells its rank; in
    a chain the other layers do.

    Shape:
        Every spatial axis becomes 1.
    """

    family: ClassVar[str] = "global_max_pool"


@dataclass(frozen=True, slots=True, repr=False)
class GlobalAvgPool(_Global):
    """Take the mean of each plane of an (N, C, spatial...) tensor, 1 to 3 spatial axes: ONNX's GlobalAveragePool.

    The same as the AdaptiveAvgPool of that rank to 1. The tensor must be batched, since nothing else tells its rank; in
    a chain the other layers do.

    Shape:
        Every spatial axis becomes 1.
    """

    family: ClassVar[str] = "global_avg_pool"


LAYERS: dict[str, type[Layer]] = {name: globals()[name] for name in DTYPES}
"""Every layer by its name."""
