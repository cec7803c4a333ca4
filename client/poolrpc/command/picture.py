"""Pictures of windows: the input with a window, the computation, and the output, for each window."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

from poolrpc.command.drawing import Box, Drawing, Line, Text
from poolrpc.command.explain import VIEW
from poolrpc.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from poolrpc.command.drawing import Shape
    from poolrpc.tensors import Array

    Index = tuple[int, ...]

PICTURE_WIDTH, PICTURE_MARGIN = 360, 14
"""The width of a picture, which is that of a phone, and its margin, in pixels."""

LABELS, ARROW_LENGTH, SLICE_GAP = 18, 38, 22
"""Space for the positions next to a grid, for the arrow, and above each slice of a third axis."""

CELL_SIZES = (26, 44)
"""The least size of a cell with the output on the right of the input, and the largest one, in pixels."""

LINE_HEIGHT, LEGIBLE = 20, 8
"""The distance of lines of text, and the least size of a number, in pixels."""


@dataclass(frozen=True, slots=True)
class Step:
    """A window as it is drawn.

    Attributes:
        index: Index of the output cell.
        cells: Indices of the input cells that the window has, also of the padding.
        spans: Where the window starts and ends on each axis, with the gaps of a dilation.
        value: The value of the output cell.
        text: The computation.
        chosen: Index of the cell that is the maximum; None if no cell is chosen.
        notes: A short text for each of the cells, such as its weight; empty for none.

    """

    index: Index
    cells: tuple[Index, ...]
    spans: tuple[tuple[int, int], ...]
    value: float
    text: str
    chosen: Index | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What a picture shows.

    Attributes:
        title: The layer.
        plane: The input, of one to three axes.
        output: The output.
        steps: The windows that are shown.
        padding: What a cell of the padding counts as, such as "0"; empty if it does not count.
        unvisited: For each axis, the positions of the input that no window has.

    """

    title: str
    plane: Array
    output: Array
    steps: tuple[Step, ...]
    padding: str = ""
    unvisited: tuple[tuple[int, ...], ...] = ()

    @property
    def sizes(self) -> str:
        """The shapes of input and output: "4 × 4 → 2 × 2"."""
        return " → ".join(" × ".join(map(str, each.shape)) for each in (self.plane, self.output))


@dataclass(frozen=True, slots=True)
class Grid:
    """A grid of cells.

    Attributes:
        x: The left edge of the first cell, in pixels.
        y: The upper edge of the first cell, in pixels.
        cell: The size of a cell, in pixels.
        extents: The positions on each axis; of three axes, the first one has a slice below the other for each position.

    """

    x: float
    y: float
    cell: float
    extents: tuple[range, ...]

    @property
    def width(self) -> float:
        """The width in pixels."""
        return self.cell * len(self.extents[-1])

    @property
    def height(self) -> float:
        """The height in pixels, of all slices."""
        rows = len(self.extents[-2]) if len(self.extents) > 1 else 1
        slices = len(self.extents[0]) if len(self.extents) == 3 else 1  # noqa: PLR2004 - depth, rows and columns
        return slices * (rows * self.cell + SLICE_GAP) - SLICE_GAP

    def place(self, index: Index) -> tuple[float, float]:
        """Return the upper left corner of a cell, which may be outside of the grid."""
        offsets = [position - extent.start for position, extent in zip(index, self.extents, strict=True)]
        depth, row, column = [0] * (3 - len(offsets)) + offsets
        rows = len(self.extents[-2]) if len(self.extents) > 1 else 1
        return self.x + column * self.cell, self.y + row * self.cell + depth * (rows * self.cell + SLICE_GAP)

    def box(self, index: Index, fill: str, stroke: str = "edge", *, thickness: float = 1, dashed: bool = False) -> Box:
        """Return the box of a cell."""
        x, y = self.place(index)
        return Box(x + 1, y + 1, self.cell - 2, self.cell - 2, fill, stroke, thickness, dashed)

    def text(self, index: Index, cell: float | str, fill: str = "ink", *, bold: bool = False) -> Text:
        """Return the text of a cell, as large as it fits, with fewer digits of a number in a small cell."""
        x, y = self.place(index)
        bold = bold and self.cell >= CELL_SIZES[0]
        room = (self.cell - 4) / (0.64 if bold else 0.58)  # by the width of a digit, relative to its height
        text = cell if isinstance(cell, str) else short(cell, int(room / LEGIBLE))
        size = min(0.46 * self.cell, room / max(len(text), 1))
        return Text(x + self.cell / 2, y + self.cell / 2 + 0.36 * size, text, round(size, 1), fill, bold=bold)

    def labels(self) -> Iterator[Text]:
        """Yield the positions on each axis, above and on the left."""
        first = tuple(extent.start for extent in self.extents)
        slices = self.extents[0] if len(self.extents) == 3 else range(1)  # noqa: PLR2004 - as above
        for depth in slices:
            start = (depth,) * (len(first) - 2) + first[-2:]
            for column in self.extents[-1]:
                x, y = self.place((*start[:-1], column))
                yield Text(x + self.cell / 2, y - 5, minus(str(column)), 11, "muted")
            for row in self.extents[-2] if len(first) > 1 else ():
                x, y = self.place((*start[:-2], row, start[-1]))
                yield Text(x - 5, y + self.cell / 2 + 4, minus(str(row)), 11, "muted", "end")


