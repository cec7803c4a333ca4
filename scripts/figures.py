"""Draw the pictures of the docs: `python -m scripts.figures`, which `make figures` runs.

Pictures of windows are what `poolrpc explain --save` draws; those of benchmarks are drawn from benchmarks/results/, and
the photograph on the front page is pooled by a server. tests/docs/test_figures.py fails if a committed picture is not
what this draws. The picture of a load is what `poolrpc bench --plot` draws: no two are equal, so it is drawn only if it
was deleted.
"""

from __future__ import annotations

import base64
import io
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from benchmarks.figures import FIGURES
from poolrpc import parse_layer
from poolrpc.cli import main as poolrpc
from poolrpc.command.drawing import Box, Drawing, Line, Picture, Text, to_svg
from poolrpc.command.picture import Scene, Step, draw

FOLDER = Path(__file__).parent.parent / "docs/figures"

PLANE = "[[1, 3, 2, 4], [5, 6, 8, 7], [4, 2, 1, 0], [9, 7, 3, 2]]"
FEATURE = "[[9, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]"
MOVED = "[[0, 0, 0, 0], [0, 9, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]"
NOISE = "[[5, 7, 2, 3], [6, 4, 1, 2], [9, 8, 5, 4], [7, 8, 6, 5]]"

STILL = {
    "max": ("MaxPool2d(2)", PLANE),
    "average": ("AvgPool2d(2)", PLANE),
    "padding-max": ("MaxPool2d(3, stride=2, padding=1)", PLANE),
    "padding-average": ("AvgPool2d(3, stride=2, padding=1)", PLANE),
    "dilation": ("MaxPool2d(2, stride=1, dilation=2)", PLANE),
    "padding-dilation": ("MaxPool2d(2, stride=2, padding=1, dilation=2)", PLANE),
    "floor": ("MaxPool2d(3, stride=2)", PLANE),
    "ceil": ("MaxPool2d(3, stride=2, ceil_mode=True)", PLANE),
    "global-average": ("GlobalPool2d('mean')", PLANE),
    "global-max": ("GlobalPool2d('max')", PLANE),
    "command": ("MaxPool2d(2, stride=1)", "[[1, 3, 2], [5, 6, 8]]"),
}
"""Pictures with all windows below each other: the layer and the input."""

MOVING = {
    "max-moving": ("MaxPool2d(2)", PLANE),
    "average-moving": ("AvgPool2d(2)", PLANE),
    "feature": ("MaxPool2d(2)", FEATURE),
    "feature-moved": ("MaxPool2d(2)", MOVED),
    "noise": ("AvgPool2d(2)", NOISE),
    "stride": ("MaxPool2d(2, stride=1)", PLANE),
    "gaps": ("AvgPool2d(1, stride=2)", PLANE),
    "adaptive": ("AdaptiveAvgPool2d(3)", PLANE),
}
"""Pictures with a window that moves."""

WEIGHTS = np.array([[1, -1], [1, -1]])
"""The weights of the convolution: differences of columns."""

PHOTO_LAYER = "MaxPool2d(8)"

LOAD = "bench"
"""The picture of a load, whose times differ from run to run."""


def main() -> None:
    """Write every picture."""
    for name, text in (windows() | benchmarks() | {"photograph": photograph()}).items():
        path = FOLDER / f"{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if not (path := FOLDER / f"{LOAD}.svg").exists():
        draw_load(path)


def draw_load(path: Path) -> None:
    """Draw a load on a server of its own, and print what the command prints."""
    from poolrpc_server import Config, Server  # noqa: PLC0415 - as for the photograph

    server = Server(Config(listen=("127.0.0.1:0",)))
    server.start()
    shapes = ["--shape", "1x3x32x32", "--shape", "1x3x64x64"]
    flags = ["--layer", "MaxPool2d(2)", "--rate", "200", "--duration", "2", "--plot", str(path)]
    poolrpc(["bench", "--address", server.addresses[0], *shapes, *flags])
    server.stop(0)


