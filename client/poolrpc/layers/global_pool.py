"""GlobalPool1d, GlobalPool2d and GlobalPool3d."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

from poolrpc._shapes.parameters import choice
from poolrpc.layers.base import FLOATS, INTEGERS, Layer

Reduce: TypeAlias = Literal["max", "mean"]
REDUCTIONS: tuple[Reduce, ...] = get_args(Reduce)
"""The values of `reduce`."""


class _ReducedDtypes:
    """The dtypes of a layer's reduction; on a class, those of any reduction."""

    def __get__(self, layer: _GlobalPool | None, cls: type[_GlobalPool]) -> tuple[str, ...]:
        return FLOATS if layer is not None and layer.reduce == "mean" else FLOATS + INTEGERS


@dataclass(frozen=True, slots=True, repr=False)
class _GlobalPool(Layer):
    family: ClassVar[str] = "global_pool"
    dtypes = _ReducedDtypes()
    reduce: Reduce

    def __post_init__(self) -> None:
        self._set(reduce=choice("reduce", self.reduce, REDUCTIONS))

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * len(plane)

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        return plane


class GlobalPool1d(_GlobalPool):
    """The maximum or the mean of each 1d plane.

    The parameter, dtypes and errors are those of GlobalPool2d.

    Shape:
        Input: (N, C, L) or (C, L). Output: (N, C, 1) or (C, 1), so

            L_out = 1

    Examples:
        >>> from poolrpc import GlobalPool1d
        >>> GlobalPool1d("mean").output_shape((8, 64, 50))
        (8, 64, 1)

    """

    __slots__ = ()
    spatial_dims = 1


class GlobalPool2d(_GlobalPool):
    """The maximum or the mean of each 2d plane: ONNX's GlobalMaxPool and GlobalAveragePool.

    The output is that of torch's AdaptiveMaxPool2d or AdaptiveAvgPool2d with an output size of 1. If a plane contains
    NaN, its maximum and its mean are NaN. The dtypes are float16, bfloat16, float32 and float64, and for the maximum
    also uint8, uint16, int8, int16, int32 and int64; the output has the input's.

    Args:
        reduce: What becomes of a plane's cells: "max" or "mean".

    Shape:
        Input: (N, C, H, W) or (C, H, W). Output: (N, C, 1, 1) or (C, 1, 1), so

            H_out = 1

        and likewise for W_out.

    Raises:
        InvalidArgumentError: `reduce` is another value. `output_shape` and the calls of a client also raise it if the
            input has another rank.

    Examples:
        >>> from poolrpc import GlobalPool2d
        >>> GlobalPool2d("mean").output_shape((8, 64, 56, 56))
        (8, 64, 1, 1)

    """

    __slots__ = ()
    spatial_dims = 2


class GlobalPool3d(_GlobalPool):
    """The maximum or the mean of each 3d plane.

    The parameter, dtypes and errors are those of GlobalPool2d.

    Shape:
        Input: (N, C, D, H, W) or (C, D, H, W). Output: (N, C, 1, 1, 1) or (C, 1, 1, 1), so

            D_out = 1

        and likewise for H_out and W_out.

    Examples:
        >>> from poolrpc import GlobalPool3d
        >>> GlobalPool3d("max").output_shape((8, 64, 16, 56, 56))
        (8, 64, 1, 1, 1)

    """

    __slots__ = ()
    spatial_dims = 3
