"""Every layer computed by torch's own operators on a tensor of (N, C, spatial...): the reference, on any device.

A layer is bound once to the operator that torch.nn.functional would call and to its arguments, so that a small call
costs little more than the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf, prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from poolrpc._shapes.parameters import per_axis
from poolrpc.layers import SEED_STEP
from poolrpc.layers.reductions import reduction_of
from poolrpc_server.compute.kernels.blur import blur_bytes, blur_pool
from poolrpc_server.compute.kernels.cells import channel_numbers, convert, flip, upload
from poolrpc_server.compute.kernels.padded import HALVES, padded_average, padded_max, sum_dtype, torch_can_pad
from poolrpc_server.compute.kernels.reduce import global_pool, pool, reduction_bytes
from poolrpc_server.compute.kernels.segments import bind_segments, segment_bytes
from poolrpc_server.compute.kernels.weighted import bind_weighted, operand_bytes
from poolrpc_server.compute.with_operand import WithOperand, takes_operand

if TYPE_CHECKING:
    from poolrpc.layers import Layer
    from poolrpc.layers.reductions import Reduce

Pooled = tuple[torch.Tensor, torch.Tensor | None]
"""An output, and the indices of its maxima if the layer returns them."""

Operator = Callable[[torch.Tensor, Any, int, int], Pooled]
"""Computes a layer on some planes of a tensor: (x, operand, first, count).

x has the axes (N, C, spatial...) and is contiguous in either layout; the operand is the layer's, or None. x has the
planes from number `first` on of a tensor of `count` planes, on which the samples of fractional layers and the powers of
LPPool depend.
"""

INDEX_BYTES = torch.int64.itemsize
INDEXED = ("max_pool", "adaptive_max_pool", "fractional_max_pool")
"""The families whose operators compute indices, whether they are returned or not."""

SAMPLE_BYTES = 48
"""The memory that drawing a sample takes."""

NARROW_INTEGERS = (torch.uint8, torch.uint16, torch.int8, torch.int16)
LAYOUT_INDEPENDENT = ("max_pool", "avg_pool", "global_pool, max")
"""The operations whose values torch computes equally in either layout."""

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), as a counter:
# sample k of a seed is the generator's k-th output, so that the samples of any range of planes can be drawn separately.
GAMMA = np.uint64(SEED_STEP)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
FLOAT32_BITS = 24

SEPARABLE_KERNEL = 7
"""On CUDA, a max over windows at stride 1 of at least this height and width is computed axis by axis: on an H200, 1.5
times as fast for windows of 7 x 7, 3 times for 13 x 13; equally fast for 5 x 5. No other GPU was measured."""

GRID_PLANES = 65535
"""On CUDA, torch's fractional operators launch a row of blocks of threads for each plane, and CUDA accepts no more."""

VECTOR_CELLS = 256
"""A multiple of the cells that any of torch's vectorised loops takes at once; what remains at a tensor's end is
computed one by one."""


def operation(layer: Layer | WithOperand) -> str:
    """Return the name of what a layer computes: its family, and its reduction if it has one."""
    reduce: Reduce | None = getattr(layer, "reduce", None)
    return layer.family if reduce is None else f"{layer.family}, {reduction_of(reduce).name}"


def bind(
    layer: Layer | WithOperand, dtype: torch.dtype, plane: tuple[int, ...], *, channels_last: bool = False
) -> Operator:
    """Return the operator that computes a layer.

    Args:
        layer: The layer.
        dtype: The dtype of the cells.
        plane: The spatial shape of the output.
        channels_last: Whether inputs and outputs are (N, spatial..., C).

    """
    name = operation(layer)
    if isinstance(layer, WithOperand):
        run = _with_operand(layer, dtype)
        return _in_channels_last(layer, dtype, run) if channels_last else run
    operator = OPERATIONS.get(name) or OPERATIONS[layer.family]
    if name == "max_unpool" and not dtype.is_floating_point:
        run = _unpool_integers(layer, dtype, plane)
    elif dtype == torch.uint16 and layer.spatial_dims:
        run = _max_unsigned(operator(layer, torch.int16, plane))
    else:
        run = operator(layer, dtype, plane)
    return _in_channels_last(layer, dtype, run) if channels_last else run