def draw(scene: Scene, *, moving: bool) -> Drawing:
    """Return the picture of a scene.

    Args:
        scene: What to show.
        moving: Show the windows one after the other in the same place, and not all of them below each other.

    Raises:
        InvalidArgumentError: An axis is too long for a picture.

    """
    extents = tuple(_extent(scene, axis) for axis in range(scene.plane.ndim))
    longest = max(*map(len, extents), *scene.output.shape)
    if longest > VIEW:
        msg = f"expected at most {VIEW} cells on an axis of a picture, with its padding, got {longest}"
        raise InvalidArgumentError(msg, field="input")
    shapes: list[Shape] = []
    y = PICTURE_MARGIN + 14.0
    for line in textwrap.wrap(scene.title, 37):
        shapes.append(Text(PICTURE_MARGIN, y, line, 14, "ink", "start", bold=True, mono=True))
        y += LINE_HEIGHT
    shapes.append(Text(PICTURE_MARGIN, y, scene.sizes, 13, "muted", "start"))
    panel = _Panel(scene, extents, y + 12)
    if moving:
        result = panel.result(len(scene.steps), everything=True)
        frames = [[*panel.window(step), *panel.result(i + 1)] for i, step in enumerate(scene.steps)]
        shapes += panel.still()
        return _drawing(scene, panel.y + panel.height, shapes, [*frames, result])
    for i, step in enumerate(scene.steps):
        shapes += [*panel.still(), *panel.window(step), *panel.result(i + 1)]
        panel = _Panel(scene, extents, panel.y + panel.height + 10)
    if scene.output.size > len(scene.steps):
        shapes.append(
            Text(PICTURE_MARGIN, panel.y + 10, f"+ {scene.output.size - len(scene.steps)}", 13, "muted", "start")
        )
        return _drawing(scene, panel.y + LINE_HEIGHT, shapes)
    return _drawing(scene, panel.y - 10, shapes)


def _drawing(scene: Scene, bottom: float, shapes: Sequence[Shape], frames: Sequence[Sequence[Shape]] = ()) -> Drawing:
    height = math.ceil(bottom + PICTURE_MARGIN)
    card = Box(0.5, 0.5, PICTURE_WIDTH - 1, height - 1, "paper", "edge", radius=8)
    title = f"{scene.title}, {scene.sizes}: {'; '.join(step.text for step in scene.steps)}"
    return Drawing(PICTURE_WIDTH, height, title, (card, *shapes), tuple(map(tuple, frames)))


def _extent(scene: Scene, axis: int) -> range:
    """Return the positions of an axis: those of the input and of the windows, also where they extend beyond it."""
    spans = [step.spans[axis] for step in scene.steps]
    return range(min(0, *(start for start, _ in spans)), max(scene.plane.shape[axis], *(end for _, end in spans)))


