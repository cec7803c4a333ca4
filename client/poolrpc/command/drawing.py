"""Drawings of boxes, lines and text, still or moving, as SVG; raster.py draws the same as pixels.

All pictures of the project are made of these, in one palette: each colour has a light and a dark value, and an SVG
takes the one that its viewer prefers.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#171c24"),
    "ink": ("#17212b", "#e8edf2"),
    "muted": ("#566472", "#9dabb8"),
    "edge": ("#b4c0ca", "#46535f"),
    "cell": ("#f3f6f8", "#222b35"),
    "window": ("#ffe2ae", "#6b4a12"),
    "chosen": ("#f7ab2e", "#a96a05"),
    "amber": ("#a14a06", "#fbbf24"),
    "output": ("#d3f0ea", "#134e48"),
    "teal": ("#0f766e", "#2dd4bf"),
    "blue": ("#1d4ed8", "#7ea6ff"),
    "rose": ("#be123c", "#fb7f93"),
    "violet": ("#6d28d9", "#b79cff"),
    "green": ("#4d7c0f", "#a3d65c"),
}
"""The light and the dark value of each colour, by its name."""

SANS = '-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif'
MONO = 'ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace'

SECONDS = 1.6
"""The time that a moving drawing shows each frame, in seconds."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle, in pixels from the top left; the colours are names of PALETTE, or empty for none."""

    x: float
    y: float
    width: float
    height: float
    fill: str = ""
    stroke: str = ""
    thickness: float = 1
    dashed: bool = False
    radius: float = 3


@dataclass(frozen=True, slots=True)
class Text:
    """A line of text, whose baseline is at `y`; the anchor is start, middle or end."""

    x: float
    y: float
    text: str
    size: float = 14
    fill: str = "ink"
    anchor: str = "middle"
    bold: bool = False
    mono: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A line through points."""

    points: tuple[tuple[float, float], ...]
    stroke: str = "ink"
    thickness: float = 1
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Dot:
    """A disc."""

    x: float
    y: float
    radius: float
    fill: str = "ink"


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file in an SVG, scaled to a size in pixels; unless it is smooth, its own pixels are seen as squares."""

    x: float
    y: float
    width: float
    height: float
    uri: str
    smooth: bool = False


Shape = Box | Text | Line | Dot | Picture


@dataclass(frozen=True, slots=True)
class Drawing:
    """A drawing.

    Attributes:
        width: Its width in pixels.
        height: Its height in pixels.
        title: What it shows, for screen readers.
        shapes: Its shapes, the ones behind first.
        frames: Shapes that are shown in turn, in front of the others; the last frame alone where nothing moves.

    """

    width: float
    height: float
    title: str
    shapes: tuple[Shape, ...]
    frames: tuple[tuple[Shape, ...], ...] = ()

    @property
    def seconds(self) -> float:
        """The duration of all frames; the last one is shown for twice as long as the others."""
        return SECONDS * (len(self.frames) + 1)


def to_svg(drawing: Drawing) -> str:
    """Return a drawing as SVG, whose colours are light or dark as the viewer prefers."""
    width, height = number(drawing.width), number(drawing.height)
    title = escape(drawing.title, quote=False)
    used = _colours([drawing.shapes, *drawing.frames])
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"',
        f'role="img" aria-labelledby="title"><title id="title">{title}</title>',
        "<style>",
        f"text{{font-family:{SANS}}}.mono{{font-family:{MONO}}}.bold{{font-weight:600}}",
        _rules(used, 0),
        f"@media(prefers-color-scheme:dark){{{_rules(used, 1)}}}",
        *(_motion(drawing) if drawing.frames else ()),
        "</style>",
        *map(_element, drawing.shapes),
    ]
    for i, frame in enumerate(drawing.frames):
        last = " last" if i == len(drawing.frames) - 1 else ""
        # A delay below 0 starts in the middle of the cycle, so that one frame is visible from the start on.
        delay = SECONDS * i - drawing.seconds
        lines += [f'<g class="frame{last}" style="animation-delay:{number(delay)}s">', *map(_element, frame), "</g>"]
    return "\n".join([*lines, "</svg>\n"])


def _colours(groups: Iterable[Sequence[Shape]]) -> list[tuple[str, str]]:
    """Return which property has which colour, such as ("fill", "ink")."""
    return sorted(
        {
            (prop, name)
            for shapes in groups
            for shape in shapes
            for prop in ("fill", "stroke")
            if (name := getattr(shape, prop, ""))
        }
    )


def _rules(used: Iterable[tuple[str, str]], scheme: int) -> str:
    return "".join(f".{prop[0]}-{name}{{{prop}:{PALETTE[name][scheme]}}}" for prop, name in used)


def _motion(drawing: Drawing) -> list[str]:
    share = 100 / (len(drawing.frames) + 1)
    cycle = f"{number(drawing.seconds)}s step-end infinite"
    return [
        ".frame{visibility:hidden}.last{visibility:visible}",
        f"@media(prefers-reduced-motion:no-preference){{.frame{{animation:each {cycle}}}.last{{animation-name:last}}}}",
        f"@keyframes each{{0%{{visibility:visible}}{share:.7g}%{{visibility:hidden}}}}",
        f"@keyframes last{{0%{{visibility:visible}}{2 * share:.7g}%{{visibility:hidden}}}}",
    ]


def _element(shape: Shape) -> str:
    match shape:
        case Box():
            place = f'x="{number(shape.x)}" y="{number(shape.y)}" rx="{number(shape.radius)}"'
            size = f'width="{number(shape.width)}" height="{number(shape.height)}"'
            return f"<rect {place} {size}{_look(shape)}/>"
        case Text():
            anchor = "" if shape.anchor == "start" else f' text-anchor="{shape.anchor}"'
            place = f'x="{number(shape.x)}" y="{number(shape.y)}" font-size="{number(shape.size)}"'
            return f"<text {place}{anchor}{_look(shape)}>{escape(shape.text, quote=False)}</text>"
        case Line():
            points = " ".join(f"{number(x)},{number(y)}" for x, y in shape.points)
            return f'<polyline points="{points}" stroke-linejoin="round" stroke-linecap="round"{_look(shape)}/>'
        case Dot():
            return f'<circle cx="{number(shape.x)}" cy="{number(shape.y)}" r="{number(shape.radius)}"{_look(shape)}/>'
        case Picture():
            place = f'x="{number(shape.x)}" y="{number(shape.y)}"'
            size = f'width="{number(shape.width)}" height="{number(shape.height)}"'
            look = "" if shape.smooth else ' style="image-rendering:pixelated"'
            return f'<image {place} {size}{look} href="{shape.uri}"/>'


def _look(shape: Box | Text | Line | Dot) -> str:
    fill, stroke = getattr(shape, "fill", ""), getattr(shape, "stroke", "")
    classes = [f"f-{fill}"] * bool(fill) + [f"s-{stroke}"] * bool(stroke)
    classes += [each for each in ("bold", "mono") if getattr(shape, each, False)]
    look = f' class="{" ".join(classes)}"' + ("" if fill else ' fill="none"')
    thickness = getattr(shape, "thickness", 1)
    if stroke and thickness != 1:
        look += f' stroke-width="{number(thickness)}"'
    return look + (' stroke-dasharray="4 3"' if getattr(shape, "dashed", False) else "")


def number(value: float) -> str:
    """Return a number of pixels with at most two digits after the point."""
    return f"{round(value, 2):.10g}"
