"""Maxima and averages with a padding that torch's operators reject: computed on a padded copy of the planes."""

from __future__ import annotations

from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from poolrpc_server.compute.kernels.cells import upload
from poolrpc_server.compute.kernels.counts import divisor
from poolrpc_server.compute.kernels.windows import Sizes, Windows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc_server.compute.kernels.eager import Operator, Pooled

HALVES = (torch.float16, torch.bfloat16)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which torch adds the cells of a window."""
    return torch.float32 if dtype in HALVES else dtype


def lowest(dtype: torch.dtype) -> float | int:
    """Return the lowest value of a dtype."""
    return -inf if dtype.is_floating_point else torch.iinfo(dtype).min


def highest(dtype: torch.dtype) -> float | int:
    """Return the highest value of a dtype."""
    return inf if dtype.is_floating_point else torch.iinfo(dtype).max


def torch_can_pad(layer: Any) -> bool:  # noqa: ANN401 - a Layer
    """Return whether torch's operator takes the padding of a layer: at most half of a kernel, on both sides alike."""
    if layer.family not in {"max_pool", "avg_pool"}:
        return True
    return all(before == after <= kernel // 2 for kernel, _, before, after, _ in layer.geometry())


def sum_divisor(layer: Any) -> int | None:  # noqa: ANN401 - an AvgPool or a Pool
    """Return what all sums of a layer are divided by, if it isn't the number of a window's cells."""
    return 1 if getattr(layer, "reduce", None) == "sum" else getattr(layer, "divisor_override", None)


def padded_max(layer: Any, dtype: torch.dtype, plane: Sizes, operator: Operator) -> Operator:  # noqa: ANN401 - a MaxPool
    """Return the operator of a max with any padding, given that of the same windows without padding."""
    windows = Windows.of(layer.geometry())
    value = lowest(dtype)
    pad = _pad(windows, plane)

    def run(x: torch.Tensor, _: object, first: int, count: int) -> Pooled:
        output, chosen = operator(pad(x, value), None, first, count)
        return output, None if chosen is None else _indices_in_plane(chosen, windows, x.shape[2:], plane)

    return run


def padded_average(layer: Any, dtype: torch.dtype, plane: Sizes) -> Operator:  # noqa: ANN401 - an AvgPool
    """Return the operator of an average or a sum with any padding, which sums the padded plane and then divides."""
    windows = Windows.of(layer.geometry())
    sums, pad = sum_dtype(dtype), _pad(windows, plane)
    kernel, stride = windows.kernel, windows.stride
    override = sum_divisor(layer)

    def run(x: torch.Tensor, *_: object) -> Pooled:
        padded = pad(x.to(sums), 0)
        if len(plane) == 1:  # avg_pool1d has no divisor_override
            total = functional.avg_pool2d(padded.unsqueeze(2), (1, *kernel), (1, *stride), divisor_override=1).squeeze(
                2
            )
        else:
            total = getattr(functional, f"avg_pool{len(plane)}d")(padded, kernel, stride, divisor_override=1)
        counts = override or divisor(tuple(x.shape[2:]), windows, plane, include_pad=layer.count_include_pad)
        return divided(total, counts).to(dtype), None

    return run


def divided(total: torch.Tensor, counts: float | torch.Tensor) -> torch.Tensor:
    """Divide sums in place by numbers of cells; those of integers are truncated towards zero."""
    if isinstance(counts, torch.Tensor):
        counts = upload(counts, total, total.dtype)
    if total.is_floating_point():
        return total.div_(counts)
    # The CPU traps the division of the lowest integer by -1.
    counts = counts if isinstance(counts, torch.Tensor) else int(counts)
    return total.neg_() if isinstance(counts, int) and counts == -1 else total.div_(counts, rounding_mode="trunc")


def _pad(windows: Windows, plane: Sizes) -> Callable[[torch.Tensor, float], torch.Tensor]:
    """Return a function that pads planes with a value, such that the windows exactly cover them."""
    span = windows.span(plane)

    def pad(x: torch.Tensor, value: float) -> torch.Tensor:
        axes = zip(windows.padding, span, x.shape[2:], strict=True)
        # What no window covers is cut off, by a negative padding.
        sides = [(before, cells - before - size) for before, cells, size in axes]
        return torch.constant_pad_nd(x, [*chain.from_iterable(reversed(sides))], value)

    return pad


def _indices_in_plane(chosen: torch.Tensor, windows: Windows, plane: Sequence[int], result: Sizes) -> torch.Tensor:
    """Return indices of cells of a padded plane as those in the plane itself, in the same memory if possible.

    A window whose cells are all the lowest value has its first cell as its maximum. If that is in the padding, torch
    takes the first one after it.
    """
    rest, index, factor = chosen, torch.zeros_like(chosen), 1
    axes = zip(plane, windows.span(result), windows.padding, windows.dilation, strict=True)
    for size, cells, before, dilation in reversed([*axes]):
        position = (rest % cells).sub_(before)
        index.add_(torch.where(position < 0, position % dilation, position), alpha=factor)
        rest, factor = rest.div(cells, rounding_mode="floor"), factor * size
    return index
