"""The figures of the docs, from benchmarks/results/: each is drawn by one function."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.charts import (
    MARGIN,
    SMALL,
    WIDTH,
    Chart,
    Curve,
    decades,
    duration,
    size,
    times,
)
from poolrpc.command.drawing import Dot, Line
from poolrpc.command.plot import PlotAxis

if TYPE_CHECKING:
    from collections.abc import Callable

Rows = list[dict[str, Any]]

RESULTS = Path(__file__).parent / "results"

TRANSPORTS = {
    "auto": ("TCP", "blue"),
    "arena": ("gRPC, arena", "violet"),
    "local": ("local", "teal"),
    "local, no copies": ("local, in place", "green"),
}
"""Transports of a single call that are drawn, with their names and colours."""

EVEN = {"local": "on one machine", "auto": "over TCP"}
"""Where a transport is used, for those whose break-even the title names."""

ENDINGS = {
    "good: right": ("undisturbed: right", "teal"),
    "good: unavailable": ("undisturbed: unavailable", "amber"),
    "cancelled: allowed": ("cancelled", "edge"),
    "cancelled: right": ("cancelled too late: right", "teal"),
    "bad: right": ("invalid: rejected", "teal"),
    "short: allowed": ("deadline exceeded", "edge"),
    "short: right": ("short deadline: right", "teal"),
    "short: unavailable": ("short deadline: unavailable", "amber"),
}
"""How calls of the soak end, with their names and colours."""

WAYS = {
    "level one": "level one alone",
    "five calls": "five calls",
    "five branches": "five branches",
    "torch": "torch",
    "numpy": "NumPy",
    "tinybrain": "tinybrain",
}
"""What a pyramid is compared with, by its name in the results."""


def read(name: str) -> Rows:
    """Return the rows of a benchmark."""
    rows: Rows = json.loads((RESULTS / f"{name}.json").read_text())
    return rows


def kernels() -> str:
    """Every case of the kernels by its group, and the geometric mean of each group."""
    rows = read("kernels")
    means = {row["case"].removeprefix("geometric mean: "): row for row in rows if "cases" in row}
    cases = [row for row in rows if "group" in row]
    chart = Chart(
        f"Max pooling runs at {times(means['max']['ratio'])} the speed of eager torch, averages at "
        f"{times(means['average']['ratio'])}",
        "One thread; a dot is a case, hollow if the plan chose eager torch; on the right the mean",
    )
    left = 186
    high = max(row["ratio"] for row in cases)
    axis = PlotAxis(min(0.7, *(row["ratio"] for row in cases)), high, left, WIDTH - 64, log=True)
    top = chart.y + 14
    for value in (1, 3, 10, 30, 100):
        if value <= high:
            at = axis.place(value)
            bottom = top + 12 + 22 * len(means)
            chart.shapes.append(Line(((at, top + 8), (at, bottom)), "ink" if value == 1 else "edge"))
            chart.text(at, top, f"{value}×", SMALL, "ink" if value == 1 else "muted", bold=value == 1)
    chart.y = top + 6
    for group, mean in sorted(means.items(), key=lambda each: -each[1]["ratio"]):
        chart.y += 22
        chart.text(left - 16, chart.y, group, anchor="end")
        for row in (each for each in cases if each["group"] == group):
            at = axis.place(row["ratio"])
            eager = row["kernel"] == "eager torch"
            chart.shapes.append(Dot(at, chart.y - 4, 4, "muted" if eager else "teal"))
            if eager:
                chart.shapes.append(Dot(at, chart.y - 4, 2.5, "paper"))
        chart.text(WIDTH - MARGIN, chart.y, times(mean["ratio"]), anchor="end", bold=True)
    chart.y += 8
    return chart.svg()


def transport() -> str:
    """The time of a call by its size and transport, and where each becomes faster than torch in the same process."""
    rows = [row for row in read("transport") if row["case"].startswith("MaxPool2d")]
    even = {name: break_even(rows, name) for name in TRANSPORTS}
    found = [f"{where} from {size(even[name])}" for name, where in EVEN.items() if even.get(name)]
    chart = Chart(
        f"A call beats torch in the caller's own process: {' and '.join(found)}"
        if found
        else "No call beats torch in the caller's own process",
        "MaxPool2d(2) of float32, one compute thread on each side; a ring marks the first size that is faster",
    )
    curves = []
    for name, (label, colour) in TRANSPORTS.items():
        of = points(rows, name)
        ring = next((point for point in of if point[0] == even[name]), None)
        if of:
            curves.append(Curve(label, of, colour, ring=ring))
    for baseline, label, colour in (("torch", "local torch", "ink"), ("plain server", "a plain server", "muted")):
        of = [
            (row["bytes"], row["baseline_ms"])
            for row in rows
            if row["contender"] == "unary" and row["baseline"] == baseline
        ]
        curves.append(Curve(label, of, colour, dashed=True))
    values = [y for curve in curves for _, y in curve.points]
    low, high = min(row["bytes"] for row in rows), max(row["bytes"] for row in rows)
    sizes = [x for x in decades(low, high) if low <= x <= high]
    chart.curves(
        curves,
        {x: size(x) for x in sizes},
        {y: duration(y) for y in decades(min(values), max(values))},
        height=330,
        x_title="input",
        y_title="time of a call",
    )
    return chart.svg()


def points(rows: Rows, name: str) -> list[tuple[float, float]]:
    """Return the times of a transport by size."""
    return [(row["bytes"], row["ms"]) for row in rows if row["contender"] == name and row["baseline"] == "torch"]


def break_even(rows: Rows, name: str) -> int | None:
    """Return the smallest size from which on a transport is faster than torch; None if there is none."""
    ratios = {row["bytes"]: row["ratio"] for row in rows if row["contender"] == name and row["baseline"] == "torch"}
    slower = [each for each, ratio in ratios.items() if ratio < 1]
    return min((each for each in ratios if each > max(slower, default=0)), default=None)


def local() -> str:
    """How many times as fast as gRPC on the same socket calls by the local transport are, by size."""
    rows = [row for row in read("transport") if row["baseline"] == "unix unary"]
    sizes = sorted({row["bytes"] for row in rows if row["case"].startswith("MaxPool2d")})
    ratio = {(row["bytes"], row["contender"]): row["ratio"] for row in rows if row["case"].startswith("MaxPool2d")}
    chart = Chart(
        f"On one machine the local transport is {times(min(ratio[n, 'local'] for n in sizes))} to "
        f"{times(max(ratio[n, 'local'] for n in sizes))} as fast as gRPC",
        "MaxPool2d(2) of float32; both on the same unix socket; by the size of the input",
    )
    most = max(ratio.values())
    chart.heading("the input is copied into shared memory")
    chart.bars(((size(n), ratio[n, "local"], times(ratio[n, "local"]), "teal") for n in sizes), left=66, most=most)
    chart.heading("the input is in shared memory already, client.empty()")
    chart.bars(
        (
            (size(n), ratio[n, "local, no copies"], times(ratio[n, "local, no copies"]), "green")
            for n in sizes
            if (n, "local, no copies") in ratio
        ),
        left=66,
        most=most,
    )
    return chart.svg()


def load() -> str:
    """The throughput and the latencies over the load."""
    rows = [row for row in read("load") if row.get("transport", "grpc") == "grpc"]
    last, capacity = rows[-1], rows[0]["capacity"]
    chart = Chart(
        f"At {last['offered'] / capacity:.0f} times its capacity the server keeps "
        f"{last['ratio']:.0%} of its throughput",
        "Calls at random times, no retries; what is over the capacity is rejected at once",
    )
    marks = {
        row["offered"]: f"{row['case'].split()[0]}×"
        for row in rows
        if row["case"].split()[0] != "0.8"  # no room
    }
    top = nice(max(row["goodput"] for row in rows))
    x, y = chart.curves(
        [Curve("right answers", [(row["offered"], row["goodput"]) for row in rows], "teal")],
        marks,
        {0: "0", top / 2: f"{top / 2:g}", top: f"{top:g}"},
        height=130,
        y_title="right answers per second",
        linear=True,
        names=False,
    )
    chart.shapes.append(Line(((x.place(capacity), y.start), (x.place(capacity), y.end)), "muted", 1, dashed=True))
    chart.text(x.place(capacity) - 6, y.start - 8, "capacity", SMALL, "muted", "end")
    latencies = [
        Curve(label, found, colour)
        for key, label, colour in (
            ("accepted_p99_ms", "accepted, p99", "blue"),
            ("accepted_p50_ms", "accepted, p50", "teal"),
            ("rejected_p99_ms", "rejected, p99", "rose"),
            ("rejected_p50_ms", "rejected, p50", "amber"),
        )
        if (found := [(row["offered"], row[key]) for row in rows if row[key]])
    ]
    values = [y for curve in latencies for _, y in curve.points]
    chart.curves(
        latencies,
        marks,
        {y: duration(y) for y in decades(min(values), max(values))},
        height=210,
        x_title="load, in multiples of the capacity",
        y_title="latency",
    )
    return chart.svg()


def nice(value: float) -> float:
    """Return the least of 2, 4, 5 and 10 times a power of ten that is not below a value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(digit * power for digit in (1, 2, 4, 5, 10) if digit * power >= value)


