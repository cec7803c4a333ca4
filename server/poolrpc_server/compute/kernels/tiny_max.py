"""Max pooling of a few cells with NumPy.

A torch operator releases the interpreter's lock. With eight callers, getting it back took up to a fifth of the CPU time
of a small call. NumPy keeps the lock for a few cells. Alone and repeated, it takes a microsecond longer than torch.
"""

from collections.abc import Callable
from math import prod

import numpy as np
import torch

from poolrpc_server.compute.kernels.blocks import Cells
from poolrpc_server.compute.kernels.cost import Case, Cost
from poolrpc_server.compute.kernels.padded import lowest
from poolrpc_server.compute.kernels.plan import Plan, Row
from poolrpc_server.compute.kernels.windows import taps_of

TINY_DTYPES = (torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

MAX_READS, MAX_TINY_TAPS = 2_048, 4
"""The most cells to read, each counted in every window that it is in, and the most cells of a window: each of them is a
call of NumPy."""


def _bind(plan: Plan, x: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
    """Return a function that pools the planes of x (P, *plane) into out (P, *output_plane) each time it is called.

    The views of both tensors' memory are created once.
    """
    source, target = x.numpy(), out.numpy()
    taps = [
        (source[read], target[write]) for read, write in taps_of(tuple(x.shape[1:]), plan.windows, tuple(out.shape[1:]))
    ]
    if len(taps) > 1 and all(written.size == target.size for _, written in taps):
        one, two, *rest = [read for read, _ in taps]
        fill, calls = None, [(one, two, target), *((read, target, target) for read in rest)]
    else:
        fill, calls = lowest(x.dtype), [(read, written, written) for read, written in taps]

    def run() -> None:
        if fill is not None:
            target.fill(fill)
        for one, two, written in calls:
            np.maximum(one, two, out=written)

    return run


def add_tiny_max(plan: Plan, source: Cells, target: Cells, _: object) -> None:
    """Append the call that pools the source's cells into the target."""
    runs = [_bind(plan, x, out) for x, out in zip(source.at(), target.at(), strict=True)]
    source.program.calls.append(lambda i: runs[i]())


def _pays(_: Plan, case: Case) -> bool:
    taps = prod(case.windows.kernel)
    return taps <= MAX_TINY_TAPS and taps * case.outputs <= MAX_READS


TINY_COST = Cost(0.0, 0.0, 1.0, 0.5)
"""The work, apart from the calls."""

TINY_MAX = Row(
    "tiny max",
    ("max_pool",),
    add=add_tiny_max,
    pays=_pays,
    work=lambda plan: TINY_COST.of(plan.dtype, plan.cells, prod(plan.result_shape), plan.layer.work(plan.plane)),
    fits=lambda plan: plan.dtype in TINY_DTYPES,
    channels_last=True,
)
