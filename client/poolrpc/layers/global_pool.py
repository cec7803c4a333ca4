"""GlobalPool1d, GlobalPool2d and GlobalPool3d."""

from dataclasses import dataclass
from typing import ClassVar

from poolrpc.layers.base import Layer
from poolrpc.layers.reductions import Reduce, ReducedDtypes, check_reduce


@dataclass(frozen=True, slots=True, repr=False)
class _GlobalPool(Layer):
    family: ClassVar[str] = "global_pool"
    dtypes = ReducedDtypes()
    operand: ClassVar[str] = "weights"
    operand_optional: ClassVar[bool] = True
    reduce: Reduce

    def __post_init__(self) -> None:
        self._set(reduce=check_reduce("reduce", self.reduce))

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * len(plane)

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        return plane


class GlobalPool1d(_GlobalPool):
    """Each 1d plane, reduced to one cell.

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
    """Each 2d plane, reduced to one cell: ONNX's GlobalMaxPool, GlobalAveragePool and GlobalLpPool, and others.

    For "max" and "mean", the output is that of torch's AdaptiveMaxPool2d or AdaptiveAvgPool2d with an output size of 1;
    for "min", "sum", "median", "std" and "var" it is that of torch's functions of these names over the plane. If a
    plane contains NaN, the output is NaN. The dtypes are those of Pool2d; the output has the input's.

    Args:
        reduce: What becomes of a plane's cells: "max", "min", "sum", "mean", "median", "std", "var", or a Norm,
            PowerMean, LogSumExp or Softmax.

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
    """Each 3d plane, reduced to one cell.

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
