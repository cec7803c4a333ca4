"""Power-average pooling for the norms 1, 2 and infinity."""

from math import inf, prod

import torch
from torch import Tensor

from poolrpc_server.compute.kernels import raster_average, separable_max
from poolrpc_server.compute.kernels.blocks import Cells, Program, scratch
from poolrpc_server.compute.kernels.cost import Case
from poolrpc_server.compute.kernels.eager import HALVES
from poolrpc_server.compute.kernels.plan import Plan, Row
from poolrpc_server.compute.kernels.raster_average import add_average, can_divide, divisor, sum_dtype
from poolrpc_server.compute.kernels.separable_max import add_max
from poolrpc_server.compute.kernels.windows import Windows

NORMS = (1.0, 2.0, inf)
"""The norms whose powers torch computes in the same way for every cell. For most others its vectorised code differs in
the last bit from the code for the remaining cells at a tensor's end, so that the ends of blocks would be visible."""


def power_average(x: Tensor, norm: float, windows: Windows, out: Tensor) -> None:
    """Pool the planes of a floating-point x (P, *plane) into out (P, *output_plane), with one of NORMS."""
    plane, result = x.shape[1:], out.shape[1:]
    sums = sum_dtype(x.dtype)
    program = Program(x.shape[0], prod(plane) * sums.itemsize)
    source, target = Cells(program, x, reused=False), Cells(program, out, reused=False)
    write = target.at()
    if norm != 1:
        powers = scratch(program, x, plane)
        read, power = source.at(), powers.at()
        if norm == inf:
            program.calls.append(lambda i: torch.abs(read[i], out=power[i]))
        else:
            program.calls.append(lambda i: torch.mul(read[i], read[i], out=power[i]))
        source = powers
    if norm == inf:
        add_max(source, windows, target)
    else:
        add_average(source, windows, [divisor(tuple(plane), windows, tuple(result), include_pad=True)], sums, target)
        # torch computes sign(y) * relu(abs(y)), which is y, except that -0.0 becomes 0.0.
        program.calls.append(lambda i: write[i].add_(0.0))
        program.calls.append(lambda i: write[i].mul_(prod(windows.kernel)))
        if norm == 2:
            program.calls.append(lambda i: write[i].sqrt_())
    program.run()


def _fits(plan: Plan) -> bool:
    norm = plan.layer.norm_type
    return norm == inf or (norm in NORMS and can_divide(plan))


def _pays(plan: Plan, case: Case) -> bool:
    if plan.layer.norm_type == inf:
        return separable_max.pays(plan, case)
    ours, eager = raster_average.costs(case)
    wide = case.dtype.itemsize / 4
    eager += case.cells if case.dtype in HALVES else (0.5 * case.cells + 1.5 * case.outputs) * wide
    return ours + (0.15 * case.cells + 0.3 * case.outputs) * wide < 0.9 * eager


POWER_AVERAGE = Row(
    "power average",
    ("lp_pool",),
    run=lambda plan, x, out, _: power_average(x, plan.layer.norm_type, plan.windows, out),
    pays=_pays,
    fits=_fits,
)
