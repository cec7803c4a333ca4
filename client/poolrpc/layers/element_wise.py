"""ToDtype, Normalize and Round: the element-wise steps of a chain."""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from poolrpc._shapes.limits import MAX_RANK
from poolrpc._shapes.parameters import boolean, choice, finite_numbers
from poolrpc._shapes.rules import clip
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers.base import FLOATS, INTEGERS, Layer

MIN_RANK = 2
"""The number of axes of the smallest tensor: (C, L)."""

UNSAFE_SCALES = {"int32": ("float32",), "int64": ("float32", "float64")}
"""The floats that torchvision does not scale to an integer dtype, since their precision does not suffice."""


class ElementWiseStep(Layer):
    """The base class of steps that compute each cell from the same cell of the input, for any number of spatial axes.

    They may be anywhere in a chain, as long as the call has a pooling layer too, which determines the
    number of spatial axes.
    """

    __slots__ = ()
    spatial_dims = 0

    def output_shape(self, shape: tuple[int, ...], operand_shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Return the shape of the output, which is the input's.

        Args:
            shape: The input's shape, (N, C, spatial...) or (C, spatial...), with up to three spatial axes.
            operand_shape: None, since a step takes no operand.

        Raises:
            InvalidArgumentError: No tensor with one to three spatial axes has this shape.

        """
        if not MIN_RANK <= len(shape) <= MAX_RANK:
            msg = f"expected {MIN_RANK} to {MAX_RANK} dims, (N, C, spatial...) or (C, spatial...), got shape "
            raise InvalidArgumentError(msg + clip(shape), field="shape")
        if operand_shape is not None:
            raise InvalidArgumentError(f"expected none, got {clip(operand_shape)}", field="operand_shape")
        return self._checked_sizes(shape)

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial shape of the output, which is the input's."""
        return plane

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size of a window: one cell."""
        return (1,) * len(plane)


class _ConvertedDtypes:
    """The dtypes that a conversion takes; on a class, those of any conversion."""

    def __get__(self, layer: "ToDtype | None", cls: "type[ToDtype]") -> tuple[str, ...]:
        every = (*FLOATS, *INTEGERS, "bool")
        if layer is None or not layer.scale:
            return every
        unsafe = UNSAFE_SCALES.get(layer.dtype, ())
        return tuple(each for each in every if each not in unsafe and (each != "bool" or layer.dtype in FLOATS))


@dataclass(frozen=True, slots=True, repr=False)
class ToDtype(ElementWiseStep):
    """The conversion of each cell to another dtype, as torchvision.transforms.v2.ToDtype computes it.

    It takes every dtype: float16, bfloat16, float32, float64, uint8, uint16, int8, int16, int32, int64 and bool. A
    client can so send the bytes of an image as they are, and let the server compute their average.

    Integers that become integers keep their lowest bits, as in torch: -1 is 255 in uint8. Floats that become integers
    are truncated towards zero. What torch leaves to the CPU is defined here: a float beyond the range of the dtype
    becomes its nearest value (300.0 is 255 in uint8, -1.0 is 0), and NaN becomes 0.

    Args:
        dtype: The dtype of the output, as a name or as a dtype of NumPy or torch: any of those above but bool.
        scale: Whether values are scaled from one dtype's range to the other's, 0 to 1 for floats and 0 to the largest
            value for integers. As in torchvision, integers are multiplied by the inverse of their largest value;
            floats by the largest value of the integers + 1 - 0.001, and truncated; and between integers, bits are
            shifted. Floats become int32 only from float16, bfloat16 and float64, and int64 only from float16 and
            bfloat16, because other floats have too few bits; bool becomes floats alone. Default: False.

    Shape:
        Input: any. Output: the same, so

            H_out = H

    Raises:
        InvalidArgumentError: A parameter has the wrong type, or there is no such dtype.

    Examples:
        >>> from poolrpc import AvgPool2d, ToDtype, branch_shapes
        >>> ToDtype("float32", scale=True)
        ToDtype('float32', scale=True)
        >>> ToDtype("float32").output_shape((8, 3, 56, 56))
        (8, 3, 56, 56)
        >>> branch_shapes((8, 3, 56, 56), [[ToDtype("float32"), AvgPool2d(2)]])
        [((8, 3, 56, 56), (8, 3, 28, 28))]

    """

    family: ClassVar[str] = "to_dtype"
    dtypes = _ConvertedDtypes()
    dtype: str
    scale: bool = False

    def __post_init__(self) -> None:
        self._set(dtype=_name_of(self.dtype), scale=boolean("scale", self.scale))

    def output_dtype(self, dtype: str) -> str:  # noqa: ARG002 - it is the same for any input
        """Return the dtype of the output."""
        return self.dtype


@dataclass(frozen=True, slots=True, repr=False)
class Normalize(ElementWiseStep):
    """The cell minus a mean, divided by a standard deviation, as torchvision.transforms.v2.Normalize computes it.

    The mean and the standard deviation are rounded to the input's dtype first. The dtypes are float16, bfloat16,
    float32 and float64; the output has the input's.

    Args:
        mean: The mean of each channel, a tuple with one number per channel, up to 64; or one number for all channels.
        std: The standard deviation of each channel, likewise. Not 0.

    Shape:
        Input: any, with as many channels as there are numbers. Output: the same, so

            H_out = H

    Raises:
        InvalidArgumentError: A number is not finite, a standard deviation is 0, or there are not as many of one as of
            the other. The calls of a client also raise it if the input has another number of channels.

    Examples:
        >>> from poolrpc import Normalize
        >>> Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).output_shape((8, 3, 56, 56))
        (8, 3, 56, 56)

    """

    family: ClassVar[str] = "normalize"
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    def __post_init__(self) -> None:
        self._set(mean=finite_numbers("mean", self.mean), std=finite_numbers("std", self.std))
        deviations = self.std if isinstance(self.std, tuple) else (self.std,)
        if 0.0 in deviations:
            raise InvalidArgumentError(f"expected numbers other than 0, got {clip(self.std)}", field="std")
        sizes = {len(each) for each in (self.mean, self.std) if isinstance(each, tuple)}
        if len(sizes) > 1:
            msg = f"expected as many as mean has, {len(self.mean)}, got {len(deviations)}"  # type: ignore[arg-type]  # both are tuples
            raise InvalidArgumentError(msg, field="std")

    @property
    def period(self) -> int:
        """The number of channels; 1 if all are treated alike."""
        return max(len(each) if isinstance(each, tuple) else 1 for each in (self.mean, self.std))

    def check_channels(self, channels: int) -> None:
        """Check that a tensor has as many channels as there are numbers.

        Raises:
            InvalidArgumentError: It has another number of channels.

        """
        if self.period not in {1, channels}:
            name = "mean" if isinstance(self.mean, tuple) else "std"
            msg = f"expected one number, or one per channel of {channels}, got {self.period}"
            raise InvalidArgumentError(msg, field=name)

    def at_plane(self, first: int) -> Self:
        """Return the step for the planes from number `first` on: plane i has the numbers of channel first + i."""
        start = first % self.period
        if not start:
            return self
        mean, std = (
            (*each[start:], *each[:start]) if isinstance(each, tuple) else each for each in (self.mean, self.std)
        )
        return type(self)(mean, std)


@dataclass(frozen=True, slots=True, repr=False)
class Round(ElementWiseStep):
    """The nearest integer to each cell, and of two equally near ones the even one, as torch.round computes it.

    The dtypes are float16, bfloat16, float32, float64, uint8, uint16, int8, int16, int32 and int64; the output has the
    input's. Integers stay as they are.

    Shape:
        Input: any. Output: the same, so

            H_out = H

    Examples:
        >>> from poolrpc import parse_chain
        >>> parse_chain("[ToDtype('float32'), AvgPool2d(2), Round(), ToDtype('uint8')]")
        (ToDtype('float32'), AvgPool2d(2), Round(), ToDtype('uint8'))

    """

    family: ClassVar[str] = "round"
    dtypes: ClassVar[tuple[str, ...]] = FLOATS + INTEGERS


def _name_of(dtype: object) -> str:
    """Return the name of a dtype of NumPy or torch, or a name as it is."""
    if type(dtype).__module__ == "torch":
        dtype = str(dtype).removeprefix("torch.")
    if isinstance(dtype, np.dtype) or (isinstance(dtype, type) and issubclass(dtype, np.generic)):
        dtype = np.dtype(dtype).name
    return choice("dtype", dtype, FLOATS + INTEGERS)


STEPS: dict[str, type[ElementWiseStep]] = {cls.__name__: cls for cls in (ToDtype, Normalize, Round)}
"""Every element-wise step by its name."""
