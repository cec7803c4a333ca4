"""A load's latencies and calls per second, drawn as SVG in the style of all pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from poolrpc.command.drawing import Box, Drawing, Line, Text, to_svg
from poolrpc.command.load import quantile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from poolrpc.command.drawing import Shape
    from poolrpc.command.load import LoadResult

    Points = list[tuple[float, float]]
    Labels = list[tuple[float, str]]

WIDTH, HEIGHT, LEFT, GAP = 400, 150, 58, 70
"""Size of a panel in pixels, its distance from the left, and from the one above; narrow, to be legible on a phone."""

COLOURS = ("teal", "rose")
CURVE = 2
"""The thickness of a curve, in pixels; lines of the grid are thinner."""

INTERVALS = 40
"""Points of the curves over time."""

NINES = 6
"""The percentiles are drawn up to 99.9999 %, each nine as wide as the first 90 %."""


@dataclass(frozen=True, slots=True)
class PlotAxis:
    """A linear or logarithmic axis.

    Attributes:
        low: The least value.
        high: The largest value.
        start: The pixel of the least value.
        end: The pixel of the largest value.
        log: Whether the axis is logarithmic.

    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        part = ((math.log(max(value, self.low)) if self.log else value) - low) / ((high - low) or 1)
        return round(self.start + part * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Return the values to label: 1, 2 and 5 times powers of ten, or about five at equal distances."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            few = len(powers) > 4  # noqa: PLR2004 - more labels would overlap
            values = [digit * 10.0**power for power in powers for digit in ((1,) if few else (1, 2, 5))]
            return [value for value in values if self.low <= value <= self.high]
        rough = (self.high - self.low) / 5 or 1
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999)
        return [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def svg(title: str, result: LoadResult) -> str:
    """Return a drawing: the latency by percentile; the latencies and the answered calls per second over time."""
    times, latencies = (result.due + result.latency)[~result.failed], result.answered * 1000
    edges = np.linspace(0, result.seconds, INTERVALS + 1)
    groups = np.digitize(times, edges[1:-1])
    middle = ((edges[1:] + edges[:-1]) / 2).tolist()
    width = result.seconds / INTERVALS
    rates = [(at, int((groups == number).sum()) / width) for number, at in enumerate(middle)]
    over_time = {
        name: [
            (at, quantile(latencies[groups == number], part))
            for number, at in enumerate(middle)
            if (groups == number).any()
        ]
        for name, part in (("p50", 0.5), ("p99", 0.99))
    }
    nines = min(NINES, max(1.0, math.log10(max(len(latencies), 1))))
    positions = np.linspace(0, nines, 300).tolist() if len(latencies) else []
    by_percentile = [(each, quantile(latencies, 1 - 10**-each)) for each in positions]
    percent = {0.0: "0", math.log10(2): "50"} | {
        float(each): f"{100 - 10.0 ** (2 - each):.12g}" for each in range(1, 7)
    }
    ticks = [(at, f"{name} %") for at, name in percent.items() if at <= nines]
    seconds = PlotAxis(0, result.seconds, LEFT, LEFT + WIDTH)
    time_ticks = [(each, f"{each:g} s") for each in seconds.ticks()]
    percentiles = PlotAxis(0, nines, LEFT, LEFT + WIDTH)
    tops = [GAP + number * (HEIGHT + GAP) for number in range(3)]
    panels = [
        *_panel(tops[0], "latency by percentile, ms", {"": by_percentile}, percentiles, ticks, log=True),
        *_panel(tops[1], "latency over time, ms", over_time, seconds, time_ticks, log=True),
        *_panel(tops[2], "calls answered per second", {"": rates}, seconds, time_ticks, log=False),
    ]
    right, bottom = LEFT + WIDTH + 30, tops[-1] + HEIGHT + 34
    card = Box(0.5, 0.5, right - 1, bottom - 1, "paper", "edge", radius=8)
    heading = Text(LEFT, 26, title, min(15, WIDTH / (0.65 * len(title))), anchor="start", bold=True)  # in one line
    return to_svg(Drawing(right, bottom, title, (card, heading, *panels)))


def _panel(  # noqa: PLR0913 - what a panel has
    top: float, title: str, curves: dict[str, Points], x: PlotAxis, x_ticks: Labels, *, log: bool
) -> Iterator[Shape]:
    values = [value for points in curves.values() for _, value in points] or [1.0]
    y = PlotAxis(min(values) * 0.9 if log else 0, max(values) * 1.1 or 1, top + HEIGHT, top, log)
    yield Text(LEFT, top - 10, title, 13, "muted", "start")
    for value in y.ticks():
        at = y.place(value)
        yield Line(((LEFT, at), (LEFT + WIDTH, at)), "edge")
        yield Text(LEFT - 8, at + 4, f"{value:,g}", 12, "muted", "end")
    for value, label in x_ticks:
        yield Text(x.place(value), top + HEIGHT + 18, label, 12, "muted")
    for number, (name, points) in enumerate(curves.items()):
        yield Line(tuple((x.place(one), y.place(two)) for one, two in points), COLOURS[number], CURVE)
        if name:
            yield Text(LEFT + WIDTH - 44 * number, top - 10, name, 13, COLOURS[number], "end", bold=True)
