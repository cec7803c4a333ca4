"""BlurPool: a binomial filter with a stride, computed axis by axis in torch's operators on any device."""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING, Any

from torch.nn import functional

from poolrpc_server.compute.kernels.padded import sum_dtype

if TYPE_CHECKING:
    import torch

    from poolrpc_server.compute.kernels.eager import Operator, Pooled
    from poolrpc_server.compute.kernels.windows import Sizes


def blur_pool(layer: Any, dtype: torch.dtype, plane: Sizes) -> Operator:  # noqa: ANN401 - a BlurPool2d
    """Return the operator of a BlurPool."""
    kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
    coefficients = [comb(kernel - 1, i) / 2 ** (kernel - 1) for i in range(kernel)]

    def filtered(x: torch.Tensor, axis: int, length: int) -> torch.Tensor:
        read = [slice(None)] * x.dim()
        total: torch.Tensor | None = None
        for start, coefficient in enumerate(coefficients):
            read[axis] = slice(start, start + (length - 1) * stride + 1, stride)
            # Multiplied and added apart: torch's fused operator differs in the last bit at a tensor's end.
            cells = x[tuple(read)] * coefficient
            total = cells if total is None else total.add_(cells)
        assert total is not None  # noqa: S101 - a filter has a coefficient
        return total

    def run(x: torch.Tensor, *_: object) -> Pooled:
        padded = functional.pad(x.to(sum_dtype(dtype)), (padding,) * 4, "reflect")
        return filtered(filtered(padded, 2, plane[0]), 3, plane[1]).to(dtype), None

    return run


def blur_bytes(layer: Any, dtype: torch.dtype, cells: int, outputs: int) -> int:  # noqa: ANN401 - a BlurPool2d
    """Return an upper bound of the memory that the operator takes for a plane, apart from its output, in bytes.

    Args:
        layer: The layer.
        dtype: The dtype of the cells.
        cells: The number of cells of a plane, with its channels if they are last.
        outputs: The same for an output plane.

    """
    # The padding is less than an axis, so that a padded plane has less than 9 times the cells; then two of its passes.
    padded = 9 * cells if layer.padding > layer.stride else 4 * cells
    return (cells + padded + 2 * (cells * 3 + outputs)) * sum_dtype(dtype).itemsize
