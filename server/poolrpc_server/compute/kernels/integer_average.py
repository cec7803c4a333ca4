"""Averages of 2x2 cells of small integers: two or four steps of a chain as one, in integers.

`[ToDtype("float32"), AvgPool2d(2)]` is the average of an image, and with `Round(), ToDtype("uint8")` after it a level
of an image's pyramid. The sum of four uint8 or uint16 is exact in float32, and so is a quarter of it; Round() takes the
even one of two neighbours that are equally near. With integers, that is (2 s + s % 8) / 8, rounded down, for a sum s.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import numpy as np
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

PAIRS = {torch.uint8: (torch.int16, torch.uint16), torch.uint16: (torch.int32, torch.uint32)}
"""The dtypes of two cells of each dtype, in which their sum is computed: of torch's operators, and of NumPy's."""

PART_BYTES = 2**18
"""The size of a part of a block, some rows of all its planes: the cells of a part are read three times, and its sums
eight times, so they should stay in the cache of one core."""

LARGER_BLOCKS = 2
"""How many times the size of other kernels' blocks this one's have: what is read again is a part, and the later levels
of a pyramid are so small that their calls take longer than their cells."""

ROUNDED_STEPS, STEPS = 4, 2
"""The number of steps that become one, with rounding and without."""

Step: TypeAlias = "tuple[Layer | IntegerAverage | WithOperand, TensorSpec, Shape]"
"""A layer, with the spec and the planes' shape of its input."""


