"""Adaptive average pooling where all windows have the same size: an average that is divided once for each axis."""

from math import prod

import torch
from torch import Tensor

from poolrpc_server.compute.kernels import raster_average
from poolrpc_server.compute.kernels.blocks import Cells, Program
from poolrpc_server.compute.kernels.cost import Case
from poolrpc_server.compute.kernels.eager import HALVES
from poolrpc_server.compute.kernels.plan import Plan, Row
from poolrpc_server.compute.kernels.raster_average import MAX_TAPS, add_average, sum_dtype
from poolrpc_server.compute.kernels.windows import Windows


def adaptive_average(x: Tensor, windows: Windows, out: Tensor) -> None:
    """Average the planes of a floating-point x (P, *plane) into out (P, *output_plane), over adjacent windows."""
    plane, result = x.shape[1:], out.shape[1:]
    if plane == result:
        # torch's sum starts from 0.0, so it is never -0.0.
        torch.add(x, 0.0, out=out)
        return
    # In three dimensions torch adds and divides in the dtype of the cells, and rounds after each.
    sums = x.dtype if len(result) == 3 else sum_dtype(x.dtype)
    program = Program(x.shape[0], prod(plane) * sums.itemsize)
    source, target = Cells(program, x, reused=False), Cells(program, out, reused=False)
    # torch divides once for each axis, which rounds differently from dividing by the product.
    add_average(source, windows, [float(k) for k in windows.kernel], sums, target)
    program.run()


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
    run=lambda plan, x, out, _: adaptive_average(x, plan.windows, out),
    pays=_pays,
    fits=_fits,
)
