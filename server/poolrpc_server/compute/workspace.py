"""Workspaces: the memory that holds the tensors of one execution, and the cache that keeps idle ones for reuse."""

from __future__ import annotations

import threading
import warnings
from contextlib import suppress
from functools import partial
from itertools import count, islice
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from poolrpc_server.compute.branch import checked_indices
from poolrpc_server.compute.buffers import aligned
from poolrpc_server.compute.operands import whole_operand
from poolrpc_server.compute.overlap import run_in_blocks
from poolrpc_server.compute.with_operand import takes_operand

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from poolrpc.tensors import Bytes, TensorSpec
    from poolrpc_server.compute.branch import Branch
    from poolrpc_server.compute.device import DeviceStreams, Stream
    from poolrpc_server.compute.kernels.blocks import Program
    from poolrpc_server.compute.locations import Location
    from poolrpc_server.compute.operands import WholeOperand
    from poolrpc_server.compute.overlap import StageTimer
    from poolrpc_server.compute.schedule import Schedule

ParallelFor: TypeAlias = "Callable[[Callable[[int, int], None], int, int], None]"
"""Calls a function on ranges (start, stop) that cover a number of planes, on up to a number of threads."""

OVERHEAD_BYTES = 4096
"""Memory that a workspace takes in addition to its tensors' bytes: Python's, NumPy's and torch's objects for them."""

LEFT_BYTES = 64 * 2**10
"""An output of at least this many bytes is left where torch allocated it: for fewer, a copy costs less than a view."""

KEPT_SHARE = 0.75
"""The share of its limit that the cache keeps when it drops workspaces, so that it doesn't sort them on every miss."""


with warnings.catch_warnings():
    # torch warns, once in a process, of a tensor of memory that is not writable. The engine never writes to inputs.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


