"""Adaptive average pooling where all windows have the same size: an average that is divided once for each axis."""

from math import prod

import torch

from poolrpc_server.compute.kernels import raster_average
from poolrpc_server.compute.kernels.blocks import Cells
from poolrpc_server.compute.kernels.cost import Case
from poolrpc_server.compute.kernels.padded import HALVES, sum_dtype
from poolrpc_server.compute.kernels.plan import Plan, Row
from poolrpc_server.compute.kernels.raster_average import MAX_TAPS, add_average
from poolrpc_server.compute.kernels.windows import Windows


def add_adaptive_average(plan: Plan, source: Cells, target: Cells, _: object) -> None:
    """Append the calls that average the source's floating-point cells into the target, over adjacent windows."""
    if plan.plane == plan.output_plane:
        # torch's sum starts from 0.0, so it is never -0.0.
        read, write = source.at(), target.at()
        source.program.calls.append(lambda i: torch.add(read[i], 0.0, out=write[i]))
        return
    # In three dimensions torch adds and divides in the dtype of the cells, and rounds after each.
    sums = plan.dtype if len(plan.plane) == 3 else sum_dtype(plan.dtype)
    # torch divides once for each axis, which rounds differently from dividing by the product.
    add_average(source, plan.windows, [float(k) for k in plan.windows.kernel], sums, target)


def _fits(plan: Plan) -> bool:
    windows = Windows.dividing(plan.plane, plan.output_plane)
    return prod(plan.output_plane) > 1 and windows is not None and prod(windows.kernel) <= MAX_TAPS


def _pays(_: Plan, case: Case) -> bool:
    if case.plane == case.result:
        return True
    return not (len(case.plane) == 3 and case.dtype in HALVES) and raster_average.is_faster(case)


ADAPTIVE_AVERAGE = Row(
    "adaptive average",
    ("adaptive_avg_pool",),
    add=add_adaptive_average,
    work=raster_average.work,
    scratch=raster_average.scratch_bytes,
    plane_bytes=lambda plan: plan.cells * sum_dtype(plan.dtype).itemsize,
    pays=_pays,
    fits=_fits,
)
