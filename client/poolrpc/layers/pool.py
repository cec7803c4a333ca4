"""Pool1d, Pool2d and Pool3d."""

from dataclasses import dataclass
from typing import Any, ClassVar

from poolrpc._shapes.parameters import Axes, Padding, axes, boolean
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers.avg_pool import AvgPool1d, AvgPool2d, AvgPool3d
from poolrpc.layers.base import Layer, SlidingWindowLayer
from poolrpc.layers.max_pool import MaxPool1d, MaxPool2d, MaxPool3d
from poolrpc.layers.reductions import Reduce, ReducedDtypes, check_reduce

MAXIMA: tuple[Any, ...] = (MaxPool1d, MaxPool2d, MaxPool3d)
AVERAGES: tuple[Any, ...] = (AvgPool1d, AvgPool2d, AvgPool3d)


@dataclass(frozen=True, slots=True, repr=False)
class _Pool(SlidingWindowLayer):
    family: ClassVar[str] = "pool"
    dtypes = ReducedDtypes()
    reduce: Reduce
    kernel_size: Axes
    stride: Axes | None = None
    padding: Padding = 0
    dilation: Axes = 1
    ceil_mode: bool = False
    count_include_pad: bool = False

    def __post_init__(self) -> None:
        self._set(reduce=check_reduce("reduce", self.reduce))
        self._check_window()
        self._set(
            dilation=axes("dilation", self.dilation, self.spatial_dims),
            ceil_mode=boolean("ceil_mode", self.ceil_mode),
            count_include_pad=boolean("count_include_pad", self.count_include_pad),
        )
        self._check_padding(self.padding)
        if self.count_include_pad and self.reduce != "mean":
            msg = f"expected False unless reduce is 'mean', got True with {self.reduce!r}"
            raise InvalidArgumentError(msg, field="count_include_pad")

    def resolved(self, plane: tuple[int, ...]) -> Layer:
        """Return the layer with its padding in cells; if torch.nn has a layer that computes the same, that one."""
        made: Any = SlidingWindowLayer.resolved(self, plane)
        dims, windows = self.spatial_dims, (self.kernel_size, self.stride, made.padding)
        kernel, _, dilation = self._sizes()
        # torch's averages have no dilation, and AvgPool3d has no kernel larger than the plane.
        averages = max(dilation) == 1 and (dims < len(AVERAGES) or all(map(int.__le__, kernel, plane)))
        layer: Layer = made
        if self.reduce == "max":
            layer = MAXIMA[dims - 1](*windows, self.dilation, ceil_mode=self.ceil_mode)
        elif self.reduce == "mean" and averages:
            layer = AVERAGES[dims - 1](*windows, self.ceil_mode, self.count_include_pad)
        elif self.reduce == "sum" and averages and dims > 1:  # AvgPool1d has no divisor_override
            layer = AVERAGES[dims - 1](*windows, self.ceil_mode, divisor_override=1)
        return layer


class Pool1d(_Pool):
    """Each window of a 1d input, reduced to one cell.

    The parameters, dtypes and errors are those of Pool2d, with one value for the single axis.

    Shape:
        Input: (N, C, L) or (C, L). Output: (N, C, L_out) or (C, L_out), where

            L_out = floor((L + 2*padding - dilation*(kernel_size - 1) - 1) / stride) + 1

        with ceil in place of floor if ceil_mode is set.

    Examples:
        >>> from poolrpc import Pool1d
        >>> Pool1d("std", 3, stride=2).output_shape((8, 64, 50))
        (8, 64, 24)

    """

    __slots__ = ()
    spatial_dims = 1


class Pool2d(_Pool):
    """Each window of a 2d input, reduced to one cell.

    A window has the cells of the input that it covers; those of the padding, and those beyond it, are left out. "max"
    is MaxPool2d, and "mean" is AvgPool2d, with the same bits, but that count_include_pad is False by default. "min",
    "sum" and "median", the lower of two in the middle, are as in torch, and so are "std" and "var", which divide by
    the number of cells - 1; Norm, PowerMean, LogSumExp and Softmax have their rules in their own documentation. If a
    window contains NaN, its value is NaN.

    The dtypes are float16, bfloat16, float32 and float64; for "max", "min" and "median" also uint8, uint16, int8,
    int16, int32 and int64; for "sum" and "mean" also int64. The output has the input's. Half precision is added in
    float32, and all but these five are computed in float64; the result is rounded once.

    Args:
        reduce: What becomes of a window's cells: "max", "min", "sum", "mean", "median", "std", "var", or a Norm,
            PowerMean, LogSumExp or Softmax.
        kernel_size: Size of a window in cells, 1 to 65535: an int for both axes, or (height, width).
        stride: Distance between windows in cells, 1 to 65535: an int or a pair. Default: None, which is kernel_size.
        padding: As in MaxPool2d. Default: 0.
        dilation: Distance between the cells of a window, 1 to 65535: an int or a pair. Default: 1. A window without any
            cell of the input, which only a dilation can have, has the sum and the mean 0, the max -inf and the min inf.
        ceil_mode: Whether to round the output's size up instead of down, which adds a last, partial window on an axis
            if it starts in the input or the padding before it. Default: False.
        count_include_pad: Whether cells of the padding count in the divisor of a mean. Default: False.

    Shape:
        Input: (N, C, H, W) or (C, H, W). Output: (N, C, H_out, W_out) or (C, H_out, W_out), where

            H_out = floor((H + 2*padding - dilation*(kernel_size - 1) - 1) / stride) + 1

        with ceil in place of floor if ceil_mode is set, and W_out likewise, from W and the second value of each pair.

    Raises:
        InvalidArgumentError: A parameter has the wrong type or is out of range, or count_include_pad is set and reduce
            is not "mean". `output_shape` and the calls of a client also raise it if the input has another rank, if no
            window fits the padded input, or if dilation is larger than the padded input.

    Examples:
        >>> import numpy as np
        >>> import poolrpc_server
        >>> from poolrpc import Norm, Pool2d
        >>> x = np.array([[[[1, 3, 2, 4], [5, 6, 8, 7]]]], np.float32)
        >>> with poolrpc_server.embedded() as client:
        ...     layers = [Pool2d("min", 2), Pool2d("mean", 2, dilation=(1, 2)), Pool2d(Norm(1), 2)]
        ...     results = client.pool_each(x, layers)
        >>> [result.output.tolist() for result in results]
        [[[[[1.0, 2.0]]]], [[[[4.0]]]], [[[[15.0, 21.0]]]]]

    """

    __slots__ = ()
    spatial_dims = 2


class Pool3d(_Pool):
    """Each window of a 3d input, reduced to one cell.

    The parameters, dtypes and errors are those of Pool2d, with one value for all axes or (depth, height, width).

    Shape:
        Input: (N, C, D, H, W) or (C, D, H, W). Output: (N, C, D_out, H_out, W_out) or (C, D_out, H_out, W_out), where

            D_out = floor((D + 2*padding - dilation*(kernel_size - 1) - 1) / stride) + 1

        with ceil in place of floor if ceil_mode is set, and H_out and W_out likewise.

    Examples:
        >>> from poolrpc import Pool3d
        >>> Pool3d("median", (1, 2, 2)).output_shape((8, 64, 16, 56, 56))
        (8, 64, 16, 28, 28)

    """

    __slots__ = ()
    spatial_dims = 3
