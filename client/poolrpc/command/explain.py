"""Explanation of a layer on a small plane: every window, its value, and the shape formula with its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc._shapes.rules import adaptive_window, last_window_starts_outside, pooled_size
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers.reductions import reduction_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc.layers import Layer
    from poolrpc.tensors import Array

AXIS_NAMES = ("column", "row", "depth")
"""Names of a plane's axes, last to first."""

WINDOWS = 20
"""The default number of windows that are printed."""

VIEW = 16
"""The number of positions of an axis that are printed for a window."""

TERMS = 32
"""The number of cells whose values are printed in the computation of a window."""

MAX_WORK = 2**20
"""The number of cells of all windows together, at most: about a second of Python."""


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
class Windows:
    """Where the windows of a layer are on a plane.

    Attributes:
        axes: For each axis, the positions of the windows at each index of the output.
        unvisited: As in Explanation.
        formulas: As in Explanation.

    """

    axes: tuple[tuple[WindowAxis, ...], ...]
    unvisited: dict[str, tuple[int, ...]]
    formulas: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """The explanation of a layer on a plane.

    Attributes:
        layer: The layer.
        plane: The input.
        windows: The windows, in the order of the output's cells.
        output: The output, computed from the windows.
        unvisited: For each axis by its name, "rows" and so on, the positions in the input that no window has: a cell is
            in no window if one of its positions is.
        formulas: The shape rule with its numbers, one line per axis.

    """

    layer: Layer
    plane: Array
    windows: tuple[Window, ...]
    output: Array
    unvisited: dict[str, tuple[int, ...]]
    formulas: tuple[str, ...]


def explain(layer: Layer, plane: Array) -> Explanation:
    """Explain a layer on one plane.

    Args:
        layer: Any layer but FractionalMaxPool, whose windows depend on the seed, and MaxUnpool, which has none.
        plane: An array of floats of shape (L), (H, W) or (D, H, W).

    Raises:
        InvalidArgumentError: The layer has no fixed windows, or can't pool this plane.

    """
    windows = find_windows(layer, plane.shape)
    if layer.work(plane.shape) > MAX_WORK:
        msg = f"expected windows of at most {MAX_WORK} cells together, got {layer.work(plane.shape)}"
        raise InvalidArgumentError(msg, field="input")
    explained = []
    for index in product(*(range(len(axis)) for axis in windows.axes)):
        axes = tuple(windows.axes[axis][i] for axis, i in enumerate(index))
        value, how = WINDOW_VALUES[layer.family](layer, plane, axes)
        explained.append(Window(index, axes, _nested(plane, axes), value, how))
    output = np.array([each.value for each in explained], plane.dtype).reshape(layer.output_plane(plane.shape))
    return Explanation(layer, plane, tuple(explained), output, windows.unvisited, windows.formulas)


def find_windows(layer: Layer, plane: tuple[int, ...]) -> Windows:
    """Return where the windows of a layer are on a plane.

    Args:
        layer: Any layer but FractionalMaxPool, whose windows depend on the seed, and MaxUnpool, which has none.
        plane: The shape of the plane, (L), (H, W) or (D, H, W).

    Raises:
        InvalidArgumentError: The layer has no fixed windows, or can't pool such a plane.

    """
    if layer.family not in WINDOW_VALUES:
        msg = f"expected a layer with fixed windows, got {layer!r}"
        raise InvalidArgumentError(msg, field="layer")
    if layer.spatial_dims != len(plane):
        msg = f"expected a plane of {layer.spatial_dims} dims for {layer.name}, got shape {plane}"
        raise InvalidArgumentError(msg, field="input")
    layer.output_shape((1, 1, *plane))
    resolved = layer.resolved(plane)
    axes = tuple(
        tuple(WindowAxis(_positions(resolved, axis, i, size, cells), size) for i in range(cells))
        for axis, (size, cells) in enumerate(zip(plane, layer.output_plane(plane), strict=True))
    )
    unvisited = {
        f"{name}s": tuple(sorted(set(range(size)).difference(*(each.positions for each in axis))))
        for name, size, axis in zip(_axis_names(len(plane)), plane, axes, strict=True)
    }
    return Windows(axes, unvisited, _formulas(resolved, plane))


