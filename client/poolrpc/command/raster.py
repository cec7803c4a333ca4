"""Drawings as PNG and GIF, with Pillow and the fonts of matplotlib."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolrpc.command.drawing import PALETTE, SECONDS, Box, Dot, Line, Picture, Text
from poolrpc.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from poolrpc.command.drawing import Drawing, Shape

SCALE = 2
"""Pixels of the image for each of the drawing."""

SAMPLES = 2
"""Lines are drawn with this many pixels for each of the image in both directions, so that slanted ones are smooth."""


def encode_drawing(drawing: Drawing, suffix: str, *, dark: bool = False) -> bytes:
    """Return a drawing as an image file.

    Args:
        drawing: The drawing; one with frames becomes a GIF that repeats, or the PNG of its last frame.
        suffix: ".png" or ".gif".
        dark: Use the dark colours.

    Raises:
        InvalidArgumentError: Pillow or matplotlib is not installed.

    """
    frames = drawing.frames if suffix == ".gif" and drawing.frames else (*drawing.frames[-1:],) or ((),)
    images = [_image(drawing, frame, dark=dark) for frame in frames]
    encoded = io.BytesIO()
    if suffix == ".gif":
        times = [int(SECONDS * 1000)] * (len(images) - 1) + [int(SECONDS * 2000)]
        images[0].save(encoded, "GIF", save_all=True, append_images=images[1:], duration=times, loop=0, disposal=1)
    else:
        images[0].save(encoded, "PNG")
    return encoded.getvalue()


def _image(drawing: Drawing, frame: Iterable[Shape], *, dark: bool) -> Any:  # noqa: ANN401 - Pillow is optional
    image, draw, _ = _modules()
    factor = SCALE * SAMPLES
    size = (round(drawing.width * factor), round(drawing.height * factor))
    canvas = image.new("RGB", size, PALETTE["paper"][dark])
    pen = draw.Draw(canvas)
    for shape in (*drawing.shapes, *frame):
        _paint(pen, shape, factor, dark=dark)
    return canvas.resize((size[0] // SAMPLES, size[1] // SAMPLES), image.Resampling.BOX)


def _paint(pen: Any, shape: Shape, factor: int, *, dark: bool) -> None:  # noqa: ANN401 - Pillow is optional
    fill, stroke = (PALETTE[name][dark] if (name := getattr(shape, key, "")) else None for key in ("fill", "stroke"))
    width = max(1, round(getattr(shape, "thickness", 1) * factor))
    match shape:
        case Box():
            corners = [shape.x, shape.y, shape.x + shape.width, shape.y + shape.height]
            # In SVG half of a line is outside of its box, in Pillow all of it is inside.
            grown = shape.thickness / 2 if stroke else 0
            low, high = (
                [(each - grown) * factor for each in corners[:2]],
                [(each + grown) * factor for each in corners[2:]],
            )
            border = None if shape.dashed else stroke
            if fill or border:  # without both, Pillow draws a white border
                pen.rounded_rectangle([*low, *high], shape.radius * factor, fill, border, width)
            if shape.dashed and stroke:
                left, top, right, bottom = corners
                ring = ((left, top), (right, top), (right, bottom), (left, bottom), (left, top))
                _dashes(pen, ring, stroke, width, factor)
        case Line():
            if shape.dashed:
                _dashes(pen, shape.points, stroke, width, factor)
            else:
                pen.line([(x * factor, y * factor) for x, y in shape.points], stroke, width, joint="curve")
        case Dot():
            pen.circle((shape.x * factor, shape.y * factor), shape.radius * factor, fill)
        case Text():
            anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
            pen.text((shape.x * factor, shape.y * factor), shape.text, fill, _font(shape, factor), anchor)
        case Picture():
            raise NotImplementedError("only SVG has pictures in pictures")


def _dashes(pen: Any, points: Iterable[tuple[float, float]], stroke: str | None, width: int, factor: int) -> None:  # noqa: ANN401 - Pillow is optional
    for (x, y), (end_x, end_y) in pairwise(points):
        length = max(abs(end_x - x), abs(end_y - y))
        at = 0.0
        while at < length:
            until = min(at + 4, length)
            ends = [(x + (end_x - x) * part / length, y + (end_y - y) * part / length) for part in (at, until)]
            pen.line([(one * factor, two * factor) for one, two in ends], stroke, width)
            at += 7


def _font(text: Text, factor: int) -> Any:  # noqa: ANN401 - Pillow is optional
    _, _, font = _modules()
    import matplotlib as mpl  # noqa: PLC0415 - optional; _modules checks that it is there

    name = ("DejaVuSansMono" if text.mono else "DejaVuSans") + ("-Bold" if text.bold else "")
    # DejaVu is wider than the fonts of screens.
    return font.truetype(Path(mpl.get_data_path()) / f"fonts/ttf/{name}.ttf", round(text.size * factor * 0.92))


def _modules() -> tuple[Any, Any, Any]:
    try:
        import matplotlib as mpl  # noqa: F401, PLC0415 - optional, and only pictures of pixels need it
        from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415 - the same
    except ImportError:
        msg = "expected Pillow and matplotlib, for .png and .gif, got none: pip install 'poolrpc[viz]'"
        raise InvalidArgumentError(msg, field="save") from None
    return Image, ImageDraw, ImageFont
