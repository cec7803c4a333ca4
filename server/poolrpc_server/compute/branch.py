"""Branches: a chain of layers, computed in blocks of planes that stay in the CPU's cache through all of its layers."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from poolrpc.tensors import align
from poolrpc_server.compute.kernels import blocks
from poolrpc_server.compute.kernels.blocks import KEPT_BYTES, Cells, DoubleBuffer, Program, scratch
from poolrpc_server.compute.operands import WholeOperand
from poolrpc_server.compute.planes import check_indices
from poolrpc_server.compute.with_operand import takes_operand

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from poolrpc_server.compute.kernels import Plan

BLOCK_WORK = 20_000_000
"""The work of a block, if one plane isn't more: about 20 ms, after which the caller is looked at."""

WHOLE_BYTES = 32 * 2**20
"""A single layer whose operator takes at most this much memory is computed at once: torch's operators allocate their
outputs, and a block's output has to be copied."""

PROGRAM_BLOCKS = 16
"""The number of blocks of a program: its views of them take memory, and it is made again for the next ones."""

PARALLEL_WORK = 1_500_000
"""A branch of at least this work is divided among threads: for less, synchronising them costs more than it saves."""

PROGRAM_BYTES = 2 * 2**20
"""The memory of a program's views, and of what the C library's allocator keeps for a thread."""

ALIGNMENT_BYTES = 4096
"""More than the memory that is lost to the alignment of what a layer allocates."""