def _axis_names(dims: int) -> tuple[str, ...]:
    return AXIS_NAMES[:dims][::-1]


def _positions(layer: Any, axis: int, index: int, size: int, cells: int) -> tuple[int, ...]:  # noqa: ANN401 - any family
    if layer.family.startswith("global"):
        return tuple(range(size))
    if layer.family.startswith("adaptive"):
        return tuple(range(*adaptive_window(index, size, cells)))
    if layer.family == "blur_pool":
        start = index * layer.stride - layer.padding
        return tuple(range(start, start + layer.kernel_size))
    kernel, stride, before, after, dilation = layer.geometry()[axis]
    start = index * stride - before
    # With ceil_mode the last window may extend beyond the right padding, where there are no cells.
    return tuple(p for p in range(start, start + dilation * kernel, dilation) if p < size + after)


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
    return value, f"({format_terms(values, ' + ')}) / {divisor} = {format_number(value)}"


def _power(layer: Any, plane: Array, axes: tuple[WindowAxis, ...]) -> tuple[float, str]:  # noqa: ANN401 - of the family
    p = layer.norm_type
    values = [cell for _, cell in _cells(plane, axes)]
    if p == math.inf:
        value = float(np.max(np.abs(values)))
        return value, f"max({format_terms(values, ', ', '|{}|')}) = {format_number(value)}"
    # torch multiplies the mean over the window's cells by the size of a full window.
    full = math.prod(layer.window(plane.shape))
    with np.errstate(invalid="ignore"):
        mean = float(np.mean(np.power(np.array(values), p)))
        value = float(np.power(abs(mean) * np.sign(mean) * full, 1 / p))
    powers = format_terms(values, " + ", f"{{}}^{format_number(p)}")
    return value, f"(({powers}) / {len(values)} * {full})^(1/{format_number(p)}) = {format_number(value)}"


def _blur(layer: Any, plane: Array, axes: tuple[WindowAxis, ...]) -> tuple[float, str]:  # noqa: ANN401 - of the family
    numbers = [math.comb(layer.kernel_size - 1, i) for i in range(layer.kernel_size)]
    weights = [math.prod(each) for each in product(numbers, repeat=len(axes))]
    # The padding reflects the cells next to the edge.
    reflected = [[(axis.size - 1) - abs(axis.size - 1 - abs(p)) for p in axis.positions] for axis in axes]
    values = [float(plane[index]) for index in product(*reflected)]
    divisor = sum(weights)
    value = sum(map(math.prod, zip(weights, values, strict=True))) / divisor
    terms = [f"{weight}*{format_number(each)}" for weight, each in zip(weights, values, strict=True)]
    return value, f"({_shortened(terms, ' + ')}) / {divisor} = {format_number(value)}"


