"""Means of the rows of pages' patches, as of ColPali's vectors, through `map` on a unix socket.

1,000 pages of (128, 1030) bfloat16, with 38 segments each: 32 rows of 32 patches, and 6 more tokens. `GlobalPool1d` is
the mean of the whole page by the same path, and so what the path alone allows; `torch` is torch.segment_reduce of one
page after the other in this process, in float32 on one thread, `numpy` np.add.reduceat. Rows have gigabytes per second
of the wall clock, and of the CPU time of the busier of client and server: what they would reach with a core each.
"""

from __future__ import annotations

import tempfile
import time
from itertools import repeat
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import psutil
import torch

from benchmarks.rounds import interleave, row
from poolrpc import GlobalPool1d, PoolClient, SegmentPool
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGES, DISTINCT, SHAPE = 1000, 50, (128, 1030)
OFFSETS = np.concatenate([np.arange(0, 1025, 32), np.arange(1025, 1031)])


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each baseline."""
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    pages = [random.standard_normal(SHAPE, np.float32).astype(ml_dtypes.bfloat16) for _ in range(DISTINCT)]
    every = [pages[number % DISTINCT] for number in range(PAGES)]
    counts = np.diff(OFFSETS).astype(np.float32)
    offsets = torch.from_numpy(OFFSETS).expand(SHAPE[0], -1).contiguous()

    def by_torch() -> None:
        for page in every:
            x = torch.from_numpy(page.view(np.int16)).view(torch.bfloat16).float()
            torch.segment_reduce(x, "mean", offsets=offsets, axis=1).bfloat16()

    def by_numpy() -> None:
        for page in every:
            sums = np.add.reduceat(page.astype(np.float32), OFFSETS[:-1], axis=1)
            (sums / counts).astype(ml_dtypes.bfloat16)

    with (
        tempfile.TemporaryDirectory() as folder,
        serving(listen=f"unix:{folder}/pool.sock") as server,
        PoolClient(server.address, timeout=600) as client,
    ):

        def segments() -> None:
            for _ in client.map(every, SegmentPool("mean"), offsets=repeat(OFFSETS)):
                pass

        def whole() -> None:
            for _ in client.map(every, GlobalPool1d("mean")):
                pass

        runs: dict[str, Callable[[], None]] = {
            "SegmentPool": segments,
            "GlobalPool1d": whole,
            "torch": by_torch,
            "numpy": by_numpy,
        }
        times = interleave(runs, rounds)
        nbytes = sum(page.nbytes for page in every)
        busier = min(cpu_seconds(segments, server.process.pid) for _ in range(rounds))
        for baseline in list(runs)[1:]:
            rates = {
                "gb_per_second": round(nbytes / min(times["SegmentPool"]) / 1e9, 3),
                "gb_per_cpu_second": round(nbytes / busier / 1e9, 3),
            }
            yield row("1000 pages, 38 segments", baseline, "SegmentPool", times, bytes=nbytes, **rates)


def cpu_seconds(function: Callable[[], None], pid: int) -> float:
    """Return the larger of the CPU times that this process and the server take for a call of a function."""
    server = psutil.Process(pid)
    before, own = server.cpu_times(), time.process_time()
    function()
    after, spent = server.cpu_times(), time.process_time() - own
    return max(spent, after.user + after.system - before.user - before.system)
