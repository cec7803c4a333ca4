"""Branches whose first layer pools boxes: the rows of their outputs are boxes, not images."""

from __future__ import annotations

from math import inf, prod
from typing import TYPE_CHECKING, Any

import torch

from poolrpc.errors import LimitExceededError
from poolrpc_server.compute.branch import Branch
from poolrpc_server.compute.kernels.padded import sum_dtype
from poolrpc_server.compute.kernels.regions import TABLE_BYTES, bind_regions, regions_work

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc_server.compute.kernels import Plan


class BoxBranch(Branch):
    """How a chain that begins with regions of interest is computed: all boxes, then each layer on all of their bins.

    Args:
        plans: The plan of each layer.
        planes: The number of planes of the input; of images, if channels are last.
        outputs: The numbers of the layers whose outputs are returned, with the last layer.
        max_work: The most work of its boxes, in nanoseconds of one thread, which depends on their sizes.

    """

    def __init__(self, plans: Sequence[Plan], planes: int, outputs: Sequence[int], max_work: float = inf) -> None:
        first = plans[0]
        layer = first.layer
        boxes, channels = layer.size, layer.channels
        self.outputs = tuple(outputs) or (len(plans) - 1,)
        self.planes = self.block = planes
        self.steps = [(plan, None) for plan in plans]
        self._max_work = max_work
        # The planes of the bins; of boxes, if channels are last.
        self._binned = boxes * channels if first.channels is None else boxes
        self.work = boxes * channels * int(layer.work(first.plane))
        # A step has no estimate but that of its kernel, whose arithmetic is that of the operator.
        self.work += sum(plan.work(plan.choose(max(1, self._binned)), self._binned) for plan in plans[1:])
        self.threads, self.whole = 1, True
        wide = sum_dtype(first.dtype).itemsize
        images = planes * first.cells * (wide + first.dtype.itemsize)
        bins = self._binned * prod(first.result_shape) * (2 * wide + first.dtype.itemsize)
        later = sum(plan.eager_scratch(self._binned) for plan in plans[1:])
        self.scratch_bytes = images + bins + later + TABLE_BYTES

    def compute_whole(
        self, x: torch.Tensor, operand: torch.Tensor, check: Callable[[], None] | None
    ) -> Sequence[torch.Tensor]:
        """Compute all boxes, as Branch.compute_whole does; with several outputs, in order.

        Raises:
            LimitExceededError: The boxes are too much work.

        """
        return [tensor for each in self.compute_on_device(x, operand, 0, check) for tensor in each]

    def compute_on_device(
        self,
        x: torch.Tensor,
        operand: Any,  # noqa: ANN401 - the boxes
        first: int,  # noqa: ARG002 - all planes are computed at once
        check: Callable[[], None] | None = None,
    ) -> list[Sequence[torch.Tensor]]:
        """Compute all boxes on the device of the input, as Branch.compute_on_device does.

        Raises:
            LimitExceededError: The boxes are too much work.

        """
        plan = self.steps[0][0]
        layer = plan.layer
        images = x.reshape(-1, layer.channels, *plan.plane) if plan.channels is None else x.movedim(-1, 1)
        self._check_work(layer.layer, images.shape, operand, plan.dtype)
        shape = (layer.size, layer.channels, *plan.output_plane)
        binned, done = torch.empty(shape, dtype=plan.dtype, device=x.device), 0
        for part in bind_regions(layer.layer, plan.dtype)(images, operand):
            if check is not None:
                check()
            binned[done : done + len(part)] = part
            done += len(part)
        x = binned.view(1, -1, *plan.output_plane) if plan.channels is None else binned.movedim(1, -1).contiguous()
        results: list[Sequence[torch.Tensor]] = [(x,)] if 0 in self.outputs else []
        for number, (plan, _) in enumerate(self.steps[1:], 1):
            if check is not None:
                check()
            chosen = None
            if self._binned:
                x, chosen = plan.eager(x, None, 0, self._binned * (plan.channels or 1))
            else:  # torch's operators reject some empty tensors
                x = x.new_empty(
                    (*x.shape[: 2 if plan.channels is None else 1], *plan.result_shape), dtype=plan.output_dtype
                )
                chosen = torch.empty_like(x, dtype=torch.int64) if plan.layer.returns_indices else None
            if number in self.outputs:
                results.append((x,) if chosen is None else (x, chosen))
        return results

    def _check_work(self, layer: Any, shape: Sequence[int], boxes: torch.Tensor, dtype: torch.dtype) -> None:  # noqa: ANN401 - a layer
        if self._max_work == inf or not len(boxes):
            return
        work = regions_work(layer, shape, boxes, dtype)
        if work > self._max_work:
            msg = (
                f"expected at most {self._max_work} cells to visit in all boxes, weighted by their cost, got {work:.0f}"
            )
            limits = {"limit": str(self._max_work), "actual": f"{work:.0f}"}
            raise LimitExceededError(msg, reason="WORK_BUDGET", metadata=limits)