def takes_channels_last(layer: Layer | WithOperand, dtype: torch.dtype) -> bool:
    """Return whether torch's operator is given planes with channels last as they are."""
    independent = operation(layer) in LAYOUT_INDEPENDENT and torch_can_pad(layer)
    return independent and not layer.returns_indices and dtype not in NARROW_INTEGERS


def _in_channels_last(layer: Layer | WithOperand, dtype: torch.dtype, run: Operator) -> Operator:
    # torch's channels-last kernels add whole planes in another order, choose differently among NaNs, and reject some
    # planes of narrow integers. In these cases planes are made contiguous first, so that both layouts give one result.
    independent = takes_channels_last(layer, dtype)

    def channels_first(memory: torch.Tensor) -> torch.Tensor:
        view = memory.movedim(-1, 1)
        # Through one axis: if an axis has length 1, contiguous() may leave strides that torch takes for channels-last.
        return view if independent else view.reshape(-1).reshape(view.shape)

    moves = layer.operand == "indices"

    def run_channels_last(x: torch.Tensor, operand: Any, first: int, count: int) -> Pooled:  # noqa: ANN401 - the layer's
        output, chosen = run(channels_first(x), channels_first(operand) if moves else operand, first, count)
        return output.movedim(1, -1).contiguous(), None if chosen is None else chosen.movedim(1, -1).contiguous()

    return run_channels_last


def _with_operand(layer: WithOperand, dtype: torch.dtype) -> Operator:
    if layer.operand == "offsets":
        reduce_segments = bind_segments(layer, dtype)
        return lambda x, segments, first, _: (reduce_segments(x, segments, first), None)
    pool = bind_weighted(layer, dtype)
    return lambda x, weights, first, _: (pool(x, weights, first), None)


def _max_pool(layer: Any, dtype: torch.dtype, plane: tuple[int, ...]) -> Operator:  # noqa: ANN401 - a layer of the family
    if not torch_can_pad(layer):
        inner = replace(layer, padding=0, ceil_mode=False)
        return padded_max(layer, dtype, plane, _max_pool(inner, dtype, plane))
    kernel, stride, padding, _, dilation = zip(*layer.geometry(), strict=True)
    windows = kernel, stride, padding, dilation
    arguments = (*windows, layer.ceil_mode)
    name = f"max_pool{len(plane)}d"
    # max_pool1d supports integers only with its indices. max_pool2d and 3d compute the indices in any case.
    if layer.return_indices or (len(plane) == 1 and not dtype.is_floating_point):
        function = getattr(functional, name)

        def run(x: torch.Tensor, *_: object) -> Pooled:
            output, indices = function(x, *arguments, return_indices=True)
            return output, indices if layer.return_indices else None

        return run
    operator = getattr(torch, name)
    if len(plane) == 2 and min(windows[0]) >= SEPARABLE_KERNEL and set(windows[1] + windows[3]) == {1}:
        (height, width), _, (above, left), _ = windows

        def run_separably(x: torch.Tensor, *_: object) -> Pooled:
            if x.device.type != "cuda":
                return operator(x, *arguments), None
            rows = operator(x, (height, 1), 1, (above, 0))
            return operator(rows, (1, width), 1, (0, left)), None

        return run_separably
    return lambda x, *_: (operator(x, *arguments), None)


def _avg_pool(layer: Any, dtype: torch.dtype, plane: tuple[int, ...]) -> Operator:  # noqa: ANN401
    if not torch_can_pad(layer) or (len(plane) == 3 and dtype in HALVES):  # of which torch has no 3d average
        return padded_average(layer, dtype, plane)
    kernel, stride, padding, *_ = zip(*layer.geometry(), strict=True)
    ceil, include = layer.ceil_mode, layer.count_include_pad
    operator = getattr(functional, f"avg_pool{len(plane)}d")
    if len(plane) == 1:  # avg_pool1d has no divisor_override
        return lambda x, *_: (operator(x, kernel, stride, padding, ceil, include), None)
    divisor = layer.divisor_override
    if divisor == -1 and dtype == torch.int64:  # The CPU traps the division of the lowest integer by -1.
        return lambda x, *_: (operator(x, kernel, stride, padding, ceil, include, 1).neg_(), None)
    return lambda x, *_: (operator(x, kernel, stride, padding, ceil, include, divisor), None)


def _window_sum(layer: Any, dtype: torch.dtype, plane: tuple[int, ...]) -> Operator:  # noqa: ANN401
    # Added in the order in which torch's averages add, whatever the size of the windows.
    dilated = any(dilation > 1 for *_, dilation in layer.geometry())
    return (pool if dilated else padded_average)(layer, dtype, plane)