class Workspace:
    """Memory for the input and output tensors of one execution, with torch's views of it.

    Attributes:
        schedule: The schedule that it is for.
        inputs: The bytes of each input tensor.
        outputs: The bytes of each output tensor; empty if torch's operators allocate them.
        location: Where the tensors are in a client's memory; None if they are in memory of the workspace.
        last_used: A number that grows with every use of any workspace of the cache.
        nbytes: The memory that the workspace takes, in bytes, with that of its programs.

    """

    def __init__(  # noqa: PLR0913 - the last three are optional
        self,
        schedule: Schedule,
        inputs: Sequence[Any],
        outputs: Sequence[memoryview] = (),
        operand: WholeOperand | None = None,
        *,
        reused: bool = False,
        location: Location | None = None,
    ) -> None:
        """Create a workspace.

        Args:
            schedule: The schedule that it is for.
            inputs: The bytes of each input tensor.
            outputs: Memory for each output tensor; it may be left out if the schedule is `whole`.
            operand: The operand that the blocks of planes share, checked. None: that of the inputs, if there is one.
            reused: Whether it will run many times, so that programs are made once and kept.
            location: The location in a client's memory that the inputs and outputs are those of, if any.

        Raises:
            InvalidArgumentError: An operand that the blocks of planes share is invalid.

        """
        self.schedule, self.inputs, self.outputs, self.location = schedule, inputs, outputs, location
        self.last_used = 0
        self._programs: list[list[Program] | None] = [None] * len(schedule.branches)
        branches = schedule.branches
        self._operand = operand
        if branches:
            if schedule.whole_operand and operand is None:
                self._operand = whole_operand(inputs[1], schedule.request, schedule.spatial_dims)
            self._x = self._tensor(inputs[0], schedule.inputs[0])
            self._aligned = self._x.data_ptr() % self._x.element_size() == 0
            if not self._aligned:  # Vectorised code may fail on such an address: planes are copied first.
                self._x = self._bytes(0)
            targets = iter(self._tensor(*output) for output in zip(outputs, schedule.outputs, strict=bool(outputs)))
            self._targets = [
                [list(islice(targets, len(result.specs))) for result in results]
                for _, results in schedule.request.by_branch(schedule.results)
            ]
            if reused:
                self._programs = [
                    None if branch.whole else list(branch.programs(*self._operands(branch, targets), 0, branch.planes))
                    for branch, targets in zip(branches, self._targets, strict=True)
                ]
        kept = sum(program.nbytes for programs in self._programs for program in programs or ())
        self.nbytes = (schedule.nbytes if location is None else 0) + OVERHEAD_BYTES + kept

    @property
    def idle(self) -> list[Workspace]:
        """The idle workspaces that may be used instead of this one."""
        return self.schedule.workspaces if self.location is None else self.location.workspaces

    def run(
        self, parallel_for: ParallelFor, check: Callable[[], None] | None = None, *, in_place: bool = False
    ) -> Sequence[memoryview]:
        """Compute the outputs.

        Args:
            parallel_for: Calls a function on ranges of planes, on one thread or several.
            check: Called between layers and blocks of planes, on any of these threads; what it raises ends the
                computation. None: nothing is called.
            in_place: Whether every output must be written to `outputs`, rather than left where torch allocated it.

        Returns:
            The bytes of each output.

        Raises:
            InvalidArgumentError: The operand is invalid, such as indices that are out of range.

        """
        schedule = self.schedule
        if not schedule.branches:
            return self.outputs
        outputs: list[memoryview] = []
        for branch, targets, programs in zip(schedule.branches, self._targets, self._programs, strict=True):
            if programs is not None:
                for program in programs:
                    program.run(check)
            elif branch.whole:
                results = branch.compute_whole(self._input(), self._checked_operand(branch), check)
                written = [target for each in targets for target in each]
                if not written or (not in_place and written[0].nbytes >= LEFT_BYTES):
                    outputs += map(_memory, results)
                    continue
                for target, result in zip(written, results, strict=True):
                    target.copy_(result)
            else:
                part = partial(branch.compute_range, *self._operands(branch, targets), check)
                parallel_for(part, branch.planes, branch.threads)
            outputs += self.outputs[len(outputs) : len(outputs) + sum(map(len, targets))]
        return outputs

    @property
    def page_locked(self) -> bool:
        """Whether a CUDA device can read the input where it is."""
        return self._x.is_pinned()

    def run_on_device(
        self,
        streams: Sequence[Stream],
        block: int,
        check: Callable[[], None] | None = None,
        *,
        timer: StageTimer | None = None,
        counter: DeviceStreams | None = None,
    ) -> Sequence[memoryview]:
        """Compute the outputs on the schedule's device, in blocks of planes.

        Args:
            streams: The device's streams.
            block: The planes of a block.
            check: Called before each block; what it raises ends the computation.
            timer: Records the times of the stages.
            counter: Counts the blocks that are queued.

        Returns:
            The bytes of each output.

        Raises:
            InvalidArgumentError: The operand is invalid, such as indices that are out of range.

        """
        if self.schedule.branches:
            stages = (partial(self._upload, self._bytes(0)), self._compute, self._download)
            run_in_blocks(streams, self.schedule.planes, block, stages, check, timer=timer, counter=counter)
        return self.outputs

    def _upload(self, planes: torch.Tensor, start: int, stop: int, _: None) -> tuple[torch.Tensor, list[Any]]:
        """Queue the upload of some of the planes, given as bytes, and of each branch's operand."""
        device = self.schedule.device
        first = self.schedule.branches[0].steps[0][0]
        uploaded = planes[start:stop].to(device, non_blocking=True, copy=True)
        x = first.batched(uploaded.view(-1).view(first.dtype).view(-1, *first.plane_shape))
        return x, [self._operand_on_device(branch, start, stop) for branch in self.schedule.branches]

    def _operand_on_device(self, branch: Branch, start: int, stop: int) -> Any:  # noqa: ANN401 - as the operator takes it
        """Queue the upload of a branch's operand for some of the planes; None if it takes none."""
        plan, device = branch.steps[0][0], self.schedule.device
        if not takes_operand(plan.layer):
            return None
        if self._operand is not None:
            return self._operand.on(device)
        return checked_indices(self._bytes(1)[start:stop], plan).to(device)

    def _compute(self, start: int, _: int, uploaded: tuple[torch.Tensor, list[Any]]) -> list[torch.Tensor]:
        """Queue the layers of every branch on some planes, and return all their outputs."""
        x, operands = uploaded
        results = (
            branch.compute_on_device(x, each, start)
            for branch, each in zip(self.schedule.branches, operands, strict=True)
        )
        return [output for branch in results for outputs in branch for output in outputs]

    def _download(self, start: int, stop: int, results: list[torch.Tensor]) -> None:
        """Queue the download of the outputs of some planes."""
        targets = (target for branch in self._targets for outputs in branch for target in outputs)
        for target, result in zip(targets, results, strict=True):
            if not self.schedule.divisible:  # the planes of the output may be others
                target.copy_(result.view(target.shape), non_blocking=True)
                continue
            written = target.view(self.schedule.planes, -1)[start:stop]
            written.copy_(result.view(written.shape), non_blocking=True)

    def _operands(
        self, branch: Branch, targets: Sequence[Sequence[torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor | WholeOperand | None, list[list[torch.Tensor]]]:
        """Return the planes of a branch's input, operand and outputs, as its programs take them."""
        first = branch.steps[0][0]
        x = self._x.view(-1, *first.plane_shape) if self._aligned else self._x
        operand = (self._operand or self._bytes(1)) if takes_operand(first.layer) else None
        written = [
            [target.view(-1, *branch.steps[step][0].result_shape) for target in each]
            for step, each in zip(branch.outputs, targets, strict=True)
        ]
        return x, operand, written

    def _input(self) -> torch.Tensor:
        """Return the input as the first layers take it: batched and aligned."""
        if self._aligned:
            return self._x
        dtype: torch.dtype = getattr(torch, self.schedule.inputs[0].dtype)
        return self._batched(self._x.clone().view(dtype), self.schedule.inputs[0])

    def _checked_operand(self, branch: Branch) -> Any:  # noqa: ANN401 - as the operator of its layer takes it
        """Return the operand of all planes, checked; None if the branch takes none."""
        plan = branch.steps[0][0]
        if not takes_operand(plan.layer):
            return None
        return checked_indices(self._bytes(1), plan) if self._operand is None else self._operand.value

    def _tensor(self, data: Bytes, spec: TensorSpec) -> torch.Tensor:
        """Return a tensor's memory, batched, without a copy."""
        dtype: torch.dtype = getattr(torch, spec.dtype)
        # torch makes no tensor of an empty buffer: there are no boxes.
        return self._batched(torch.frombuffer(data, dtype=dtype) if spec.numel else torch.empty(0, dtype=dtype), spec)

    def _bytes(self, number: int) -> torch.Tensor:
        """Return the bytes of each plane of an input, without a copy."""
        return torch.frombuffer(self.inputs[number], dtype=torch.uint8).view(self.schedule.planes, -1)

    def _batched(self, cells: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        dims = self.schedule.spatial_dims
        # torch does not infer the size of an axis of an empty tensor.
        if spec.layout == "NHWC":
            return cells.view(prod(spec.shape[: -dims - 1]), *spec.shape[-dims - 1 :])
        return cells.view(1, prod(spec.shape[:-dims]), *spec.shape[-dims:])


class WorkspaceCache:
    """Idle workspaces of all schedules and locations, limited in bytes; the least recently used are dropped first.

    Creating a workspace for a small request takes longer than pooling it. `take` and `put` cost two list operations:
    only the creation of a workspace takes the lock.
    """

    def __init__(self, limit: int, per_schedule: int) -> None:
        """Create an empty cache.

        Args:
            limit: Bytes of all workspaces, in use or idle, above which idle ones are dropped.
            per_schedule: Idle workspaces to keep of one schedule, and of one location.

        """
        self._limit = limit
        self._per_schedule = per_schedule
        self._uses = count(1)
        self._workspaces: set[Workspace] = set()
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The memory of all workspaces, in use or idle, in bytes."""
        return self._nbytes

    def borrow(self, schedule: Schedule, location: Location | None = None) -> AbstractContextManager[Workspace]:
        """Borrow a workspace, which is put back when the context ends, or discarded if it fails."""
        return _Loan(self, self.take(schedule, location))

    def take(self, schedule: Schedule, location: Location | None = None) -> Workspace:
        """Return a workspace that no other thread uses until it is put back or discarded."""
        try:
            return (schedule.workspaces if location is None else location.workspaces).pop()
        except IndexError:  # none is idle, or another thread took the last one
            return self._create(schedule, location)

    def put(self, workspace: Workspace) -> None:
        """Keep a workspace for the next request of its schedule, or of its location."""
        idle, location = workspace.idle, workspace.location
        if len(idle) < self._per_schedule and self._nbytes <= self._limit:
            workspace.last_used = next(self._uses)
            idle.append(workspace)
            if location is not None and location.ended:
                self.drop_idle_of(location)
        else:
            self.discard(workspace)

    def discard(self, workspace: Workspace) -> None:
        """Drop a workspace that is in use."""
        with self._lock:
            self._drop(workspace)

    def drop_idle_of(self, location: Location) -> None:
        """Drop the idle workspaces of a location."""
        with suppress(IndexError):  # there is none left
            while True:
                self.discard(location.workspaces.pop())

    def clear(self) -> None:
        """Drop every idle workspace."""
        with self._lock:
            self._drop_oldest(0)

    def _create(self, schedule: Schedule, location: Location | None) -> Workspace:
        if location is None:
            inputs, outputs = (
                [aligned(spec.nbytes) for spec in specs] for specs in (schedule.inputs, schedule.outputs)
            )
            workspace = Workspace(schedule, inputs, outputs, reused=True)
        else:
            workspace = Workspace(schedule, location.inputs, location.outputs, reused=True, location=location)
        with self._lock:
            self._workspaces.add(workspace)
            self._nbytes += workspace.nbytes
            if self._nbytes > self._limit:
                self._drop_oldest(KEPT_SHARE * self._limit)
        return workspace

    def _drop_oldest(self, keep: float) -> None:
        for workspace in sorted(self._workspaces, key=lambda each: each.last_used):
            if self._nbytes <= keep:
                return
            try:
                workspace.idle.remove(workspace)
            except ValueError:  # in use
                continue
            self._drop(workspace)

    def _drop(self, workspace: Workspace) -> None:
        self._workspaces.remove(workspace)
        self._nbytes -= workspace.nbytes


def _memory(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, which are copied if they are not contiguous."""
    # torch calls a tensor contiguous whatever the stride of an axis of one cell, but does not view that one's bytes.
    cells = tensor.contiguous().as_strided((tensor.numel(),), (1,))
    return cells.view(torch.uint8).numpy().data


class _Loan:
    """A workspace that is in use; contextlib's manager takes longer than a small kernel."""

    __slots__ = ("_cache", "_workspace")

    def __init__(self, cache: WorkspaceCache, workspace: Workspace) -> None:
        self._cache, self._workspace = cache, workspace

    def __enter__(self) -> Workspace:
        return self._workspace

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._cache.put(self._workspace)
        else:  # It may be in any state after a failure.
            self._cache.discard(self._workspace)
