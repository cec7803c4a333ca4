"""Each layer by torch.nn.functional, on a tensor of (N, C, spatial...): the reference, and right on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from poolrpc_server.kernels.samples import draw

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc.layers import Layer

Pooled = tuple[torch.Tensor, torch.Tensor | None]
HALVES = (torch.float16, torch.bfloat16)
NARROW_INTEGERS = (torch.uint8, torch.int8, torch.int16)
ALIKE = ("max_pool", "avg_pool", "global_max_pool")
"""The families whose values torch computes alike in either layout."""


def run(layer: Layer, x: torch.Tensor, indices: torch.Tensor | None, plane: tuple[int, ...]) -> Pooled:
    """Compute a layer.

    Args:
        layer: The layer.
        x: Of (N, C, spatial...), contiguous in either layout, with no axis of 0.
        indices: For MaxUnpool, of x's shape and in range.
        plane: The spatial shape of the output.

    Returns:
        The output, of (N, C, *plane), and the indices where the layer returns them.

    """
    return FAMILIES[layer.family](layer, x, indices, plane)


def run_in_layout(
    layer: Layer, x: torch.Tensor, indices: torch.Tensor | None, plane: tuple[int, ...], *, channels_last: bool
) -> Pooled:
    """Compute a layer on contiguous memory of either layout, and give the output in the same; otherwise as run.

    torch's channels-last kernels add whole planes in another order, choose among NaNs in another way, and refuse some
    planes of narrow integers; where they do, planes are put in one piece first, so that layouts give the same answer.
    """
    if not channels_last:
        return run(layer, x, indices, plane)
    alike = layer.family in ALIKE and not layer.gives_indices and x.dtype not in NARROW_INTEGERS

    def first(memory: torch.Tensor) -> torch.Tensor:
        view = memory.movedim(-1, 1)
        # Flat and back: where an axis is 1, contiguous() alone may leave strides that torch takes for channels-last.
        return view if alike else view.reshape(-1).reshape(view.shape)

    output, places = run(layer, first(x), None if indices is None else first(indices), plane)
    return output.movedim(1, -1).contiguous(), None if places is None else places.movedim(1, -1).contiguous()


def _function(name: str, x: torch.Tensor) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(functional, f"{name}{x.ndim - 2}d")
    return function


def _max_pool(layer: Any, x: torch.Tensor, _: object, __: object) -> Pooled:  # noqa: ANN401 - a layer of the family
    arguments = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode)
    # max_pool1d has integers only with its indices.
    if layer.return_indices or (x.ndim == 3 and not x.is_floating_point()):  # noqa: PLR2004 - (N, C, L)
        output, places = _function("max_pool", x)(x, *arguments, return_indices=True)
        return output, places
    return _function("max_pool", x)(x, *arguments), None


def _avg_pool(layer: Any, x: torch.Tensor, _: object, __: object) -> Pooled:  # noqa: ANN401
    arguments = [layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode, layer.count_include_pad]
    if x.ndim > 3:  # noqa: PLR2004 - avg_pool1d has no divisor_override
        arguments.append(layer.divisor_override)
    return _function("avg_pool", x)(x, *arguments), None


def _lp_pool(layer: Any, x: torch.Tensor, _: object, __: object) -> Pooled:  # noqa: ANN401
    return _function("lp_pool", x)(x, layer.norm_type, layer.kernel_size, layer.stride, layer.ceil_mode), None


def _fractional_max_pool(layer: Any, x: torch.Tensor, _: object, plane: tuple[int, ...]) -> Pooled:  # noqa: ANN401
    # torch places the windows in x's own dtype, where half precision rounds them out of the plane: the max is taken in
    # float32, which changes no value.
    wide = x.float() if x.dtype in HALVES else x
    samples = draw(layer.seed, x.shape[0], x.shape[1], len(plane)).to(x.device, wide.dtype)
    output, places = _function("fractional_max_pool", x)(
        wide, layer.kernel_size, output_size=plane, return_indices=True, _random_samples=samples
    )
    return output.to(x.dtype), places


def _adaptive_max_pool(layer: Any, x: torch.Tensor, _: object, plane: tuple[int, ...]) -> Pooled:  # noqa: ANN401
    output, places = _function("adaptive_max_pool", x)(x, plane, return_indices=True)
    return output, places if layer.return_indices else None


def _adaptive_avg_pool(_: Any, x: torch.Tensor, __: object, plane: tuple[int, ...]) -> Pooled:  # noqa: ANN401
    return _function("adaptive_avg_pool", x)(x, plane), None


def _max_unpool(layer: Any, x: torch.Tensor, indices: torch.Tensor | None, plane: tuple[int, ...]) -> Pooled:  # noqa: ANN401
    return _function("max_unpool", x)(x, indices, layer.kernel_size, layer.stride, layer.padding, plane), None


def _global_max_pool(_: Any, x: torch.Tensor, __: object, ___: object) -> Pooled:  # noqa: ANN401
    return x.amax(tuple(range(2, x.ndim)), keepdim=True), None


FAMILIES: dict[str, Callable[[Any, torch.Tensor, torch.Tensor | None, tuple[int, ...]], Pooled]] = {
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