def soak() -> str:
    """How the calls of the soak ended."""
    row = read("soak")[0]
    none = [name for name in ("wrong", "late", "lost") if not row[name]]
    some = [
        f"{len(row['wrong']) if name == 'wrong' else row[name]} {name}"
        for name in ("wrong", "late", "lost")
        if row[name]
    ]
    chart = Chart(
        f"{row['calls']:,} calls among faults: {', '.join([f'none {each}' for each in none] + some)}",
        f"{row['case']}: {row['clients_killed']:,} clients and {row['workers_killed']:,} workers killed, "
        f"{row['connections_cut']:,} connections cut",
    )
    endings = {key: (row["came"][key], *ENDINGS.get(key, (key, "rose"))) for key in row["came"]}
    most = max(count for count, _, _ in endings.values())
    order = sorted(endings.values(), key=lambda each: -each[0])
    chart.bars(((name, count, f"{count:,}", colour) for count, name, colour in order), left=196, most=most)
    chart.note("teal: as expected; grey: what the caller wanted; amber: UNAVAILABLE after the retries")
    return chart.svg()


def pyramid() -> str:
    """How many times as fast as other ways a pyramid in one call is."""
    groups: dict[str, Rows] = {}
    for row in read("pyramid"):
        if row["baseline"] in WAYS and row["contender"] == "pool_steps":
            groups.setdefault(row["case"], []).append(row)
    alone = [1 / row["ratio"] for rows in groups.values() for row in rows if row["baseline"] == "level one"]
    chart = Chart(
        f"Five levels of a pyramid take {min(alone):.1f} to {max(alone):.1f} times as long as the first one alone",
        "client.pool_steps, in shared memory: how many times as fast as each other way",
    )
    most = max(row["ratio"] for rows in groups.values() for row in rows)
    for case, rows in groups.items():
        what, _, shape = case.partition(" of ")
        chart.heading(f"{what} of {shape.replace('x', ' × ').split(',')[0]}")
        chart.bars(
            (
                (WAYS[row["baseline"]], row["ratio"], times(row["ratio"]), "teal" if row["ratio"] >= 1 else "amber")
                for row in rows
            ),
            left=120,
            most=most,
        )
    return chart.svg()


FIGURES: dict[str, Callable[[], str]] = {
    each.__name__: each for each in (kernels, transport, local, load, soak, pyramid)
}
"""The function that draws each figure, by its name."""
