"""The number of replicas for a load, by a simulation whose times were measured.

    python -m benchmarks capacity --rate 500 --bytes 1000000 --p99 0.05
    python -m benchmarks capacity --json benchmarks/results/capacity.json

The first prints how many replicas answer 99 of 100 calls within 50 ms. The second compares the simulation with the
curve that `python -m benchmarks load` measured, for the same calls.

Calls arrive at random, independently of each other. A call uses its slot for as long as a single client waited for its
result over the loopback. That includes the client's own work, so that a real server does somewhat better. The time of
the network is not included.
"""

from __future__ import annotations

import json
import math
import sys
from bisect import bisect_left
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import load
from benchmarks.fleet import Call, Fleet, Outcome
from poolrpc._transport.options import STREAM_MIN_BYTES
from poolrpc_server.calls.queue import QueueLimits
from poolrpc_server.compute.schedule import CPU_BATCHED_BYTES

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator, Sequence

RESULTS = Path(__file__).parent / "results"
CALLS = 20_000
"""Calls of one simulation: 200 of them are slower than the p99."""
ATTEMPTS = 5
"""Attempts of our client: the first one and four retries."""

LIKE = Call(0.0, 1.0, 0, None)


@dataclass(frozen=True, slots=True)
class Question:
    """A load, and the latency that is required.

    Attributes:
        rate: Calls per second.
        bytes: The sizes of a call's input, all equally likely.
        p99: Seconds within which 99 of 100 calls must be answered.
        path: The transport of the tensors; None selects it by their size, like the client over TCP.
        layer_ms: Milliseconds that the layer takes more than MaxPool2d(2).
        client_side: Whether many clients choose the replicas round-robin, instead of a balancer that knows their load.
        retry: Whether a rejected call is tried again.

    """

    rate: float
    bytes: Sequence[int]
    p99: float
    path: str | None = None
    layer_ms: float = 0.0
    client_side: bool = False
    retry: bool = False


def seconds_of(path: str) -> tuple[float, float, float]:
    """Return the seconds of a call by a transport, the seconds per byte, and the largest relative error.

    They are the line with the smallest relative errors for the times of benchmarks/results/transport.json, over the
    sizes that the client sends by this transport.
    """
    points = {
        row["bytes"]: row["ms"] / 1000
        for row in read("transport")
        if row["contender"] == path and (path != "unary" or row["bytes"] < STREAM_MIN_BYTES)
    }
    nbytes, times = np.array(list(points), float), np.array(list(points.values()))
    terms = np.stack([1 / times, nbytes / times], axis=1)
    fixed, each = np.linalg.lstsq(terms, np.ones(len(times)))[0]
    return float(fixed), float(each), float(np.abs(terms @ [fixed, each] - 1).max())


def read(name: str) -> list[dict[str, Any]]:
    """Return the rows of a benchmark."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())
    return rows


def call_of(nbytes: int, question: Question) -> Call:
    """Return a call with an input of so many bytes."""
    path = question.path or ("unary" if nbytes < STREAM_MIN_BYTES else "stream")
    fixed, each, _ = seconds_of(path)
    total = nbytes * 5 // 4  # with MaxPool2d(2)'s output
    batched = path == "unary" and total <= CPU_BATCHED_BYTES
    return Call(0.0, fixed + each * nbytes + question.layer_ms / 1000, total, nbytes if batched else None)


def drawn(rate: float, kinds: Sequence[Call]) -> list[Call]:
    """Draw calls at random times, each kind equally often."""
    draw = np.random.default_rng(0)
    times, chosen = np.cumsum(draw.exponential(1 / rate, CALLS)), draw.integers(len(kinds), size=CALLS)
    return [replace(kinds[kind], at=float(at)) for at, kind in zip(times, chosen, strict=True)]


def waiting(replicas: int, busy: float, *, least_request: bool) -> float:
    """Return the p99 of equal calls in units of a call's time, if nothing is rejected."""
    limits = QueueLimits(max_queue=CALLS, max_queue_seconds=float(CALLS))
    return Fleet(replicas, limits, least_request=least_request).serve(drawn(busy * replicas, [LIKE])).within(0.99)


