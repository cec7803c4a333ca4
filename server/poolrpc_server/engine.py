"""Where tensors are: the device, who computes on it, and the way from a request's bytes to its outputs' bytes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from math import prod
from threading import Semaphore, local
from typing import TYPE_CHECKING, Any, TypeVar

# Apple's GPUs lack some pooling kernels; torch computes these on the CPU where it was told so before it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import numpy as np
import torch

from poolrpc.codec import tensors
from poolrpc.layers import INTEGERS
from poolrpc.tensors import split
from poolrpc_server import kernels
from poolrpc_server.buffers import Buffers, aligned
from poolrpc_server.validate import check_indices, steps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc.codec import BranchResult, Request
    from poolrpc.tensors import Bytes, TensorSpec


T = TypeVar("T")

SMALL_BYTES = 16 * 2**10
"""A request of at most this, outputs included, has memory of its own, which torch has seen before: seeing takes longer
than pooling there."""

IDLE_BYTES = 128 * 2**20
"""Memory for outputs that is kept for the next calls."""

SHARED_BYTES = 20 * 2**20
"""A step that reads and writes at least this is shared among threads: below it, meeting costs more than it saves."""


class Engine:
    """A device, and so many seats: who computes has one, with torch at one thread of its own."""

    def __init__(self, device: str, threads: int) -> None:
        """Make an engine.

        Args:
            device: "auto", or torch's name for one.
            threads: Requests computed at a time.

        Raises:
            ValueError: There is no such device here.

        """
        self.device = resolve_device(device)
        self.threads = threads
        # A request is computed by the thread that asks, once it has a seat: handing it to another would take longer
        # than a small one's computing does. A large one is shared with threads whose seats are free. Helpers wait for
        # nobody, so that calls can't wait for each other in a ring.
        self._seats = Semaphore(threads)
        self._helpers = ThreadPoolExecutor(max(1, threads - 1), "poolrpc-helper", _prepare_thread)
        self._buffers = Buffers(IDLE_BYTES)
        self._local = local()

    def schedule(self, request: Request, spatial_dims: int, results: Sequence[BranchResult]) -> Schedule:
        """Say how a request is to be computed, which says what work it is."""
        device = self._device_for(request.input.dtype)
        return Schedule(request, spatial_dims, results, device, self._share)

    def run(
        self,
        schedule: Schedule,
        payload: Bytes,
        check_wanted: Callable[[], None],
        finish: Callable[[Sequence[memoryview]], T],
    ) -> T:
        """Run a request when a seat is free, and give what `finish` makes of its outputs.

        Args:
            schedule: How to run it.
            payload: The bytes of its tensors, in order.
            check_wanted: Called when its turn comes; raises where nobody waits any more.
            finish: Called with the outputs' bytes, whose memory is used again afterwards.

        Raises:
            InvalidArgumentError: The payload is of another length, or MaxUnpool's indices are out of range.
            PoolError: What check_wanted raised.

        """
        one = len(schedule.inputs) == 1 and len(payload) == schedule.input_bytes
        inputs = (payload,) if one else split(payload, schedule.inputs)
        if not schedule.small:
            with self._buffers.lend(schedule.outputs) as outputs:
                return finish(self._compute(Stage(schedule, inputs, outputs), check_wanted, in_place=False))
        try:
            stage = schedule.stages.pop()
        except IndexError:  # none, or another call's by now
            stage = schedule.own_stage()
        for place, data in zip(stage.inputs, inputs, strict=True):
            place[:] = data
        finished = finish(self._compute(stage, check_wanted, in_place=False))
        # What a failure leaves behind isn't used again.
        if len(schedule.stages) < self.threads:
            schedule.stages.append(stage)
        return finished

    def run_in_place(
        self,
        schedule: Schedule,
        inputs: Sequence[memoryview],
        outputs: Sequence[memoryview],
        check_wanted: Callable[[], None],
    ) -> None:
        """Run a request whose tensors' bytes, and the places of its outputs', are where the caller says.

        Each is at a multiple of its items' size, and the outputs are apart from the inputs; the rest is as in run.
        """
        self._compute(Stage(schedule, inputs, outputs), check_wanted, in_place=True)

    def close(self) -> None:
        """End the helpers' threads."""
        self._helpers.shutdown()

    def _compute(self, stage: Stage, check_wanted: Callable[[], None], *, in_place: bool) -> Sequence[memoryview]:
        with self._seats:
            check_wanted()
            if not hasattr(self._local, "prepared"):
                _prepare_thread()
                self._local.prepared = True
            return stage.run(in_place=in_place)

    def _share(self, part: Callable[[int, int], None], planes: int, nbytes: int) -> None:
        free = 0
        while nbytes >= SHARED_BYTES and free + 1 < min(self.threads, planes) and self._seats.acquire(blocking=False):
            free += 1
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
            for _ in range(free):
                self._seats.release()

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
        small: Whether it has stages of its own.
        stages: Those that nobody uses.

    """

    def __init__(
        self,
        request: Request,
        spatial_dims: int,
        results: Sequence[BranchResult],
        device: torch.device,
        share: kernels.Share,
    ) -> None:
        self.request = request
        self.spatial_dims = spatial_dims
        self.results = results
        self.device = device
        self.share = share
        self.inputs = request.specs
        self.input_bytes = sum(spec.nbytes for spec in self.inputs)
        self.outputs = tensors(results)
        self.small = self.input_bytes + sum(spec.nbytes for spec in self.outputs) <= SMALL_BYTES
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

    def own_stage(self) -> Stage:
        """Make a stage with memory of its own."""
        inputs, outputs = ([aligned(spec.nbytes) for spec in specs] for specs in (self.inputs, self.outputs))
        return Stage(self, inputs, outputs)


class Stage:
    """Memory for a request's tensors, as torch sees it.

    Attributes:
        inputs: Where the bytes of its tensors are.
        outputs: Where those of its outputs go.

    """

    def __init__(self, schedule: Schedule, inputs: Sequence[Any], outputs: Sequence[memoryview]) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._schedule = schedule
        if schedule.plans:
            self._x = self._tensor(inputs[0], schedule.inputs[0])
            goals = iter(self._tensor(*each) for each in zip(outputs, schedule.outputs, strict=True))
            self._goals = [[next(goals) for _ in result.specs] for result in schedule.results]

    def run(self, *, in_place: bool) -> Sequence[memoryview]:
        """Compute the outputs and give their bytes, where they go or, where not `in_place`, where torch put them."""
        schedule = self._schedule
        if not schedule.plans:
            return self.outputs
        device, x = schedule.device, self._x
        on_cpu = device.type == "cpu"
        if not on_cpu:
            x = x.to(device)
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
                    goal.copy_(part)
                    given.append(place)
                else:
                    given.append(part.numpy().reshape(-1).view(np.uint8).data)
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


def resolve_device(name: str) -> torch.device:
    """Give the device of that name; "auto" is the first of cuda, mps and cpu that there is.

    Raises:
        ValueError: There is no such device here.

    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        msg = f"device: expected auto or a device of this machine as torch names it, got {name!r}: {reason}"
        raise ValueError(msg) from None
    return torch.empty(0, device=device).device


class _Memory:
    """A read-only buffer, offered to NumPy as writable: torch asks for that, and the engine never writes to inputs."""

    def __init__(self, data: Bytes) -> None:
        address = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        self._data = data  # Kept for as long as an array looks at it.
        self.__array_interface__ = {"version": 3, "shape": (len(data),), "typestr": "|u1", "data": (address, False)}
