"""Max pooling without indices of a few cells, by NumPy.

torch's operators let go of the interpreter and reach through much code: where a call has just come, and nothing of that
is in the CPU's caches, tens of microseconds for a handful of cells. NumPy takes a few.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from poolrpc_server.compute.kernels.separable_max import lowest
from poolrpc_server.compute.kernels.windows import within

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc_server.compute.kernels.windows import Windows

DTYPES = (torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def bind(windows: Windows, x: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
    """Give what pools the planes of x (P, *plane) into out (P, *output_plane), whenever it is called.

    What is looked at, and where, is settled once; both stay where they are.
    """
    source, target = x.numpy(), out.numpy()
    taps = []
    for places in product(*map(range, windows.kernel)):
        read, write = [slice(None)], [slice(None)]
        for axis, place in enumerate(places):
            stride = windows.stride[axis]
            offset = place * windows.dilation[axis] - windows.padding[axis]
            first, last = within(offset, stride, x.shape[axis + 1], out.shape[axis + 1])
            if first >= last:  # in the padding, for every window
                break
            read.append(slice(first * stride + offset, (last - 1) * stride + offset + 1, stride))
            write.append(slice(first, last))
        else:
            taps.append((source[tuple(read)], target[tuple(write)]))
    if len(taps) > 1 and all(goal.size == target.size for _, goal in taps):
        one, two, *rest = [read for read, _ in taps]
        fill, calls = None, [(one, two, target), *((read, target, target) for read in rest)]
    else:
        fill, calls = lowest(x.dtype), [(read, goal, goal) for read, goal in taps]

    def run() -> None:
        if fill is not None:
            target.fill(fill)
        for one, two, goal in calls:
            np.maximum(one, two, out=goal)

    return run
