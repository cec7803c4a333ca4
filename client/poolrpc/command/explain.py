"""A layer on one small plane, window by window, with the shape formula filled in: for learning and for debugging."""

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

AXES = ("column", "row", "depth")
"""The names of a plane's axes, last to first."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a window: the positions of its cells, which may lie in the padding.

    Attributes:
        positions: Of the cells, in the input's coordinates; padding is below 0 or at `size` and above.
        size: The input's cells on this axis.

    """

    positions: tuple[int, ...]
    size: int

    @property
    def inside(self) -> tuple[int, ...]:
        """The positions in the input."""
        return tuple(each for each in self.positions if 0 <= each < self.size)


@dataclass(frozen=True, slots=True)
class Window:
    """One window: where it lies, what is in it, and what comes of it.

    Attributes:
        index: The output cell's place.
        axes: The window's positions on each axis.
        cells: The values, padding as None, in the window's own (nested) shape.
        value: The output cell.
        how: How the value comes about: "max 6 at (1, 1)", "(1 + 3 + 5 + 6) / 4 = 3.75".

    """

    index: tuple[int, ...]
    axes: tuple[Axis, ...]
    cells: Any
    value: float
    how: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """A layer on a plane.

    Attributes:
        layer: The layer.
        plane: The input.
        windows: Each window, in the order of the output.
        output: The output, computed from the windows.
        formulas: One line an axis: the shape rule with its numbers.

    """

    layer: Layer
    plane: Array
    windows: tuple[Window, ...]
    output: Array
    formulas: tuple[str, ...]


def explain(layer: Layer, plane: Array) -> Explanation:
    """Explain a layer on one plane.

    Args:
        layer: Any but the fractional ones, whose windows the seed places, and MaxUnpool, which has none.
        plane: Of the layer's spatial shape: (L), (H, W) or (D, H, W), in floats.

    Raises:
        InvalidArgumentError: The layer has no fixed windows, or can't pool such a plane.

    """
    if layer.family not in VALUES:
        msg = f"expected a layer whose windows are fixed, got {layer!r}"
        raise InvalidArgumentError(msg, field="layer")
    if layer.spatial_dims not in (None, plane.ndim):
        msg = f"expected a plane of {layer.spatial_dims} dims for {layer.name}, got shape {plane.shape}"
        raise InvalidArgumentError(msg, field="input")
    layer.output_shape((1, 1, *plane.shape))
    out = layer.output_plane(plane.shape)
    by_axis = [
        [Axis(_positions(layer, axis, i, size, cells), size) for i in range(cells)]
        for axis, (size, cells) in enumerate(zip(plane.shape, out, strict=True))
    ]
    windows = []
    for index in product(*map(range, out)):
        axes = tuple(by_axis[axis][i] for axis, i in enumerate(index))
        value, how = VALUES[layer.family](layer, plane, axes)
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
    # In ceil_mode the last window may reach beyond the right padding, where there is nothing.
    return tuple(p for p in range(start, start + dilation * kernel, dilation) if p < size + padding)


def _nested(plane: Array, axes: tuple[Axis, ...], at: tuple[int, ...] = ()) -> Any:  # noqa: ANN401 - as deep as the rank
    if len(at) < len(axes):
        return [_nested(plane, axes, (*at, position)) for position in axes[len(at)].positions]
    inside = all(0 <= p < axis.size for p, axis in zip(at, axes, strict=True))
    return float(plane[at]) if inside else None


def _cells(plane: Array, axes: tuple[Axis, ...]) -> list[tuple[tuple[int, ...], float]]:
    return [(at, float(plane[at])) for at in product(*(axis.inside for axis in axes))]


def _max(_: Layer, plane: Array, axes: tuple[Axis, ...]) -> tuple[float, str]:
    at, value = None, -math.inf
    for place, cell in _cells(plane, axes):
        # As in torch: the first of equals is chosen, and a NaN wins.
        if at is None or cell > value or math.isnan(cell):
            at, value = place, cell
    return value, f"max {number(value)} at {_place(at)}" if at else "no cell of the input: -inf"


