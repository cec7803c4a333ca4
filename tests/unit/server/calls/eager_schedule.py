"""A schedule that needs no engine, for tests of validation."""

import math
from dataclasses import dataclass

from poolrpc._wire.codec import BranchResult, Request
from poolrpc_server.compute.planes import steps


@dataclass(frozen=True)
class EagerSchedule:
    """The work of eager kernels: every cell of every window of every layer."""

    request: Request
    spatial_dims: int
    results: tuple[BranchResult, ...]

    @property
    def work(self):
        """Return the number of cells that the kernels visit."""
        return sum(
            spec.numel // math.prod(plane) * layer.work(plane)
            for chain in steps(self.request, self.spatial_dims, self.results)
            for layer, spec, plane in chain
        )
