"""GlobalMaxPool and GlobalAvgPool."""

from dataclasses import dataclass
from typing import ClassVar

from poolrpc.layers.base import FLOATS, INTEGERS, Layer


class _GlobalPool(Layer):
    """The base class of layers whose only window is the whole plane."""

    __slots__ = ()

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * len(plane)

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        return plane


@dataclass(frozen=True, slots=True, repr=False)
class GlobalMaxPool(_GlobalPool):
    """The maximum of each plane, of 1 to 3 spatial axes: ONNX's GlobalMaxPool.

    The output is that of torch's AdaptiveMaxPool1d, 2d or 3d with an output size of 1. If a plane contains NaN, its
    maximum is NaN. The dtypes are float16, bfloat16, float32, float64, uint8, int8, int16, int32 and int64; the output
    has the input's.

    Shape:
        Input: (N, C, L), (N, C, H, W) or (N, C, D, H, W). The tensor must have N, since nothing else determines its
        number of spatial axes, except in a chain with layers that do. Output:

            (N, C, 1), (N, C, 1, 1) or (N, C, 1, 1, 1)

    Raises:
        InvalidArgumentError: `output_shape` and the calls of a client raise it if the input has another rank.

    Examples:
        >>> from poolrpc import GlobalMaxPool
        >>> GlobalMaxPool().output_shape((8, 64, 56, 56))
        (8, 64, 1, 1)

    """

    family: ClassVar[str] = "global_max_pool"
    dtypes: ClassVar[tuple[str, ...]] = FLOATS + INTEGERS


@dataclass(frozen=True, slots=True, repr=False)
class GlobalAvgPool(_GlobalPool):
    """The mean of each plane, of 1 to 3 spatial axes: ONNX's GlobalAveragePool.

    The output is that of torch's AdaptiveAvgPool1d, 2d or 3d with an output size of 1. The dtypes are float16,
    bfloat16, float32 and float64; the output has the input's.

    Shape:
        Input: (N, C, L), (N, C, H, W) or (N, C, D, H, W). The tensor must have N, since nothing else determines its
        number of spatial axes, except in a chain with layers that do. Output:

            (N, C, 1), (N, C, 1, 1) or (N, C, 1, 1, 1)

    Raises:
        InvalidArgumentError: `output_shape` and the calls of a client raise it if the input has another rank.

    Examples:
        >>> from poolrpc import GlobalAvgPool
        >>> GlobalAvgPool().output_shape((8, 64, 56))
        (8, 64, 1)

    """

    family: ClassVar[str] = "global_avg_pool"
