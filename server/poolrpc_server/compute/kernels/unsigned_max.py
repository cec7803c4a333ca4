"""Max pooling of uint16, which torch lacks: as int16 of the same order, by the kernels for int16."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from poolrpc_server.compute.kernels.blocks import Cells, scratch
from poolrpc_server.compute.kernels.cost import Cost
from poolrpc_server.compute.kernels.plan import Plan, Row

FLIP = torch.iinfo(torch.int16).min
"""The bit whose change turns an unsigned number into a signed one of the same order, and back."""

FLIP_COST = Cost(0.3, 0.1, 0.1)
"""The work in addition to that of the kernel."""


def _signed(plan: Plan) -> Plan:
    return replace(plan, dtype=torch.int16)


def unsigned(row: Row) -> Row:
    """Return the row that computes uint16 by a row for int16."""

    def add(plan: Plan, source: Cells, target: Cells, indices: Cells | None) -> None:
        program = source.program
        flipped = scratch(program, source.shape, torch.int16)
        given = Cells(program, source.tensor.view(torch.int16), reused=source.reused).at()
        write = flipped.at()
        program.calls.append(lambda i: torch.bitwise_xor(given[i], FLIP, out=write[i]))
        memory = None if target.memory is None else target.memory.view(torch.int16)
        signed = Cells(program, target.tensor.view(torch.int16), reused=target.reused, memory=memory)
        row.add(_signed(plan), flipped, signed, indices)
        maxima = signed.at()
        program.calls.append(lambda i: maxima[i].bitwise_xor_(FLIP))

    return Row(
        f"{row.name} of unsigned",
        row.operations,
        add=add,
        pays=lambda plan, case: row.pays(_signed(plan), replace(case, dtype=torch.int16)),
        work=lambda plan: row.work(_signed(plan)) + FLIP_COST.of(torch.int16, plan.cells, prod(plan.result_shape)),
        takes=lambda dtype: dtype == torch.uint16 and row.takes(torch.int16),
        fits=lambda plan: row.fits(_signed(plan)),
        scratch=lambda plan: row.scratch(_signed(plan)) + plan.cells * torch.int16.itemsize,
        plane_bytes=lambda plan: row.plane_bytes(_signed(plan)),
        channels_last=row.channels_last,
        indices=row.indices,
    )
