"""Power-average pooling for the norms 1, 2 and infinity."""

from math import inf, prod

import torch

from poolrpc_server.compute.kernels import raster_average, separable_max
from poolrpc_server.compute.kernels.blocks import Cells, scratch
from poolrpc_server.compute.kernels.cost import EAGER_CALL, Case, Cost
from poolrpc_server.compute.kernels.counts import divisor
from poolrpc_server.compute.kernels.padded import HALVES, sum_dtype
from poolrpc_server.compute.kernels.plan import Plan, Row
from poolrpc_server.compute.kernels.raster_average import add_average, can_divide
from poolrpc_server.compute.kernels.separable_max import add_max

NORMS = (1.0, 2.0, inf)
"""The norms whose powers torch computes in the same way for every cell. For most others its vectorised code differs in
the last bit from the code for the remaining cells at a tensor's end, so that the ends of blocks would be visible."""


def add_power_average(plan: Plan, source: Cells, target: Cells, _: object) -> None:
    """Append the calls that pool the source's floating-point cells into the target, with one of NORMS."""
    program, norm, windows = source.program, plan.layer.norm_type, plan.windows
    write = target.at()
    if norm != 1:
        powers = scratch(program, plan.plane, plan.dtype)
        read, power = source.at(), powers.at()
        if norm == inf:
            program.calls.append(lambda i: torch.abs(read[i], out=power[i]))
        else:
            program.calls.append(lambda i: torch.mul(read[i], read[i], out=power[i]))
        source = powers
    if norm == inf:
        add_max(source, windows, target)
    else:
        divided_by = divisor(plan.plane, windows, plan.output_plane, include_pad=True)
        add_average(source, windows, [divided_by], sum_dtype(plan.dtype), target)
        # torch computes sign(y) * relu(abs(y)), which is y, except that -0.0 becomes 0.0.
        program.calls.append(lambda i: write[i].add_(0.0))
        program.calls.append(lambda i: write[i].mul_(prod(windows.kernel)))
        if norm == 2:
            program.calls.append(lambda i: write[i].sqrt_())


def _scratch(plan: Plan) -> int:
    powers, item = plan.cells, plan.dtype.itemsize
    if plan.layer.norm_type == inf:
        return (powers + separable_max.scratch_cells(plan.plane, plan.windows, plan.output_plane)) * item
    return powers * item + raster_average.scratch_bytes(plan)


def _fits(plan: Plan) -> bool:
    norm = plan.layer.norm_type
    return norm == inf or (norm in NORMS and can_divide(plan))


def _pays(plan: Plan, case: Case) -> bool:
    if plan.layer.norm_type == inf:
        return separable_max.pays(plan, case)
    ours, eager = raster_average.costs(case)
    wide = case.dtype.itemsize / 4
    eager += EAGER_POWER_CALLS * EAGER_CALL
    eager += case.cells if case.dtype in HALVES else (0.5 * case.cells + 1.5 * case.outputs) * wide
    return ours + (0.15 * case.cells + 0.3 * case.outputs) * wide < 0.9 * eager


EAGER_POWER_CALLS = 5
"""Operators that torch calls in addition to the average."""

POWER_COST = Cost(6.5, 0.45, 0.1)
"""The work in addition to that of an average or of a max."""


def _work(plan: Plan) -> float:
    pooled = separable_max.work(plan) if plan.layer.norm_type == inf else raster_average.work(plan)
    return pooled + POWER_COST.of(plan.dtype, plan.cells, prod(plan.output_plane))


POWER_AVERAGE = Row(
    "power average",
    ("lp_pool",),
    add=add_power_average,
    work=_work,
    scratch=_scratch,
    plane_bytes=lambda plan: plan.cells * sum_dtype(plan.dtype).itemsize,
    pays=_pays,
    fits=_fits,
)
