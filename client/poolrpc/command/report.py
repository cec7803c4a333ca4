"""What a load measured, as data for JSON and as lines for a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc.command.load import quantile
from poolrpc.tensors import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from poolrpc._transport.result import PoolResult
    from poolrpc.command.load import Load, LoadResult
    from poolrpc.tensors import Array

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
"""The parts of the calls whose latencies are reported."""

BARS, BAR_WIDTH = 12, 40
"""Bars of the histogram, and the characters of the longest."""

BUSY = 0.85
"""The share of a CPU from which a process that makes calls may be what limits them: it runs one thread at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadReport:
    """A load, and what it measured.

    Attributes:
        address: The address of the server.
        load: The load.
        processes: The number of processes that made the calls.
        answers: The results of the first call of each request.
        result: What became of the calls.

    """

    address: str
    load: Load
    processes: int
    answers: list[list[PoolResult]]
    result: LoadResult

    def input_bytes(self, request: int) -> int:
        """Return the size of a request's tensor."""
        return TensorSpec(self.load.dtype, self.load.requests[request][0]).nbytes

    def output_bytes(self, request: int) -> int:
        """Return the size of the tensors of a request's answer."""
        arrays = (each for result in self.answers[request] for each in (result.output, result.indices))
        return sum(each.nbytes for each in arrays if each is not None)

    def data(self) -> dict[str, Any]:
        """Return all figures, for JSON. Times are in seconds or, if their name says so, milliseconds."""
        load, result = self.load, self.result
        requests = [self._request(number) for number in range(len(load.requests))]
        sent, received = (
            sum(each["answered"] * each[name] for each in requests) / result.seconds
            for name in ("input_bytes", "output_bytes")
        )
        return {
            "address": self.address,
            "load": {
                "dtype": load.dtype,
                "layout": load.layout,
                "rate": load.rate,
                "concurrency": load.concurrency,
                "connections": load.connections,
                "processes": self.processes,
                "seconds": load.seconds,
                "warmup": load.warmup,
                "timeout": load.timeout,
                "checked": load.expected is not None,
            },
            "seconds": result.seconds,
            "answered": len(result.answered),
            "failed": int(result.failed.sum()),
            "unsent": result.unsent,
            "calls_per_second": result.rate,
            "sent_bytes_per_second": sent,
            "received_bytes_per_second": received,
            "latency_ms": _percentiles(result.answered),
            "late_ms": _percentiles(result.late),
            "errors": [
                {"kind": kind, "count": count, "message": result.messages[kind]}
                for kind, count in result.errors.items()
            ],
            "requests": requests,
            "client_cpus": result.cpus,
            "histogram": [{"from_ms": low, "to_ms": high, "calls": calls} for low, high, calls in self._histogram()],
        }

    def _request(self, number: int) -> dict[str, Any]:
        shape, branches = self.load.requests[number]
        latencies = self.result.latency[~self.result.failed & (self.result.request == number)]
        return {
            "shape": shape,
            "branches": [[repr(layer) for layer in chain] for chain in branches],
            "transport": self.answers[number][0].transport,
            "input_bytes": self.input_bytes(number),
            "output_bytes": self.output_bytes(number),
            "answered": len(latencies),
            "latency_ms": _percentiles(latencies),
        }

    def _histogram(self) -> list[tuple[float, float, int]]:
        answered = self.result.answered * 1000
        if not len(answered):
            return []
        low, high = answered.min(), answered.max()
        inner = np.geomspace(low, high, BARS + 1)[1:-1] if high > low * 1.1 else ()
        edges = np.array([low, *inner, high])
        counts, _ = np.histogram(answered, edges)
        return [
            (low, high, count) for (low, high), count in zip(pairwise(edges.tolist()), counts.tolist(), strict=True)
        ]

    def text(self) -> list[str]:
        """Return the figures as lines."""
        data, load, result = self.data(), self.load, self.result
        processes = _count(self.processes, "process")
        calls = f"{load.concurrency} at a time" if load.rate is None else f"{load.rate:g} per second are due"
        lines = [
            *(line for each in data["requests"] for line in self._request_lines(each)),
            f"calls: {calls}, {load.seconds:g} s, {_count(load.connections, 'connection')}, {processes}",
            "",
            f"answered   {len(result.answered):,}, {number(result.rate)} per second"
            + (", all as the first" if load.expected is not None and not data["failed"] else ""),
            f"sent       {number(data['sent_bytes_per_second'] / 1e6)} MB/s",
            f"received   {number(data['received_bytes_per_second'] / 1e6)} MB/s",
            f"latency    {_spelled(data['latency_ms'])}",
        ]
        if load.rate is not None:
            lines.append(f"  of that, before the call was sent: {_spelled(data['late_ms'])}")
        lines.append(f"client     {result.cpus:.2f} CPUs")
        for each in data["errors"]:
            message = " ".join(each["message"].split())
            lines.append(f"failed     {each['count']:,} {each['kind']}: {message}")
        lines += self._remarks()
        if bars := self._histogram():
            lines += ["", *_bars(bars)]
        return lines

    def _request_lines(self, request: dict[str, Any]) -> Iterator[str]:
        chains = [each[0] if len(each) == 1 else f"[{', '.join(each)}]" for each in request["branches"]]
        shape = "x".join(map(str, request["shape"]))
        yield (
            f"{' and '.join(chains)} of {self.load.dtype} {shape}: {number(request['input_bytes'] / 1e6)} MB, "
            f"answered with {number(request['output_bytes'] / 1e6)} MB, {request['transport']}"
        )
        if len(self.load.requests) > 1:
            yield f"  {request['answered']:,} answered: {_spelled(request['latency_ms'])}"

    def _remarks(self) -> Iterator[str]:
        load, result = self.load, self.result
        if result.unsent:
            yield (
                f"not sent   {result.unsent:,} calls that were due, since {load.concurrency} were in flight: the "
                "latencies are those of a smaller load"
            )
        if result.busiest > BUSY:
            yield (
                f"note       a process that makes calls used {result.busiest:.2f} CPUs, and may have limited them: use "
                "more --processes"
            )


def _percentiles(seconds: Array) -> dict[str, float | None]:
    if not len(seconds):
        return dict.fromkeys(PERCENTILES)
    return {name: quantile(seconds, part) * 1000 for name, part in PERCENTILES.items()}


def _spelled(percentiles: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {'-' if ms is None else f'{number(ms)} ms'}" for name, ms in percentiles.items())


def number(value: float) -> str:
    """Return a number with three digits or more."""
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0  # noqa: PLR2004 - powers of ten
    return f"{value:,.{digits}f}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 'es' if what.endswith('s') else 's'}"


def _bars(histogram: list[tuple[float, float, int]]) -> list[str]:
    most = max(calls for _, _, calls in histogram)
    limits = [f"{number(low)} to {number(high)} ms" for low, high, _ in histogram]
    width = max(map(len, limits))
    return [
        f"{limit:>{width}} | {'#' * -(-calls * BAR_WIDTH // most)} {calls or ''}".rstrip()
        for limit, (_, _, calls) in zip(limits, histogram, strict=True)
    ]
