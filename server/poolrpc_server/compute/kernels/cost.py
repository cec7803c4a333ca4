"""The cost model that decides which kernel is used: estimates in nanoseconds of one thread, fitted to measurements.

Each kernel's own estimate is in its file; this file has what they share. The numbers were measured on one x86-64
machine (`python -m benchmarks kernels` measures another). They affect only the speed, since every kernel gives the same
result. A kernel is used only if it is estimated to be somewhat faster than torch.
"""

from dataclasses import dataclass
from math import prod

import torch

from poolrpc_server.compute.kernels.windows import Sizes, Windows

CALL = 40_000
"""The cost of calling any of these kernels, before it reads a cell."""

STEP = 9_000
"""The cost of each torch call in a kernel."""

PREDICTED, UNPREDICTED = 8_192, 16_384
"""Output cells of torch's max: up to the first number the CPU predicts its branches, from the second on it doesn't."""


@dataclass(frozen=True, slots=True)
class Case:
    """The size of one kernel call.

    Attributes:
        dtype: The dtype of the cells.
        planes: The number of planes; of images, if channels are last.
        plane: The shape of an input plane, with its channels if they are last.
        result: The shape of an output plane, likewise.
        windows: The windows over every axis of `plane`.

    """

    dtype: torch.dtype
    planes: int
    plane: Sizes
    result: Sizes
    windows: Windows

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
    return outputs * (6 + 0.6 * prod(case.windows.kernel)) * mispredicted