def answer(question: Question) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of replicas that was tried, with the smallest sufficient one last.

    Raises:
        SystemExit: No number of replicas is sufficient.

    """
    rate = question.rate
    if rate <= 0 or min(question.bytes) < 0:
        sys.exit(f"expected --rate above 0 and --bytes of at least 0, got {rate} and {question.bytes}")
    kinds = [call_of(nbytes, question) for nbytes in question.bytes]
    alone = max(call.seconds for call in kinds)
    if alone >= question.p99:
        sys.exit(f"expected --p99 of more than {alone:.4g} s, the time of a call alone, got {question.p99:g}")
    calls = drawn(rate, kinds)
    tried: dict[int, Outcome] = {}

    def enough(replicas: int) -> bool:
        if replicas not in tried:
            attempts = ATTEMPTS if question.retry else 1
            fleet = Fleet(replicas, QueueLimits(), least_request=not question.client_side, attempts=attempts)
            tried[replicas] = fleet.serve(calls)
        return tried[replicas].within(0.99) <= question.p99

    least = most = math.ceil(rate * sum(call.seconds for call in kinds) / len(kinds))
    while not enough(most):
        most *= 2
    fewest = bisect_left(range(most + 1), True, lo=least, key=enough)
    for replicas in sorted(tried, key=lambda each: (each == fewest, each)):
        outcome = tried[replicas]
        yield {
            "case": f"{rate:g} calls per second of {', '.join(f'{each:,}' for each in question.bytes)} bytes",
            "replicas": replicas,
            "enough": enough(replicas),
            "baseline": "the required p99",
            "ratio": round(question.p99 / outcome.within(0.99), 3),
            **{f"p{part}_ms": milliseconds(outcome.within(part / 100)) for part in (50, 99)},
            "rejections_per_call": round(outcome.rejections / CALLS, 4),
            "busy": round(outcome.busy / outcome.seconds / replicas, 3),
            "gbit_per_second_each": round(
                outcome.goodput * sum(question.bytes) / len(question.bytes) * 8e-9 / replicas, 3
            ),
        }


def milliseconds(seconds: float) -> float | None:
    """Return milliseconds; None for infinity."""
    return round(seconds * 1000, 2) if seconds < math.inf else None


def replay(row: dict[str, Any]) -> Outcome:
    """Simulate the same calls that a row of `python -m benchmarks load` sent."""
    kinds = []
    for number, (shape, layer) in enumerate(load.MIX):
        nbytes = 4 * (math.prod(shape) + math.prod(layer.output_shape(shape)))
        kinds.append(Call(0.0, row["mix_ms"][number] / 1000, nbytes, number if nbytes <= CPU_BATCHED_BYTES else None))
    calls = [
        replace(kinds[kind], at=at)
        for client in range(load.CLIENTS)
        for at, kind in load.arrivals(row["offered"] / load.CLIENTS, client)
    ]
    return Fleet(1, QueueLimits(max_queue_seconds=load.QUEUE_SECONDS)).serve(calls)


def compared(row: dict[str, Any]) -> dict[str, Any]:
    """Return the simulated values at a load, each with the measured one."""
    outcome = replay(row)
    p50, p99 = (outcome.answered[int(len(outcome.answered) * part)] for part in (0.5, 0.99))
    return {
        "case": row["case"],
        "baseline": "measured",
        "ratio": round(outcome.goodput / row["goodput"], 3),
        "goodput": round(outcome.goodput, 1),
        "measured_goodput": row["goodput"],
        "p50_ms": milliseconds(p50),
        "measured_p50_ms": row["accepted_p50_ms"],
        "p99_ms": milliseconds(p99),
        "measured_p99_ms": row["accepted_p99_ms"],
    }


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    """Return the rows: the answer to the command's question, or the simulation compared with the measurement."""
    if options.rate is None:
        return map(compared, read("load"))
    return answer(Question(**{each.name: getattr(options, each.name) for each in fields(Question)}))
