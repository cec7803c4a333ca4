"""Explanation of a layer on a small plane: every window, its value, and the shape formula with its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc._shapes.rules import adaptive_window, last_window_starts_outside, pooled_size
from poolrpc.errors import InvalidArgumentError

if TYPE_CHECKING:
    from poolrpc.layers import Layer
    from poolrpc.tensors import Array

AXIS_NAMES = ("column", "row", "depth")
"""Names of a plane's axes, last to first."""


@dataclass(frozen=True, slots=True)
class WindowAxis:
    """One axis of a window.

    Attributes:
        positions: Positions of the window's cells in the input; the padding is below 0, and at `size` and above.
        size: Size of the input on this axis, in cells.

    """

    positions: tuple[int, ...]
    size: int

    @property
    def inside(self) -> tuple[int, ...]:
        """The positions that are in the input, not in the padding."""
        return tuple(each for each in self.positions if 0 <= each < self.size)


@dataclass(frozen=True, slots=True)
class Window:
    """One window of a layer.

    Attributes:
        index: Index of the output cell.
        axes: The window's positions on each axis.
        cells: The values of the window's cells, as nested lists; None in the padding.
        value: The value of the output cell.
        how: The computation of the value: "max 6 at (1, 1)", "(1 + 3 + 5 + 6) / 4 = 3.75".

    """

    index: tuple[int, ...]
    axes: tuple[WindowAxis, ...]
    cells: Any
    value: float
    how: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """The explanation of a layer on a plane.

    Attributes:
        layer: The layer.
        plane: The input.
        windows: The windows, in the order of the output's cells.
        output: The output, computed from the windows.
        formulas: The shape rule with its numbers, one line per axis.

    """

    layer: Layer
    plane: Array
    windows: tuple[Window, ...]
    output: Array
    formulas: tuple[str, ...]


def explain(layer: Layer, plane: Array) -> Explanation:
    """Explain a layer on one plane.

    Args:
        layer: Any layer but FractionalMaxPool, whose windows depend on the seed, and MaxUnpool, which has none.
        plane: An array of floats of shape (L), (H, W) or (D, H, W).

    Raises:
        InvalidArgumentError: The layer has no fixed windows, or can't pool this plane.

    """
    if layer.family not in WINDOW_VALUES:
        msg = f"expected a layer with fixed windows, got {layer!r}"
        raise InvalidArgumentError(msg, field="layer")
    if layer.spatial_dims != plane.ndim:
        msg = f"expected a plane of {layer.spatial_dims} dims for {layer.name}, got shape {plane.shape}"
        raise InvalidArgumentError(msg, field="input")
    layer.output_shape((1, 1, *plane.shape))
    out = layer.output_plane(plane.shape)
    by_axis = [
        [WindowAxis(_positions(layer, axis, i, size, cells), size) for i in range(cells)]
        for axis, (size, cells) in enumerate(zip(plane.shape, out, strict=True))
    ]
    windows = []
    for index in product(*map(range, out)):
        axes = tuple(by_axis[axis][i] for axis, i in enumerate(index))
        value, how = WINDOW_VALUES[layer.family](layer, plane, axes)
        windows.append(Window(index, axes, _nested(plane, axes), value, how))
    output = np.array([each.value for each in windows], plane.dtype).reshape(out)
    return Explanation(layer, plane, tuple(windows), output, _formulas(layer, plane.shape))


def _positions(layer: Any, axis: int, index: int, size: int, cells: int) -> tuple[int, ...]:  # noqa: ANN401 - any family
    if layer.family.startswith("global"):
        return tuple(range(size))
    if layer.family.startswith("adaptive"):
        return tuple(range(*adaptive_window(index, size, cells)))
    kernel, stride, padding, dilation = layer.geometry()[axis]
    start = index * stride - padding
    # With ceil_mode the last window may extend beyond the right padding, where there are no cells.
    return tuple(p for p in range(start, start + dilation * kernel, dilation) if p < size + padding)


def _nested(plane: Array, axes: tuple[WindowAxis, ...], index: tuple[int, ...] = ()) -> Any:  # noqa: ANN401 - as deep as the rank
    if len(index) < len(axes):
        return [_nested(plane, axes, (*index, position)) for position in axes[len(index)].positions]
    inside = all(0 <= p < axis.size for p, axis in zip(index, axes, strict=True))
    return float(plane[index]) if inside else None


def _cells(plane: Array, axes: tuple[WindowAxis, ...]) -> list[tuple[tuple[int, ...], float]]:
    return [(index, float(plane[index])) for index in product(*(axis.inside for axis in axes))]


def _max(_: Layer, plane: Array, axes: tuple[WindowAxis, ...]) -> tuple[float, str]:
    maximum_at, value = None, -math.inf
    for index, cell in _cells(plane, axes):
        # As in torch, the first of equal cells is chosen, and a NaN before any number.
        if maximum_at is None or cell > value or math.isnan(cell):
            maximum_at, value = index, cell
    return (
        value,
        f"max {format_number(value)} at {_format_index(maximum_at)}" if maximum_at else "no cell of the input: -inf",
    )


