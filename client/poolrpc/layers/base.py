"""The base classes of the layers, and the dtypes that layers take."""

from dataclasses import MISSING, fields, replace
from math import prod
from types import FunctionType
from typing import Any, ClassVar, Self

from poolrpc._shapes.limits import MAX_NUMEL
from poolrpc._shapes.operands import check_operand_shape
from poolrpc._shapes.parameters import Axes, axes, integer, padded_sides, padding, per_axis
from poolrpc._shapes.rules import check_shape, pooled_size, same_padding
from poolrpc.errors import InvalidArgumentError

# A layer's dtypes are those that torch has on the CPU, the same for every device. torch pools integers only on the CPU,
# so a server with a GPU computes them on its CPU. Half precision for 3d averages is left out (torch has it only on
# CUDA). torch's own layers do not pool uint16; its maxima are those of the same numbers in a wider dtype.
FLOATS = ("float16", "bfloat16", "float32", "float64")
WIDE_FLOATS = ("float32", "float64")
INTEGERS = ("uint8", "uint16", "int8", "int16", "int32", "int64")


def expression_of(value: Any) -> str:  # noqa: ANN401 - a dataclass
    """Return an expression of a layer or a reduction: its required parameters, and others that differ from defaults."""
    parts = []
    for each in fields(value):
        parameter = getattr(value, each.name)
        if each.default is MISSING:
            parts.append(repr(parameter))
        elif parameter != each.default:
            parts.append(f"{each.name}={parameter!r}")
    return f"{type(value).__name__}({', '.join(parts)})"


