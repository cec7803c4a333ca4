"""Traffic for minutes, with every result compared with torch's, while clients, workers and connections are killed.

Clients are killed during their calls; calls are cancelled, have short deadlines, or are wrong; connections are cut;
workers are killed. Each call must end with one correct result, or with an error that is expected for its kind, within
its deadline and a second. An undisturbed call may only fail with UNAVAILABLE, after its retries.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from benchmarks.soak_client import THREADS, TIMEOUT
from poolrpc_server.config import Config
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPES = ((1, 3, 16, 16), (2, 8, 32, 32), (1, 3, 64, 64), (1, 64, 56, 56), (4, 64, 112, 112))
LAYERS = (
    "MaxPool2d(2)",
    "MaxPool2d(3, stride=2, padding=1)",
    "MaxPool2d(2, return_indices=True)",
    "AvgPool2d(3, stride=1, padding=1)",
    "LPPool2d(2.0, 2)",
    "AdaptiveAvgPool2d((3, 5))",
)
DTYPES = ("float32", "float64", "float16")
CLIENTS = 2
KILLED = 0.06
"""The part of the calls during which the client is killed."""
WORKER_SECONDS, CUT_SECONDS = 7.0, 4.0
"""The average life of a worker, and of a connection."""
GROWTH_MIB, GROWTH_MINUTES = 50, 10
"""The growth of the memory that is allowed in a soak of so many minutes or more, after caches have filled in the first
fifth of the time."""


def make_cases(path: Path) -> None:
    """Write tensors, and torch's results, under the names that soak_client reads."""
    arrays, drawn = {}, np.random.default_rng(0)
    for shape in SHAPES:
        for number, layer in enumerate(LAYERS):
            name, dtype = f"{len(arrays)} {layer}", DTYPES[(number + shape[1]) % len(DTYPES)]
            x = drawn.standard_normal(shape).astype(dtype)
            # The expression is also one of torch.nn.
            made = eval(f"torch.nn.{layer}")(torch.from_numpy(x))  # noqa: S307 - from the table above
            output, indices = made if isinstance(made, tuple) else (made, None)
            arrays[f"{name}:x"], arrays[f"{name}:output"] = x, output.numpy()
            if indices is not None:
                arrays[f"{name}:indices"] = indices.numpy()
    np.savez(path, **arrays)  # type: ignore[arg-type]  # arrays


class Cutter:
    """A TCP proxy whose connections do not last."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.cut = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._connected, "127.0.0.1", 0), self._loop
        ).result()
        self.address = "{}:{}".format(*server.sockets[0].getsockname())
        self._drawn = np.random.default_rng(1)

    def close(self) -> None:
        """Stop."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        copies = [asyncio.create_task(self._copy(*pair)) for pair in ((reader, server_writer), (server_reader, writer))]
        await asyncio.wait(copies, timeout=self._drawn.exponential(CUT_SECONDS), return_when=asyncio.FIRST_COMPLETED)
        self.cut += 1
        for copy in copies:
            copy.cancel()
        for each in (writer, server_writer):
            each.transport.abort()

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(2**18):
                writer.write(data)
                await writer.drain()


class Client:
    """A client process, which is killed after so many calls and replaced by another."""

    def __init__(self, number: int, arguments: list[str], until: float) -> None:
        self._arguments, self._until = arguments, until
        self._drawn = np.random.default_rng([2, number])
        self.came: Counter[str] = Counter()
        self.used: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.late = self.killed = self.lost = 0
        self.thread = threading.Thread(target=self._lives)
        self.thread.start()

    def _lives(self) -> None:
        while time.monotonic() < self._until:
            self._live(1 + int(self._drawn.exponential(THREADS / KILLED)))
            self.killed += 1

    def _live(self, calls: int) -> None:
        seed = str(self._drawn.integers(2**31))
        with subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "benchmarks.soak_client", *self._arguments, seed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None  # noqa: S101 - it is a pipe
            in_flight: dict[str, float] = {}
            # This loop waits for a line: it would not end if all calls hung.
            watch = threading.Timer(max(0.0, self._until - time.monotonic()) + 2 * TIMEOUT, process.kill)
            watch.start()
            for data in process.stdout:
                line = json.loads(data)
                if "begin" in line:
                    in_flight[line["begin"]] = time.monotonic()
                else:
                    del in_flight[line["end"]]
                    self._ended(line)
                    calls -= 1
                if calls <= 0 or time.monotonic() >= self._until:
                    break
            now = time.monotonic()
            # One call of a client may be several calls for the server.
            self.lost += sum(now - started > 3 * TIMEOUT for started in in_flight.values())
            watch.cancel()
            process.kill()

    def _ended(self, line: dict[str, Any]) -> None:
        self.came[f"{line['what']}: {line['came'].partition(' ')[0]}"] += 1
        self.used.update(line["used"])
        if line["came"].startswith("wrong"):
            self.wrong.append(f"{line['what']}: {line['came']}")
        self.late += line["s"] > 2 * TIMEOUT + 1 if line["what"] == "good" else line["s"] > TIMEOUT + 1


