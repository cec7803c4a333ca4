"""Averages of 2x2 cells of small integers, rounded: four steps of a chain as one, in integers.

`[ToDtype("float32"), AvgPool2d(2), Round(), ToDtype("uint8")]` is a level of an image's pyramid. The sum of four uint8
or uint16 is exact in float32, and so is a quarter of it; Round() takes the even one of two neighbours that are equally
near. With integers, the same number is (s + 1 + (s / 4 is odd)) / 4, each quotient rounded down, for a sum s.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import torch

from poolrpc.layers import AvgPool2d, Round, ToDtype
from poolrpc_server.compute.kernels.blocks import Cells, scratch
from poolrpc_server.compute.kernels.cost import Cost
from poolrpc_server.compute.kernels.plan import Plan, Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from poolrpc.chains import Outputs, Shape
    from poolrpc.layers import Layer
    from poolrpc.tensors import TensorSpec
    from poolrpc_server.compute.with_operand import WithOperand

PAIRS = {torch.uint8: torch.int16, torch.uint16: torch.int32}
"""The dtype of two cells of each dtype, in which their sum is computed."""

STEPS = 4
"""The number of steps that become one."""

Step: TypeAlias = "tuple[Layer | RoundedAverage | WithOperand, TensorSpec, Shape]"
"""A layer, with the spec and the planes' shape of its input."""


@dataclass(frozen=True, slots=True)
class RoundedAverage:
    """Stands for the four steps in a plan."""

    pool: AvgPool2d

    family: ClassVar[str] = "rounded_average"
    operand: ClassVar[str] = ""
    returns_indices: ClassVar[bool] = False

    def geometry(self) -> tuple[tuple[int, int, int, int, int], ...]:
        """Return those of the average."""
        return self.pool.geometry()

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial shape of the output."""
        return self.pool.output_plane(plane)

    def output_dtype(self, dtype: str) -> str:
        """Return the dtype of the output, which is the input's."""
        return dtype


def fuse(chain: Sequence[Step], outputs: Outputs, device: str) -> tuple[Sequence[Step], Outputs]:
    """Return a chain in which each four such steps are one, and the new numbers of the layers that are returned.

    Args:
        chain: The layers.
        outputs: The numbers of the layers whose outputs are returned; the first three of four steps are none of them.
        device: The type of the device; on another than the CPU, the chain stays as it is.

    """
    if device != "cpu":
        return chain, outputs
    fused: list[Step] = []
    numbers: list[int] = []
    start = 0
    while start < len(chain):
        steps = chain[start : start + STEPS]
        layer = None if {*range(start, start + STEPS - 1)} & {*outputs} else _rounded_average(steps)
        fused.append(chain[start] if layer is None else (layer, *chain[start][1:]))
        start += 1 if layer is None else STEPS
        if start - 1 in outputs:
            numbers.append(len(fused) - 1)
    return fused, tuple(numbers)


def _rounded_average(steps: Sequence[Step]) -> RoundedAverage | None:
    if len(steps) < STEPS:
        return None
    (first, spec, plane), (pool, *_), (rounded, *_), (last, *_) = steps
    if not isinstance(pool, AvgPool2d) or getattr(torch, spec.dtype) not in PAIRS:
        return None
    quarters = pool.divisor_override in {None, 4} and pool.geometry() == ((2, 2, 0, 0, 1),) * 2
    # The cells of a row are read in pairs, of which the one at the lower address is in the lower bits.
    pairs = spec.layout == "NCHW" and plane[-1] % 2 == 0 and sys.byteorder == "little"
    whole = not pool.ceil_mode or plane[0] % 2 == 0
    converted = (first, rounded, last) == (ToDtype("float32"), Round(), ToDtype(spec.dtype))
    return RoundedAverage(pool) if quarters and pairs and whole and converted else None


def _add(plan: Plan, source: Cells, target: Cells, _: object) -> None:
    program, wide = source.program, PAIRS[plan.dtype]
    bits = plan.dtype.itemsize * 8
    mask = (1 << bits) - 1
    height = plan.output_plane[0]
    pairs = Cells(program, source.tensor.view(wide), reused=source.reused)
    read = pairs.at()
    sums, more = (scratch(program, pairs.shape, wide) for _ in range(2))
    rows, others = sums.at(), more.at()
    upper, lower = (sums.at((slice(row, 2 * height, 2),)) for row in (0, 1))
    totals, odd = (each.at((slice(height),)) for each in (more, sums))
    # A uint16 is written as the int16 of the same bits.
    written = target.tensor.view(torch.int16) if plan.dtype == torch.uint16 else target.tensor
    write = Cells(program, written, reused=target.reused).at()
    program.calls += [
        lambda i: torch.bitwise_and(read[i], mask, out=rows[i]),
        lambda i: torch.bitwise_right_shift(read[i], bits, out=others[i]),
        lambda i: others[i].bitwise_and_(mask),  # the shift repeats the sign
        lambda i: rows[i].add_(others[i]),
        lambda i: torch.add(upper[i], lower[i], out=totals[i]),
        lambda i: torch.bitwise_right_shift(totals[i], 2, out=odd[i]),
        lambda i: odd[i].bitwise_and_(1),
        lambda i: totals[i].add_(odd[i]),
        lambda i: totals[i].add_(1),
        lambda i: totals[i].bitwise_right_shift_(2),
        lambda i: write[i].copy_(totals[i]),
    ]


def _scratch(plan: Plan) -> int:
    return 2 * plan.cells * plan.dtype.itemsize


ROUNDED_COST = Cost(3.0, 0.3, 0.0)
"""The work for a plane's bytes."""

ROUNDED_AVERAGE = Row(
    "rounded average",
    (RoundedAverage.family,),
    add=_add,
    pays=lambda *_: True,
    work=lambda plan: ROUNDED_COST.of(plan.dtype, plan.cells * plan.dtype.itemsize, 0),
    takes=lambda dtype: dtype in PAIRS,
    scratch=_scratch,
)