def _average(layer: Any, plane: Array, axes: tuple[Axis, ...]) -> tuple[float, str]:  # noqa: ANN401 - of the family
    values = [cell for _, cell in _cells(plane, axes)]
    spans = [len(axis.positions if getattr(layer, "count_include_pad", False) else axis.inside) for axis in axes]
    divisor = getattr(layer, "divisor_override", None) or math.prod(spans)
    value = sum(values) / divisor
    return value, f"({' + '.join(map(number, values))}) / {divisor} = {number(value)}"


def _power(layer: Any, plane: Array, axes: tuple[Axis, ...]) -> tuple[float, str]:  # noqa: ANN401 - of the family
    p = layer.norm_type
    values = [cell for _, cell in _cells(plane, axes)]
    if p == math.inf:
        value = float(np.max(np.abs(values)))
        return value, f"max({', '.join(f'|{number(each)}|' for each in values)}) = {number(value)}"
    # torch multiplies the mean over the cells that there are by the size of a full window.
    full = math.prod(layer.window(plane.shape))
    with np.errstate(invalid="ignore"):
        mean = float(np.mean(np.power(np.array(values), p)))
        value = float(np.power(abs(mean) * np.sign(mean) * full, 1 / p))
    powers = " + ".join(f"{number(each)}^{number(p)}" for each in values)
    return value, f"(({powers}) / {len(values)} * {full})^(1/{number(p)}) = {number(value)}"


VALUES = {
    "max_pool": _max,
    "avg_pool": _average,
    "lp_pool": _power,
    "adaptive_max_pool": _max,
    "adaptive_avg_pool": _average,
    "global_max_pool": _max,
    "global_avg_pool": _average,
}
"""How each family with fixed windows gives a window's value."""


def _formulas(layer: Any, plane: tuple[int, ...]) -> tuple[str, ...]:  # noqa: ANN401 - any family
    return tuple(
        f"{AXES[len(plane) - 1 - axis]}s: {_formula(layer, axis, size, cells)}"
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


def number(value: float) -> str:
    """Give a number as short as float32 allows: 6, 3.75, nan."""
    return f"{value:.7g}"


def _place(at: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, at))})"


def lines(explanation: Explanation) -> list[str]:
    """Give an explanation as lines of text."""
    shape = " x ".join(map(str, explanation.plane.shape))
    out = [f"{explanation.layer!r} on a plane of {shape}"]
    names = AXES[len(explanation.plane.shape) - 1 :: -1]
    for window in explanation.windows:
        spans = ", ".join(
            f"{name} {axis.positions[0]}"
            if len(axis.positions) == 1
            else f"{name}s {axis.positions[0]}..{axis.positions[-1]}"
            for name, axis in zip(names, window.axes, strict=True)
        )
        out += ["", f"window {_place(window.index)}: {spans}"]
        out += [f"  {row}" for row in _rows(window.cells)]
        out.append(f"  {window.how}")
    if any(axis.inside != axis.positions for window in explanation.windows for axis in window.axes):
        out += ["", "(. is padding)"]
    out += ["", "output:", *(f"  {row}" for row in _rows(explanation.output.tolist()))]
    out += ["", "shape:", *(f"  {formula}" for formula in explanation.formulas)]
    return out


def _rows(cells: Any) -> list[str]:  # noqa: ANN401 - nested as deep as the rank
    if not isinstance(cells[0], list):
        return [" ".join(f"{'.' if cell is None else number(cell):>6}" for cell in cells)]
    if not isinstance(cells[0][0], list):
        return [row for line in cells for row in _rows(line)]
    return [row for depth, part in enumerate(cells) for row in (f"depth {depth}:", *_rows(part))]