class _Cells:
    """The cells of one window, for the formulas of reductions."""

    xp = np

    def __init__(self, values: Array) -> None:
        self._values, self.count = values, len(values)

    def max(self, of: Callable[[Any], Any] | None = None) -> Any:  # noqa: ANN401 - an array, as in the next methods
        """As in WindowCells."""
        return np.max(self._values if of is None else of(self._values), initial=-np.inf)

    def min(self) -> Any:  # noqa: ANN401
        """As in WindowCells."""
        return np.min(self._values, initial=np.inf)

    def median(self) -> Any:  # noqa: ANN401
        """As in WindowCells."""
        return np.sort(self._values)[(self.count - 1) // 2] if self.count else np.nan

    def sum(self, of: Callable[..., Any] | None = None, *values: Any) -> Any:  # noqa: ANN401
        """As in WindowCells."""
        return np.sum(self._values if of is None else of(self._values, *values))

    def mean(self, of: Callable[..., Any] | None = None, *values: Any) -> Any:  # noqa: ANN401
        """As in WindowCells."""
        return self.sum(of, *values) / max(self.count, 1)


def _reduce(layer: Any, plane: Array, axes: tuple[WindowAxis, ...]) -> tuple[float, str]:  # noqa: ANN401 - of the family
    if layer.reduce in {"max", "mean"}:
        return (_max if layer.reduce == "max" else _average)(layer, plane, axes)
    values = [cell for _, cell in _cells(plane, axes)]
    with np.errstate(all="ignore"):
        value = (
            math.nan if any(map(math.isnan, values)) else float(reduction_of(layer.reduce).of(_Cells(np.array(values))))
        )
    return value, f"{layer.reduce} of {format_terms(values, ', ')} = {format_number(value)}"


def format_terms(values: list[float], separator: str, form: str = "{}") -> str:
    """Return numbers as the terms of a computation, of many only the first ones and the last one."""
    return _shortened([form.format(format_number(each)) for each in values], separator)


def _shortened(terms: list[str], separator: str) -> str:
    if len(terms) > TERMS:
        terms[TERMS - 1 : -1] = ["..."]
    return separator.join(terms)


WINDOW_VALUES = {
    "max_pool": _max,
    "avg_pool": _average,
    "lp_pool": _power,
    "adaptive_max_pool": _max,
    "adaptive_avg_pool": _average,
    "global_pool": _reduce,
    "pool": _reduce,
    "blur_pool": _blur,
}
"""The function that computes a window's value, and describes it, for each family with fixed windows."""


def _formulas(layer: Any, plane: tuple[int, ...]) -> tuple[str, ...]:  # noqa: ANN401 - any family
    return tuple(
        f"{name}s: {_formula(layer, axis, size, cells)}"
        for axis, (name, size, cells) in enumerate(
            zip(_axis_names(len(plane)), plane, layer.output_plane(plane), strict=True)
        )
    )


def _formula(layer: Any, axis: int, size: int, cells: int) -> str:  # noqa: ANN401 - any family
    if layer.family.startswith("global"):
        return f"the whole of {size} -> 1"
    if layer.family.startswith("adaptive"):
        return f"window i of {cells} spans floor(i * {size} / {cells}) to ceil((i + 1) * {size} / {cells}) -> {cells}"
    if layer.family == "blur_pool":
        return f"floor(({size} + 2*{layer.padding} - {layer.kernel_size}) / {layer.stride}) + 1 = {cells}"
    kernel, stride, before, after, dilation = layer.geometry()[axis]
    rounding = "ceil" if layer.ceil_mode else "floor"
    # Only with the parameters that the layer has. Without a dilation, 1*(kernel - 1) + 1 is the kernel.
    sides = f"2*{before}" if before == after else f"{before} + {after}"
    padded = f"{size} + {sides}" if hasattr(layer, "padding") else f"{size}"
    extent = f"{dilation}*({kernel} - 1) - 1" if hasattr(layer, "dilation") else f"{kernel}"
    text = f"{rounding}(({padded} - {extent}) / {stride}) + 1"
    floor = pooled_size(size, kernel, stride, before, dilation, padding_end=after)
    if not layer.ceil_mode:
        return f"{text} = {cells}"
    ceil = -(-(size + before + after - dilation * (kernel - 1) - 1) // stride) + 1
    if last_window_starts_outside(ceil, size, stride, before):
        return (
            f"{text} = {ceil}, but the last window would start at {(ceil - 1) * stride - before}, "
            f"not inside the input of {size} or its left padding: ceil_mode drops it -> {cells}"
        )
    return f"{text} = {cells}" + (f" (floor gives {floor})" if floor != cells else "")


def format_number(value: float) -> str:
    """Format a number with the digits of a float32: 6, 3.75, nan."""
    return f"{value:.7g}"


def _format_index(index: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, index))})"