class Branch:
    """How a chain is computed: a kernel for each layer, and the number of planes to compute at a time.

    Attributes:
        steps: The plan of each layer, and the kernel that computes it; None for torch's own operators.
        whole: Whether a single operator of torch computes all planes at once.
        outputs: The numbers of the layers whose outputs are returned; the last layer is one of them.
        planes: The number of planes of the input; of images, if channels are last.
        block: The most planes to compute at a time.
        work: The work of all planes.
        threads: The most threads to divide the planes among.
        scratch_bytes: An upper bound of the memory that all threads take, in addition to inputs and outputs.

    """

    def __init__(
        self, plans: Sequence[Plan], planes: int, threads: int, outputs: Sequence[int] = (), *, bound: bool = False
    ) -> None:
        """Choose kernels and the size of blocks.

        Args:
            plans: The plan of each layer.
            planes: The number of planes of the input; of images, if channels are last.
            threads: The most threads that may compute the branch.
            outputs: The numbers of the layers whose outputs are returned, with the last layer. Empty: the last alone.
            bound: Whether its programs will be kept, and run many times.

        """
        self.outputs = tuple(outputs) or (len(plans) - 1,)
        self.planes = self.block = planes
        self.steps = [(plan, plan.choose(planes, bound=bound)) for plan in plans]
        self.work = sum(plan.work(row, planes) for plan, row in self.steps)
        self.threads, self.scratch_bytes = 1, 0
        self.whole = False
        if plans[0].device != "cpu":
            return
        # What one layer writes and the next one reads is in the cache; it is in an output, or else in a buffer.
        sizes = [prod(plan.result_shape) * plan.output_dtype.itemsize for plan in plans]
        between = max((size for i, size in enumerate(sizes) if i not in self.outputs), default=0)
        plane_bytes = max(*sizes[:-1], *(plan.plane_bytes(row) for plan, row in self.steps), 0)
        self._plane_bytes = max(plane_bytes, -(-self.work * blocks.TARGET_BYTES // (BLOCK_WORK * planes)))
        self.block = max(1, min(planes, blocks.TARGET_BYTES // self._plane_bytes))
        if len(plans) == 1 and self.steps[0][1] is None and self.work <= BLOCK_WORK:
            # The temporary results of several operators should stay in the cache.
            most = WHOLE_BYTES if plans[0].is_one_operator else blocks.TARGET_BYTES
            self.whole = plans[0].eager_scratch(planes) <= most
            self.block = planes if self.whole else self.block
        self._between = between
        kernels = [(self.block + 1) * row.scratch(plan) for plan, row in self.steps if row is not None]
        self._shared_bytes = 0
        if len(plans) > 1:
            buffers = 2 * (self.block + 1) * between
            self._shared_bytes = buffers + max(kernels, default=0) + ALIGNMENT_BYTES
        if self.block < planes and self.work >= PARALLEL_WORK:
            self.threads = min(threads, planes)
        eager = max((plan.eager_scratch(self.block) for plan, row in self.steps if row is None), default=0)
        own = self._shared_bytes + min(KEPT_BYTES, sum(kernels)) if self._shared_bytes else sum(kernels)
        # The input and the operand are copied if they are not aligned.
        copied = (self.block + 1) * plans[0].cells * (plans[0].dtype.itemsize + 8 * takes_operand(plans[0].layer))
        program = PROGRAM_BYTES if self.block < planes else 0
        self.scratch_bytes = self.threads * (copied + own + eager + program)

    def compute_whole(
        self,
        x: torch.Tensor,
        operand: Any,  # noqa: ANN401 - as the operator takes it
        check: Callable[[], None] | None,
    ) -> Sequence[torch.Tensor]:
        """Compute all planes at once, by the single operator of a branch that is `whole`.

        Args:
            x: The input, batched.
            operand: The operand of the layer, checked; None if it takes none.
            check: Called before; what it raises ends the computation.

        Returns:
            The output, and the indices of the maxima if the layer returns them, in memory that torch allocated.

        """
        if check is not None:
            check()
        plan = self.steps[0][0]
        output, chosen = plan.eager(x, operand, 0, self.planes * (plan.channels or 1))
        return (output,) if chosen is None else (output, chosen)

    def compute_on_device(
        self,
        x: torch.Tensor,
        operand: Any,  # noqa: ANN401 - as the operator takes it
        first: int,
    ) -> list[Sequence[torch.Tensor]]:
        """Queue the layers' operators on some planes that are on a device.

        Args:
            x: The planes, batched.
            operand: The operand of the first layer, checked; None if it takes none.
            first: The number of the first plane.

        Returns:
            For each output, it and the indices of the maxima if the layer returns them.

        """
        results: list[Sequence[torch.Tensor]] = []
        for number, (plan, _) in enumerate(self.steps):
            channels = plan.channels or 1
            x, chosen = plan.eager(x, None if number else operand, first * channels, self.planes * channels)
            if number in self.outputs:
                results.append((x,) if chosen is None else (x, chosen))
        return results

    def compute_range(  # noqa: PLR0913, PLR0917 - the last two are added by what divides the planes
        self,
        x: torch.Tensor,
        operand: torch.Tensor | WholeOperand | None,
        targets: Sequence[Sequence[torch.Tensor]],
        check: Callable[[], None] | None,
        start: int,
        stop: int,
    ) -> None:
        """Compute a range of planes on the CPU, block by block.

        Args:
            x: All planes of the input, (planes, *plane); or their bytes, (planes, bytes), if they are not aligned.
            operand: The bytes of the indices for MaxUnpool, or a whole operand; None if the first layer takes none.
            targets: For each output, memory for all planes of it, and of the indices of the maxima.
            check: Called before each layer of each block; what it raises ends the computation.
            start: The number of the first plane of the range.
            stop: The number of the plane after the last.

        """
        for program in self.programs(x, operand, targets, start, stop):
            program.run(check)

    def programs(
        self,
        x: torch.Tensor,
        operand: torch.Tensor | WholeOperand | None,
        targets: Sequence[Sequence[torch.Tensor]],
        start: int,
        stop: int,
    ) -> Iterator[Program]:
        """Yield the programs that compute a range of planes, one after the other; all else is as for compute_range."""
        count = -(-(stop - start) // (PROGRAM_BLOCKS * self.block))
        for first, end in pairwise(start + (stop - start) * i // count for i in range(count + 1)):
            program = Program(end - first, self._plane_bytes, self._shared_bytes, first)
            source = Cells(program, x[first:end])
            written = [[Cells(program, target[first:end]) for target in each] for each in targets]
            given = Cells(program, operand[first:end]) if isinstance(operand, torch.Tensor) else operand
            self._append(program, source, given, written, first)
            yield program

    def _append(
        self,
        program: Program,
        source: Cells,
        operand: Cells | WholeOperand | None,
        targets: Sequence[Sequence[Cells]],
        first: int,
    ) -> None:
        """Append the calls of every layer to a program for the planes from number `first` on."""
        plan = self.steps[0][0]
        if source.tensor.dtype != plan.dtype:  # Vectorised code may fail on an address that is not aligned.
            source = _aligned(source, plan)
        buffers = DoubleBuffer(program, torch.uint8, align((program.step + 1) * self._between))
        returned = dict(zip(self.outputs, targets, strict=True))
        program.begin_layers()
        for number, (plan, row) in enumerate(self.steps):
            program.begin_layer()
            target, *rest = returned.get(number) or (buffers.swap(plan.result_shape, plan.output_dtype),)
            chosen = rest[0] if rest else None
            if row is None:
                read = None if operand is None or number else _operand_reader(operand, plan)
                plan.add_eager(source, target, chosen, read, first, self.planes)
            else:
                row.add(plan, source, target, chosen)
            program.end_layer()
            source = target


def _aligned(source: Cells, plan: Plan) -> Cells:
    """Append the call that copies planes, given as bytes, to aligned memory."""
    made = scratch(source.program, plan.plane_shape, plan.dtype)
    copied = made.tensor.view(source.program.step, -1).view(torch.uint8)
    source.program.calls.append(blocks.copy(source.at(), Cells(source.program, copied, reused=True).at()))
    return made


def _operand_reader(operand: Cells | WholeOperand, plan: Plan) -> Callable[[int], Any]:
    """Return a function that reads the operand of a block: MaxUnpool's indices, which it checks, or a whole one."""
    if isinstance(operand, WholeOperand):
        return lambda _: operand.value
    read = operand.at()
    return lambda number: checked_indices(read[number], plan)


def checked_indices(data: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return a copy of the indices for MaxUnpool of some planes, checked and batched.

    A client that writes to shared memory can't change the copy after the check. It is also aligned, whatever precedes
    the indices in the payload.

    Args:
        data: Their bytes, (planes, bytes).
        plan: The plan of the layer.

    Raises:
        InvalidArgumentError: An index is out of range.

    """
    indices = data.clone().view(torch.int64)
    check_indices(indices.numpy(), prod(plan.output_plane))
    return plan.batched(indices.view(-1, *plan.plane_shape))
