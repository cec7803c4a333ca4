"""The engine: executes requests with torch on one device."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import inf
from threading import Barrier, local
from typing import TYPE_CHECKING, Any, Protocol

# torch reads this when it is imported: it computes pooling operators that Apple's GPUs lack on the CPU.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import torch

from poolrpc.chains import Planes
from poolrpc.layers import FLOATS, INTEGERS
from poolrpc.tensors import split_tensors
from poolrpc_server.compute.buffers import Buffers
from poolrpc_server.compute.device import DeviceStreams, PageLocks, backend_of, resolve_device
from poolrpc_server.compute.locations import Location
from poolrpc_server.compute.operands import joined, whole_operand
from poolrpc_server.compute.overlap import StageTimer, block_limit, planes_of_block
from poolrpc_server.compute.planes import batch_of
from poolrpc_server.compute.schedule import Schedule
from poolrpc_server.compute.workspace import Workspace, WorkspaceCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from poolrpc._wire.codec import BranchResult, Request
    from poolrpc.tensors import Bytes
    from poolrpc_server.compute.device import Backend, Stream
    from poolrpc_server.compute.operands import WholeOperand
    from poolrpc_server.compute.schedule import BatchKey
    from poolrpc_server.telemetry.stage_times import StageTimes

WORKSPACE_LIMIT = 64 * 2**20
"""The default limit of the memory of cached workspaces, in bytes."""

WORKSPACE_SHARE = 2
"""No workspace takes more than this part of it."""

IDLE_LIMIT = 96 * 2**20
"""The default limit of the memory of idle buffers, in bytes."""

GRID_ROWS = 8 * 65535
"""On CUDA, torch's operators of three spatial axes launch a row of blocks of threads for every eight rows of cells, and
CUDA accepts no more."""

RETRIED_SHARE = 4
"""After a device ran out of memory, a request is computed once more in blocks of this part of the size."""

BATCH_SCHEDULES, BATCH_WORKSPACE_BYTES = 256, 2 * 2**20
"""The number of batches' schedules to remember, and the size up to which their workspaces are cached. There are more of
these schedules than of requests': one for each number of planes."""


BATCHED_WORK = 20_000_000
"""The most work of a batch of boxes, which depends on their sizes: of more, each request is computed alone, so that its
caller is looked at while it is computed."""


class Slots(Protocol):
    """The execution slots that the batcher manages."""

    def borrow(self, count: int) -> int:
        """Take up to `count` free slots, and return how many were taken."""

    def release(self, slots: int) -> None:
        """Release slots."""


@dataclass(slots=True, eq=False)
class Run:
    """One request to execute, with its tensors' bytes.

    Attributes:
        schedule: How to compute it.
        inputs: The bytes of each input tensor.
        finish: Converts the outputs' bytes to the result; their memory is reused as soon as it returns.
        outputs: Where to write the outputs. None: to memory of the engine.
        times: Records when the computation starts and ends. None: nothing is recorded.
        location: Where the tensors are in a client's memory, if they were there before. None: it keeps no workspace.
        check: Called regularly during the execution, between layers and blocks of planes, on any of its threads; what
            it raises ends the execution. None: nothing is called. It isn't called for a run in a batch of several.

    """

    schedule: Schedule
    inputs: Sequence[Bytes]
    finish: Callable[[Sequence[memoryview]], Any]
    outputs: Sequence[memoryview] | None = None
    location: Location | None = None
    times: StageTimes | None = None
    check: Callable[[], None] | None = None

    @property
    def key(self) -> BatchKey | None:
        """The key of the runs that may share its batch. None: it is executed alone."""
        return None if self.outputs is not None else self.schedule.key

    @property
    def nbytes(self) -> int:
        """The size of inputs and outputs, in bytes."""
        return self.schedule.nbytes

    @property
    def seconds(self) -> float:
        """The estimated duration, in seconds."""
        return self.schedule.seconds

    def record_duration(self, seconds: float) -> None:
        """Correct the estimate by the duration of an execution."""
        self.schedule.record_duration(seconds)


