"""What a server takes: memory of its processes, threads, connections and calls, and CPU time of a call.

The calls are those of `poolrpc bench`, whose command is in each row. Memory is what the processes have for themselves
(RssAnon), without the libraries' files, which all processes share. CPU time is the server's alone.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import psutil

from poolrpc import PoolClient
from poolrpc_server.config import PROCESS_BYTES
from poolrpc_server.resources import ROOT
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scripts.server_process import ServerProcess

FLAGS = (
    ("--threads", "1"),
    ("--threads", "8"),
    ("--workers", "2", "--threads", "2"),
    ("--workers", "4", "--threads", "4"),
)
SHAPES = ("1x3x32x32", "1x3x224x224", "8x64x56x56", "8x64x112x112")
"""12 KB, a photograph of 602 KB, 6.4 MB, and 25.7 MB, which is a stream over TCP."""

CONCURRENCY = (1, 4)
CONNECTIONS = 256
SAMPLE_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Usage:
    """What the processes of a server have used.

    Attributes:
        processes: The number of processes.
        own: Bytes of memory that they have for themselves.
        files: Bytes of files in the memory of the first of them.
        cpu: Seconds of CPU time.

    """

    processes: int
    own: int
    files: int
    cpu: float


def usage(server: ServerProcess) -> Usage:
    """Return what a server, with its workers, has used so far."""
    first = psutil.Process(server.process.pid)
    processes = [first, *first.children(recursive=True)]
    # multiprocessing's resource tracker is a process too, of a few MiB.
    memory = [_status(each.pid) for each in processes]
    times = [each.cpu_times() for each in processes]
    return Usage(
        len(processes),
        sum(each["RssAnon"] for each in memory),
        max(each["RssFile"] for each in memory),
        sum(each.user + each.system for each in times),
    )


def _status(pid: int) -> dict[str, int]:
    lines = (ROOT / f"proc/{pid}/status").read_text().splitlines()
    fields = (line.partition(":") for line in lines if line.startswith("Rss"))
    return {name: int(value.split()[0]) * 1024 for name, _, value in fields}


class Peak:
    """The most memory that a server has during a block."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.bytes = 0

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, usage(self._server).own)


def bench(address: str, *flags: str) -> tuple[str, dict[str, Any]]:
    """Run `poolrpc bench`, and return its command, without the address, and its figures."""
    command = ["bench", *flags]
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "poolrpc", *command, "--address", address, "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    return shlex.join(["poolrpc", *command]), json.loads(done.stdout)


def idle() -> Iterator[dict[str, Any]]:
    """Yield the memory of processes that have served a few small calls."""
    for flags in FLAGS:
        with serving(*flags) as server:
            started = usage(server)
            command, _ = bench(server.address, *load("1x3x32x32", 4, 2))
            after = usage(server)
        workers = int(flags[1]) if flags[0] == "--workers" else 1
        yield {
            "kind": "idle",
            "case": f"poolrpc-server {' '.join(flags)}",
            "command": command,
            "workers": workers,
            "started_mib": round(started.own / 2**20, 1),
            "served_mib": round(after.own / 2**20, 1),
            "files_mib": round(after.files / 2**20, 1),
            "baseline": "what is reserved for the processes themselves",
            "ratio": round(workers * PROCESS_BYTES / after.own, 3),
        }


def connections() -> Iterator[dict[str, Any]]:
    """Yield the memory of connections without calls."""
    with serving() as server, ExitStack() as stack:
        bench(server.address, *load("1x3x32x32", 4, 1))
        before = usage(server)
        for _ in range(CONNECTIONS):
            client = PoolClient(server.address, options={"grpc.use_local_subchannel_pool": 1})
            stack.enter_context(client).health()
        after = usage(server)
    each = (after.own - before.own) / CONNECTIONS
    yield {
        "kind": "connections",
        "case": f"{CONNECTIONS} connections",
        "kib_each": round(each / 1024, 1),
        "baseline": "256 KiB",
        "ratio": round(2**18 / each, 3),
    }


def load(shape: str, concurrency: int, seconds: float, *more: str) -> tuple[str, ...]:
    """Return the flags of `poolrpc bench` for a load."""
    calls = ("--concurrency", str(concurrency), "--duration", f"{seconds:g}")
    return ("--shape", shape, "--layer", "MaxPool2d(2)", *calls, *more)


def calls(seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the CPU time and the memory of calls of each size, over TCP and through the arena."""
    smallest: dict[str, float] = {}
    for way, shape, concurrency in product(("TCP", "unix socket"), SHAPES, CONCURRENCY):
        with ExitStack() as stack:
            listen = "127.0.0.1:0"
            if way != "TCP":
                listen = f"unix:{stack.enter_context(TemporaryDirectory(prefix='poolrpc-'))}/pool.sock"
            server = stack.enter_context(serving(listen=listen))
            bench(server.address, *load("1x3x32x32", 4, 1))
            before = usage(server)
            with Peak(server) as peak:
                command, figures = bench(server.address, *load(shape, concurrency, seconds, "--warmup", "0"))
            spent = usage(server).cpu - before.cpu
        request = figures["requests"][0]
        # The calls that are not counted: the first of all, and one of each connection.
        cpu = spent / (figures["answered"] + 1 + figures["load"]["connections"])
        in_flight = concurrency * (request["input_bytes"] + request["output_bytes"])
        yield {
            "kind": "calls",
            "case": f"{shape}, {concurrency} at a time, {way}",
            "command": command,
            "way": way,
            "bytes": request["input_bytes"],
            "concurrency": concurrency,
            "transport": request["transport"],
            "calls_per_second": round(figures["calls_per_second"], 1),
            "p99_ms": round(figures["latency_ms"]["p99"], 2),
            "server_cpu_ms": round(cpu * 1000, 3),
            "grew_mib": round(max(peak.bytes - before.own, 0) / 2**20, 1),
            "grew_times": round(max(peak.bytes - before.own, 0) / in_flight, 2),
            "baseline": "the CPU time of the smallest call",
            "ratio": round(smallest.setdefault(way, cpu) / cpu, 4),
        }


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows; the loads take a fifth of a second for each of the rounds."""
    yield from idle()
    yield from connections()
    yield from calls(rounds / 5)
