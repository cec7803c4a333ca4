"""A server's CPU time for a call over TCP, and its calls per second, with one caller and with eight.

One compute thread, MaxPool2d(2), float32. The server is compared with a bare gRPC server that returns a quarter of the
bytes, which is the least that a call costs in Python; with that and the engine alone, in this process; and with a
tutorial's server: a bytes field, eager torch. The two have ten threads, on both cores. Callers send messages that were
encoded before, from a process of their own, and compare every answer.

CPU time varies less than latency on a machine that others use too. It is that of the whole process: gRPC's threads, the
log's and the metrics' included.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import psutil
import torch

from benchmarks.kernels import prepare
from benchmarks.load import METHOD, exchange
from benchmarks.rounds import row
from benchmarks.transport import ECHO, PLAIN, UNLIMITED, bare
from poolrpc import MaxPool2d
from poolrpc._wire.framing import MESSAGE_BYTES_KEY
from poolrpc.v1 import pool_pb2
from poolrpc_server.compute.engine import Engine
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from poolrpc_server.compute.engine import Run

SHAPES = (1, 3, 32, 32), (1, 3, 64, 64), (1, 3, 224, 224)
CALLERS = 1, 8
SECONDS, TIMEOUT, THREADS = 1.0, 30, 10
TARGET = 1.25
"""How many times the CPU time of a bare gRPC call ours may take, in addition to the engine's."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A call, and its answer.

    Attributes:
        address: The server's address.
        method: The method.
        message: The request.
        answer: The expected response.
        metadata: The call's metadata.

    """

    address: str
    method: str
    message: bytes
    answer: bytes
    metadata: tuple[tuple[str, str], ...] = ()


def call_repeatedly(exchange: Exchange, port: Connection) -> None:
    """Make calls from as many threads as `port` says, for SECONDS each time, and report (calls, wrong, seconds)."""
    with grpc.insecure_channel(exchange.address, UNLIMITED) as channel:
        call = channel.unary_unary(exchange.method)

        def repeat(results: list[bool], until: float) -> None:
            while time.perf_counter() < until:
                answer = call(exchange.message, metadata=exchange.metadata, timeout=TIMEOUT)
                results.append(answer == exchange.answer)

        while callers := port.recv():
            started, results = time.perf_counter(), [list[bool]() for _ in range(callers)]
            threads = [threading.Thread(target=repeat, args=(each, started + SECONDS)) for each in results]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            answers = [answer for each in results for answer in each]
            port.send((len(answers), answers.count(False), time.perf_counter() - started))


class Contender:
    """A server process, and a process that calls it.

    Args:
        pid: The number of the server's process.
        exchange: The call.

    """

    def __init__(self, pid: int, exchange: Exchange) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._server = psutil.Process(pid)
        self._port, theirs = spawn.Pipe()
        self._process = spawn.Process(target=call_repeatedly, args=(exchange, theirs), daemon=True)
        self._process.start()
        self.wrong = 0

    def measure(self, callers: int) -> tuple[float, float]:
        """Return the server's CPU time for a call, and the time in which one call is answered, in seconds."""
        before = self._server.cpu_times()
        self._port.send(callers)
        calls, wrong, seconds = self._port.recv()
        after = self._server.cpu_times()
        self.wrong += wrong
        return (after.user + after.system - before.user - before.system) / calls, seconds / calls

    def close(self) -> None:
        """End the process that calls."""
        self._port.send(0)
        self._process.join()


@contextmanager
def bare_server() -> Iterator[tuple[int, str]]:
    """Run the bare server of `python -m benchmarks transport` with ten threads, and yield its process and address."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=bare, args=(theirs, THREADS))
    process.start()
    yield process.pid or 0, f"127.0.0.1:{ours.recv()}"
    ours.send(None)
    process.join()


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows."""
    torch.set_num_threads(1)
    engine = Engine("cpu", 1)
    with ExitStack() as servers:
        server = servers.enter_context(serving("--threads", "1"))
        echo, tutorial = (servers.enter_context(bare_server()) for _ in range(2))
        for shape in SHAPES:
            layer = MaxPool2d(2)
            message, answer = exchange(shape, layer)
            x = np.random.default_rng(0).standard_normal(shape, np.float32)
            output = torch.nn.MaxPool2d(2)(torch.from_numpy(x)).numpy()
            plain = pool_pb2.PoolResponse(payload=output.tobytes()).SerializeToString()
            size = ((MESSAGE_BYTES_KEY, str(len(message))),)
            alone = prepare(engine, (layer,), torch.from_numpy(x), "NCHW")
            with ExitStack() as clients:
                contenders = {
                    "server": Contender(server.process.pid, Exchange(server.address, METHOD, message, answer, size)),
                    "bare gRPC": Contender(echo[0], Exchange(echo[1], ECHO, x.tobytes(), x.tobytes()[: x.nbytes // 4])),
                    "tutorial": Contender(tutorial[0], Exchange(tutorial[1], PLAIN, message, plain)),
                }
                for contender in contenders.values():
                    clients.callback(contender.close)
                    contender.measure(2)  # connects, and fills caches
                for callers in CALLERS:
                    yield from compared(contenders, callers, rounds, engine, alone, shape)
    engine.close()


def compared(  # noqa: PLR0913, PLR0917 - what is compared
    contenders: dict[str, Contender], callers: int, rounds: int, engine: Engine, alone: Run, shape: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Yield the rows for a number of callers."""
    cpu: dict[str, list[float]] = {name: [] for name in (*contenders, "bare gRPC and the engine")}
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds, answered = contenders[name].measure(callers)
            cpu[name].append(seconds)
            wall[name].append(answered)
        started = time.thread_time()
        for _ in range(100):
            engine.execute([alone])
        engine_seconds = (time.thread_time() - started) / 100
        cpu["bare gRPC and the engine"].append(TARGET * cpu["bare gRPC"][-1] + engine_seconds)
    wrong = sum(contender.wrong for contender in contenders.values())
    case = f"{callers} caller{'s' * (callers > 1)} of {'x'.join(map(str, shape))}"
    for baseline in (*names[1:], "bare gRPC and the engine"):
        yield row(f"CPU time of a call, {case}", baseline, "server", cpu, wrong=wrong, broken=wrong > 0)
    for baseline in names[1:]:
        rate = round(1 / median(wall["server"]))
        yield row(f"calls per second, {case}", baseline, "server", wall, calls_per_second=rate, broken=wrong > 0)
