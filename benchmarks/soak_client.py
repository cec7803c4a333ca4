"""A client process of the soak: calls of every kind, each checked, and a line on stdout when each begins and ends.

python -m benchmarks.soak_client CASES TCP UNIX SEED. It needs no torch: results are compared with those in the file
CASES. It runs until it is killed, or its stdin ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from concurrent.futures import CancelledError as Cancelled
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

import poolrpc
from poolrpc import AsyncPoolClient, AvgPool2d, MaxPool2d, MaxUnpool2d, PoolClient, PoolResult, parse_layer

if TYPE_CHECKING:
    from collections.abc import Callable

THREADS = 8
TIMEOUT = 30.0
SHORT, CANCELLED, BAD = 0.06, 0.20, 0.10
"""The parts of the calls that have a short deadline, are cancelled, and are wrong."""


used = threading.local()
"""The transports of a thread's results since its call began, as `names`."""


class WrongResultError(Exception):
    """A result that is not the expected one."""


class Case:
    """A tensor, a layer, and the expected result."""

    def __init__(self, name: str, arrays: dict[str, Any]) -> None:
        self.layer = parse_layer(name.partition(" ")[2])
        self.x, self.output, self.indices = (arrays.get(f"{name}:{part}") for part in ("x", "output", "indices"))

    def check(self, result: PoolResult) -> None:
        """Compare a result, bit by bit."""
        used.names.append(result.transport)
        pairs = [(result.output, self.output), (result.indices, self.indices)]
        for got, expected in pairs:
            if expected is not None and (
                got is None or got.shape != expected.shape or got.tobytes() != expected.tobytes()
            ):
                raise WrongResultError(f"{self.layer!r} of {self.x.shape}: another result through {result.transport}")


