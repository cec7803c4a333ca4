"""Max pooling without indices of a few cells, by NumPy.

torch's operators let go of the interpreter and reach through much code: where a call has just come, and nothing of that
is in the CPU's caches, tens of microseconds for a handful of cells. NumPy takes a few.
"""

from __future__ import annotations

from itertools import product
from math import inf, prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc_server.kernels.windows import Windows

DTYPES = (torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

MOST_CELLS = 2048
"""Cells of windows, counted in each window that they are in, of all planes together."""

MOST_TAPS = 16
"""Cells of a window: each is a call of NumPy's."""


def bind(windows: Windows, x: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> Callable[[], None]:
    """Give what pools the planes of x (P, *plane) into out (P, *output_plane), whenever it is called.

    What is looked at, and where, is settled once; both arrays stay where they are.
    """
    lead = (slice(None),)
    taps = []
    for places in product(*map(range, windows.kernel)):
        reads, writes = [], []
        for axis, place in enumerate(places):
            stride = windows.stride[axis]
            offset = place * windows.dilation[axis] - windows.padding[axis]
            first = max(0, -(offset // stride))
            last = min(out.shape[axis + 1], (x.shape[axis + 1] - 1 - offset) // stride + 1)
            writes.append(slice(first, max(first, last)))
            reads.append(slice(first * stride + offset, max(0, last - 1) * stride + offset + 1, stride))
        goal = out[(*lead, *writes)]
        if goal.size:
            taps.append((x[(*lead, *reads)], goal))
    whole = [read for read, goal in taps if goal.size == out.size]
    if len(whole) == len(taps) > 1:
        rest = [(read, out, out) for read in whole[2:]]
        calls, lowest = [(whole[0], whole[1], out), *rest], None
    else:
        calls = [(read, goal, goal) for read, goal in taps]
        lowest = np.iinfo(out.dtype).min if out.dtype.kind in "iu" else -inf
    maximum = np.maximum

    def run() -> None:
        if lowest is not None:
            out.fill(lowest)
        for one, two, goal in calls:
            maximum(one, two, out=goal)

    return run


def pays(windows: Windows, outputs: int) -> bool:
    """Tell whether it beats torch."""
    taps = prod(windows.kernel)
    return taps <= MOST_TAPS and taps * outputs <= MOST_CELLS
