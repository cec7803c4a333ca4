"""Schedules: how a request is computed, determined once for all requests that differ only in their tensors' bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import TYPE_CHECKING

import torch

from poolrpc._wire.codec import payload_specs
from poolrpc.chains import Planes, period
from poolrpc_server.compute.box_branch import BoxBranch
from poolrpc_server.compute.branch import Branch
from poolrpc_server.compute.kernels import plan_for
from poolrpc_server.compute.kernels.eager import INDEX_BYTES, depends_on_size
from poolrpc_server.compute.kernels.integer_average import fuse
from poolrpc_server.compute.planes import batch_of, planes_of_image, steps
from poolrpc_server.compute.with_operand import WHOLE_OPERANDS, WithOperand

if TYPE_CHECKING:
    from collections.abc import Sequence

    from poolrpc._wire.codec import BranchResult, Request
    from poolrpc_server.compute.workspace import Workspace

WORKSPACE_BYTES, EAGER_WORKSPACE_BYTES = 4 * 2**20, 64 * 2**10
"""The largest input of a request that gets a cached workspace: copying it there takes less time than creating a program
and its views. The second is for requests that torch's operators compute without a program."""

CPU_BATCHED_BYTES, DEVICE_BATCHED_BYTES = 256 * 2**10, 8 * 2**20
"""The largest request, outputs included, that shares a batch. On the CPU, copying larger ones together costs more than
one kernel call saves; on another device they are copied in any case."""

OPERAND_COPIES = 6
"""The most copies of an operand, of its own size, while it is checked and used."""

BATCH_KEYS, BATCHED_LAYERS = 1024, 16
"""The number of batch keys to remember, and the most layers of a request that has one: a key holds all of them."""

CALL_SECONDS, LAYER_SECONDS, WORK_SECONDS = 30e-6, 25e-6, 1e-9
"""The duration estimated before the first execution: for a request, each of its layers, and each unit of its work."""

CACHED_CALL_SECONDS, CACHED_LAYER_SECONDS = 8e-6, 5e-6
"""The first two for a request with a cached workspace, in which all views and programs are made already."""


@dataclass(frozen=True, slots=True, eq=False)
class BatchKey:
    """The properties that requests of a batch share: all but the numbers of planes and of boxes.

    Equal keys are the same object.
    """

    plane: Request
    spatial_dims: int
    device: torch.device


_batch_key = lru_cache(BATCH_KEYS)(BatchKey)


