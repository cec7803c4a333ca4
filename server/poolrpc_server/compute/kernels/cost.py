"""Two cost models, in nanoseconds of one thread: which kernel is used, and how much work a request is.

Each kernel's own estimates are in its file, those of torch's operators are in eager_cost.py; this file has what they
share. The numbers are fitted to measurements on one x86-64 machine (`python -m benchmarks kernels` measures another).
Estimates that choose a kernel affect only the speed, since every kernel gives the same result; a kernel is used only if
it is estimated to be somewhat faster than torch. Estimates of work are coarser and hold for planes of any shape.
"""

from dataclasses import dataclass
from math import prod

import torch

from poolrpc_server.compute.kernels.windows import Sizes, Windows

CALL, BOUND_CALL = 40_000, 1_500
"""The cost of calling any of these kernels, before it reads a cell, if its program has to be made and if it is kept."""

STEP, BOUND_STEP = 9_000, 1_300
"""The cost of each torch call in a kernel, likewise."""

EAGER_CALL = 2_000
"""The cost of calling one of torch's operators."""

PREDICTED, UNPREDICTED = 8_192, 16_384
"""Output cells of torch's max: up to the first number the CPU predicts its branches, from the second on it doesn't."""


WEIGHTS = {
    torch.float16: 1.3,
    torch.bfloat16: 1.3,
    torch.float64: 1.6,
    torch.int64: 1.6,
    torch.uint8: 0.75,
    torch.int8: 0.75,
}
"""How many times a cell of a dtype costs what a cell of float32 costs."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The parts of the work for one plane of float32, in nanoseconds.

    Attributes:
        plane: For the plane.
        cell: For each of its cells.
        output: For each cell of the output.
        visit: For each cell that is visited; one in several windows is visited several times.

    """

    plane: float
    cell: float
    output: float
    visit: float = 0.0

    def of(self, dtype: torch.dtype, cells: float, outputs: float, visits: float = 0.0) -> float:
        """Return the work for a plane of so many cells, output cells and visited cells."""
        weight = WEIGHTS.get(dtype, 1.0)
        return self.plane + weight * (self.cell * cells + self.output * outputs + self.visit * visits)


@dataclass(frozen=True, slots=True)
class Case:
    """The size of one kernel call.

    Attributes:
        dtype: The dtype of the cells.
        planes: The number of planes; of images, if channels are last.
        plane: The shape of an input plane, with its channels if they are last.
        result: The shape of an output plane, likewise.
        windows: The windows over every axis of `plane`.
        bound: Whether the kernel's program is kept, and run many times.

    """

    dtype: torch.dtype
    planes: int
    plane: Sizes
    result: Sizes
    windows: Windows
    bound: bool = False

    @property
    def call(self) -> int:
        """The cost of the call, before it reads a cell."""
        return BOUND_CALL if self.bound else CALL

    @property
    def step(self) -> int:
        """The cost of each torch call in it."""
        return BOUND_STEP if self.bound else STEP

    @property
    def cells(self) -> int:
        """The number of input cells."""
        return self.planes * prod(self.plane)

    @property
    def outputs(self) -> int:
        """The number of output cells."""
        return self.planes * prod(self.result)


def eager_max(case: Case) -> float:
    """Estimate the cost of torch's own max over windows."""
    outputs = case.outputs
    mispredicted = 2 if outputs >= UNPREDICTED else 1.5 if outputs >= PREDICTED else 1
    return EAGER_CALL + outputs * (6 + 0.6 * prod(case.windows.kernel)) * mispredicted
