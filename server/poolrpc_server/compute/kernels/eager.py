"""Each layer by torch's own operators, on a tensor of (N, C, spatial...): the reference, and right on every device.

A layer is bound once, to the operator that torch.nn.functional ends in and to its arguments, so that a small call costs
hardly more than the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from poolrpc._shapes.parameters import per_axis
from poolrpc_server.compute.kernels.samples import draw

if TYPE_CHECKING:
    from poolrpc.layers import Layer

Pooled = tuple[torch.Tensor, torch.Tensor | None]
Run = Callable[[torch.Tensor, torch.Tensor | None], Pooled]
"""Computes a tensor of (N, C, spatial...), contiguous in either layout, and MaxUnpool's indices."""

HALVES = (torch.float16, torch.bfloat16)
NARROW_INTEGERS = (torch.uint8, torch.int8, torch.int16)
ALIKE = ("max_pool", "avg_pool", "global_max_pool")
"""The families whose values torch computes alike in either layout."""


def bind(layer: Layer, dtype: torch.dtype, plane: tuple[int, ...], *, channels_last: bool = False) -> Run:
    """Give what computes a layer.

    Args:
        layer: The layer.
        dtype: Of the cells.
        plane: The spatial shape of the output.
        channels_last: Whether tensors come, and go, as (N, spatial..., C).

    """
    run = FAMILIES[layer.family](layer, dtype, plane)
    return _in_channels_last(layer, dtype, run) if channels_last else run


def _in_channels_last(layer: Layer, dtype: torch.dtype, run: Run) -> Run:
    # torch's channels-last kernels add whole planes in another order, choose among NaNs in another way, and refuse some
    # planes of narrow integers; there, planes are put in one piece first, so that layouts give the same answer.
    alike = layer.family in ALIKE and not layer.returns_indices and dtype not in NARROW_INTEGERS

    def first(memory: torch.Tensor) -> torch.Tensor:
        view = memory.movedim(-1, 1)
        # Flat and back: where an axis is 1, contiguous() alone may leave strides that torch takes for channels-last.
        return view if alike else view.reshape(-1).reshape(view.shape)

    def moved(x: torch.Tensor, indices: torch.Tensor | None) -> Pooled:
        output, places = run(first(x), None if indices is None else first(indices))
        return output.movedim(1, -1).contiguous(), None if places is None else places.movedim(1, -1).contiguous()

    return moved


def _max_pool(layer: Any, dtype: torch.dtype, plane: tuple[int, ...]) -> Run:  # noqa: ANN401 - a layer of the family
    windows = tuple(zip(*layer.geometry(), strict=True))
    arguments = (*windows, layer.ceil_mode)
    name = f"max_pool{len(plane)}d"
    # max_pool1d has integers only with its indices; max_pool2d and 3d compute theirs in any case.
    if layer.return_indices or (len(plane) == 1 and not dtype.is_floating_point):
        function = getattr(functional, name)

        def both(x: torch.Tensor, _: object) -> Pooled:
            output, places = function(x, *arguments, return_indices=True)
            return output, places if layer.return_indices else None

        return both
    operator = getattr(torch, name)
    return lambda x, _: (operator(x, *arguments), None)


def _avg_pool(layer: Any, _: torch.dtype, plane: tuple[int, ...]) -> Run:  # noqa: ANN401
    kernel, stride, padding, _dilation = zip(*layer.geometry(), strict=True)
    ceil, include = layer.ceil_mode, layer.count_include_pad
    operator = getattr(functional, f"avg_pool{len(plane)}d")
    if len(plane) == 1:  # which has no divisor_override
        return lambda x, _: (operator(x, kernel, stride, padding, ceil, include), None)
    divisor = layer.divisor_override
    return lambda x, _: (operator(x, kernel, stride, padding, ceil, include, divisor), None)


def _lp_pool(layer: Any, _: torch.dtype, plane: tuple[int, ...]) -> Run:  # noqa: ANN401
    function = getattr(functional, f"lp_pool{len(plane)}d")
    return lambda x, _: (function(x, layer.norm_type, layer.kernel_size, layer.stride, layer.ceil_mode), None)


def _fractional_max_pool(layer: Any, dtype: torch.dtype, plane: tuple[int, ...]) -> Run:  # noqa: ANN401
    function = getattr(functional, f"fractional_max_pool{len(plane)}d")
    # torch places the windows in x's own dtype, where half precision rounds them out of the plane: the max is taken in
    # float32, which changes no value.
    wide = torch.float32 if dtype in HALVES else dtype
    kernel = per_axis(layer.kernel_size, len(plane))

    def run(x: torch.Tensor, _: object) -> Pooled:
        samples = draw(layer.seed, x.shape[0], x.shape[1], len(plane)).to(x.device, wide)
        output, places = function(x.to(wide), kernel, output_size=plane, return_indices=True, _random_samples=samples)
        return output.to(dtype), places if layer.return_indices else None

    return run


def _adaptive_max_pool(layer: Any, _: torch.dtype, plane: tuple[int, ...]) -> Run:  # noqa: ANN401
    operator = getattr(torch._C._nn, f"adaptive_max_pool{len(plane)}d", None) or torch.adaptive_max_pool1d  # noqa: SLF001 - where functional gets it

    def run(x: torch.Tensor, _: object) -> Pooled:
        output, places = operator(x, plane)
        return output, places if layer.return_indices else None

    return run


def _adaptive_avg_pool(_: Any, __: torch.dtype, plane: tuple[int, ...]) -> Run:  # noqa: ANN401
    operator = getattr(torch._C._nn, f"adaptive_avg_pool{len(plane)}d", None) or torch.adaptive_avg_pool1d  # noqa: SLF001 - where functional gets it
    return lambda x, _: (operator(x, plane), None)


def _max_unpool(layer: Any, _: torch.dtype, plane: tuple[int, ...]) -> Run:  # noqa: ANN401
    function = getattr(functional, f"max_unpool{len(plane)}d")
    return lambda x, indices: (function(x, indices, layer.kernel_size, layer.stride, layer.padding, plane), None)


def _global_max_pool(_: Any, __: torch.dtype, plane: tuple[int, ...]) -> Run:  # noqa: ANN401
    axes = tuple(range(2, 2 + len(plane)))
    return lambda x, _: (x.amax(axes, keepdim=True), None)


FAMILIES: dict[str, Callable[[Any, torch.dtype, tuple[int, ...]], Run]] = {
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "lp_pool": _lp_pool,
    "fractional_max_pool": _fractional_max_pool,
    "adaptive_max_pool": _adaptive_max_pool,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "max_unpool": _max_unpool,
    "global_max_pool": _global_max_pool,
    "global_avg_pool": _adaptive_avg_pool,
}
"""What binds each family."""
