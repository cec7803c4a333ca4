"""Where tensors are: the device, who computes on it, and the way from a request's bytes to its outputs' bytes."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from threading import local
from typing import TYPE_CHECKING, Any, Protocol

# Apple's GPUs lack some pooling kernels; torch computes these on the CPU where it was told so before it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import numpy as np
import torch

from poolrpc._wire.codec import tensors
from poolrpc.chains import Planes
from poolrpc.layers import INTEGERS
from poolrpc.tensors import split
from poolrpc_server.compute import kernels
from poolrpc_server.compute.buffers import Buffers, aligned
from poolrpc_server.compute.device import DeviceStreams, resolve_device, settle
from poolrpc_server.compute.planes import block_of, check_indices, steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from poolrpc._wire.codec import BranchResult, Request
    from poolrpc.tensors import Bytes, TensorSpec
    from poolrpc_server.telemetry.timeline import Turn


SMALL_BYTES = 16 * 2**10
"""A request of at most this, outputs included, has memory of its own, which torch has seen before: seeing takes longer
than pooling there."""

GATHERED_BYTES = (8 * 2**20, 256 * 2**10)
"""Up to this, outputs included, requests are computed together: on another device, where they are copied anyway, and on
the CPU, where beyond it copying them together costs more than a call of a kernel does."""

IDLE_BYTES = 128 * 2**20
"""Memory for outputs that is kept for the next calls."""

SHARED_BYTES = 20 * 2**20
"""A step that reads and writes at least this is shared among threads: below it, meeting costs more than it saves."""

CALL_SECONDS, CELL_SECONDS = 50e-6, 1e-9
"""What a request is taken to need before one like it was computed: for itself, and for each cell of its work."""

BATCHES, BATCH_BYTES = 256, 128 * 2**10
"""Schedules of batches that are remembered, and the size up to which they keep their memory."""


class Slots(Protocol):
    """Who says how many may compute."""

    def borrow(self, most: int) -> int:
        """Take up to so many slots that are free."""

    def give_back(self, slots: int) -> None:
        """Give them back."""


class Observer(Protocol):
    """What is told of each execution."""

    def executed(self, requests: int, planes: int, nbytes: int, seconds: float) -> None:
        """So much was computed at once."""


@dataclass(frozen=True, slots=True)
class Run:
    """A request with its tensors, to be computed.

    Attributes:
        schedule: How.
        inputs: The bytes of its tensors.
        finish: Makes the answer of the outputs' bytes, whose memory is used again afterwards.
        outputs: Where the outputs go. None: anywhere.
        turn: Is told how far it is, where there is one.

    """

    schedule: Schedule
    inputs: Sequence[Bytes]
    finish: Callable[[Sequence[memoryview]], Any]
    outputs: Sequence[memoryview] | None = None
    turn: Turn | None = None

    @property
    def key(self) -> BatchKey | None:
        """What it shares with those that it may be computed with."""
        return None if self.outputs is not None else self.schedule.key

    @property
    def gathered(self) -> bool:
        """Whether it is computed in memory that it shares, even alone: on a CPU that would be a copy for nothing."""
        return self.key is not None and self.schedule.device.type != "cpu"

    @property
    def nbytes(self) -> int:
        """Of inputs and outputs."""
        return self.schedule.nbytes

    @property
    def seconds(self) -> float:
        """How long it takes, by estimate."""
        return self.schedule.seconds

    def record_duration(self, seconds: float) -> None:
        """Learn how long it took."""
        self.schedule.record_duration(seconds)


class Engine:
    """A device, and what computes on it: whoever asks, with torch at one thread of its own."""

    def __init__(self, device: str, threads: int) -> None:
        """Make an engine.

        Args:
            device: "auto", or torch's name for one.
            threads: Executions at a time, which is for its caller to see to.

        Raises:
            ValueError: There is no such device here.

        """
        self.device = resolve_device(device)
        self.threads = threads
        self.slots: Slots | None = None
        self.observer: Observer | None = None
        # A request is computed by the thread that asks: handing it to another would take longer than a small one's
        # computing does. A large one is shared with threads whose slots are free. Helpers wait for nobody, so that
        # calls can't wait for each other in a ring.
        self._helpers = ThreadPoolExecutor(max(1, threads - 1), "poolrpc-helper", _prepare_thread)
        self.lanes = DeviceStreams(self.device, threads)
        self._buffers = Buffers(IDLE_BYTES, self.lanes.memory)
        self._batch = lru_cache(BATCHES)(self._schedule_batch)
        self._local = local()

    def schedule(self, request: Request, spatial_dims: int, results: Sequence[BranchResult]) -> Schedule:
        """Say how a request is to be computed, which says what work it is."""
        device = self._device_for(request.input.dtype)
        return Schedule(request, spatial_dims, results, device, self._share)

    def run(self, schedule: Schedule, payload: Bytes, finish: Callable[[Sequence[memoryview]], Any]) -> Run:
        """Give what runs a request.

        Args:
            schedule: How to run it.
            payload: The bytes of its tensors, in order.
            finish: Called with the outputs' bytes, whose memory is used again afterwards; what it gives is the answer.

        Raises:
            InvalidArgumentError: The payload is of another length.

        """
        one = len(schedule.inputs) == 1 and len(payload) == schedule.input_bytes
        return Run(schedule, (payload,) if one else split(payload, schedule.inputs), finish)

    def run_in_place(self, schedule: Schedule, inputs: Sequence[memoryview], outputs: Sequence[memoryview]) -> Run:
        """Give what runs a request whose tensors' bytes, and the places of its outputs', are where the caller says.

        Each is at a multiple of its items' size, and the outputs are apart from the inputs.
        """
        return Run(schedule, inputs, _nothing, outputs)

    def execute(self, runs: Sequence[Run]) -> list[Any]:
        """Compute a run, or several of one key at once, and give their answers.

        Raises:
            InvalidArgumentError: MaxUnpool's indices are out of range, in one of them.
            LimitExceededError: The device has no memory for them.

        """
        if not hasattr(self._local, "prepared"):
            _prepare_thread()
            self._local.prepared = True
        turns = [run.turn for run in runs if run.turn is not None]
        for turn in turns:
            turn.begin(len(runs), sum(run.schedule.planes for run in runs))
        started = time.perf_counter()
        with self.lanes.lane():
            answers = self._together(runs) if len(runs) > 1 or runs[0].gathered else [self._alone(runs[0])]
        seconds = time.perf_counter() - started
        if self.observer is not None:
            planes, nbytes = (sum(getattr(run.schedule, name) for run in runs) for name in ("planes", "nbytes"))
            self.observer.executed(len(runs), planes, nbytes, seconds)
        return answers

    def close(self) -> None:
        """End the helpers' threads."""
        self._helpers.shutdown()

    def _alone(self, run: Run) -> Any:  # noqa: ANN401 - what the run's finish gives
        schedule = run.schedule
        if run.outputs is not None:
            return run.finish(Stage(schedule, run.inputs, run.outputs).run(in_place=True))
        if schedule.small:
            with self._staged(schedule) as stage:
                for place, data in zip(stage.inputs, run.inputs, strict=True):
                    place[:] = data
                return run.finish(stage.run(in_place=False))
        with self._buffers.lend(schedule.outputs) as outputs:
            return run.finish(Stage(schedule, run.inputs, outputs).run(in_place=False))

    def _together(self, runs: Sequence[Run]) -> list[Any]:
        alike = runs[0].key
        assert alike is not None  # noqa: S101 - those without are computed alone
        with self._staged(self._batch(alike, sum(run.schedule.planes for run in runs))) as stage:
            for number, place in enumerate(stage.inputs):
                end = 0
                for run in runs:
                    start, end = end, end + len(run.inputs[number])
                    place[start:end] = run.inputs[number]
            given = stage.run(in_place=False)
            for run in runs:
                if run.turn is not None:
                    run.turn.compute_ended()
            answers, starts = [], [0] * len(given)
            for run in runs:
                ends = [start + spec.nbytes for start, spec in zip(starts, run.schedule.outputs, strict=True)]
                parts = [whole[start:end] for whole, start, end in zip(given, starts, ends, strict=True)]
                answers.append(run.finish(parts))
                starts = ends
        return answers

    @contextmanager
    def _staged(self, schedule: Schedule) -> Iterator[Stage]:
        """Give memory for a request's tensors that nobody else uses, for as long as the context lasts."""
        if not schedule.small:
            with self._buffers.lend(schedule.inputs) as inputs, self._buffers.lend(schedule.outputs) as outputs:
                yield Stage(schedule, inputs, outputs)
            return
        try:
            stage = schedule.stages.pop()
        except IndexError:  # none, or another call's by now
            stage = schedule.own_stage()
        yield stage
        # What a failure leaves behind isn't used again.
        if len(schedule.stages) < self.threads:
            schedule.stages.append(stage)

    def _schedule_batch(self, alike: BatchKey, planes: int) -> Schedule:
        one, dims = alike.plane, alike.spatial_dims
        request = block_of(one, Planes(one.input, dims), planes, 0)
        return Schedule(request, dims, request.results(), alike.device, self._share, BATCH_BYTES)

    def _share(self, part: Callable[[int, int], None], planes: int, nbytes: int) -> None:
        most = min(self.threads, planes) - 1
        free = self.slots.borrow(most) if self.slots is not None and most > 0 and nbytes >= SHARED_BYTES else 0
        try:
            ends = [planes * i // (free + 1) for i in range(free + 2)]
            futures = [self._helpers.submit(part, start, stop) for start, stop in pairwise(ends[1:])]
            try:
                part(ends[0], ends[1])
            finally:
                wait(futures)
            for future in futures:
                future.result()
        finally:
            if free and self.slots is not None:
                self.slots.give_back(free)

    def _device_for(self, dtype: str) -> torch.device:
        # CUDA has no max of integers, and Metal no float64: these are computed beside it, so that dtypes don't depend
        # on the device.
        if dtype in INTEGERS or (dtype == "float64" and self.device.type == "mps"):
            return torch.device("cpu")
        return self.device


class Schedule:
    """How a request is computed: a plan for each layer. Made once, and run any number of times.

    Attributes:
        inputs: The tensors of its payload.
        input_bytes: The payload's.
        outputs: Those of its answer.
        work: The cells that its kernels visit.
        nbytes: Of inputs and outputs.
        planes: How many it has; images, where channels are last.
        key: What requests that may be computed together have in common. None: this one is computed alone.
        seconds: How long it takes, by estimate, and by what it took.
        small: Whether it has stages of its own.
        stages: Those that nobody uses.

    """

    def __init__(  # noqa: PLR0913, PLR0917 - what it is made of; made in two places of this file
        self,
        request: Request,
        spatial_dims: int,
        results: Sequence[BranchResult],
        device: torch.device,
        share: kernels.Share,
        small: int = SMALL_BYTES,
    ) -> None:
        self.request = request
        self.spatial_dims = spatial_dims
        self.results = results
        self.device = device
        self.share = share
        self.inputs = request.specs
        self.input_bytes = sum(spec.nbytes for spec in self.inputs)
        self.outputs = tensors(results)
        self.nbytes = self.input_bytes + sum(spec.nbytes for spec in self.outputs)
        self.planes = Planes(request.input, spatial_dims).count
        self.small = device.type == "cpu" and self.nbytes <= small
        self.stages: list[Stage] = []
        self.work = 0
        self.plans: list[list[kernels.Plan]] = []
        if request.input.numel:  # else there are no planes, and perhaps axes that no tensor of torch's could have
            channels = request.input.shape[-1] if request.input.layout == "NHWC" else None
            dtype: torch.dtype = getattr(torch, request.input.dtype)
            for chain in steps(request, spatial_dims, results):
                self.plans.append([])
                for layer, spec, plane in chain:
                    plan = kernels.plan(layer, dtype, plane, channels, device.type)
                    self.work += plan.work(spec.numel // prod(plan.memory))
                    self.plans[-1].append(plan)
        self.key = self._key()
        self.seconds = CALL_SECONDS + CELL_SECONDS * self.work

    def record_duration(self, seconds: float) -> None:
        """Learn how long it took."""
        self.seconds += (seconds - self.seconds) / 4

    def _key(self) -> BatchKey | None:
        request = self.request
        alike = all(layer.splits and layer.at_plane(1) is layer for chain in request.branches for layer in chain)
        if not (self.plans and alike and self.nbytes <= GATHERED_BYTES[self.device.type == "cpu"]):
            return None
        return _alike(block_of(request, Planes(request.input, self.spatial_dims), 1, 0), self.spatial_dims, self.device)

    def own_stage(self) -> Stage:
        """Make a stage with memory of its own."""
        inputs, outputs = ([aligned(spec.nbytes) for spec in specs] for specs in (self.inputs, self.outputs))
        return Stage(self, inputs, outputs, stays=True)


@dataclass(frozen=True, slots=True, eq=False)
class BatchKey:
    """What requests that may be computed together are, but for their number of planes; one object for all of them."""

    plane: Request
    spatial_dims: int
    device: torch.device


_alike = lru_cache(4096)(BatchKey)


class Stage:
    """Memory for a request's tensors, as torch sees it.

    Attributes:
        inputs: Where the bytes of its tensors are.
        outputs: Where those of its outputs go.

    """

    def __init__(
        self, schedule: Schedule, inputs: Sequence[Any], outputs: Sequence[memoryview], *, stays: bool = False
    ) -> None:
        """Make one; it `stays` where it is to be run often."""
        self.inputs, self.outputs = inputs, outputs
        self._schedule = schedule
        self._bound: Callable[[], None] | None = None
        if schedule.plans:
            self._x = self._tensor(inputs[0], schedule.inputs[0])
            goals = iter(self._tensor(*each) for each in zip(outputs, schedule.outputs, strict=True))
            self._goals = [[next(goals) for _ in result.specs] for result in schedule.results]
            # One layer alone: what a chain hands on has no place that stays.
            if stays and [len(plans) for plans in schedule.plans] == [1] and schedule.device.type == "cpu":
                self._bound = schedule.plans[0][0].bind(self._x, self._goals[0][0])

    def run(self, *, in_place: bool) -> Sequence[memoryview]:
        """Compute the outputs and give their bytes, where they go or, where not `in_place`, where torch put them."""
        if self._bound is not None:
            self._bound()
            return self.outputs
        schedule = self._schedule
        if not schedule.plans:
            return self.outputs
        device, x = schedule.device, self._x
        on_cpu = device.type == "cpu"
        if not on_cpu:
            x = x.to(device, non_blocking=True)
        indices = self._indices().to(device) if len(self.inputs) > 1 else None
        given: list[memoryview] = []
        for plans, goals in zip(schedule.plans, self._goals, strict=True):
            output, places = x, indices
            for plan in plans[:-1]:
                output, places = plan.compute(output, places, schedule.share)
            made = plans[-1].compute(output, places, schedule.share, *(goals if on_cpu else ()))
            for goal, part in zip(goals, made, strict=False):
                place = self.outputs[len(given)]
                if part is goal or part is None:
                    given.append(place)
                elif in_place or not on_cpu or part.dtype == torch.bfloat16 or not part.is_contiguous():
                    goal.copy_(part, non_blocking=True)
                    given.append(place)
                else:
                    given.append(part.numpy().reshape(-1).view(np.uint8).data)
        settle(device)
        return given

    def _tensor(self, data: Bytes, spec: TensorSpec) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, spec.dtype)
        memory = np.asarray(_Memory(data))
        if memory.ctypes.data % dtype.itemsize:  # Code that is vectorised by a compiler may fail on such an address.
            memory = memory.copy()
        return self._batched(torch.frombuffer(memory, dtype=dtype).reshape(spec.shape))

    def _indices(self) -> torch.Tensor:
        # A copy, so that what is checked is what is used, and aligned, whatever lies before it in the payload.
        schedule = self._schedule
        indices = np.frombuffer(self.inputs[1], "<i8").copy()
        check_indices(indices, schedule.request, schedule.spatial_dims, schedule.results)
        return self._batched(torch.from_numpy(indices).reshape(schedule.request.input.shape))

    def _batched(self, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(0) if x.ndim == self._schedule.spatial_dims + 1 else x


def _prepare_thread() -> None:
    # Two OpenMP threads on a busy two-core box were seen to stall a hundredfold; and nothing here has a gradient.
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def _nothing(_: Sequence[memoryview]) -> None:
    """Make no answer: the outputs are where they should be."""


class _Memory:
    """A read-only buffer, offered to NumPy as writable: torch asks for that, and the engine never writes to inputs."""

    def __init__(self, data: Bytes) -> None:
        address = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        self._data = data  # Kept for as long as an array looks at it.
        self.__array_interface__ = {"version": 3, "shape": (len(data),), "typestr": "|u1", "data": (address, False)}
