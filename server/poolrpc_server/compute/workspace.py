"""Workspaces: the memory that holds the tensors of one execution, and the cache that keeps idle ones for reuse."""

from __future__ import annotations

import threading
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from poolrpc_server.compute.buffers import aligned
from poolrpc_server.compute.device import synchronize
from poolrpc_server.compute.planes import check_indices

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc.tensors import Bytes, TensorSpec
    from poolrpc_server.compute.schedule import Schedule

OVERHEAD_BYTES = 4096
"""Memory that a workspace takes in addition to its tensors' bytes: Python's, NumPy's and torch's objects for them."""

KEPT_SHARE = 0.75
"""The share of its limit that the cache keeps when it drops workspaces, so that it doesn't sort them on every miss."""


class Workspace:
    """Memory for the input and output tensors of one execution, with torch's views of it.

    Attributes:
        schedule: The schedule that it is for.
        inputs: The bytes of each input tensor.
        outputs: The bytes of each output tensor.
        last_used: A number that grows with every use of any workspace of the cache.

    """

    def __init__(
        self, schedule: Schedule, inputs: Sequence[Any], outputs: Sequence[memoryview], *, reused: bool = False
    ) -> None:
        """Create a workspace.

        Args:
            schedule: The schedule that it is for.
            inputs: The bytes of each input tensor.
            outputs: The bytes of each output tensor.
            reused: Whether it will run many times, so that a kernel should be bound to its memory.

        """
        self.schedule, self.inputs, self.outputs = schedule, inputs, outputs
        self.last_used = 0
        self._bound: Callable[[], None] | None = None
        if schedule.plans:
            self._x = self._tensor(inputs[0], schedule.inputs[0])
            targets = iter(self._tensor(*output) for output in zip(outputs, schedule.outputs, strict=True))
            self._targets = [[next(targets) for _ in result.specs] for result in schedule.results]
            # Only a single layer can be bound: a chain's intermediate tensors have no fixed memory.
            if reused and [len(plans) for plans in schedule.plans] == [1] and schedule.device.type == "cpu":
                self._bound = schedule.plans[0][0].bind(self._x, self._targets[0][0])

    @property
    def nbytes(self) -> int:
        """The memory that the workspace takes, in bytes."""
        return self.schedule.nbytes + OVERHEAD_BYTES

    def run(self, *, in_place: bool) -> Sequence[memoryview]:
        """Compute the outputs.

        Args:
            in_place: Whether every output must be written to `outputs`, rather than left where torch allocated it.

        Returns:
            The bytes of each output.

        """
        if self._bound is not None:
            self._bound()
            return self.outputs
        schedule = self.schedule
        if not schedule.plans:
            return self.outputs
        device, x = schedule.device, self._x
        on_cpu = device.type == "cpu"
        if not on_cpu:
            x = x.to(device, non_blocking=True)
        input_indices = self._indices().to(device) if len(self.inputs) > 1 else None
        outputs: list[memoryview] = []
        for plans, targets in zip(schedule.plans, self._targets, strict=True):
            output, indices = x, input_indices
            for plan in plans[:-1]:
                output, indices = plan.compute(output, indices, schedule.parallel_for)
            results = plans[-1].compute(output, indices, schedule.parallel_for, *(targets if on_cpu else ()))
            for target, result in zip(targets, results, strict=False):
                buffer = self.outputs[len(outputs)]
                if result is target or result is None:
                    outputs.append(buffer)
                elif in_place or not on_cpu or result.dtype == torch.bfloat16 or not result.is_contiguous():
                    target.copy_(result, non_blocking=True)
                    outputs.append(buffer)
                else:
                    outputs.append(result.numpy().reshape(-1).view(np.uint8).data)
        synchronize(device)
        return outputs

    def _tensor(self, data: Bytes, spec: TensorSpec) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, spec.dtype)
        memory = np.asarray(_WritableView(data))
        if memory.ctypes.data % dtype.itemsize:  # Vectorised code may fail on an address that is not aligned.
            memory = memory.copy()
        return self._batched(torch.frombuffer(memory, dtype=dtype).reshape(spec.shape))

    def _indices(self) -> torch.Tensor:
        # A copy: a client that writes to shared memory can't change the indices after the check. It is also aligned,
        # whatever precedes the indices in the payload.
        schedule = self.schedule
        indices = np.frombuffer(self.inputs[1], "<i8").copy()
        check_indices(indices, schedule.request, schedule.spatial_dims, schedule.results)
        return self._batched(torch.from_numpy(indices).reshape(schedule.request.input.shape))

    def _batched(self, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(0) if x.ndim == self.schedule.spatial_dims + 1 else x


class WorkspaceCache:
    """Idle workspaces of all schedules, limited in bytes; the least recently used are dropped first.

    Creating a workspace for a small request takes longer than pooling it. `take` and `put` cost two list operations:
    only the creation of a workspace takes the lock.
    """

    def __init__(self, limit: int, per_schedule: int) -> None:
        """Create an empty cache.

        Args:
            limit: Bytes of all workspaces, in use or idle, above which idle ones are dropped.
            per_schedule: Idle workspaces to keep of one schedule.

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

    def take(self, schedule: Schedule) -> Workspace:
        """Return a workspace that no other thread uses until it is put back or discarded."""
        try:
            return schedule.workspaces.pop()
        except IndexError:  # none is idle, or another thread took the last one
            return self._create(schedule)

    def put(self, workspace: Workspace) -> None:
        """Keep a workspace for the next request of its schedule."""
        idle = workspace.schedule.workspaces
        if len(idle) < self._per_schedule and self._nbytes <= self._limit:
            workspace.last_used = next(self._uses)
            idle.append(workspace)
        else:
            self.discard(workspace)

    def discard(self, workspace: Workspace) -> None:
        """Drop a workspace that is in use."""
        with self._lock:
            self._drop(workspace)

    def clear(self) -> None:
        """Drop every idle workspace."""
        with self._lock:
            self._drop_oldest(0)

    def _create(self, schedule: Schedule) -> Workspace:
        inputs, outputs = ([aligned(spec.nbytes) for spec in specs] for specs in (schedule.inputs, schedule.outputs))
        workspace = Workspace(schedule, inputs, outputs, reused=True)
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
                workspace.schedule.workspaces.remove(workspace)
            except ValueError:  # in use
                continue
            self._drop(workspace)

    def _drop(self, workspace: Workspace) -> None:
        self._workspaces.remove(workspace)
        self._nbytes -= workspace.nbytes


class _WritableView:
    """A read-only buffer presented to NumPy as writable: torch requires that, and the engine never writes to inputs."""

    def __init__(self, data: Bytes) -> None:
        address = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        self._data = data  # Keeps the memory alive as long as an array views it.
        self.__array_interface__ = {"version": 3, "shape": (len(data),), "typestr": "|u1", "data": (address, False)}