@dataclass(frozen=True, slots=True)
class IntegerAverage:
    """Stands for the steps in a plan.

    Attributes:
        pool: The average.
        rounded: Whether the output is rounded to the dtype of the input; else it is float32.

    """

    pool: AvgPool2d
    rounded: bool

    family: ClassVar[str] = "integer_average"
    operand: ClassVar[str] = ""
    returns_indices: ClassVar[bool] = False

    def geometry(self) -> tuple[tuple[int, int, int, int, int], ...]:
        """Return those of the average."""
        return self.pool.geometry()

    def output_plane(self, plane: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial shape of the output."""
        return self.pool.output_plane(plane)

    def output_dtype(self, dtype: str) -> str:
        """Return the dtype of the output."""
        return dtype if self.rounded else "float32"


def fuse(chain: Sequence[Step], outputs: Outputs, device: str) -> tuple[Sequence[Step], Outputs]:
    """Return a chain in which such steps are one, and the new numbers of the layers that are returned.

    Args:
        chain: The layers.
        outputs: The numbers of the layers whose outputs are returned; steps before the last of those that become one
            are none of them.
        device: The type of the device; on another than the CPU, the chain stays as it is.

    """
    if device != "cpu":
        return chain, outputs
    fused: list[Step] = []
    numbers: list[int] = []
    start = 0
    while start < len(chain):
        step, count = chain[start], 1
        for steps in (ROUNDED_STEPS, STEPS):
            within = {*range(start, start + steps - 1)} & {*outputs}
            layer = None if within else _integer_average(chain[start : start + steps], steps)
            if layer is not None:
                step, count = (layer, *step[1:]), steps
                break
        fused.append(step)
        start += count
        if start - 1 in outputs:
            numbers.append(len(fused) - 1)
    return fused, tuple(numbers)


def _integer_average(steps: Sequence[Step], count: int) -> IntegerAverage | None:
    if len(steps) < count:
        return None
    (first, spec, plane), (pool, *_), *rest = steps
    if not isinstance(pool, AvgPool2d) or getattr(torch, spec.dtype) not in PAIRS:
        return None
    quarters = pool.divisor_override in {None, 4} and pool.geometry() == ((2, 2, 0, 0, 1),) * 2
    # The cells of a row are read in pairs, of which the one at the lower address is in the lower bits.
    pairs = spec.layout == "NCHW" and plane[-1] % 2 == 0 and sys.byteorder == "little"
    whole = not pool.ceil_mode or plane[0] % 2 == 0
    expected = [ToDtype("float32"), Round(), ToDtype(spec.dtype)][: count - 1]
    converted = [first, *(layer for layer, *_ in rest)] == expected
    return IntegerAverage(pool, bool(rest)) if quarters and pairs and whole and converted else None


def _add(plan: Plan, source: Cells, target: Cells, _: object) -> None:
    program, (signed, _) = source.program, PAIRS[plan.dtype]
    height, width = plan.output_plane
    nbytes = program.step * plan.cells * plan.dtype.itemsize
    parts = min(height, -(-nbytes // PART_BYTES))
    rows = -(-height // parts)
    memory = [scratch(program, (count, width), signed) for count in (2 * rows, rows, rows)]
    for first, last in pairwise(height * part // parts for part in range(parts + 1)):
        _add_rows(plan, source, target, memory, first, last)


def _add_rows(  # noqa: PLR0913, PLR0917 - what is read and written
    plan: Plan, source: Cells, target: Cells, memory: Sequence[Cells], first: int, last: int
) -> None:
    """Append the calls that compute the output's rows from number `first` to the one before `last`."""
    program, bits = source.program, plan.dtype.itemsize * 8
    signed, unsigned = PAIRS[plan.dtype]
    pairs = Cells(program, source.tensor.view(signed)[:, 2 * first : 2 * last], reused=source.reused)
    written = Cells(program, target.tensor[:, first:last], reused=target.reused)
    odd, sums, more = (
        Cells(program, each.tensor[:, : count * (last - first)], reused=True)
        for each, count in zip(memory, (2, 1, 1), strict=True)
    )
    (upper, lower), (odd_upper, odd_lower) = (
        [cells.at((slice(row, None, 2),)) for row in (0, 1)] for cells in (pairs, odd)
    )
    both, other = sums.at(), more.at()
    # torch's shift repeats the sign, and NumPy's calls cost less, but torch is faster where rows are skipped.
    read, odd_cells, sum_cells, more_cells = (cells.arrays(unsigned) for cells in (pairs, odd, sums, more))
    program.calls += [
        lambda i: torch.add(upper[i], lower[i], out=both[i]),
        lambda i: np.right_shift(read[i], bits, out=odd_cells[i]),
        lambda i: torch.add(odd_upper[i], odd_lower[i], out=other[i]),
        # The sum of pairs has that of their second cells times a power of two, of which one remains. What overflows
        # on the way doesn't matter, since the sum of four cells does not.
        lambda i: both[i].add_(other[i], alpha=1 - (1 << bits)),
    ]
    if plan.layer.rounded:
        write = written.arrays(plan.dtype)
        program.calls += [
            lambda i: np.bitwise_and(sum_cells[i], 7, out=more_cells[i]),
            lambda i: other[i].add_(both[i], alpha=2),
            lambda i: np.right_shift(more_cells[i], 3, out=more_cells[i]),
            lambda i: np.copyto(write[i], more_cells[i], casting="unsafe"),
        ]
    else:
        averages = written.at()
        program.calls += [lambda i: averages[i].copy_(both[i]), lambda i: averages[i].mul_(0.25)]


def _scratch(plan: Plan) -> int:
    return 2 * plan.cells * plan.dtype.itemsize


INTEGER_COST = Cost(3.0, 0.3, 0.0)
"""The work for a plane's bytes."""

INTEGER_AVERAGE = Row(
    "integer average",
    (IntegerAverage.family,),
    add=_add,
    pays=lambda *_: True,
    work=lambda plan: INTEGER_COST.of(plan.dtype, plan.cells * plan.dtype.itemsize, 0),
    takes=lambda dtype: dtype in PAIRS,
    scratch=_scratch,
    plane_bytes=lambda plan: plan.cells * plan.dtype.itemsize // LARGER_BLOCKS,
)