@dataclass
class _Panel:
    """The input and the output: next to each other, or below each other if they are too wide."""

    scene: Scene
    extents: tuple[range, ...]
    y: float
    input: Grid = field(init=False)
    output: Grid = field(init=False)
    height: float = field(init=False)

    def __post_init__(self) -> None:
        scene, extents = self.scene, self.extents
        out = tuple(map(range, scene.output.shape))
        room = PICTURE_WIDTH - 2 * PICTURE_MARGIN - LABELS
        columns = len(extents[-1]), len(out[-1])
        cell = math.floor(min(CELL_SIZES[1], (room - ARROW_LENGTH) / sum(columns)))
        x, y = PICTURE_MARGIN + LABELS, self.y + LABELS
        if cell >= CELL_SIZES[0]:
            self.input = Grid(x, y, cell, extents)
            left = x + self.input.width + ARROW_LENGTH
            self.output = Grid(left, y + max(0, (self.input.height - Grid(0, 0, cell, out).height) / 2), cell, out)
        else:
            cell = math.floor(min(CELL_SIZES[1], room / max(columns)))
            self.input = Grid(x, y, cell, extents)
            self.output = Grid(x, y + self.input.height + ARROW_LENGTH, cell, out)
        bottom = max(each.y + each.height for each in (self.input, self.output))
        self.height = bottom + LINE_HEIGHT * max(len(_wrapped(step)) for step in scene.steps) - self.y + 6

    def still(self) -> list[Shape]:
        """Return the shapes of the input, the arrow, and an output without values."""
        shapes: list[Shape] = [*self.input.labels()]
        for index in product(*self.extents):
            shapes += self._cell(index)
        shapes += [self.output.box(index, "paper") for index in product(*self.output.extents)]
        one, two = self.input, self.output
        if two.x > one.x:
            left, middle = one.x + one.width + 8, two.y + two.height / 2
            tip = two.x - 8
            shapes.append(Line(((left, middle), (tip, middle)), "muted", 1.5))
            shapes.append(Line(((tip - 6, middle - 5), (tip, middle), (tip - 6, middle + 5)), "muted", 1.5))
        else:
            middle, tip = one.x + min(one.width, two.width) / 2, two.y - 8
            shapes.append(Line(((middle, one.y + one.height + 8), (middle, tip)), "muted", 1.5))
            shapes.append(Line(((middle - 5, tip - 6), (middle, tip), (middle + 5, tip - 6)), "muted", 1.5))
        return shapes

    def _cell(self, index: Index) -> Iterator[Shape]:
        sizes = self.scene.plane.shape
        if all(0 <= each < size for each, size in zip(index, sizes, strict=True)):
            unvisited = any(p in skipped for p, skipped in zip(index, self.scene.unvisited, strict=False))
            yield self.input.box(index, "paper" if unvisited else "cell")
            yield self.input.text(index, float(self.scene.plane[index]), "muted" if unvisited else "ink")
            if unvisited:
                x, y = self.input.place(index)
                low, high = 5, self.input.cell - 5
                yield Line(((x + low, y + high), (x + high, y + low)), "muted")
        elif self._is_padding(index):
            yield self.input.box(index, "", dashed=True)
            if self.scene.padding:
                yield self.input.text(index, self.scene.padding, "muted")

    def _is_padding(self, index: Index) -> bool:
        """Return whether a cell outside of the input is in the padding: it is if a window has it."""
        axes = zip(*(cell for step in self.scene.steps for cell in step.cells), strict=True)
        return all(
            min(*positions, 0) <= each <= max(*positions, size - 1)
            for each, positions, size in zip(index, axes, self.scene.plane.shape, strict=True)
        )

    def window(self, step: Step) -> list[Shape]:
        """Return the shapes of a window: its cells, its frame, and the computation."""
        shapes: list[Shape] = []
        for number, index in enumerate(step.cells):
            inside = all(0 <= each < size for each, size in zip(index, self.scene.plane.shape, strict=True))
            chosen = index == step.chosen
            shapes.append(
                self.input.box(
                    index, "chosen" if chosen else "window", "amber", thickness=1 + chosen, dashed=not inside
                )
            )
            cell = float(self.scene.plane[index]) if inside else self.scene.padding
            if cell != "":  # padding that does not count
                shapes.append(self.input.text(index, cell, bold=chosen))
            if step.notes:
                x, y = self.input.place(index)
                corner = self.input.cell - 4
                shapes.append(Text(x + corner, y + corner, step.notes[number], 10, "amber", "end", bold=True))
        rows, columns = ((0, 1), *step.spans)[-2:]
        for outer in sorted({cell[:-2] for cell in step.cells}):
            start = (*outer, *(first for first, _ in step.spans[-2:]))
            x, y = self.input.place(start)
            width, height = ((end - begin) * self.input.cell for begin, end in (columns, rows))
            shapes.append(Box(x, y, width, height, "", "amber", 3, radius=5))
        y = self.y + self.height - LINE_HEIGHT * (len(_wrapped(step)) - 1) - 6
        for line in _wrapped(step):
            shapes.append(Text(PICTURE_MARGIN, y, line, 14, "ink", "start"))
            y += LINE_HEIGHT
        return shapes

    def result(self, count: int, *, everything: bool = False) -> list[Shape]:
        """Return the output cells of the first windows, the last of which is marked, or everything without a mark."""
        shapes: list[Shape] = []
        shown = [step.index for step in self.scene.steps[:count]]
        for index in product(*self.output.extents) if everything else shown:
            current = index == shown[-1] and not everything
            shapes.append(self.output.box(index, "output", "teal", thickness=2.5 if current else 1))
            shapes.append(self.output.text(index, float(self.scene.output[index]), bold=current))
        return shapes


def _wrapped(step: Step) -> list[str]:
    return textwrap.wrap(minus(step.text), 44)


def short(value: float, most: int) -> str:
    """Return a number for a cell: with four digits, or with fewer if it has more characters than fit."""
    texts = [minus(f"{value:.{digits}g}").replace("inf", "∞") for digits in (4, 3, 2, 1)]
    return next((text for text in texts if len(text) <= most), min(texts, key=len))


def minus(text: str) -> str:
    """Return a text with the sign of typography in front of numbers below 0."""
    return text.replace("-", "−")