def format_lines(explanation: Explanation, windows: int = WINDOWS) -> list[str]:
    """Return an explanation as lines of text, with this number of windows at most."""
    plane, names = explanation.plane, _axis_names(explanation.plane.ndim)
    out = [f"{explanation.layer!r} on a plane of {' x '.join(map(str, plane.shape))}"]
    width = 2 + max(len(format_number(float(cell))) for cell in plane.flat)
    # What is printed of each axis: the input, and the padding that windows have.
    extents = []
    for axis, size in enumerate(plane.shape):
        spans = [each.axes[axis].positions for each in explanation.windows]
        extents.append(range(min(0, *(each[0] for each in spans)), max(size, *(each[-1] + 1 for each in spans))))
    for window in explanation.windows[:windows]:
        position = ", ".join(
            f"{name} {axis.positions[0]}"
            if len(axis.positions) == 1
            else f"{name}s {axis.positions[0]}..{axis.positions[-1]}"
            for name, axis in zip(names, window.axes, strict=True)
        )
        views = [_view(extent, axis) for extent, axis in zip(extents, window.axes, strict=True)]
        rows = _grid(views, partial(_cell, explanation, window.axes), width)
        out += [
            "",
            f"window {_format_index(window.index)}: {position}",
            *(f"  {row}" for row in rows),
            f"  {window.how}",
        ]
    total = len(explanation.windows)
    if total > windows:
        out += ["", f"{total - windows} more windows: --windows {total} prints all"]
    out += ["", f"[n] is in the window{_legend(explanation, extents)}"]
    out += [
        f"in no window: {name if len(positions) > 1 else name.removesuffix('s')} {', '.join(map(str, positions))}"
        for name, positions in explanation.unvisited.items()
        if positions
    ]
    output = explanation.output[tuple(slice(VIEW) for _ in names)]
    title = "output:" if output.shape == explanation.output.shape else f"output (the first {VIEW} of an axis):"
    width = max(len(format_number(float(cell))) for cell in output.flat)
    rows = _grid([range(size) for size in output.shape], lambda index: format_number(float(output[index])), width)
    out += ["", title, *(f"  {row}" for row in rows)]
    out += ["", "shape:", *(f"  {formula}" for formula in explanation.formulas)]
    return out


def _legend(explanation: Explanation, extents: list[range]) -> str:
    parts = []
    if any(explanation.unvisited.values()):
        parts.append("(n) is in no window")
    if any(len(extent) > size for extent, size in zip(extents, explanation.plane.shape, strict=True)):
        reflects = explanation.layer.family == "blur_pool"
        parts.append(". is padding" + ", which reflects the cells next to the edge" * reflects)
    if any(len(extent) > VIEW for extent in extents):
        parts.append(f"only {VIEW} positions of an axis are shown")
    return "".join(f", {each}" for each in parts)


def _view(extent: range, axis: WindowAxis) -> range:
    """Return the positions of an axis to print for a window: all, or else some with the window in the middle."""
    length = axis.positions[-1] + 1 - axis.positions[0]
    first = axis.positions[0] - max(VIEW - length, 0) // 2
    first = max(extent.start, min(first, extent.stop - VIEW))
    return range(first, min(first + VIEW, extent.stop))


def _cell(explanation: Explanation, axes: tuple[WindowAxis, ...], index: tuple[int, ...]) -> str:
    inside = all(0 <= each < size for each, size in zip(index, explanation.plane.shape, strict=True))
    text = format_number(float(explanation.plane[index])) if inside else "."
    if all(each in axis.positions for each, axis in zip(index, axes, strict=True)):
        return f"[{text}]"
    if inside and any(each in unvisited for each, unvisited in zip(index, explanation.unvisited.values(), strict=True)):
        return f"({text})"
    return f"{text} "


def _grid(
    views: list[range], cell: Callable[[tuple[int, ...]], str], width: int, index: tuple[int, ...] = ()
) -> list[str]:
    """Return the rows of a grid of cells; those of a third axis under a line for each of its positions."""
    if len(views) == 1:
        return [" ".join(f"{cell((*index, each)):>{width}}" for each in views[0]).rstrip()]
    rows = []
    for each in views[0]:
        if len(views) == 3:  # noqa: PLR2004 - depth, rows and columns
            rows.append(f"depth {each}:")
        rows += _grid(views[1:], cell, width, (*index, each))
    return rows