class Worker:
    """Makes calls from several threads."""

    def __init__(self, cases: str, tcp: str, unix: str, seed: int) -> None:
        with np.load(cases) as arrays:
            loaded = dict(arrays)
        self._cases = [Case(name, loaded) for name in dict.fromkeys(key.rpartition(":")[0] for key in loaded)]
        self._small = [each for each in self._cases if each.x.nbytes < 2**16 and each.indices is None]
        self._clients = [PoolClient(tcp, timeout=TIMEOUT), PoolClient(unix, timeout=TIMEOUT)]
        self._channel = grpc.insecure_channel(tcp)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._async_clients = [
            asyncio.run_coroutine_threadsafe(self._connect(each), self._loop).result() for each in (tcp, unix)
        ]
        self._seed = seed

    @staticmethod
    async def _connect(address: str) -> AsyncPoolClient:
        return AsyncPoolClient(address, timeout=TIMEOUT)

    def run(self) -> None:
        """Call until the process ends."""
        for number in range(THREADS):
            threading.Thread(target=self._calls, args=(number,), daemon=True).start()
        sys.stdin.read()

    def _calls(self, number: int) -> None:
        drawn, count = np.random.default_rng([self._seed, number]), 0
        while True:
            count += 1
            name = f"{number}.{count}"
            kind = drawn.random()
            if kind < SHORT:
                what, call, allowed = "short", self._short, (poolrpc.DeadlineExceededError,)
            elif kind < SHORT + CANCELLED:
                what, call, allowed = "cancelled", self._cancelled, (poolrpc.CancelledError, Cancelled)
            elif kind < SHORT + CANCELLED + BAD:
                what, call, allowed = "bad", self._bad, ()
            else:
                what, call, allowed = "good", self._good, ()
            report({"begin": name, "what": what})
            started, used.names = time.monotonic(), []
            came = outcome_of(call, drawn, allowed)
            line = {"end": name, "what": what, "came": came, "s": time.monotonic() - started}
            report({**line, "used": sorted(set(used.names))})

    def _case(self, drawn: np.random.Generator) -> Case:
        return self._cases[drawn.integers(len(self._cases))]

    def _client(self, drawn: np.random.Generator) -> PoolClient:
        return self._clients[drawn.integers(2)]

    def _async_client(self, drawn: np.random.Generator) -> AsyncPoolClient:
        return self._async_clients[drawn.integers(2)]

    def _good(self, drawn: np.random.Generator) -> None:
        case, client = self._case(drawn), self._client(drawn)
        match drawn.integers(5):
            case 0:
                client.pool(case.x, case.layer)
                case.check(client.pool(case.x, case.layer, transport="stream"))
            case 1:
                copied = client.pool(case.x, case.layer, copy=False)
                case.check(copied)
            case 2:
                small = self._small[drawn.integers(len(self._small))]
                for result in client.map([small.x] * 20, small.layer):
                    small.check(result)
            case 3:
                wait = self._async_client(drawn).pool(case.x, case.layer)
                case.check(asyncio.run_coroutine_threadsafe(wait, self._loop).result())
            case _:
                for result in client.pool_each(case.x, [case.layer, case.layer]):
                    case.check(result)

    def _short(self, drawn: np.random.Generator) -> None:
        case = self._case(drawn)
        case.check(self._client(drawn).pool(case.x, case.layer, timeout=float(drawn.uniform(0.0002, 0.01))))

    def _cancelled(self, drawn: np.random.Generator) -> None:
        case = self._case(drawn)
        transport = "stream" if drawn.integers(5) == 0 else None
        wait = self._async_client(drawn).pool(case.x, case.layer, transport=transport)
        future = asyncio.run_coroutine_threadsafe(wait, self._loop)
        # Cancels the call at a random moment.
        threading.Event().wait(float(drawn.exponential(0.005)))
        future.cancel()
        case.check(future.result())

    def _bad(self, drawn: np.random.Generator) -> None:
        """Make a wrong call, whose error is the expected outcome."""
        x = np.zeros((1, 2, 4, 4), np.float32)
        client = self._client(drawn)
        wrong: list[tuple[Callable[[], object], type[BaseException]]] = [
            (lambda: client.pool(x, MaxPool2d(5)), poolrpc.InvalidArgumentError),
            (lambda: client.pool(x.astype(np.int8), AvgPool2d(2)), poolrpc.UnsupportedError),
            (
                lambda: client.pool(x, MaxUnpool2d(2), indices=np.full(x.shape, 999)),
                poolrpc.InvalidArgumentError,
            ),
            (
                lambda: client.pool(x, MaxPool2d(2), layout="NHWC", indices=np.zeros(x.shape, int)),
                poolrpc.InvalidArgumentError,
            ),
            (
                lambda: self._channel.unary_unary("/poolrpc.v1.PoolService/Pool")(b"\xff" * 40, timeout=TIMEOUT),
                grpc.RpcError,
            ),
        ]
        call, expected = wrong[drawn.integers(len(wrong))]
        try:
            call()
        except expected:
            return
        raise WrongResultError("expected an error for a wrong call, got a result")


def outcome_of(
    call: Callable[[np.random.Generator], None], drawn: np.random.Generator, allowed: tuple[type[BaseException], ...]
) -> str:
    """Make a call, and return its outcome: "right", "allowed" (an expected error), "unavailable" or something else."""
    try:
        call(drawn)
    except allowed:
        return "allowed"
    except poolrpc.UnavailableError as error:
        return f"unavailable {error.reason}"
    except grpc.RpcError as error:
        return f"unavailable {error.code().name}"  # type: ignore[attr-defined]  # also a grpc.Call
    except BaseException as error:  # noqa: BLE001 - every exception is reported
        return f"wrong {type(error).__name__}: {error}"[:300]
    return "right"


def report(line: dict[str, object]) -> None:
    """Write a line at once: it is shorter than a pipe's atomic write."""
    os.write(1, (json.dumps(line) + "\n").encode())


if __name__ == "__main__":
    Worker(*sys.argv[1:4], int(sys.argv[4])).run()  # type: ignore[misc, arg-type]  # three strings
