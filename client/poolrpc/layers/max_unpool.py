"""MaxUnpool1d, MaxUnpool2d and MaxUnpool3d."""

from dataclasses import dataclass
from typing import ClassVar

from poolrpc._shapes.limits import MAX_NUMEL
from poolrpc._shapes.parameters import Axes, axes, per_axis
from poolrpc._shapes.rules import unpooled_size
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers.base import FLOATS, INTEGERS, SlidingWindowLayer


@dataclass(frozen=True, slots=True, repr=False)
class _MaxUnpool(SlidingWindowLayer):
    family: ClassVar[str] = "max_unpool"
    dtypes: ClassVar[tuple[str, ...]] = FLOATS + INTEGERS
    kernel_size: Axes
    stride: Axes | None = None
    padding: Axes = 0
    output_size: tuple[int, ...] | None = None
    operand: ClassVar[str] = "indices"

    def __post_init__(self) -> None:
        self._check_window()
        self._set(padding=axes("padding", self.padding, self.spatial_dims, low=0))
        if self.output_size is not None:
            sizes = axes("output_size", self.output_size, self.spatial_dims, high=MAX_NUMEL)
            self._set(output_size=per_axis(sizes, self.spatial_dims))

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        geometry = self.geometry()
        default = tuple(unpooled_size(size, k, s, p) for size, (k, s, p, *_) in zip(plane, geometry, strict=True))
        out = default if self.output_size is None else self.output_size
        for cells, usual, (_, stride, *_) in zip(out, default, geometry, strict=True):
            if self.output_size is not None and not abs(cells - usual) < stride:
                msg = f"expected less than a stride of {stride} from the default {default}, got {out}"
                raise InvalidArgumentError(msg, field="output_size")
            if cells < 1:
                msg = f"expected an output of at least 1 cell per axis, got {out} on plane {plane}"
                raise InvalidArgumentError(msg, field="padding")
        return out

    def window(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        # Each output cell is written as a zero, and each input cell once: at most two cells of work per output cell.
        return (2,) + (1,) * (len(plane) - 1)


class MaxUnpool1d(_MaxUnpool):
    """The partial inverse of MaxPool1d, as torch.nn.MaxUnpool1d computes it.

    The parameters, dtypes and errors are those of MaxUnpool2d, with one value for the single axis.

    Shape:
        Input and indices: (N, C, L) or (C, L). Output: (N, C, L_out) or (C, L_out), where

            L_out = output_size, by default (L - 1)*stride - 2*padding + kernel_size

    Examples:
        >>> from poolrpc import MaxUnpool1d
        >>> MaxUnpool1d(2).output_shape((8, 64, 25))
        (8, 64, 50)

    """

    __slots__ = ()
    spatial_dims = 1


class MaxUnpool2d(_MaxUnpool):
    """The partial inverse of MaxPool2d, as torch.nn.MaxUnpool2d computes it.

    Each value of the input is written to the position that its index names, and all other cells are zero. The indices
    are a second input of the call (`indices=`): int64, of the input's shape, from a MaxPool2d with return_indices. The
    dtypes are those of MaxPool2d: float16, bfloat16, float32, float64, uint8, uint16, int8, int16, int32 and int64; the
    output has the input's.

    Args:
        kernel_size: That of the MaxPool2d, 1 to 65535: an int for both axes, or (height, width).
        stride: That of the MaxPool2d, 1 to 65535: an int or a pair. Default: None, which is kernel_size.
        padding: That of the MaxPool2d, 0 to 65535: an int or a pair. Default: 0.
        output_size: Size of the output in cells, if another than the default; in torch it is an argument of the call.
            An int or a pair, less than a stride from the default on each axis. Default: None.

    Shape:
        Input and indices: (N, C, H, W) or (C, H, W). Output: (N, C, H_out, W_out) or (C, H_out, W_out), where

            H_out = output_size, by default (H - 1)*stride - 2*padding + kernel_size

        and W_out likewise. The rule is torch.nn.functional._unpool_output_size.

    Raises:
        InvalidArgumentError: A parameter has the wrong type or is out of range. `output_shape` and the calls of a
            client also raise it if output_size doesn't fit the input; the calls, if an index is outside the output.

    Examples:
        >>> from poolrpc import MaxUnpool2d
        >>> MaxUnpool2d(2).output_shape((8, 64, 28, 28))
        (8, 64, 56, 56)
        >>> MaxUnpool2d(2, output_size=(57, 57)).output_shape((8, 64, 28, 28))
        (8, 64, 57, 57)

    """

    __slots__ = ()
    spatial_dims = 2


class MaxUnpool3d(_MaxUnpool):
    """The partial inverse of MaxPool3d, as torch.nn.MaxUnpool3d computes it.

    The parameters, dtypes and errors are those of MaxUnpool2d, with one value for all axes or (depth, height, width).

    Shape:
        Input and indices: (N, C, D, H, W) or (C, D, H, W). Output: (N, C, D_out, H_out, W_out) or (C, D_out, H_out,
        W_out), where

            D_out = output_size, by default (D - 1)*stride - 2*padding + kernel_size

        and H_out and W_out likewise.

    Examples:
        >>> from poolrpc import MaxUnpool3d
        >>> MaxUnpool3d(2).output_shape((8, 64, 8, 28, 28))
        (8, 64, 16, 56, 56)

    """

    __slots__ = ()
    spatial_dims = 3
