"""Loads from a tenth of the capacity to ten times it: what is answered, how soon, and how soon the rest is rejected.

Open loop: several client processes send at random times that were drawn before, whether responses arrive or not, and
without retries, by gRPC and then by local calls. Every response is compared with torch's, byte by byte. The layers of
the mix take long for their size, because clients and server share the machine's cores: with large tensors the clients
could not send ten times the capacity.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import psutil
import torch

from poolrpc import AvgPool2d, LPPool2d, MaxPool2d, PoolClient, PoolError
from poolrpc._wire import framing
from poolrpc._wire.codec import Request, encode_request, encode_results
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.queues import Queue
    from multiprocessing.synchronize import Barrier

    from poolrpc.layers import Layer

MIX: tuple[tuple[tuple[int, ...], Layer], ...] = (
    ((1, 16, 64, 64), AvgPool2d(63, 1, 31)),
    ((1, 16, 64, 64), AvgPool2d(51, 1, 25)),
    ((1, 32, 48, 48), AvgPool2d(45, 1, 22)),
    ((1, 24, 64, 64), LPPool2d(3.0, 41, 1)),
    ((1, 3, 32, 32), MaxPool2d(2)),
)
"""Up to about 80 ms of one thread, for up to 400 KB."""

TIMES = {"grpc": (0.1, 0.5, 0.8, 1, 2, 5, 10), "local": (0.5, 1, 2, 10)}
LOCAL_CALLS = 64
"""Threads of a client that makes local calls, one for each call that it has in flight."""
CLIENTS, CALLERS = 2, 4
"""Processes that send a load, and threads that measure the capacity."""
QUEUE_SECONDS = 0.25
SECONDS, TIMEOUT = 20, 30
METHOD = "/poolrpc.v1.PoolService/Pool"
OPTIONS = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]


@dataclass
class Observed:
    """The results of a client.

    Attributes:
        accepted: Seconds of each correct response.
        kinds: The number of correct responses for each request of the mix.
        rejected: Seconds of each rejection.
        statuses: The number of calls by status.
        wrong: The number of responses that differ from torch's.
        late: The largest delay in seconds with which a call was sent.
        seconds: The time from the first call to the last response.

    """

    accepted: list[float] = field(default_factory=list)
    kinds: Counter[int] = field(default_factory=Counter)
    rejected: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    late: float = 0.0
    seconds: float = 0.0


class GrpcCaller:
    """Sends the requests of the mix by gRPC."""

    def __init__(self, address: str) -> None:
        self._mix = [exchange(*each) for each in MIX]
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._call = self._channel.unary_unary(METHOD)

    def call(self, number: int) -> bool:
        """Call, and return whether the response is torch's."""
        request, expected = self._mix[number]
        return bool(self._call(request, timeout=TIMEOUT) == expected)

    def future(self, number: int) -> Any:  # noqa: ANN401 - a future of gRPC
        """Begin a call."""
        return self._call.future(self._mix[number][0], timeout=TIMEOUT)

    def outcome(self, future: Any, number: int) -> tuple[str, bool]:  # noqa: ANN401 - as above
        """Return the status of a call that has ended, and whether its response is torch's."""
        code: str = future.code().name
        return code, code == "OK" and future.result() == self._mix[number][1]

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


class LocalCaller:
    """Makes local calls for the requests of the mix."""

    def __init__(self, address: str) -> None:
        self._mix = [(tensor(shape), layer, torchs(shape, layer).tobytes()) for shape, layer in MIX]
        self._client = PoolClient(address, timeout=TIMEOUT, options=OPTIONS)
        self._threads = ThreadPoolExecutor(LOCAL_CALLS)

    def call(self, number: int) -> bool:
        """Call, and return whether the result is torch's."""
        x, layer, expected = self._mix[number]
        return self._client.pool(x, layer, transport="local").output.tobytes() == expected

    def future(self, number: int) -> Future[bool]:
        """Begin a call."""
        return self._threads.submit(self.call, number)

    def outcome(self, future: Future[bool], _: int) -> tuple[str, bool]:
        """Return the status of a call that has ended, and whether its result is torch's."""
        error = future.exception()
        if isinstance(error, PoolError):
            return error.code, False
        return "OK", future.result()

    def close(self) -> None:
        """Close the client."""
        self._client.close()
        self._threads.shutdown()