class Schedule:
    """How a request is computed.

    Attributes:
        inputs: The specs of the tensors in the payload.
        input_bytes: The size of the payload.
        outputs: The specs of the output tensors.
        nbytes: The size of inputs and outputs.
        planes: The number of planes; of images, if channels are last.
        branches: How each branch is computed; empty if the input has no cells.
        whole: Whether a single operator of torch computes each branch at once, on the CPU.
        divisible: Whether the planes have the same outputs, bit for bit, if they are computed in blocks.
        work: The number of cells that the kernels visit, each weighted by what it costs in nanoseconds of one thread.
        scratch_bytes: An upper bound of the memory that an execution takes, on all of its threads, in addition to its
            inputs and outputs.
        whole_operand: Whether there is an operand of another shape than the input's, which all blocks of planes share.
        boxes: The number of boxes.
        key: The key of the requests that may be computed in one batch with this one. None: it is computed alone.
        seconds: The estimated duration, corrected by each execution.
        undisturbed_seconds: The same of executions that no other thread disturbs: the shortest one, nearly.
        cached: Whether its workspaces are kept for reuse.
        workspaces: The idle ones.

    """

    def __init__(  # noqa: PLR0913, PLR0917 - its parts; the engine alone creates schedules, in two places
        self,
        request: Request,
        spatial_dims: int,
        results: Sequence[BranchResult],
        device: torch.device,
        threads: int,
        workspace_bytes: int,
        max_work: float = inf,
    ) -> None:
        self.request = request
        self.spatial_dims = spatial_dims
        self.results = results
        self.device = device
        self.inputs = request.specs
        self.input_bytes = sum(spec.nbytes for spec in self.inputs)
        self.outputs = payload_specs(results)
        self.nbytes = self.input_bytes + sum(spec.nbytes for spec in self.outputs)
        self.planes = Planes(request.input, spatial_dims).count
        self.whole_operand = request.operand is not None and request.operand_name in WHOLE_OPERANDS
        self.boxes = self.inputs[1].shape[0] if self.whole_operand and request.operand_name == "boxes" else 0
        self.cached = device.type == "cpu" and self.input_bytes <= min(WORKSPACE_BYTES, workspace_bytes)
        self.cached &= not self.whole_operand
        self.workspaces: list[Workspace] = []
        self.branches: list[Branch] = []
        if request.input.numel:  # An empty tensor has no planes, and may have axes longer than torch allows.
            channels = request.input.shape[-1] if request.input.layout == "NHWC" else None
            for chain, (_, numbers) in zip(steps(request, spatial_dims, results), request.returned(), strict=True):
                fused, outputs = fuse(tuple(chain), numbers, device.type)
                plans = [
                    plan_for(layer, getattr(torch, spec.dtype), plane, channels, device.type)
                    for layer, spec, plane in fused
                ]
                if isinstance(plans[0].layer, WithOperand) and plans[0].layer.operand == "boxes":
                    self.branches.append(BoxBranch(plans, self.planes, outputs, max_work))
                else:
                    self.branches.append(Branch(plans, self.planes, threads, outputs, bound=self.cached))
        self.work = sum(branch.work for branch in self.branches)
        every = [layer for chain in request.branches for layer in chain]
        independent = device.type == "cpu" or not any(map(depends_on_size, every))
        self.divisible = independent and all(layer.splittable for layer in every)
        # Images are not divided among their boxes, but other images with their boxes may follow.
        independent &= all(layer.splittable or layer.operand == "boxes" for layer in every)
        self.key = self._key() if independent else None
        self.scratch_bytes = max((branch.scratch_bytes for branch in self.branches), default=0)
        if self.whole_operand:  # its copy, what is computed from it, and the positions of the cells of segments
            self.scratch_bytes += OPERAND_COPIES * self.inputs[1].nbytes
            self.scratch_bytes += 2 * INDEX_BYTES * sum(request.input.shape[1:]) * (request.operand_name == "offsets")
        for branch, (_, returned) in zip(self.branches, request.by_branch(results), strict=False):
            if branch.whole or device.type != "cpu":  # its outputs stay where torch allocated them
                self.scratch_bytes += sum(spec.nbytes for result in returned for spec in result.specs)
        # A program for one thread can't be divided among several.
        self.cached &= all(branch.threads == 1 for branch in self.branches)
        self.cached &= self.nbytes + self.scratch_bytes <= workspace_bytes
        self.whole = bool(self.branches) and all(branch.whole for branch in self.branches)
        if self.whole:
            self.cached &= self.input_bytes <= EAGER_WORKSPACE_BYTES
        if self.key is not None or self.cached:  # Inputs and outputs are copied, for a batch or a cached workspace.
            self.scratch_bytes += self.nbytes
        layers = sum(len(branch.steps) for branch in self.branches)
        call, layer = (CACHED_CALL_SECONDS, CACHED_LAYER_SECONDS) if self.cached else (CALL_SECONDS, LAYER_SECONDS)
        self.seconds = self.undisturbed_seconds = call + layer * layers + WORK_SECONDS * self.work

    def record_duration(self, seconds: float) -> None:
        """Correct the estimate by the duration of an execution."""
        self.seconds += (seconds - self.seconds) / 4
        self.undisturbed_seconds = min(seconds, self.undisturbed_seconds + (seconds - self.undisturbed_seconds) / 16)

    def _key(self) -> BatchKey | None:
        request, dims = self.request, self.spatial_dims
        repeats = period(request.branches)
        channels = request.input.shape[-1] if request.input.layout == "NHWC" else 1
        name, unit = request.operand_name, 1
        if name in {"weights", "boxes"}:  # the weights of the next request, and its images, begin with an image
            unit = request.channels or planes_of_image(request.input, dims)
        # The planes of the next request follow: they must begin where the layers' period begins.
        period_planes = unit if name == "boxes" else self.planes
        independent = repeats and period_planes * channels % repeats == 0
        independent = independent and self.planes % unit == request.start == 0
        on_cpu = self.device.type == "cpu"
        limit = CPU_BATCHED_BYTES if on_cpu else DEVICE_BATCHED_BYTES
        layers = sum(len(branch.steps) for branch in self.branches)
        if not (1 <= layers <= BATCHED_LAYERS and independent and self.nbytes <= limit):
            return None
        return _batch_key(batch_of(request, Planes(request.input, dims), unit, 1), dims, self.device)
