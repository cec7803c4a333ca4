"""Explanations as pictures, in files."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

from poolrpc.command.drawing import to_svg
from poolrpc.command.explain import format_terms
from poolrpc.command.files import replacing
from poolrpc.command.picture import Scene, Step, draw
from poolrpc.command.raster import encode_drawing
from poolrpc.errors import InvalidArgumentError

if TYPE_CHECKING:
    from pathlib import Path

    from poolrpc.command.explain import Explanation, Window

MAX_FAMILIES = ("max_pool", "adaptive_max_pool")

PICTURE_SUFFIXES = (".svg", ".png", ".gif")
"""Suffixes of pictures."""


def save_picture(
    path: Path, explanation: Explanation, windows: int, *, moving: bool = False, dark: bool = False
) -> None:
    """Write the picture of an explanation to a file.

    Args:
        path: The file; its suffix, one of PICTURE_SUFFIXES, selects the format.
        explanation: What to show.
        windows: The number of windows that are shown, at most.
        moving: Show the windows one after the other in the same place; a GIF always does.
        dark: Use the dark colours; an SVG has both.

    Raises:
        InvalidArgumentError: The format is another one, or lacks what is chosen; or the plane is too large.
        OSError: The file can't be written.

    """
    suffix = path.suffix.lower()
    if suffix not in PICTURE_SUFFIXES:
        raise InvalidArgumentError(
            f"expected the suffix {', '.join(PICTURE_SUFFIXES)}, got {path.suffix!r}", field="save"
        )
    if moving and suffix == ".png":
        raise InvalidArgumentError("expected .svg or .gif for a picture that moves, got '.png'", field="animate")
    if dark and suffix == ".svg":
        msg = "expected .png or .gif, since a .svg has both light and dark colours, got '.svg'"
        raise InvalidArgumentError(msg, field="dark")
    drawing = draw(scene(explanation, windows), moving=moving or suffix == ".gif")
    data = to_svg(drawing).encode() if suffix == ".svg" else encode_drawing(drawing, suffix, dark=dark)
    with replacing(path) as file:
        file.write(data)


def scene(explanation: Explanation, windows: int) -> Scene:
    """Return what a picture of an explanation shows, with this number of windows at most."""
    layer = explanation.layer
    is_max = layer.family in MAX_FAMILIES or getattr(layer, "reduce", "") == "max"
    counted = "0" if getattr(layer, "count_include_pad", False) else ""
    return Scene(
        repr(layer),
        explanation.plane,
        explanation.output,
        tuple(_step(explanation, window, is_max=is_max) for window in explanation.windows[:windows]),
        "−∞" if is_max else counted,
        tuple(explanation.unvisited.values()),
    )


def _step(explanation: Explanation, window: Window, *, is_max: bool) -> Step:
    layer: object = explanation.layer.resolved(explanation.plane.shape)
    spans = [(each.positions[0], each.positions[-1] + 1) for each in window.axes]
    if hasattr(layer, "geometry"):
        # With ceil_mode the last window may extend beyond the cells.
        spans = [
            (start, start + dilation * (kernel - 1) + 1)
            for (start, _), (kernel, _, _, _, dilation) in zip(spans, layer.geometry(), strict=True)
        ]
    cells = tuple(product(*(each.positions for each in window.axes)))
    inside = list(product(*(each.inside for each in window.axes)))
    chosen, text = None, window.how
    if is_max and inside:
        values = [float(explanation.plane[index]) for index in inside]
        text = f"max({format_terms(values, ', ')}) = {format_terms([window.value], '')}"
        # As in torch, the first of equal cells, but the last NaN.
        equal = [i for i, v in zip(inside, values, strict=True) if v == window.value or math.isnan(v)]
        chosen = equal[-1 if math.isnan(window.value) else 0]
    return Step(window.index, cells, tuple(spans), window.value, text, chosen)