def _lp_pool(layer: Any, _: torch.dtype, plane: tuple[int, ...]) -> Operator:  # noqa: ANN401
    norm, ceil = layer.norm_type, layer.ceil_mode
    kernel, stride = [*zip(*layer.geometry(), strict=True)][:2]
    if norm == inf:  # torch.nn.functional.lp_pool3d has it from torch 2.12 on
        maximum = getattr(torch, f"max_pool{len(plane)}d")
        return lambda x, *_: (maximum(x.abs(), kernel, stride, 0, 1, ceil), None)
    average = getattr(functional, f"avg_pool{len(plane)}d")
    cells = prod(kernel)

    # What functional.lp_pool2d computes, with less memory, and on any range of a tensor's planes.
    def run(x: torch.Tensor, _: object, first: int, count: int) -> Pooled:
        output = average(_power(x, norm, first, count), kernel, stride, 0, ceil)
        sizes = output.abs().relu_()
        return _power(output.sign_().mul_(sizes).mul_(cells), 1.0 / norm, first, count), None

    return run


def _power(x: torch.Tensor, exponent: float, first: int, count: int) -> torch.Tensor:
    """Return the power of each cell of x, which has the planes from number `first` on of a tensor of `count` planes.

    torch's vectorised code differs in the last bit from the code for the remaining cells at a tensor's end. So x is
    extended on both sides, such that exactly the cells that are at the end of the whole tensor are at the end.
    """
    cells = x[0, 0].numel()
    start, total = first * cells, count * cells
    before, after = start % VECTOR_CELLS, 0 if start + x.numel() == total else -(start + x.numel()) % VECTOR_CELLS
    if not before and not after:
        return x.pow(exponent)
    extended = x.new_ones(before + x.numel() + after)
    inside = extended[before : before + x.numel()].view(x.shape)
    inside.copy_(x)
    extended.pow_(exponent)
    return inside


def _fractional_max_pool(layer: Any, dtype: torch.dtype, plane: tuple[int, ...]) -> Operator:  # noqa: ANN401
    function = getattr(functional, f"fractional_max_pool{len(plane)}d")
    # torch computes the windows' positions in x's dtype, and half precision rounds some out of the plane. So the max is
    # taken in float32, which changes no value.
    wide = torch.float32 if dtype in HALVES else dtype
    kernel = per_axis(layer.kernel_size, len(plane))

    def run(x: torch.Tensor, _: object, first: int, __: int) -> Pooled:
        samples = upload(draw_samples(layer.at_plane(first).seed, x.shape[0], x.shape[1], len(plane)), x, wide)
        most = x.shape[1] if x.device.type == "cpu" else GRID_PLANES
        made = [
            function(part, kernel, output_size=plane, return_indices=True, _random_samples=drawn)
            for part, drawn in zip(torch.split(x.to(wide), most, 1), torch.split(samples, most, 1), strict=True)
        ]
        output, indices = made[0] if len(made) == 1 else (torch.cat(each, 1) for each in zip(*made, strict=True))
        return output.to(dtype), indices if layer.return_indices else None

    return run


def draw_samples(seed: int, batch: int, channels: int, axes: int) -> torch.Tensor:
    """Return the `_random_samples` of a fractional layer, which depend only on its seed and each plane's number.

    The samples of plane n*channels + c are those from number (n*channels + c)*axes on.

    Args:
        seed: The layer's seed, 0..2**64-1.
        batch: The size of N.
        channels: The number of channels.
        axes: The number of spatial axes.

    Returns:
        A float64 tensor of (batch, channels, axes), in [0, 1); each value is exact in float32 too.

    """
    counter = np.arange(1, batch * channels * axes + 1, dtype=np.uint64)
    state = np.uint64(seed) + counter * GAMMA  # wraps around, as SplitMix64 does
    state = (state ^ (state >> np.uint64(30))) * MIX_1
    state = (state ^ (state >> np.uint64(27))) * MIX_2
    state ^= state >> np.uint64(31)
    samples = (state >> np.uint64(64 - FLOAT32_BITS)).astype(np.float64) / 2**FLOAT32_BITS
    return torch.from_numpy(samples.reshape(batch, channels, axes))