def _average(layer: Any, plane: Array, axes: tuple[WindowAxis, ...]) -> tuple[float, str]:  # noqa: ANN401 - of the family
    values = [cell for _, cell in _cells(plane, axes)]
    spans = [len(axis.positions if getattr(layer, "count_include_pad", False) else axis.inside) for axis in axes]
    divisor = getattr(layer, "divisor_override", None) or math.prod(spans)
    value = sum(values) / divisor
    return value, f"({' + '.join(map(format_number, values))}) / {divisor} = {format_number(value)}"


def _power(layer: Any, plane: Array, axes: tuple[WindowAxis, ...]) -> tuple[float, str]:  # noqa: ANN401 - of the family
    p = layer.norm_type
    values = [cell for _, cell in _cells(plane, axes)]
    if p == math.inf:
        value = float(np.max(np.abs(values)))
        return value, f"max({', '.join(f'|{format_number(each)}|' for each in values)}) = {format_number(value)}"
    # torch multiplies the mean over the window's cells by the size of a full window.
    full = math.prod(layer.window(plane.shape))
    with np.errstate(invalid="ignore"):
        mean = float(np.mean(np.power(np.array(values), p)))
        value = float(np.power(abs(mean) * np.sign(mean) * full, 1 / p))
    powers = " + ".join(f"{format_number(each)}^{format_number(p)}" for each in values)
    return value, f"(({powers}) / {len(values)} * {full})^(1/{format_number(p)}) = {format_number(value)}"


def _reduce(layer: Any, plane: Array, axes: tuple[WindowAxis, ...]) -> tuple[float, str]:  # noqa: ANN401 - of the family
    return {"max": _max, "mean": _average}[layer.reduce](layer, plane, axes)


WINDOW_VALUES = {
    "max_pool": _max,
    "avg_pool": _average,
    "lp_pool": _power,
    "adaptive_max_pool": _max,
    "adaptive_avg_pool": _average,
    "global_pool": _reduce,
}
"""The function that computes a window's value, and describes it, for each family with fixed windows."""


def _formulas(layer: Any, plane: tuple[int, ...]) -> tuple[str, ...]:  # noqa: ANN401 - any family
    return tuple(
        f"{AXIS_NAMES[len(plane) - 1 - axis]}s: {_formula(layer, axis, size, cells)}"
        for axis, (size, cells) in enumerate(zip(plane, layer.output_plane(plane), strict=True))
    )


def _formula(layer: Any, axis: int, size: int, cells: int) -> str:  # noqa: ANN401 - any family
    if layer.family.startswith("global"):
        return f"the whole of {size} -> 1"
    if layer.family.startswith("adaptive"):
        return f"window i of {cells} spans floor(i * {size} / {cells}) to ceil((i + 1) * {size} / {cells}) -> {cells}"
    kernel, stride, padding, dilation = layer.geometry()[axis]
    rounding = "ceil" if layer.ceil_mode else "floor"
    text = f"{rounding}(({size} + 2*{padding} - {dilation}*({kernel} - 1) - 1) / {stride}) + 1"
    floor = pooled_size(size, kernel, stride, padding, dilation)
    if not layer.ceil_mode:
        return f"{text} = {cells}"
    ceil = -(-(size + 2 * padding - dilation * (kernel - 1) - 1) // stride) + 1
    if last_window_starts_outside(ceil, size, stride, padding):
        return (
            f"{text} = {ceil}, but the last window would start at {(ceil - 1) * stride - padding}, "
            f"not inside the input of {size} or its left padding: ceil_mode drops it -> {cells}"
        )
    return f"{text} = {cells}" + (f" (floor gives {floor})" if floor != cells else "")


def format_number(value: float) -> str:
    """Format a number with the digits of a float32: 6, 3.75, nan."""
    return f"{value:.7g}"


def _format_index(index: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, index))})"


def format_lines(explanation: Explanation) -> list[str]:
    """Return an explanation as lines of text."""
    shape = " x ".join(map(str, explanation.plane.shape))
    out = [f"{explanation.layer!r} on a plane of {shape}"]
    names = AXIS_NAMES[len(explanation.plane.shape) - 1 :: -1]
    for window in explanation.windows:
        spans = ", ".join(
            f"{name} {axis.positions[0]}"
            if len(axis.positions) == 1
            else f"{name}s {axis.positions[0]}..{axis.positions[-1]}"
            for name, axis in zip(names, window.axes, strict=True)
        )
        out += ["", f"window {_format_index(window.index)}: {spans}"]
        out += [f"  {row}" for row in _rows(window.cells)]
        out.append(f"  {window.how}")
    if any(axis.inside != axis.positions for window in explanation.windows for axis in window.axes):
        out += ["", "(. is padding)"]
    out += ["", "output:", *(f"  {row}" for row in _rows(explanation.output.tolist()))]
    out += ["", "shape:", *(f"  {formula}" for formula in explanation.formulas)]
    return out


def _rows(cells: Any) -> list[str]:  # noqa: ANN401 - nested as deep as the rank
    if not isinstance(cells[0], list):
        return [" ".join(f"{'.' if cell is None else format_number(cell):>6}" for cell in cells)]
    if not isinstance(cells[0][0], list):
        return [row for line in cells for row in _rows(line)]
    return [row for depth, part in enumerate(cells) for row in (f"depth {depth}:", *_rows(part))]