@contextmanager
def server(folder: str, workers: int) -> Iterator[tuple[psutil.Process, str, str]]:
    """Start a server on a TCP and a unix address; return its process and both addresses."""
    unix = f"unix:{folder}/pool.sock"
    with serving("--workers", str(workers), "--threads", "1", "--listen", unix) as started:
        yield psutil.Process(started.process.pid), started.address, unix


def kill_workers(process: psutil.Process, until: float, killed: list[int]) -> None:
    """Kill the youngest worker again and again; the oldest one lives, so that its memory can be measured."""
    drawn, ended = np.random.default_rng(3), threading.Event()
    while (left := until - time.monotonic()) > 0:
        ended.wait(min(left, float(drawn.exponential(WORKER_SECONDS))))
        workers = sorted(process.children(), key=lambda each: each.create_time())
        if len(workers) > 1:
            workers[-1].kill()
            killed.append(workers[-1].pid)


def memory(process: psutil.Process) -> float:
    """Return the MiB of the oldest process that serves, without the memory that it shares with clients."""
    workers = sorted(process.children(), key=lambda each: each.create_time())
    info = (workers[0] if workers else process).memory_info()
    return float((info.rss - info.shared) / 2**20)


def run(minutes: float) -> Iterator[dict[str, Any]]:
    """Yield the row."""
    torch.set_num_threads(1)
    workers = 2 if "workers" in Config.__slots__ else 1
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="poolrpc-"))
        make_cases(cases := Path(folder) / "cases.npz")
        process, tcp, unix = stack.enter_context(server(folder, workers))
        cutter = Cutter(tcp)
        stack.callback(cutter.close)
        started, until, killed, samples = time.monotonic(), time.monotonic() + minutes * 60, [], []
        killer = threading.Thread(target=kill_workers, args=(process, until, killed))
        killer.start()
        clients = [Client(number, [str(cases), cutter.address, unix], until) for number in range(CLIENTS)]
        while any(client.thread.is_alive() for client in clients):
            samples.append((time.monotonic() - started, memory(process)))
            clients[0].thread.join(1)
        killer.join()
        yield summary(minutes, clients, samples, killed=len(killed), cut=cutter.cut)


def summary(minutes: float, clients: list[Client], samples: list[tuple[float, float]], **more: int) -> dict[str, Any]:
    """Return the row: the counts, and the faults."""
    came = sum((client.came for client in clients), Counter())
    wrong = [each for client in clients for each in client.wrong]
    late, lost = sum(client.late for client in clients), sum(client.lost for client in clients)
    # After a fifth of the time every kind of call has been made, by many clients.
    warm = [mib for at, mib in samples if minutes * 12 <= at <= minutes * 18]
    last = [mib for at, mib in samples if minutes * 54 <= at]
    growth = median(last) - median(warm) if warm and last else 0.0
    good = sum(count for name, count in came.items() if name.startswith("good"))
    broken = [name for name, count in (("wrong", len(wrong)), ("late", late), ("lost", lost)) if count] + (
        ["memory"] if minutes >= GROWTH_MINUTES and growth > GROWTH_MIB else []
    )
    return {
        "case": f"soak of {minutes:g} minutes",
        "baseline": "undisturbed calls",
        "ratio": round(came["good: right"] / max(good, 1), 4),
        "calls": sum(came.values()),
        "came": dict(sorted(came.items())),
        "transports": dict(sum((client.used for client in clients), Counter())),
        "wrong": wrong[:20],
        "late": late,
        "lost": lost,
        "clients_killed": sum(client.killed for client in clients),
        "workers_killed": more["killed"],
        "connections_cut": more["cut"],
        "warm_mib": round(median(warm), 1) if warm else None,
        "growth_mib": round(growth, 1),
        "broken": broken,
    }
