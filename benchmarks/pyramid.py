"""A pyramid of five levels in one call, compared with other ways to compute it, and one of a file that exceeds memory.

One compute thread on each side. `level one` is a call that computes the first level alone, `five branches` one call of
chains of one to five layers, `five calls` one call for each level from the one before; all of these leave their tensors
in the arena. `torch` and `numpy` compute the levels in this process, and so does `tinybrain`, which makes pyramids for
Neuroglancer, if it is installed (`pip install tinybrain`). Levels of integers are rounded averages of the level before;
those of tinybrain are truncated.

The last row is a pyramid of 4 GiB from one file to five by a stream. It has the peak growth of the resident memory of
client and server, without the pages of the mapped files.
"""

from __future__ import annotations

import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from benchmarks.memmap import Peak
from benchmarks.rounds import interleave, row
from poolrpc import AvgPool2d, MaxPool2d, PoolClient, Round, ToDtype, branch_shapes
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from poolrpc import Layer, PoolResult

SHAPE = (1, 64, 1024, 1024)
LEVELS = 5
FILE_SHAPE = (8, 64, 2048, 2048)
PIECES = 64


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of each dtype, then that of the file."""
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving("--threads", "1", listen=f"unix:{folder}/pool.sock") as server,
        PoolClient(server.address, timeout=600) as client,
    ):
        yield from compared(client, "average", "float32", [AvgPool2d(2)] * LEVELS, rounds)
        yield from compared(client, "average", "uint8", averages("uint8"), rounds)
        yield from compared(client, "max", "uint8", [MaxPool2d(2)] * LEVELS, rounds)
    yield from_file_to_files()


def averages(dtype: str) -> list[Layer]:
    """Return the steps of a pyramid of integers: each level has the averages of the one before, rounded."""
    return [ToDtype("float32"), AvgPool2d(2), Round(), ToDtype(dtype)] * LEVELS


def torch_level(name: str, level: torch.Tensor) -> torch.Tensor:
    """Return the level after one, computed by torch."""
    if name == "max":
        return torch.nn.functional.max_pool2d(level, 2)
    if level.is_floating_point():
        return torch.nn.functional.avg_pool2d(level, 2)
    return torch.nn.functional.avg_pool2d(level.float(), 2).round().to(level.dtype)


def compared(client: PoolClient, name: str, dtype: str, chain: list[Layer], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each baseline."""
    x = client.empty(SHAPE, dtype)
    x[...] = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    step = len(chain) // LEVELS
    ends = [step * level - 1 for level in range(1, LEVELS + 1)]
    options: dict[str, Any] = {"transport": "arena", "copy": False}

    def pyramid() -> list[PoolResult]:
        return client.pool_steps(x, chain, ends, **options)

    def one_by_one() -> None:
        level = x
        for end in ends:
            level = client.pool(level, chain[end + 1 - step : end + 1], **options).output

    local = local_pyramids(name, x)
    runs: dict[str, Callable[[], object]] = {
        "pool_steps": pyramid,
        "level one": lambda: client.pool(x, chain[:step], **options),
        "five branches": lambda: client.pool_each(x, [chain[: end + 1] for end in ends], **options),
        "five calls": one_by_one,
        **local,
    }
    expected = local["torch"]()
    equal = all(map(np.array_equal, (result.output for result in pyramid()), expected))
    times = interleave(runs, rounds)
    for baseline in list(runs)[1:]:
        case = f"{name} of {dtype} {'x'.join(map(str, SHAPE))}, {LEVELS} levels"
        yield row(case, baseline, "pool_steps", times, bytes=x.nbytes, equal=equal)


def local_pyramids(name: str, x: np.ndarray) -> dict[str, Callable[[], list[np.ndarray]]]:
    """Return the functions that compute the levels in this process."""

    def by_torch() -> list[np.ndarray]:
        level, levels = torch.from_numpy(x), []
        with torch.inference_mode():
            for _ in range(LEVELS):
                level = torch_level(name, level)
                levels.append(level.numpy())
        return levels

    def by_numpy() -> list[np.ndarray]:
        level, levels = x, []
        for _ in range(LEVELS):
            n, c, height, width = level.shape
            windows = level.reshape(n, c, height // 2, 2, width // 2, 2)
            if name == "max":
                level = windows.max((3, 5))
            elif x.dtype.kind == "f":
                level = windows.mean((3, 5))
            else:
                level = np.rint(windows.mean((3, 5), np.float32)).astype(x.dtype)
            levels.append(level)
        return levels

    functions = {"torch": by_torch, "numpy": by_numpy}
    if find_spec("tinybrain"):
        import tinybrain  # noqa: PLC0415 - optional

        pooled = tinybrain.downsample_with_averaging if name == "average" else tinybrain.downsample_with_max_pooling
        volume = x[0].T  # its axes are x, y, z, and the first one is contiguous
        functions["tinybrain"] = lambda: pooled(volume, (2, 2, 1), num_mips=LEVELS)
    return functions


def from_file_to_files() -> dict[str, Any]:
    """Return the row of a file of 4 GiB, compared with eager torch, which pools the same file in pieces."""
    chain = averages("uint16")
    ends = range(3, len(chain), 4)
    with tempfile.TemporaryDirectory(dir=".") as folder, serving("--threads", "1") as server:
        x = np.memmap(Path(folder) / "x", np.uint16, "w+", shape=FILE_SHAPE)
        planes = x.reshape(PIECES, -1, *FILE_SHAPE[2:])
        piece = np.random.default_rng(0).integers(0, 2**15, planes.shape[1:], np.uint16)
        for i in range(PIECES):
            planes[i] = piece + i
        shapes = branch_shapes(FILE_SHAPE, [chain])[0]
        out = [np.memmap(Path(folder) / f"y{i}", np.uint16, "w+", shape=shapes[i]) for i in ends]
        with PoolClient(server.address, timeout=600) as client:
            client.pool_steps(piece[None], chain, ends, transport="stream")
            peaks = [Peak(psutil.Process().pid), Peak(server.process.pid)]
            started = time.perf_counter()
            results = client.pool_steps(x, chain, ends, out=out)
            seconds = time.perf_counter() - started
            grown = [peak.growth() for peak in peaks]
        torchs, equal = 0.0, all(result.output is each for result, each in zip(results, out, strict=True))
        for i in range(PIECES):
            level = torch.from_numpy(np.asarray(planes[i]))
            for each in out:
                started = time.perf_counter()
                level = torch_level("average", level)
                torchs += time.perf_counter() - started
                equal &= np.array_equal(level.numpy(), each.reshape(PIECES, -1, *each.shape[2:])[i])
        return {
            "case": f"average of uint16 {'x'.join(map(str, FILE_SHAPE))}, {LEVELS} levels, from a file to files",
            "contender": results[0].transport,
            "baseline": "torch",
            "ratio": round(torchs / seconds, 3),
            "ms": round(seconds * 1000),
            "baseline_ms": round(torchs * 1000),
            "bytes": x.nbytes,
            "client_grew_bytes": grown[0],
            "server_grew_bytes": grown[1],
            "equal": equal,
        }
