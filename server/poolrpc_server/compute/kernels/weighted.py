"""Global pooling with weights, a row of them for the planes of each image."""

from __future__ import annotations

from math import inf, nan
from typing import TYPE_CHECKING

import torch

from poolrpc.layers.reductions import Reduction, reduction_of
from poolrpc_server.compute.kernels.padded import sum_dtype
from poolrpc_server.compute.kernels.reduce import arithmetic_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc_server.compute.with_operand import WithOperand


class WeightedCells:
    """The cells of planes that count as often as their weights say, (images, channels, cells).

    A cell of weight 0 isn't there, whatever its value. A value has one number for each plane.
    """

    xp = torch

    def __init__(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        """Create the cells.

        Args:
            x: The planes, in the dtype of the arithmetic.
            weights: The weights of each image, (images, 1, cells), in the same dtype; at least 0.

        """
        self._x, self._weights = x, weights
        self._absent = weights == 0
        self._total = weights.sum(-1)
        # There is no variance of one cell or less.
        self.count = self._total.masked_fill(self._total <= 1, nan)

    def max(self, of: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """As in WindowCells."""
        return (self._x if of is None else of(self._x)).masked_fill(self._absent, -inf).amax(-1)

    def min(self) -> torch.Tensor:
        """As in WindowCells."""
        return self._x.masked_fill(self._absent, inf).amin(-1)

    def median(self) -> torch.Tensor:
        """Return the first of the sorted cells with which half of the weights are counted; NaN if a cell is NaN."""
        values, order = self._x.masked_fill(self._absent, inf).sort(-1)
        counted = self._weights.expand(self._x.shape).gather(-1, order).cumsum(-1)
        middle = (2 * counted >= counted[..., -1:]).int().argmax(-1, keepdim=True)
        has_nan = self._x.masked_fill(self._absent, 0.0).isnan().any(-1)
        return values.gather(-1, middle).squeeze(-1).masked_fill(has_nan, nan)

    def sum(self, of: Callable[..., torch.Tensor] | None = None, *values: torch.Tensor) -> torch.Tensor:
        """As in WindowCells."""
        terms = self._x if of is None else of(self._x, *(each.unsqueeze(-1) for each in values))
        return terms.masked_fill(self._absent, 0.0).mul_(self._weights).sum(-1)

    def mean(self, of: Callable[..., torch.Tensor] | None = None, *values: torch.Tensor) -> torch.Tensor:
        """As in WindowCells."""
        return self.sum(of, *values).div_(self._total)


def operand_dtype(reduction: Reduction, dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the dtype in which cells are reduced with an operand: halves at least in float32, and rounded once."""
    return sum_dtype(arithmetic_dtype(reduction, dtype, device))


def bind_weighted(layer: WithOperand, dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """Return the function that pools planes with weights.

    It takes the planes, (1, planes, spatial...), or (images, channels, spatial...); the weights of every image,
    (images, spatial...); and the number of the first plane.
    """
    reduction, channels = reduction_of(layer.layer.reduce), layer.channels

    def run(x: torch.Tensor, weights: torch.Tensor, first: int) -> torch.Tensor:
        wide = operand_dtype(reduction, dtype, x.device.type)
        planes = x.shape[0] * x.shape[1]
        cells = x.reshape(planes, -1)
        rows = weights.reshape(-1, 1, cells.shape[1])
        first += layer.start
        output = torch.empty(planes, dtype=dtype, device=x.device)
        start = 0
        while start < planes:
            row, inside = divmod(first + start, channels)
            # The rest of an image, as many whole images as there are, or the beginning of one.
            images = max(1, (planes - start) // channels) if not inside else 1
            each = min(channels - inside, planes - start)
            stop = start + images * each
            part, weight = cells[start:stop].view(images, each, -1).to(wide), rows[row : row + images].to(wide)
            made = reduction.of(WeightedCells(part, weight)).masked_fill((weight == 0).all(-1), reduction.empty)
            output[start:stop] = made.reshape(-1)
            start = stop
        return output.view(*x.shape[:2], *(1,) * (x.ndim - 2))

    return run


def operand_bytes(layer: WithOperand, dtype: torch.dtype, cells: int, outputs: int) -> int:
    """Return an upper bound of the memory that reducing a plane with an operand takes, apart from its output, in bytes.

    Args:
        layer: The layer.
        dtype: The dtype of the cells.
        cells: The number of cells of a plane, with its channels if they are last.
        outputs: The same for an output plane.

    """
    reduction = reduction_of(layer.layer.reduce)
    item = operand_dtype(reduction, dtype, "cpu").itemsize
    gathered = 4 * item + torch.int64.itemsize if reduction.gathers else 0
    return cells * (COPIES * item + gathered) + VALUES * outputs * item


COPIES, VALUES = 6, 8
"""The most copies of all cells, with their weights, and of the outputs, that a reduction's formula has at a time."""