def windows() -> dict[str, str]:
    """Return the pictures of windows by their names."""
    drawn = {"pooling/convolution": convolution()}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        for name, (layer, plane) in (STILL | MOVING).items():
            path = Path(folder) / f"{name}.svg"
            flags = ["--animate"] if name in MOVING else []
            poolrpc(["explain", layer, "--input", plane, "--save", str(path), *flags])
            drawn[f"pooling/{name}"] = path.read_text()
    return drawn


def convolution() -> str:
    """Return the picture of a convolution of the same input, with the weights in the corners of the cells."""
    plane = np.array([[1, 3, 2, 4], [5, 6, 8, 7], [4, 2, 1, 0], [9, 7, 3, 2]], np.float32)
    steps = []
    for row, column in np.ndindex(3, 3):
        cells = [(row + i, column + j) for i, j in np.ndindex(*WEIGHTS.shape)]
        terms = [(plane[cell], weight) for cell, weight in zip(cells, WEIGHTS.flat, strict=True)]
        value = float(sum(cell * weight for cell, weight in terms))
        text = "".join(f" {'+' if weight > 0 else '-'} {cell:g}" for cell, weight in terms).removeprefix(" + ")
        notes = tuple(f"×{weight}".replace("-", "−") for weight in WEIGHTS.flat)
        spans = ((row, row + 2), (column, column + 2))
        steps.append(Step((row, column), tuple(cells), spans, value, f"{text} = {value:g}", notes=notes))
    output = np.array([step.value for step in steps]).reshape(3, 3)
    return to_svg(draw(Scene("Conv2d(1, 1, 2), weights 1, −1, 1, −1", plane, output, tuple(steps)), moving=True))


def benchmarks() -> dict[str, str]:
    """Return the pictures of the results by their names."""
    return {name: figure() for name, figure in FIGURES.items()}


def photograph() -> str:
    """Return the picture of a photograph before and after a server pooled it, with the call."""
    import matplotlib as mpl  # noqa: PLC0415 - only this picture needs it, Pillow and a server
    from PIL import Image  # noqa: PLC0415 - the same

    from poolrpc_server import embedded  # noqa: PLC0415 - the same

    path = Path(mpl.get_data_path()) / "sample_data/grace_hopper.jpg"
    x = np.asarray(Image.open(path).convert("RGB"))
    with embedded() as client:
        result = client.pool(x, parse_layer(PHOTO_LAYER), layout="NHWC")
    pooled = io.BytesIO()
    Image.fromarray(result.output).save(pooled, "PNG")
    height, width, _ = x.shape
    margin, gap, top, tall = 16, 56, 62, 252
    wide = round(tall * width / height)
    right, bottom = margin + wide + gap, top + tall
    total = right + wide + margin
    tip, middle = right - 10, top + tall / 2
    shapes = [
        Box(0.5, 0.5, total - 1, bottom + 59, "paper", "edge", radius=10),
        Text(total / 2, 38, f'client.pool(photo, {PHOTO_LAYER}, layout="NHWC")', 16, mono=True, bold=True),
        Picture(margin, top, wide, tall, f"data:image/jpeg;base64,{encoded(path.read_bytes())}", smooth=True),
        Picture(right, top, wide, tall, f"data:image/png;base64,{encoded(pooled.getvalue())}"),
        Line(((tip - 36, middle), (tip, middle)), "teal", 3),
        Line(((tip - 9, middle - 9), (tip, middle), (tip - 9, middle + 9)), "teal", 3),
    ]
    for left, array in ((margin, x), (right, result.output)):
        shape = " × ".join(map(str, array.shape))
        shapes.append(Text(left + wide / 2, bottom + 24, shape, 15, "muted"))
        shapes.append(Text(left + wide / 2, bottom + 46, f"{array.nbytes / 1e3:.0f} KB", 16, bold=True))
    title = f"A photograph before and after client.pool(photo, {PHOTO_LAYER}): {x.shape} becomes {result.shape}"
    return to_svg(Drawing(total, bottom + 60, title, tuple(shapes)))


def encoded(data: bytes) -> str:
    """Return bytes as text."""
    return base64.b64encode(data).decode()


if __name__ == "__main__":
    main()
