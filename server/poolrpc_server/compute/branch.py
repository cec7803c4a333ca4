"""Branches: a chain of layers, computed in blocks of planes whose intermediate tensors are bounded."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from poolrpc_server.compute.kernels import Plan, Row

BLOCK_BYTES = 4 * 2**20
"""The memory that a block of planes may take, with all that is computed of it, if a plane doesn't take more."""

KERNEL_BLOCK_BYTES = 16 * 2**20
"""The same for a single layer that a kernel computes, which walks the planes in smaller blocks itself."""

BLOCK_WORK = 20_000_000
"""The work of a block, if a plane isn't more: about 20 ms, after which the caller is looked at."""

PARALLEL_WORK = 4_000_000
"""A branch of at least this work is divided among threads: for less, synchronising them costs more than it saves."""


class Branch:
    """How a chain is computed: a kernel for each layer, and the number of planes to compute at a time.

    Attributes:
        steps: The plan of each layer, and the kernel that computes it; None for torch's own operators.
        planes: The number of planes of the input; of images, if channels are last.
        block: The number of planes to compute at a time.
        work: The work of all planes.
        threads: The number of threads to divide the planes among, if so many are free.
        scratch_bytes: An upper bound of the memory that all threads take, in addition to inputs and outputs.

    """

    def __init__(self, plans: Sequence[Plan], planes: int, threads: int) -> None:
        """Choose kernels and the size of blocks.

        Args:
            plans: The plan of each layer.
            planes: The number of planes of the input; of images, if channels are last.
            threads: The number of threads that may compute the branch.

        """
        self.planes = self.block = planes
        self._choose(plans)
        if plans[0].device == "cpu":
            walks = len(plans) == 1 and self.steps[0][1] is not None
            limit = KERNEL_BLOCK_BYTES if walks else BLOCK_BYTES
            plane_bytes = max(_plane_bytes(plan) + (0 if row else plan.scratch(row, 1)) for plan, row in self.steps)
            self.block = max(1, min(planes, limit // plane_bytes, BLOCK_WORK * planes // max(1, self.work)))
            if not walks and self.block < planes:
                self._choose(plans)
        self.threads = min(threads, -(-planes // self.block)) if self.work >= PARALLEL_WORK else 1
        self.scratch_bytes = self.threads * self._block_scratch()

    def _choose(self, plans: Sequence[Plan]) -> None:
        self.steps = [(plan, plan.choose(self.block)) for plan in plans]
        self.work = sum(plan.work(row, self.planes) for plan, row in self.steps)

    def _block_scratch(self) -> int:
        """Return the memory that one block takes."""
        count, plans = self.block, [plan for plan, _ in self.steps]
        # The input and, for MaxUnpool, the indices are copied if they are not aligned.
        copied = count * plans[0].cells * (plans[0].dtype.itemsize + 8 * plans[0].layer.takes_indices)
        made = [count * prod(plan.result_shape) * plan.dtype.itemsize for plan in plans[:-1]]
        held = [sum(pair) for pair in pairwise([0, *made, 0])]
        return copied + max(
            before_and_after + plan.scratch(row, count)
            for before_and_after, (plan, row) in zip(held, self.steps, strict=True)
        )

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of planes to compute at a time, all of about the same size."""
        number = -(-(stop - start) // self.block)
        return pairwise(start + (stop - start) * i // number for i in range(number + 1)) if number else iter(())

    def compute(
        self,
        x: torch.Tensor,
        indices: torch.Tensor | None,
        targets: Sequence[torch.Tensor],
        first: int,
        check: Callable[[], None] | None,
    ) -> None:
        """Compute a block of planes.

        Args:
            x: The planes, batched.
            indices: Their indices for MaxUnpool.
            targets: Memory for the output and the indices of the maxima, if the last layer returns them.
            first: The number of the first plane.
            check: Called before each layer; what it raises ends the computation.

        """
        last = len(self.steps) - 1
        for number, (plan, row) in enumerate(self.steps):
            if check is not None:
                check()
            outputs = targets if number == last else ()
            x, indices = plan.compute(row, x, indices, outputs=outputs, first=first, count=self.planes)
        for target, result in zip(targets, (x, indices), strict=False):
            if result is not target and result is not None:
                target.copy_(result, non_blocking=True)


def _plane_bytes(plan: Plan) -> int:
    """Return the bytes of an input plane and of an output plane, with indices."""
    outputs = prod(plan.result_shape)
    indices = 8 * outputs * plan.layer.returns_indices + 8 * plan.cells * plan.layer.takes_indices
    return (plan.cells + outputs) * plan.dtype.itemsize + indices
