"""The work of torch's own operators on a CPU, estimated in nanoseconds of one thread."""

from __future__ import annotations

from math import inf, prod
from typing import TYPE_CHECKING, Any

import torch

from poolrpc.layers.reductions import reduction_of
from poolrpc_server.compute.kernels.cost import Cost
from poolrpc_server.compute.kernels.eager import IN_TORCH, operation, takes_channels_last
from poolrpc_server.compute.kernels.padded import torch_can_pad
from poolrpc_server.compute.kernels.reduce import reduction_work
from poolrpc_server.compute.kernels.windows import Windows
from poolrpc_server.compute.with_operand import WithOperand

if TYPE_CHECKING:
    from poolrpc_server.compute.kernels.windows import Sizes

COSTS = {
    "max_pool": Cost(8.6, 0.7, 4.5, 0.5),
    "max_pool1d of floats": Cost(3.5, 0.9, 0.3, 0.1),
    "max_pool, channels last": Cost(0.5, 0.2, 0.2, 0.12),
    "avg_pool": Cost(1.0, 0.4, 4.0, 0.12),
    "avg_pool3d": Cost(13.0, 0.15, 4.2, 0.34),
    "avg_pool, channels last": Cost(0.1, 0.25, 0.1, 0.03),
    "lp_pool": Cost(2.2, 3.4, 7.6, 0.5),
    "lp_pool, simple": Cost(1.4, 0.6, 7.7, 0.5),
    "lp_pool, infinite": Cost(8.6, 1.0, 4.5, 0.5),
    "lp_pool1d, infinite": Cost(3.5, 1.2, 0.3, 0.1),
    "fractional_max_pool": Cost(67.0, 0.3, 1.4, 2.6),
    "adaptive_max_pool": Cost(15.0, 0.3, 8.4, 0.7),
    "adaptive_avg_pool": Cost(14.0, 0.15, 3.1, 0.56),
    "adaptive_avg_pool3d": Cost(43.0, 1.1, 4.5, 0.33),
    "mean": Cost(1.0, 0.22, 4.0),
    "max_unpool": Cost(1.0, 3.0, 0.2),
    "blur_pool": Cost(60.0, 1.0, 1.5, 0.15),
    "global_pool, max": Cost(2.3, 0.7, 0.9),
    "global_pool, max, channels last": Cost(0.4, 0.15, 0.3, 3.0),
}
"""The work of each kind of operator."""

OPERAND_COSTS = {"offsets": Cost(20.0, 0.6, 10.0), "weights": Cost(20.0, 1.5, 20.0)}
"""The work of reductions with an operand, in addition to that of their formulas."""

SIMPLE_NORMS = (0.5, 1.0, 2.0, 3.0)
"""The norms whose powers torch computes without its general pow."""

COPY, FAR_COPY = 0.7, 5.0
"""The work for each cell that is copied to the other layout: in most images, and in large ones of many channels."""

PADDED_PLANE = 50.0
"""The work for each plane whose padding torch's operators reject, in addition to a copy of its cells."""

FAR_BYTES, FAR_CHANNELS = 2**23, 16
"""The size of an image and the number of its channels from which neighbours in one layout are far in the other."""

VECTOR_BYTES = 128
"""The size of an image's channels from which torch computes their maxima in vectors."""

CONVERTED = {
    "adaptive_avg_pool3d": {torch.float16: 4.5, torch.bfloat16: 2.0},
}
"""How many times an operator takes longer for a dtype that it converts cell by cell."""


def eager_work(layer: Any, dtype: torch.dtype, plane: Sizes, result: Sizes, channels: int | None) -> float:  # noqa: ANN401 - a Layer
    """Return the work of an operator for one plane; for one image, if channels are last.

    Args:
        layer: The layer.
        dtype: The dtype of the cells.
        plane: The spatial shape of the input.
        result: The spatial shape of the output.
        channels: The number of channels if they are last in memory, None if they are first.

    """
    cells, outputs, count = prod(plane), prod(result), channels or 1
    visits = layer.work(plane)
    if isinstance(layer, WithOperand):
        work = OPERAND_COSTS[layer.operand].of(dtype, cells, outputs)
        work += sum(reduction_of(layer.layer.reduce).work) * cells
        return count * (work if channels is None else work + COPY * (cells + outputs))
    if layer.family in {"pool", "global_pool"} and operation(layer) not in IN_TORCH:
        work = reduction_work(layer, cells, outputs, visits)
        return count * (work if channels is None else work + COPY * (cells + outputs))
    kind = _kind(layer, dtype, outputs, len(plane), channels)
    if kind == "global_pool, max, channels last":
        # torch takes cell by cell what it can't vectorise over the channels; integers then take an eighth of the time.
        vectorised = count == 1 or count * dtype.itemsize >= VECTOR_BYTES
        visits = 0 if vectorised else cells if dtype.is_floating_point else cells // 8
    work = COSTS[kind].of(dtype, cells, outputs, visits)
    work *= CONVERTED.get(kind, {}).get(dtype, 1.0)
    if not torch_can_pad(layer):
        work += PADDED_PLANE + COPY * prod(Windows.of(layer.geometry()).span(result))
    if channels is not None and not kind.endswith("channels last"):
        for size, tensors in ((cells, 1 + (layer.operand == "indices")), (outputs, 1 + layer.returns_indices)):
            far = count >= FAR_CHANNELS and size * count * dtype.itemsize > FAR_BYTES
            work += tensors * size * (FAR_COPY if far else COPY)
    return work * count


def _kind(layer: Any, dtype: torch.dtype, outputs: int, dims: int, channels: int | None) -> str:  # noqa: ANN401 - a Layer
    name = operation(layer)
    if name in {"adaptive_avg_pool", "global_pool, mean"}:
        return "mean" if outputs == 1 else "adaptive_avg_pool3d" if dims == 3 else "adaptive_avg_pool"
    if name == "lp_pool":
        norm = layer.norm_type
        if norm == inf:
            return "lp_pool1d, infinite" if dims == 1 else "lp_pool, infinite"
        return "lp_pool, simple" if norm in SIMPLE_NORMS else "lp_pool"
    floats_1d = dims == 1 and dtype.is_floating_point and not layer.returns_indices
    if channels is not None and takes_channels_last(layer, dtype):
        copies = (name == "max_pool" and floats_1d) or (name == "avg_pool" and dims == 3)
        if not copies:
            return f"{name}, channels last"
    if name == "max_pool" and floats_1d:
        return "max_pool1d of floats"
    return "avg_pool3d" if name == "avg_pool" and dims == 3 else name
