"""The element-wise steps of a chain, on a block of planes while it is in the cache."""

from __future__ import annotations

import torch

from poolrpc_server.compute.kernels.blocks import Cells
from poolrpc_server.compute.kernels.cells import channel_numbers, convert
from poolrpc_server.compute.kernels.cost import Cost
from poolrpc_server.compute.kernels.plan import Plan, Row

TEMPORARY_BYTES = 32
"""The most memory that a step takes for a cell while it is computed: float32 that becomes int64 is copied to float64,
copied again without NaN, and compared with the limit."""

STEP_COSTS = {
    "to_dtype": Cost(0.3, 0.3, 0.0),
    "to_dtype, truncated": Cost(1.0, 1.5, 0.0),
    "normalize": Cost(1.0, 0.4, 0.0),
    "round": Cost(0.3, 0.2, 0.0),
}
"""The work of each step."""


def _add(plan: Plan, source: Cells, target: Cells, _: object) -> None:
    ADD[plan.layer.family](plan, source, target)


def _add_to_dtype(plan: Plan, source: Cells, target: Cells) -> None:
    read, write, scale = source.at(), target.at(), plan.layer.scale
    source.program.calls.append(lambda i: convert(read[i], write[i], scale=scale))


def _add_normalize(plan: Plan, source: Cells, target: Cells) -> None:
    program, layer = source.program, plan.layer
    if plan.channels is not None:
        # A row has all channels of all its cells: along one long axis, torch's code is vectorised.
        source, target = (Cells(program, cells.tensor.flatten(-2), reused=cells.reused) for cells in (source, target))
    read, write = source.at(), target.at()
    if plan.channels is not None:
        means, deviations = (
            [program.keep(channel_numbers(each, source.shape[-1], write[0]))] * len(write)
            for each in (layer.mean, layer.std)
        )
    else:
        starts = [(program.first + i * program.step) % layer.period for i in range(len(write))]
        axes = (-1, *(1,) * len(source.shape))
        cycles = (
            program.keep(channel_numbers(each, layer.period + program.step, write[0]))
            for each in (layer.mean, layer.std)
        )
        means, deviations = (
            [cycle[start : start + len(out)].view(axes) for start, out in zip(starts, write, strict=True)]
            for cycle in cycles
        )
    program.calls += [
        lambda i: torch.sub(read[i], means[i], out=write[i]),
        lambda i: write[i].div_(deviations[i]),
    ]


def _add_round(_: Plan, source: Cells, target: Cells) -> None:
    read, write = source.at(), target.at()
    source.program.calls.append(lambda i: torch.round(read[i], out=write[i]))


ADD = {"to_dtype": _add_to_dtype, "normalize": _add_normalize, "round": _add_round}
"""The function that appends the calls of each step."""


def _truncates(plan: Plan) -> bool:
    return plan.dtype.is_floating_point and not plan.output_dtype.is_floating_point


def _work(plan: Plan) -> float:
    kind = f"{plan.layer.family}, truncated" if _truncates(plan) else plan.layer.family
    return STEP_COSTS[kind].of(
        max(plan.dtype, plan.output_dtype, key=lambda dtype: dtype.itemsize), plan.cells, plan.cells
    )


def _scratch(plan: Plan) -> int:
    if plan.layer.family == "normalize":
        # Two numbers for each channel of a row; or for each plane of a block, and for as many channels at most.
        row = 2 if plan.channels is None else plan.plane_shape[-2] * plan.channels
        return 2 * row * plan.output_dtype.itemsize
    if plan.layer.family != "to_dtype" or plan.dtype == plan.output_dtype:
        return 0
    shifts = plan.layer.scale and not plan.dtype.is_floating_point and not plan.output_dtype.is_floating_point
    return plan.cells * TEMPORARY_BYTES if shifts or _truncates(plan) else 0


ELEMENT_WISE = Row(
    "element-wise",
    ("to_dtype", "normalize", "round"),
    add=_add,
    pays=lambda *_: True,
    work=_work,
    takes=lambda _: True,
    scratch=_scratch,
    plane_bytes=lambda plan: plan.cells * max(plan.dtype.itemsize, plan.output_dtype.itemsize),
    channels_last=True,
)