class Layer:
    """The base class of every layer: a frozen value with parameters, dtypes and a shape rule.

    Layers with equal parameters are equal, and `repr(layer)` is an expression that `parse_layer` parses back to it.

    Attributes:
        family: Name of the layer's field in the proto's `oneof layer`, shared by its 1d, 2d and 3d classes.
        dtypes: Names of the dtypes that the layer takes, the same on every device. Of a class whose dtypes depend on a
            parameter: those for any value of it.
        spatial_dims: Number of spatial axes: 1, 2 or 3; 0 for an element-wise step, which takes any number of them.
        operand: The name of the second tensor that the layer takes in addition to its input, which is also its name in
            calls and errors: "indices", "weights", "offsets" or "boxes"; empty if it takes none.
        operand_optional: Whether a call may be without it.

    Examples:
        >>> from poolrpc import MaxPool2d
        >>> layer = MaxPool2d(3, stride=2)
        >>> layer.name, layer.spatial_dims, layer.dtypes[:4]
        ('MaxPool2d', 2, ('float16', 'bfloat16', 'float32', 'float64'))
        >>> layer.output_shape((8, 64, 57, 57))
        (8, 64, 28, 28)

    """

    __slots__ = ()
    family: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = FLOATS
    spatial_dims: ClassVar[int]
    operand: ClassVar[str] = ""
    operand_optional: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Name the constructor of a public class after it: Python's errors of missing arguments have that name."""
        inherited = cls.__init__
        if isinstance(inherited, FunctionType) and not cls.__name__.startswith(
            "_"
        ):  # dataclass makes the private ones'
            code, closure = inherited.__code__, inherited.__closure__
            own = FunctionType(code, inherited.__globals__, "__init__", inherited.__defaults__, closure)
            own.__kwdefaults__, own.__annotations__ = inherited.__kwdefaults__, inherited.__annotations__
            own.__qualname__ = f"{cls.__name__}.__init__"
            cls.__init__ = own  # type: ignore[method-assign]  # the same function

    @property
    def name(self) -> str:
        """The name of the layer's class, which is torch.nn's."""
        return type(self).__name__

    @property
    def splittable(self) -> bool:
        """Whether a plane has the same output, bit for bit, whichever planes are sent and computed together with it."""
        return True

    @property
    def period(self) -> int:
        """The number of planes after which the layer treats planes alike again: 1 if always, 0 if never."""
        return 1

    @property
    def returns_indices(self) -> bool:
        """Whether the result has the indices of the maxima too."""
        return bool(getattr(self, "return_indices", False))

    def output_shape(self, shape: tuple[int, ...], operand_shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Return the shape of the output, exactly as torch computes it, without a server.

        Args:
            shape: The input's shape, (N, C, spatial...) or (C, spatial...). N may be 0; every other axis is 1 to
                2**31 - 1.
            operand_shape: The shape of the operand, on which the output of SegmentPool, RoIPool and RoIAlign depends.
                Default: None, which is enough for every other layer.

        Returns:
            The shape of the output, with the input's N and C.

        Raises:
            InvalidArgumentError: The layer can't pool a tensor of this shape.

        """
        shape = self._checked_sizes(shape)
        dims = check_shape(shape, self.spatial_dims)
        if operand_shape is not None:
            operand_shape = tuple(integer("operand_shape", size, 0, MAX_NUMEL) for size in operand_shape)
            if not self.operand:
                msg = f"expected none for {self.name}, which takes no operand, got {operand_shape}"
                raise InvalidArgumentError(msg, field="operand_shape")
            check_operand_shape(self.operand, operand_shape, shape, dims)
        return self.pooled_shape(shape, dims, operand_shape)

    def pooled_shape(
        self,
        shape: tuple[int, ...],
        dims: int,
        operand_shape: tuple[int, ...] | None = None,  # noqa: ARG002 - see below
    ) -> tuple[int, ...]:
        """Return the shape of the output, for shapes that are checked.

        Args:
            shape: The input's shape, with channels first.
            dims: The number of its spatial axes.
            operand_shape: The shape of the operand, for layers whose output depends on it. None: there is none.

        Raises:
            InvalidArgumentError: The layer can't pool a tensor of this shape.

        """
        return shape[:-dims] + self.output_plane(shape[-dims:])

    def _size_of(self, operand_shape: tuple[int, ...] | None) -> int:
        """Return the length of the first axis of an operand, on which the shape of the output depends."""
        if operand_shape is None:
            msg = f"expected the shape of the {self.operand}, on which the output depends, got none"
            raise InvalidArgumentError(msg, field="operand_shape")
        return operand_shape[0]

    @staticmethod
    def _checked_sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(integer("shape", size, 0, MAX_NUMEL) for size in shape)

    def output_dtype(self, dtype: str) -> str:
        """Return the name of the output's dtype, given that of the input: the same, except for ToDtype."""
        return dtype

    def check_channels(self, channels: int) -> None:
        """Check that the layer takes a tensor with this number of channels.

        Raises:
            InvalidArgumentError: It does not.

        """

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial shape of the output.

        Args:
            plane: The spatial shape of the input, every axis at least 1.

        Raises:
            InvalidArgumentError: The layer can't pool a plane of this shape.

        """
        raise NotImplementedError

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size of the layer's largest window on a plane of this shape, in cells per axis."""
        raise NotImplementedError

    def resolved(self, plane: tuple[int, ...]) -> "Layer":  # noqa: ARG002 - for layers that depend on it
        """Return the layer that computes the same on planes of this shape and doesn't depend on it."""
        return self

    def work(self, plane: tuple[int, ...]) -> int:
        """Return the number of cells that torch visits on a plane of this shape: the sum over all windows."""
        return prod(self.output_plane(plane)) * prod(self.window(plane))

    def at_plane(self, first: int) -> Self:  # noqa: ARG002 - for layers that depend on the plane's index
        """Return the layer that pools the planes from index `first` on as this layer pools them in the whole tensor."""
        return self

    def __repr__(self) -> str:
        """Return an expression of the layer: its required parameters in order, and others that differ from defaults."""
        return expression_of(self)

    def _set(self, **values: object) -> None:
        # A frozen dataclass rejects assignment, also in its own __post_init__.
        for name, value in values.items():
            object.__setattr__(self, name, value)


class SlidingWindowLayer(Layer):
    """The base class of layers with kernel_size and stride, and padding and dilation if their family has them."""

    __slots__ = ()
    kernel_size: Axes
    stride: Axes | None

    def geometry(self) -> tuple[tuple[int, int, int, int, int], ...]:
        """Return (kernel, stride, padding before, padding after, dilation) for each axis; the padding is in cells."""
        dims = self.spatial_dims
        before, after = zip(*padded_sides(getattr(self, "padding", 0), dims), strict=True)
        kernel, stride, dilation = self._sizes()
        return tuple(zip(kernel, stride, before, after, dilation, strict=True))

    def _sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the kernel, the stride and the dilation of every axis."""
        dims = self.spatial_dims
        kernel = per_axis(self.kernel_size, dims)
        stride = kernel if self.stride is None else per_axis(self.stride, dims)
        return kernel, stride, per_axis(getattr(self, "dilation", 1), dims)

    def resolved(self, plane: tuple[int, ...]) -> Layer:
        """Return the layer that computes the same on planes of this shape, with its padding in cells."""
        rule = getattr(self, "padding", 0)
        if not isinstance(rule, str):
            return self
        sides = tuple(
            same_padding(size, stride, dilation * (kernel - 1) + 1, lower=rule == "same_lower")
            for size, kernel, stride, dilation in zip(plane, *self._sizes(), strict=True)
        )
        made: Any = self  # every subclass is a dataclass
        layer: Layer = replace(made, padding=sides)
        return layer

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial shape of the output, by torch's rule for sliding windows."""
        out = []
        made: Any = SlidingWindowLayer.resolved(self, plane)
        for size, (kernel, stride, before, after, dilation) in zip(plane, made.geometry(), strict=True):
            padded = size + before + after
            if dilation > padded:
                msg = f"expected at most the padded input, {padded}, got {dilation}"
                raise InvalidArgumentError(msg, field="dilation")
            # Only MaxUnpool has no ceil_mode, and it overrides this method.
            cells = pooled_size(size, kernel, stride, before, dilation, padding_end=after, ceil_mode=made.ceil_mode)
            if cells < 1:
                extent = dilation * (kernel - 1) + 1
                msg = (
                    f"expected an effective kernel of at most the padded input, {padded}, "
                    f"got dilation*(kernel_size - 1) + 1 = {extent} on plane {plane}"
                )
                raise InvalidArgumentError(msg, field="kernel_size")
            out.append(cells)
        return tuple(out)

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size of the kernel, without the gaps of a dilation, in cells per axis."""
        return per_axis(self.kernel_size, len(plane))

    def _check_window(self) -> None:
        dims = self.spatial_dims
        self._set(kernel_size=axes("kernel_size", self.kernel_size, dims))
        if isinstance(self.stride, tuple | list) and not self.stride:  # which torch reads as None
            self._set(stride=None)
        if self.stride is not None:
            self._set(stride=axes("stride", self.stride, dims))

    def _check_padding(self, value: object) -> None:
        checked = padding("padding", value, self.spatial_dims)
        self._set(padding=checked)
        if isinstance(checked, str):
            if self.ceil_mode:  # type: ignore[attr-defined]  # every layer with such a padding has it
                msg = f"expected False with padding={checked!r}, which covers the input in any case, got True"
                raise InvalidArgumentError(msg, field="ceil_mode")
            return
        for kernel, _, before, after, dilation in self.geometry():
            span = dilation * (kernel - 1) + 1
            # torch accepts at most half of the kernel. With less than a window's span, every window has a cell of the
            # input, unless a dilation skips all of them.
            if max(before, after) >= span:
                msg = f"expected less than the span of a window, {span}, got {max(before, after)}"
                raise InvalidArgumentError(msg, field="padding")

    def _check_fits_unpadded(self, plane: tuple[int, ...]) -> None:
        # Only torch's avg_pool3d requires this: pool3d_shape_check with check_input_size, in aten's Pool.h.
        kernel = per_axis(self.kernel_size, self.spatial_dims)
        if any(k > size for k, size in zip(kernel, plane, strict=True)):
            msg = f"expected at most the input {plane}, without padding, for a 3d average, got {kernel}"
            raise InvalidArgumentError(msg, field="kernel_size")
