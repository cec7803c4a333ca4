"""A tensor that is larger than memory should be asked to hold: 4 GiB from one file to another, by a stream.

Rows give how much the resident memory of client and server grew at its peak, without the pages of the mapped files, and
the speed against local eager torch, which pools the same file in pieces of a hundredth.
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
    """Watches how much memory of its own a process has."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.before = self.peak = self.now()
        self._done = Event()
        self._thread = Thread(target=self._watch)
        self._thread.start()

    def now(self) -> int:
        """Give what it has now: resident, but for the pages of files."""
        memory = self._process.memory_info()
        return int(memory.rss - memory.shared)

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self.now())

    def growth(self) -> int:
        """End the watch and give by how many bytes it grew, at most."""
        self._done.set()
        self._thread.join()
        return self.peak - self.before


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Give one row; `rounds` is not looked at."""
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