class Engine:
    """A device with the memory and threads that it needs to execute requests.

    Attributes:
        device: The device.
        backend: What works on it.
        streams: Its streams.
        threads: The number of executions at a time.
        page_locks: Memory of others that is page-locked for the device.
        slots: The slots that a large request may borrow to use more threads. None: it uses one thread.
        idle_limit: The largest memory of cached workspaces and idle buffers, in bytes.

    """

    def __init__(  # noqa: PLR0913 - all but the first two are optional
        self,
        device: str,
        threads: int,
        *,
        workspace_limit: int = WORKSPACE_LIMIT,
        idle_limit: int = IDLE_LIMIT,
        page_lock_limit: int = 0,
        max_work: float = inf,
        backend: Backend | None = None,
    ) -> None:
        """Create an engine.

        Args:
            device: "auto" or a device as torch names it.
            threads: The number of executions at a time. The caller must not start more.
            workspace_limit: Bytes of cached workspaces, over all schedules.
            idle_limit: Bytes of idle buffers.
            page_lock_limit: Bytes of others' memory to page-lock for the device.
            max_work: The most work of a request whose work depends on its operand, in nanoseconds of one thread.
            backend: What works on the device. None: that of the device.

        Raises:
            ValueError: This machine has no such device.

        """
        self.device = resolve_device(device)
        self.threads = threads
        self.slots: Slots | None = None
        self.idle_limit = workspace_limit + idle_limit
        # A request is computed in its caller's thread: passing it to another would take longer than computing a small
        # one. A large one is divided among helper threads too, if slots are free. Helpers never wait for each other, so
        # there is no deadlock.
        self._helpers = ThreadPoolExecutor(max(1, threads - 1), "poolrpc-helper", _prepare_thread)
        _start_threads(self._helpers, threads - 1)
        self.backend = backend_of(self.device) if backend is None else backend
        self.streams = DeviceStreams(self.device, self.backend, threads)
        self.page_locks = PageLocks(self.backend, page_lock_limit)
        self._buffers = Buffers(idle_limit, self.backend.allocate)
        self._workspaces = WorkspaceCache(workspace_limit, threads)
        self._workspace_bytes = workspace_limit // WORKSPACE_SHARE
        self._max_work = max_work
        self._batch_schedule = lru_cache(BATCH_SCHEDULES)(self._create_batch_schedule)
        self._local = local()

    @property
    def idle_bytes(self) -> int:
        """The memory of cached workspaces and idle buffers, in bytes."""
        return self._workspaces.nbytes + self._buffers.idle_bytes

    @property
    def pinned_bytes(self) -> int:
        """The page-locked memory of the engine's own buffers, in bytes."""
        return self._buffers.nbytes if self.backend.asynchronous else 0

    def drop_idle(self) -> None:
        """Drop every cached workspace and idle buffer."""
        self._workspaces.clear()
        self._buffers.clear()

    def schedule(self, request: Request, spatial_dims: int, results: Sequence[BranchResult]) -> Schedule:
        """Determine how to compute a request, and so how much work it is."""
        device = self._device_for(request, spatial_dims, results)
        return Schedule(request, spatial_dims, results, device, self.threads, self._workspace_bytes, self._max_work)

    def run(
        self,
        schedule: Schedule,
        payload: Bytes,
        finish: Callable[[Sequence[memoryview]], Any],
        operand: Bytes | None = None,
    ) -> Run:
        """Return the run of a request.

        Args:
            schedule: How to compute it.
            payload: The bytes of its tensors, in order.
            finish: Converts the outputs' bytes to the result; their memory is reused as soon as it returns.
            operand: The bytes of the operand. None: they are in the payload, if there is one.

        Raises:
            InvalidArgumentError: The payload is too short or too long.

        """
        if operand is not None:
            return Run(schedule, (payload, operand), finish)
        single = len(schedule.inputs) == 1 and len(payload) == schedule.input_bytes
        return Run(schedule, (payload,) if single else split_tensors(payload, schedule.inputs), finish)

    def run_in_place(self, schedule: Schedule, location: Location, *, again: bool = False) -> Run:
        """Return the run of a request that reads its inputs from, and writes its outputs to, the caller's memory.

        Args:
            schedule: How to compute it.
            location: Where its tensors are.
            again: Whether the same request was in this location before, so that it pays to keep a workspace for it.

        """
        return Run(schedule, location.inputs, _discard, location.outputs, location if again else None)

    def location(self, inputs: Sequence[memoryview], outputs: Sequence[memoryview]) -> Location:
        """Return the location of a request in the caller's memory.

        Each tensor must be aligned to its item size, and the outputs must not overlap the inputs.
        """
        return Location(self._workspaces, inputs, outputs)

    def execute(self, runs: Sequence[Run]) -> list[Any]:
        """Execute one run, or several of the same key as one batch, and return their results.

        Raises:
            InvalidArgumentError: The operand of one of them is invalid, such as indices that are out of range.
            LimitExceededError: The device is out of memory.

        """
        if not hasattr(self._local, "prepared"):
            _prepare_thread()
            self._local.prepared = True
        planes = sum([run.schedule.planes for run in runs])
        for run in runs:
            if run.times is not None:
                run.times.compute_started(len(runs), planes)
        if not self.backend.overlapped:
            return self._execute_batch(runs, ()) if len(runs) > 1 else [self._execute_alone(runs[0])]
        with self.streams.borrow() as streams:
            # On a GPU, a batch of one uses page-locked memory too.
            batched = len(runs) > 1 or (runs[0].key is not None and self._is_overlapped(runs[0].schedule))
            return self._execute_batch(runs, streams) if batched else [self._execute_alone(runs[0], streams)]

    def close(self) -> None:
        """Stop the helper threads."""
        self._helpers.shutdown()

    def _execute_alone(self, run: Run, streams: Sequence[Stream] = ()) -> Any:  # noqa: ANN401 - what the run's finish returns
        schedule = run.schedule
        if self._is_overlapped(schedule):
            given = run.outputs
            with self._buffers.borrow(schedule.outputs) if given is None else nullcontext(given) as outputs:
                workspace = Workspace(schedule, run.inputs, outputs)
                return run.finish(self._compute_on_device(workspace, streams, [run]))
        if schedule.cached:
            return self._execute_in_workspace(run)
        if run.outputs is not None:
            workspace = Workspace(schedule, run.inputs, run.outputs)
            return run.finish(workspace.run(self._parallel_for, run.check, in_place=True))
        if schedule.whole:
            return run.finish(Workspace(schedule, run.inputs).run(self._parallel_for, run.check))
        with self._buffers.borrow(schedule.outputs) as outputs:
            return run.finish(Workspace(schedule, run.inputs, outputs).run(self._parallel_for, run.check))

    def _execute_in_workspace(self, run: Run) -> Any:  # noqa: ANN401 - what the run's finish returns
        # An operand that a client may change after it was checked is copied.
        location = run.location if len(run.inputs) == 1 else None
        with self._workspaces.borrow(run.schedule, location) as workspace:
            if location is not None:
                return run.finish(workspace.run(self._parallel_for, run.check, in_place=True))
            for buffer, data in zip(workspace.inputs, run.inputs, strict=True):
                buffer[:] = data
            outputs = workspace.run(self._parallel_for, run.check)
            for given, computed in zip(run.outputs or (), outputs, strict=False):
                given[:] = computed
            return run.finish(outputs)

    def _is_overlapped(self, schedule: Schedule) -> bool:
        # Nothing of a tensor without cells is copied or computed.
        return self.backend.overlapped and schedule.device == self.device and bool(schedule.branches)

    def _compute_on_device(
        self, workspace: Workspace, streams: Sequence[Stream], runs: Sequence[Run]
    ) -> Sequence[memoryview]:
        """Compute the outputs of runs on the device, once more in smaller blocks if its memory does not suffice."""
        schedule = workspace.schedule
        block = schedule.planes
        if schedule.divisible:
            plane_bytes = schedule.nbytes // max(1, schedule.planes)
            limit = block_limit(self.backend.memory_bytes, self.threads, len(streams))
            block = planes_of_block(schedule.planes, plane_bytes, page_locked=workspace.page_locked, limit=limit)
        try:
            return self._compute_blocks(workspace, streams, block, runs)
        except torch.OutOfMemoryError:
            smaller = max(1, block // RETRIED_SHARE)
            if not schedule.divisible or smaller == block:
                raise
        self.backend.free_cached()
        return self._compute_blocks(workspace, streams, smaller, runs)

    def _compute_blocks(
        self, workspace: Workspace, streams: Sequence[Stream], block: int, runs: Sequence[Run]
    ) -> Sequence[memoryview]:
        check = runs[0].check if len(runs) == 1 else None
        timer = StageTimer(streams[0]) if self.backend.asynchronous and runs[0].times is not None else None
        outputs = workspace.run_on_device(streams, block, check, timer=timer, counter=self.streams)
        for run in runs:
            if timer is not None and run.times is not None:
                run.times.device = timer.stages()
        return outputs

    def _execute_batch(self, runs: Sequence[Run], streams: Sequence[Stream]) -> list[Any]:
        key = runs[0].key
        assert key is not None  # noqa: S101 - runs without a key are executed alone
        planes = sum(run.schedule.planes for run in runs)
        boxes = sum(run.schedule.boxes for run in runs)
        schedule = self._batch_schedule(key, planes, boxes)
        with self._borrow_workspace(schedule, _joined_operand(runs)) as workspace:
            for number, buffer in enumerate(workspace.inputs):
                end = 0
                for run in runs:
                    start, end = end, end + len(run.inputs[number])
                    buffer[start:end] = run.inputs[number]
            if self._is_overlapped(schedule):
                outputs = self._compute_on_device(workspace, streams, runs)
            else:
                outputs = workspace.run(self._parallel_for, runs[0].check if len(runs) == 1 else None)
            for run in runs:
                if run.times is not None:
                    run.times.compute_ended()
            results, starts = [], [0] * len(outputs)
            for run in runs:
                ends = [start + spec.nbytes for start, spec in zip(starts, run.schedule.outputs, strict=True)]
                results.append(
                    run.finish([out[start:end] for out, start, end in zip(outputs, starts, ends, strict=True)])
                )
                starts = ends
        return results

    @contextmanager
    def _borrow_workspace(self, schedule: Schedule, operand: WholeOperand | None = None) -> Iterator[Workspace]:
        """Borrow a workspace, without memory for an operand that is given; it is returned when the context ends."""
        if not schedule.cached:
            specs = schedule.inputs if operand is None else schedule.inputs[:1]
            with self._buffers.borrow(specs) as inputs, self._buffers.borrow(schedule.outputs) as outputs:
                yield Workspace(schedule, inputs, outputs, operand)
            return
        with self._workspaces.borrow(schedule) as workspace:
            yield workspace

    def _create_batch_schedule(self, key: BatchKey, planes: int, boxes: int) -> Schedule:
        dims = key.spatial_dims
        request = batch_of(key.plane, Planes(key.plane.input, dims), planes, boxes)
        nbytes = min(BATCH_WORKSPACE_BYTES, self._workspace_bytes)
        most = min(self._max_work, BATCHED_WORK)
        return Schedule(request, dims, request.results(), key.device, self.threads, nbytes, most)

    def _parallel_for(self, part: Callable[[int, int], None], planes: int, threads: int) -> None:
        borrowed = self.slots.borrow(threads - 1) if self.slots is not None and threads > 1 else 0
        futures: list[Future[None]] = []
        try:
            ends = [planes * i // (borrowed + 1) for i in range(borrowed + 2)]
            futures = [self._helpers.submit(part, start, stop) for start, stop in pairwise(ends[1:])]
            try:
                part(ends[0], ends[1])
            finally:
                wait(futures)
            while futures:
                futures.pop().result()
        finally:
            futures.clear()  # breaks the cycle of an error, its traceback and this frame, which keeps tensors' memory
            if borrowed and self.slots is not None:
                self.slots.release(borrowed)

    def _device_for(self, request: Request, spatial_dims: int, results: Sequence[BranchResult]) -> torch.device:
        # CUDA has no max and no mean of integers, and Metal no float64. These are computed on the CPU, so that the
        # server supports the same dtypes on every device. Integers that are converted first are uploaded as they are.
        if self.device.type == "cpu":
            return self.device
        if spatial_dims == 3 and _most_rows(request, results) > GRID_ROWS:  # noqa: PLR2004 - depth, height and width
            return torch.device("cpu")
        for chain in request.branches:
            dtypes = request.dtypes(chain)
            pooled = {dtype for layer, dtype in zip(chain, dtypes, strict=False) if layer.spatial_dims}
            if pooled & {*INTEGERS} or (self.device.type == "mps" and not {*dtypes} <= {*FLOATS} - {"float64"}):
                return torch.device("cpu")
        return self.device


def _joined_operand(runs: Sequence[Run]) -> WholeOperand | None:
    """Return the operand of a batch, that of each request checked; None if the blocks of planes share none."""
    if not runs[0].schedule.whole_operand:
        return None
    dims, requests = runs[0].schedule.spatial_dims, [run.schedule.request for run in runs]
    operands = [whole_operand(run.inputs[1], request, dims) for run, request in zip(runs, requests, strict=True)]
    return operands[0] if len(runs) == 1 else joined(operands, requests, dims)


def _most_rows(request: Request, results: Sequence[BranchResult]) -> int:
    """Return the size of the second last spatial axis, the largest of the input and of every step's output."""
    steps = (shape for _, returned in request.by_branch(results) for shape in returned[-1].shapes)
    axis = -3 if request.input.layout == "NHWC" else -2
    return max(shape[axis] for shape in (request.input.shape, *steps))


def _start_threads(executor: ThreadPoolExecutor, count: int) -> None:
    """Start the threads of an executor: what is submitted runs later even if that failed to start a thread for it.

    Raises:
        RuntimeError: The system has no further thread.

    """
    started = Barrier(count + 1)
    try:
        for _ in range(count):
            executor.submit(started.wait)
        started.wait()
    except BaseException:
        started.abort()
        executor.shutdown(wait=False, cancel_futures=True)
        raise


def _prepare_thread() -> None:
    # With two OpenMP threads, calls on a busy two-core machine were seen to stall a hundredfold. Nothing here needs a
    # gradient.
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def _discard(_: Sequence[memoryview]) -> None:
    """Return nothing: the outputs are already in the caller's memory."""