def _native(name: str) -> Callable[..., Any]:
    # The operators that torch.nn.functional calls. Its own functions of these names add 2 to 10 microseconds in Python,
    # which is more than the operator takes for a small tensor.
    operator: Callable[..., Any] = getattr(torch._C._nn, name, None) or getattr(torch, name)  # noqa: SLF001 - see above
    return operator


def _adaptive_max_pool(layer: Any, _: torch.dtype, plane: tuple[int, ...]) -> Operator:  # noqa: ANN401
    operator = _native(f"adaptive_max_pool{len(plane)}d")
    axes = tuple(range(2, 2 + len(plane)))
    whole = prod(plane) == 1 and not layer.return_indices

    def run(x: torch.Tensor, *_: object) -> Pooled:
        if whole and x.device.type == "cuda":  # 4 to 27 times as fast on an H200; no other GPU was measured
            return x.amax(axes, keepdim=True), None
        output, indices = operator(x, plane)
        return output, indices if layer.return_indices else None

    return run


def _adaptive_avg_pool(_: Any, __: torch.dtype, plane: tuple[int, ...]) -> Operator:  # noqa: ANN401
    operator = _native(f"adaptive_avg_pool{len(plane)}d")
    return lambda x, *_: (operator(x, plane), None)


def _global_average(layer: Any, dtype: torch.dtype, plane: tuple[int, ...]) -> Operator:  # noqa: ANN401
    bind_average = _adaptive_avg_pool if dtype.is_floating_point else global_pool  # torch has it only of floats
    return bind_average(layer, dtype, plane)


def _max_unpool(layer: Any, _: torch.dtype, plane: tuple[int, ...]) -> Operator:  # noqa: ANN401
    function = getattr(functional, f"max_unpool{len(plane)}d")
    return lambda x, indices, *_: (function(x, indices, layer.kernel_size, layer.stride, layer.padding, plane), None)


FLOAT_OF_SIZE = {2: torch.float16, 4: torch.float32, 8: torch.float64}
"""A dtype of floats for each item size."""


def _unpool_integers(layer: Any, dtype: torch.dtype, plane: tuple[int, ...]) -> Operator:  # noqa: ANN401
    # torch unpools floats alone, but only moves them: so the bits of integers can be moved as floats.
    integers = torch.int16 if dtype.itemsize == 1 else dtype
    unpool = _max_unpool(layer, dtype, plane)

    def run(x: torch.Tensor, indices: torch.Tensor | None, first: int, count: int) -> Pooled:
        floats = x.to(integers).view(FLOAT_OF_SIZE[integers.itemsize])
        return unpool(floats, indices, first, count)[0].view(integers).to(dtype), None

    return run


def _max_unsigned(run: Operator) -> Operator:
    """Return the operator for uint16 of a layer that chooses cells by their order, given that for int16."""

    def run_flipped(x: torch.Tensor, _: object, first: int, count: int) -> Pooled:
        output, chosen = run(flip(x), None, first, count)
        return flip(output), chosen

    return run_flipped


def _to_dtype(layer: Any, dtype: torch.dtype, _: object) -> Operator:  # noqa: ANN401
    target: torch.dtype = getattr(torch, layer.output_dtype(str(dtype).removeprefix("torch.")))

    def run(x: torch.Tensor, *_: object) -> Pooled:
        output = torch.empty_like(x, dtype=target)
        convert(x, output, scale=layer.scale)
        return output, None

    return run


def _normalize(layer: Any, _: torch.dtype, plane: tuple[int, ...]) -> Operator:  # noqa: ANN401
    def run(x: torch.Tensor, _: object, first: int, __: int) -> Pooled:
        start = first % layer.period
        mean, deviation = (
            channel_numbers(each, start + x.shape[1], x)[start:].view(-1, *(1,) * len(plane))
            for each in (layer.mean, layer.std)
        )
        return x.sub(mean).div_(deviation), None

    return run


def _round(*_: object) -> Operator:
    return lambda x, *_: (torch.round(x), None)


def _global_max_pool(_: Any, __: torch.dtype, plane: tuple[int, ...]) -> Operator:  # noqa: ANN401
    axes = tuple(range(2, 2 + len(plane)))
    return lambda x, *_: (x.amax(axes, keepdim=True), None)


OWN_BYTES = {
    "pool": reduction_bytes,
    "global_pool": reduction_bytes,
    "blur_pool": blur_bytes,
    "global_pool, weights": operand_bytes,
    "segment_pool, offsets": segment_bytes,
}
"""The memory of operators that are several of torch's, by family."""