CALLERS_OF: dict[str, type[GrpcCaller | LocalCaller]] = {"grpc": GrpcCaller, "local": LocalCaller}


def tensor(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return the input of a request of the mix."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def torchs(shape: tuple[int, ...], layer: Layer) -> np.ndarray[Any, Any]:
    """Return torch's output for a request of the mix."""
    names = {"kernel_size": layer.kernel_size, "stride": layer.stride}  # type: ignore[attr-defined]  # layers with windows
    names |= {"padding": layer.padding} if hasattr(layer, "padding") else {"norm_type": layer.norm_type}
    return np.asarray(getattr(torch.nn, layer.name)(**names)(torch.from_numpy(tensor(shape))))


def exchange(shape: tuple[int, ...], layer: Layer) -> tuple[bytes, bytes]:
    """Return a request, and torch's response to it."""
    x, output = tensor(shape), torchs(shape, layer)
    request = Request(TensorSpec("float32", shape), ((layer,),))
    answer = pool_pb2.PoolResponse(results=encode_results(request.results())).SerializeToString()
    return (
        framing.join(encode_request(request).SerializeToString(), [x.tobytes()]),
        framing.message_prefix(answer, output.nbytes) + output.tobytes(),
    )


def arrivals(rate: float, seed: int) -> list[tuple[float, int]]:
    """Draw the times at which a client sends, and which request of the mix."""
    drawn, times = np.random.default_rng(seed), []
    at = drawn.exponential(1 / rate)
    while at < SECONDS:
        times.append((at, int(drawn.integers(len(MIX)))))
        at += drawn.exponential(1 / rate)
    return times


def send_load(server: tuple[str, str], rate: float, seed: int, begin: Barrier, results: Queue[Observed]) -> None:
    """Send so many calls per second, and report the results."""
    torch.set_num_threads(1)
    times, seen = arrivals(rate, seed), Observed()
    transport, address = server
    with closing(CALLERS_OF[transport](address)) as caller:
        caller.call(len(MIX) - 1)

        def ended(future: Any, sent: float, number: int) -> None:  # noqa: ANN401 - a future of either caller
            seconds = time.perf_counter() - sent
            code, right = caller.outcome(future, number)
            seen.statuses[code] += 1
            if code == "UNAVAILABLE":
                seen.rejected.append(seconds)
            elif code == "OK":
                if right:
                    seen.accepted.append(seconds)
                    seen.kinds[number] += 1
                else:
                    seen.wrong += 1

        begin.wait()
        started, futures = time.perf_counter(), []
        for at, number in times:
            wait = started + at - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            seen.late = max(seen.late, -wait)
            sent, future = time.perf_counter(), caller.future(number)
            future.add_done_callback(lambda each, sent=sent, number=number: ended(each, sent, number))
            futures.append(future)
        for future in futures:
            future.exception()
        seen.seconds = time.perf_counter() - started
    results.put(seen)


def measure(server: tuple[str, str], rate: float) -> Observed:
    """Send a load from several processes, and return their results together."""
    spawn = multiprocessing.get_context("spawn")
    begin, results = spawn.Barrier(CLIENTS), spawn.Queue()
    clients = [
        spawn.Process(target=send_load, args=(server, rate / CLIENTS, seed, begin, results)) for seed in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    parts = [results.get(timeout=SECONDS + 2 * TIMEOUT + 60) for _ in clients]
    for client in clients:
        client.join()
    return Observed(
        [each for part in parts for each in part.accepted],
        sum((part.kinds for part in parts), Counter()),
        [each for part in parts for each in part.rejected],
        sum((part.statuses for part in parts), Counter()),
        sum(part.wrong for part in parts),
        max(part.late for part in parts),
        max(part.seconds for part in parts),
    )


def capacity(call: Callable[[int], bool]) -> float:
    """Return the calls per second of a few callers, each of which sends its next call when it has a response."""
    until, counts = time.perf_counter() + SECONDS, [0] * CALLERS

    def send(caller: int) -> None:
        drawn = np.random.default_rng(caller)
        while time.perf_counter() < until:
            call(int(drawn.integers(len(MIX))))
            counts[caller] += 1

    with ThreadPoolExecutor(CALLERS) as callers:
        list(callers.map(send, range(CALLERS)))
    return sum(counts) / SECONDS


def alone(call: Callable[[int], bool], count: int = 300) -> list[float]:
    """Return the seconds of calls in a row."""
    seconds = []
    for number in range(count):
        started = time.perf_counter()
        right = call(number % len(MIX))
        seconds.append(time.perf_counter() - started)
        if not right:
            raise ValueError(f"expected torch's response, got another one, for {MIX[number % len(MIX)]}")
    return seconds


def quantile(values: list[float], part: float) -> float | None:
    """Return a quantile in milliseconds; None without values."""
    return round(sorted(values)[min(len(values) - 1, int(len(values) * part))] * 1000, 2) if values else None


def run(_: int) -> Iterator[dict[str, Any]]:
    """Yield the rows, one for each transport and load."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"unix:{folder}/pool.sock"
        flags = ("--threads", "1", "--max-queue-seconds", str(QUEUE_SECONDS), "--listen", path)
        for transport in CALLERS_OF:
            with serving(*flags) as server:
                yield from loads(transport, {"grpc": server.address, "local": path}[transport], server.process.pid)


def loads(transport: str, address: str, pid: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a transport."""
    process = psutil.Process(pid)
    with closing(CALLERS_OF[transport](address)) as caller:
        alone(caller.call, 50)
        unloaded = alone(caller.call)
        most = capacity(caller.call)
    # A disturbance only makes a call longer.
    mix_ms = [quantile(unloaded[number :: len(MIX)], 0.25) or 0.0 for number in range(len(MIX))]
    rows = []
    for times in TIMES[transport]:
        cpu, seen = process.cpu_times(), measure((transport, address), times * most)
        spent = process.cpu_times()
        rows.append(
            {
                "case": f"{times:g} times capacity" + (", local calls" if transport == "local" else ""),
                "transport": transport,
                "offered": round(times * most, 1),
                "goodput": round(len(seen.accepted) / seen.seconds, 1),
                # Which calls are accepted is random, and some take a hundred times as long as others.
                "work": round(sum(mix_ms[kind] * n for kind, n in seen.kinds.items()) / 1000 / seen.seconds, 3),
                **{f"accepted_p{p:g}_ms": quantile(seen.accepted, p / 100) for p in (50, 99, 99.9)},
                **{f"rejected_p{p:g}_ms": quantile(seen.rejected, p / 100) for p in (50, 99)},
                "statuses": dict(seen.statuses),
                "wrong": seen.wrong,
                "clients_late_ms": round(seen.late * 1000, 1),
                "server_rss_mib": process.memory_info().rss >> 20,
                "server_cpus": round((spent.user + spent.system - cpu.user - cpu.system) / seen.seconds, 2),
            }
        )
    peak = max(row["work"] for row in rows)
    bound = 3 * (quantile(unloaded, 0.99) or 0) + QUEUE_SECONDS * 1000
    for each in rows:
        yield {
            **each,
            "baseline": "the most work that was done at any load",
            "ratio": round(each["work"] / peak, 3),
            "capacity": round(most, 1),
            "unloaded_p99_ms": quantile(unloaded, 0.99),
            "mix_ms": mix_ms,
            "accepted_p99_bound_ms": round(bound, 1),
        }
