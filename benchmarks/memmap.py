"""A tensor of 4 GiB, pooled from one file to another by a stream.

The row has the peak growth of the resident memory of client and server, without the pages of the mapped files, and the
speed compared with local eager torch, which pools the same file in 64 pieces.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from poolrpc import MaxPool2d, PoolClient
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPE = (2048, 64, 91, 91)
PIECES = 64
SAMPLE_SECONDS = 0.02


class Peak:
    """Samples the memory of a process."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.before = self.peak = self.now()
        self._done = Event()
        self._thread = Thread(target=self._watch)
        self._thread.start()

    def now(self) -> int:
        """Return the resident memory without the pages of files."""
        memory = self._process.memory_info()
        return int(memory.rss - memory.shared)

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self.now())

    def growth(self) -> int:
        """End sampling, and return the largest growth in bytes."""
        self._done.set()
        self._thread.join()
        return self.peak - self.before


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one row; `rounds` is ignored."""
    del rounds
    torch.set_num_threads(1)
    layer, module = MaxPool2d(3, 2, 1), torch.nn.MaxPool2d(3, 2, 1)
    with tempfile.TemporaryDirectory(dir=".") as folder, serving("--threads", "1") as server:
        source, target = Path(folder) / "x", Path(folder) / "y"
        x = np.memmap(source, np.float32, "w+", shape=SHAPE)
        piece = np.random.default_rng(0).standard_normal((SHAPE[0] // PIECES, *SHAPE[1:]), np.float32)
        for i in range(PIECES):
            x[i * len(piece) : (i + 1) * len(piece)] = piece + i
        y = np.memmap(target, np.float32, "w+", shape=layer.output_shape(SHAPE))
        with PoolClient(server.address, timeout=600) as client:
            client.pool(piece, layer)
            peaks = [Peak(psutil.Process().pid), Peak(server.process.pid)]
            started = time.perf_counter()
            result = client.pool(x, layer, out=y)
            seconds = time.perf_counter() - started
            grown = [peak.growth() for peak in peaks]
        torchs, equal = 0.0, result.output is y
        for i in range(PIECES):
            part = slice(i * len(piece), (i + 1) * len(piece))
            started = time.perf_counter()
            expected = module(torch.from_numpy(np.asarray(x[part])))
            torchs += time.perf_counter() - started
            equal &= bool(torch.equal(expected, torch.from_numpy(np.asarray(y[part]))))
        yield {
            "case": f"{layer!r} {'x'.join(map(str, SHAPE))} from file to file",
            "contender": result.transport,
            "baseline": "torch",
            "ratio": round(torchs / seconds, 3),
            "ms": round(seconds * 1000),
            "baseline_ms": round(torchs * 1000),
            "bytes": x.nbytes,
            "client_grew_bytes": grown[0],
            "server_grew_bytes": grown[1],
            "equal": equal,
        }