IN_TORCH = ("global_pool, max", "global_pool, mean")
"""Operations of these families that are one of torch's operators."""


def eager_bytes(  # noqa: PLR0913, PLR0917 - the sizes of what an operator reads, makes and writes
    layer: Layer | WithOperand, dtype: torch.dtype, cells: int, outputs: int, channels: int | None, spanned: int
) -> int:
    """Return an upper bound of the memory that a layer's operator takes for a plane, with its output, in bytes.

    Args:
        layer: The layer.
        dtype: The dtype of the cells.
        cells: The number of cells of a plane, with its channels if they are last.
        outputs: The same for an output plane.
        channels: The number of channels if they are last in memory, None if they are first.
        spanned: The number of cells that windows span, with padding; with the channels if they are last.

    """
    item, family, name, halves = dtype.itemsize, layer.family, operation(layer), dtype in HALVES
    nbytes = outputs * item
    indexed = layer.returns_indices or not (layer.spatial_dims == 1 and dtype.is_floating_point)  # max_pool1d's are not
    if family in INDEXED and (indexed or family != "max_pool"):
        nbytes += outputs * INDEX_BYTES
    average_of_halves = family == "avg_pool" and layer.spatial_dims == 3 and halves
    if not torch_can_pad(layer) or average_of_halves or name == "pool, sum":
        # The padded plane, in the dtype of sums; the sums, their divisors; and the indices in the plane.
        nbytes += spanned * (item + sum_dtype(dtype).itemsize) + outputs * (2 * sum_dtype(dtype).itemsize + 8)
        nbytes += 2 * outputs * INDEX_BYTES * layer.returns_indices
    if family in OWN_BYTES and name not in IN_TORCH:
        nbytes += OWN_BYTES[family](layer, dtype, cells, outputs)
    if dtype == torch.uint16:  # as int16 of the same order
        nbytes += (cells + outputs) * item
    if family == "max_unpool" and not dtype.is_floating_point:  # converted to a wider dtype and back, if they are bytes
        nbytes += (cells + outputs) * (torch.int16.itemsize if item == 1 else 0)
    if family == "lp_pool":  # the powers; or the sums, their sizes, and the roots; the indices of the norm infinity
        nbytes += (cells + 2 * outputs) * item + outputs * INDEX_BYTES
    if family == "fractional_max_pool":
        nbytes += SAMPLE_BYTES * layer.spatial_dims * (channels or 1)
        nbytes += (cells + outputs) * torch.float32.itemsize * halves
    if name in SIZE_DEPENDENT:  # torch converts planes that it averages as a whole
        nbytes += cells * torch.float32.itemsize * halves + outputs * torch.float64.itemsize
    # avg_pool3d copies them itself, and both 1d operators.
    native = layer.spatial_dims == 2 or family == "global_pool" or (layer.spatial_dims == 3 and family == "max_pool")
    if channels is not None and not (native and takes_channels_last(layer, dtype)):
        nbytes += (cells + outputs) * item
        nbytes += (cells * takes_operand(layer) + outputs * layer.returns_indices) * INDEX_BYTES
    return nbytes


SIZE_DEPENDENT = ("adaptive_avg_pool", "global_pool, mean")
"""Operations whose sums torch computes, on a GPU, in an order that depends on the number of planes (seen on an H200
with torch 2.11)."""


def depends_on_size(layer: Layer) -> bool:
    """Return whether a GPU's result of a plane depends on the number of planes, so that a request is computed alone."""
    sums = layer.family in {"global_pool", "segment_pool"} and operation(layer) not in {
        "global_pool, max",
        "global_pool, min",
    }
    return sums or operation(layer) in SIZE_DEPENDENT


OPERATIONS: dict[str, Callable[[Any, torch.dtype, tuple[int, ...]], Operator]] = {
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "lp_pool": _lp_pool,
    "fractional_max_pool": _fractional_max_pool,
    "adaptive_max_pool": _adaptive_max_pool,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "max_unpool": _max_unpool,
    "global_pool, max": _global_max_pool,
    "global_pool, mean": _global_average,
    "global_pool": global_pool,
    "pool": pool,
    "pool, sum": _window_sum,
    "blur_pool": blur_pool,
    "to_dtype": _to_dtype,
    "normalize": _normalize,
    "round": _round,
}
"""The function that binds the layers of each operation to torch's operator."""
