"""Charts in the style of the project's pictures: a title that says the finding, and labels next to what they name."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from poolrpc.command.drawing import Box, Dot, Drawing, Line, Text, to_svg
from poolrpc.command.plot import PlotAxis

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from poolrpc.command.drawing import Shape

WIDTH, MARGIN, LEFT, RIGHT = 480, 16, 60, 120
"""Pixels: the width of a chart, its margin, and the space for the labels of values and of curves."""

SMALL, NORMAL, LARGE = 12, 13, 16
"""Sizes of text in pixels."""

APART = 15
"""The least distance between the labels of two curves, in pixels."""

BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1, "B"))
TIMES = ((1e3, "s", 1e3), (1, "ms", 1), (0, "µs", 1e-3))


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve with its name at the end.

    Attributes:
        name: The name.
        points: Pairs of values.
        colour: The name of a colour.
        dashed: Whether it is dashed, as baselines are.
        ring: The point to mark; None for none.

    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False
    ring: tuple[float, float] | None = None


@dataclass
class Chart:
    """A drawing that grows from top to bottom.

    Attributes:
        title: What was found, as a sentence.
        subtitle: What was measured.

    """

    title: str
    subtitle: str
    shapes: list[Shape] = field(default_factory=list)
    y: float = 0

    def __post_init__(self) -> None:
        self.y = MARGIN + 14
        for line in textwrap.wrap(self.title, 44):
            self.text(MARGIN, self.y, line, LARGE, anchor="start", bold=True)
            self.y += 21
        for line in textwrap.wrap(self.subtitle, 60):
            self.text(MARGIN, self.y, line, NORMAL, "muted", "start")
            self.y += 18
        self.y += 6

    def text(  # noqa: PLR0913, PLR0917 - what a text has
        self,
        x: float,
        y: float,
        text: str,
        size: float = NORMAL,
        fill: str = "ink",
        anchor: str = "middle",
        *,
        bold: bool = False,
    ) -> None:
        """Add a line of text."""
        self.shapes.append(Text(round(x, 1), round(y, 1), text, size, fill, anchor, bold=bold))

    def curves(  # noqa: PLR0913 - what a panel has
        self,
        curves: Sequence[Curve],
        x_ticks: dict[float, str],
        y_ticks: dict[float, str],
        *,
        height: float,
        x_title: str = "",
        y_title: str = "",
        linear: bool = False,
        names: bool = True,
    ) -> tuple[PlotAxis, PlotAxis]:
        """Add a panel with curves, the names of which are at their ends, and return its axes; x is logarithmic."""
        self.y += 16
        if y_title:
            self.text(MARGIN, self.y, y_title, NORMAL, "muted", "start")
            self.y += 14
        xs = [x for curve in curves for x, _ in curve.points]
        x = PlotAxis(min(*xs, *x_ticks), max(xs), LEFT, WIDTH - RIGHT, log=True)
        y = PlotAxis(min(y_ticks), max(y_ticks), self.y + height, self.y, log=not linear)
        for value, label in y_ticks.items():
            at = y.place(value)
            self.shapes.append(Line(((LEFT, at), (WIDTH - RIGHT, at)), "edge"))
            self.text(LEFT - 8, at + 4, label, SMALL, "muted", "end")
        for value, label in x_ticks.items():
            self.text(x.place(value), self.y + height + 18, label, SMALL, "muted")
        labels = []
        for curve in curves:
            points = tuple((x.place(one), y.place(two)) for one, two in curve.points)
            self.shapes.append(Line(points, curve.colour, 2.5, curve.dashed))
            if not curve.dashed:
                self.shapes += [Dot(*point, 2.5, curve.colour) for point in points]
            labels.append((points[-1][1], curve))
        for curve in curves:
            if curve.ring:
                at = x.place(curve.ring[0]), y.place(curve.ring[1])
                self.shapes += [Dot(*at, 7, curve.colour), Dot(*at, 4, "paper")]
        for at, curve in spread(labels) if names else ():
            self.text(WIDTH - RIGHT + 8, at + 4, curve.name, NORMAL, curve.colour, "start", bold=True)
        self.y += height + 22
        if x_title:
            self.y += 16
            self.text((LEFT + WIDTH - RIGHT) / 2, self.y, x_title, NORMAL, "muted")
            self.y += 4
        return x, y

    def bars(self, rows: Iterable[tuple[str, float, str, str]], *, left: float, most: float) -> None:
        """Add bars: (name, value, its label, colour), with names in `left` pixels, up to the value `most`."""
        room = WIDTH - 2 * MARGIN - left - 74
        for name, value, label, colour in rows:
            self.y += 26
            width = max(1.5, value / most * room)
            self.text(MARGIN + left - 8, self.y, name, NORMAL, "ink", "end")
            self.shapes.append(Box(MARGIN + left, self.y - 14, round(width, 1), 18, colour, radius=2))
            self.text(MARGIN + left + width + 7, self.y, label, NORMAL, "ink", "start", bold=True)
        self.y += 10

    def heading(self, text: str) -> None:
        """Add the heading of a group of bars."""
        self.y += 26
        self.text(MARGIN, self.y, text, NORMAL, "muted", "start", bold=True)

    def note(self, text: str) -> None:
        """Add a remark."""
        self.y += 6
        for line in textwrap.wrap(text, 64):
            self.y += 17
            self.text(MARGIN, self.y, line, SMALL, "muted", "start")

    def svg(self) -> str:
        """Return the chart as SVG."""
        height = math.ceil(self.y + MARGIN)
        card = Box(0.5, 0.5, WIDTH - 1, height - 1, "paper", "edge", radius=8)
        return to_svg(Drawing(WIDTH, height, f"{self.title}. {self.subtitle}", (card, *self.shapes)))


def spread(labels: Iterable[tuple[float, Curve]]) -> list[tuple[float, Curve]]:
    """Return labels with their heights, moved apart so that none covers another."""
    ordered = sorted(labels, key=lambda each: each[0])
    heights = [at for at, _ in ordered]
    for _ in range(100):
        for one, two in pairwise(range(len(heights))):
            overlap = max(0, APART - (heights[two] - heights[one]))
            heights[one] -= overlap / 2
            heights[two] += overlap / 2
    return [(at, curve) for at, (_, curve) in zip(heights, ordered, strict=True)]


def size(nbytes: float) -> str:
    """Return a number of bytes as it is said: "602 KB", "6.4 MB"."""
    unit, name = next((unit, name) for unit, name in BYTES if nbytes >= unit)
    return f"{two_digits(nbytes / unit)} {name}"


def duration(ms: float) -> str:
    """Return a number of milliseconds as it is said: "85 µs", "1.4 ms", "2 s"."""
    _, name, unit = next(each for each in TIMES if ms >= each[0])
    return f"{two_digits(ms / unit)} {name}"


def times(ratio: float) -> str:
    """Return a ratio as it is said: "19×", "4.9×"."""
    return f"{two_digits(ratio)}×"


def two_digits(value: float) -> str:
    """Return a number with two digits, or more of a larger one: "0.94", "4.9", "19", "602"."""
    return f"{value:.{max(2, len(str(round(value))))}g}"


def decades(low: float, high: float) -> list[float]:
    """Return the powers of ten from one value to another, and those around them."""
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
