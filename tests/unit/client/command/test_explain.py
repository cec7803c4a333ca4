"""Explanations: their output compared with torch's, their formulas, and their text."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from poolrpc import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool1d,
    AvgPool2d,
    BlurPool2d,
    FractionalMaxPool2d,
    GlobalPool1d,
    GlobalPool2d,
    InvalidArgumentError,
    LPPool1d,
    LPPool2d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool2d,
)
from poolrpc.command.explain import explain, format_lines
from tests.parity.definitions import blurred, reduced
from tests.parity.reference import reference
from tests.unit.strategies import classes, layers

KNOWN = np.array([[1, 3, 2, 4], [5, 6, 8, 7], [4, 2, 1, 0], [9, 7, 3, 2]], np.float32)


def output_of_torch(layer, plane, result=0):
    """Return torch's output for one plane, or its indices if result is 1."""
    x = torch.from_numpy(plane.copy())[None, None]
    if layer.family == "blur_pool":  # which torch lacks
        return blurred(layer, x)[0, 0].numpy()
    if layer.family in {"pool", "global_pool"} and layer.reduce not in {"max", "mean"}:
        return reduced(layer, x)[0, 0].numpy()
    if layer.family in {"max_pool", "avg_pool", "pool"} and result == 0:
        return reference(layer if layer.family != "pool" else layer.resolved(plane.shape), x)[0][0, 0].numpy()
    if layer.family.startswith("global"):
        name = "AdaptiveMaxPool" if layer.reduce == "max" else "AdaptiveAvgPool"
        module = getattr(nn, f"{name}{plane.ndim}d")(1)
    else:
        arguments = {each.name: getattr(layer, each.name) for each in dataclasses.fields(layer)}
        if arguments.get("output_size") == (None,):  # which torch's 1d layers lack
            arguments["output_size"] = len(plane)
        module = getattr(nn, layer.name)(**arguments)
    output = module(x)
    return (output[result] if isinstance(output, tuple) else output)[0, 0].numpy()


@st.composite
def cases(draw):
    """Draw a layer with fixed windows and a plane of multiples of 0.5, sometimes with infinities or NaN."""
    dims = draw(st.integers(1, 3))
    among = [cls for cls in classes(dims) if cls.family not in ("fractional_max_pool", "max_unpool")]
    layer = draw(layers(among, most=4, most_output=5, indices=False))
    values = st.integers(-8, 8).map(lambda n: n / 2)
    if layer.family in ("max_pool", "adaptive_max_pool") or getattr(layer, "reduce", "") == "max":
        values |= st.sampled_from([float("nan"), float("inf"), float("-inf")])
    if layer.family == "lp_pool":
        # In torch, large exponents overflow float32, and the powers of negative numbers are mostly NaN.
        layer = dataclasses.replace(layer, norm_type=draw(st.sampled_from([1, 2, 3, 0.5, 1.5])))
        values = st.integers(0, 8).map(lambda n: n / 2) if layer.norm_type % 1 else values
    plane = [draw(st.integers(1, 6)) for _ in range(dims)]
    count = int(np.prod(plane))
    cells = draw(st.lists(values, min_size=count, max_size=count))
    return layer, np.array(cells, np.float32).reshape(plane)


@given(cases())
def test_the_output_is_torchs(case):
    """The output computed window by window is torch's, for every family, rank and parameter."""
    layer, plane = case
    try:
        explanation = explain(layer, plane)
    except InvalidArgumentError:
        assume(False)
    expected = output_of_torch(layer, plane)
    assert explanation.output.shape == expected.shape
    assert np.allclose(explanation.output, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert [window.index for window in explanation.windows] == list(np.ndindex(expected.shape))
    assert len(explanation.formulas) == plane.ndim
    for axis, formula in zip(expected.shape, explanation.formulas, strict=True):
        assert re.search(rf"(= |-> ){axis}\b", formula)
    assert "\n".join(format_lines(explanation))


@pytest.mark.parametrize("layer", [BlurPool2d(), BlurPool2d(5, 1), BlurPool2d(4, 3), BlurPool2d(1, 2)], ids=repr)
@pytest.mark.parametrize("shape", [(6, 7), (4, 9)])
def test_the_windows_of_a_blur_are_filtered(layer, shape):
    """A window's value is that of the binomial filter; a cell of the padding has the value of the cell it reflects."""
    plane = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    explanation = explain(layer, plane)
    expected = blurred(layer, torch.from_numpy(plane)[None, None])[0, 0].numpy()
    np.testing.assert_allclose(explanation.output, expected, rtol=1e-5)
    for axis, formula in zip(expected.shape, explanation.formulas, strict=True):
        assert formula.endswith(f" = {axis}")


def test_a_blur_shows_its_coefficients_and_its_padding():
    """The terms are the coefficients times the cells, also those that are reflected, of which the legend tells."""
    lines = format_lines(explain(BlurPool2d(), np.arange(1, 10, dtype=np.float32).reshape(3, 3)))
    assert "  (1*5 + 2*4 + 1*5 + 2*2 + 4*1 + 2*2 + 1*5 + 2*4 + 1*5) / 16 = 3" in lines
    assert "[n] is in the window, . is padding, which reflects the cells next to the edge" in lines
    assert "  rows: floor((3 + 2*1 - 3) / 2) + 1 = 2" in lines


@given(st.sampled_from([MaxPool2d(2, stride=1), MaxPool2d(3, padding=1), AdaptiveMaxPool2d(2)]), st.data())
def test_the_position_of_a_maximum_is_torchs_index(layer, data):
    """Among equal cells and NaN, the named position is torch's index."""
    cells = data.draw(st.lists(st.sampled_from([0.0, 1.0, float("nan"), float("-inf")]), min_size=12, max_size=12))
    plane = np.array(cells, np.float32).reshape(3, 4)
    indices = output_of_torch(dataclasses.replace(layer, return_indices=True), plane, result=1)
    for window, index in zip(explain(layer, plane).windows, indices.flatten(), strict=True):
        assert window.how.endswith(f" at ({index // 4}, {index % 4})")


@pytest.mark.parametrize(
    ("layer", "output"),
    [
        (MaxPool2d(2, 2), [[6, 8], [9, 3]]),
        (AvgPool2d(2, 2), [[3.75, 5.25], [5.5, 1.5]]),
        (AdaptiveAvgPool2d((1, 1)), [[4.0]]),
        (AdaptiveMaxPool2d((1, 1)), [[9.0]]),
        (GlobalPool2d("mean"), [[4.0]]),
        (GlobalPool2d("max"), [[9.0]]),
        (LPPool2d(1, 2), [[15, 21], [22, 6]]),
    ],
    ids=repr,
)
def test_known_examples(layer, output):
    """Well-known examples have their outputs."""
    assert explain(layer, KNOWN).output.tolist() == output


def test_a_window_is_printed_with_its_position_and_maximum():
    """Each window is printed in order: its rows and columns, the plane with its cells marked, where its maximum is."""
    text = format_lines(explain(MaxPool2d(2, 2), KNOWN))
    start = text.index("window (0, 1): rows 0..1, columns 2..3")
    assert [line.split() for line in text[start + 1 : start + 5]] == [
        ["1", "3", "[2]", "[4]"],
        ["5", "6", "[8]", "[7]"],
        ["4", "2", "1", "0"],
        ["9", "7", "3", "2"],
    ]
    assert text[start + 5].strip() == "max 8 at (1, 2)"
    assert [line for line in text if line.startswith("window")] == sorted(
        line for line in text if line.startswith("window")
    )
    assert text[0] == "MaxPool2d(2, stride=2) on a plane of 4 x 4"


def test_an_average_is_printed_as_a_sum_and_its_divisor():
    """A mean has its sum and divisor, in which padding counts if it does in torch."""
    plane = np.array([3, 5], np.float32)
    padded = AvgPool1d(2, stride=1, padding=1)
    assert [window.how for window in explain(padded, plane).windows] == [
        "(3) / 2 = 1.5",
        "(3 + 5) / 2 = 4",
        "(5) / 2 = 2.5",
    ]
    without_padding = dataclasses.replace(padded, count_include_pad=False)
    assert [window.how for window in explain(without_padding, plane).windows][::2] == ["(3) / 1 = 3", "(5) / 1 = 5"]
    divided = AvgPool2d((1, 2), divisor_override=4)
    assert explain(divided, plane[None]).windows[0].how == "(3 + 5) / 4 = 2"


def test_padding_is_printed():
    """Cells of the padding are printed as dots with a legend, and are None among the cells."""
    explanation = explain(MaxPool2d(2, padding=1), np.ones((2, 2), np.float32))
    assert explanation.windows[0].cells == [[None, None], [None, 1.0]]
    text = format_lines(explanation)
    assert text[2] == "window (0, 0): rows -1..0, columns -1..0"
    assert [line.split() for line in text[3:7]] == [
        ["[.]", "[.]", ".", "."],
        ["[.]", "[1]", "1", "."],
        [".", "1", "1", "."],
        [".", ".", ".", "."],
    ]
    assert "[n] is in the window, . is padding" in text
    assert "[n] is in the window" in format_lines(explain(MaxPool2d(2), np.ones((2, 2), np.float32)))


def test_cells_in_no_window_are_named_and_marked():
    """Cells that no window has are in parentheses in every plane, and their rows and columns are listed."""
    explanation = explain(MaxPool2d((1, 2), stride=(2, 3)), np.arange(20, dtype=np.float32).reshape(4, 5))
    assert explanation.unvisited == {"rows": (1, 3), "columns": (2,)}
    text = format_lines(explanation)
    assert [line.split() for line in text[3:7]] == [
        ["[0]", "[1]", "(2)", "3", "4"],
        ["(5)", "(6)", "(7)", "(8)", "(9)"],
        ["10", "11", "(12)", "13", "14"],
        ["(15)", "(16)", "(17)", "(18)", "(19)"],
    ]
    assert "[n] is in the window, (n) is in no window" in text
    assert text[text.index("[n] is in the window, (n) is in no window") + 1 :][:2] == [
        "in no window: rows 1, 3",
        "in no window: column 2",
    ]
    dilated = explain(MaxPool1d(2, dilation=2, stride=3), np.arange(6, dtype=np.float32))
    assert dilated.unvisited == {"columns": (1, 4)}


@given(cases())
def test_a_cell_in_no_window_does_not_matter(case):
    """Whatever is in cells that no window has, the output is the same; and every other cell is in a window."""
    layer, plane = case
    try:
        explanation = explain(layer, plane)
    except InvalidArgumentError:
        assume(False)
    visited = np.zeros(plane.shape, bool)
    for window in explanation.windows:
        visited[np.ix_(*(axis.inside for axis in window.axes))] = True
    named = np.zeros(plane.shape, bool)
    for axis, positions in enumerate(explanation.unvisited.values()):
        named[(slice(None),) * axis + (list(positions),)] = True
    assert np.array_equal(named, ~visited)


def test_few_windows_and_few_positions_are_printed():
    """A long plane is printed around each window, and only the first windows are, with how to print all."""
    text = format_lines(explain(MaxPool1d(2), np.arange(100, dtype=np.float32)), windows=3)
    assert len([line for line in text if line.startswith("window")]) == 3
    assert "47 more windows: --windows 50 prints all" in text
    assert max(map(len, text)) < 120
    assert "output (the first 16 of an axis):" in text
    every = format_lines(explain(MaxPool1d(2), np.arange(100, dtype=np.float32)), windows=50)
    assert len([line for line in every if line.startswith("window")]) == 50
    assert not [line for line in every if "more windows" in line]
    last = every[every.index("window (49): columns 98..99") + 1]
    assert last.split()[-2:] == ["[98]", "[99]"]
    assert len(last.split()) == 16


def test_a_plane_of_many_cells_is_printed_in_short_lines_or_rejected():
    """A window of many cells has short lines, and windows that are too much work are rejected with the limit."""
    plane = np.ones((200, 200), np.float32)
    assert max(map(len, format_lines(explain(AdaptiveAvgPool2d(1), plane)))) < 400
    with pytest.raises(InvalidArgumentError, match="input: expected windows of at most 1048576 cells together, got"):
        explain(MaxPool2d(100, stride=1), plane)


def test_a_window_without_a_cell_of_the_input_is_minus_infinity():
    """A dilated window may have only padding: the output is torch's minus infinity, with the reason."""
    layer, plane = MaxPool1d(2, padding=1, dilation=3), np.array([1, 2], np.float32)
    explanation = explain(layer, plane)
    assert explanation.windows[0].how == "no cell of the input: -inf"
    assert explanation.output.tolist() == output_of_torch(layer, plane).tolist() == [float("-inf")]


DROPPED = (
    "columns: ceil((5 + 2*1 - 1*(2 - 1) - 1) / 3) + 1 = 3, but the last window would start at 5, "
    "not inside the input of 5 or its left padding: ceil_mode drops it -> 2"
)


@pytest.mark.parametrize(
    ("layer", "plane", "formula"),
    [
        (MaxPool1d(3, 2, padding=1), 8, "columns: floor((8 + 2*1 - 1*(3 - 1) - 1) / 2) + 1 = 4"),
        (MaxPool1d(2, 2, dilation=3), 9, "columns: floor((9 + 2*0 - 3*(2 - 1) - 1) / 2) + 1 = 3"),
        (MaxPool1d(2, 2, ceil_mode=True), 4, "columns: ceil((4 + 2*0 - 1*(2 - 1) - 1) / 2) + 1 = 2"),
        (MaxPool1d(2, 2, ceil_mode=True), 5, "columns: ceil((5 + 2*0 - 1*(2 - 1) - 1) / 2) + 1 = 3 (floor gives 2)"),
        (
            MaxPool1d(2, 3, padding=1, ceil_mode=True),
            5,
            DROPPED,
        ),
        (LPPool1d(2, 3), 7, "columns: floor((7 - 3) / 3) + 1 = 2"),
        (AvgPool1d(3, 2, padding=1), 8, "columns: floor((8 + 2*1 - 3) / 2) + 1 = 4"),
        (AdaptiveAvgPool1d(3), 7, "columns: window i of 3 spans floor(i * 7 / 3) to ceil((i + 1) * 7 / 3) -> 3"),
        (GlobalPool1d("mean"), 7, "columns: the whole of 7 -> 1"),
    ],
    ids=repr,
)
def test_a_formula_has_its_numbers(layer, plane, formula):
    """The rule of an axis has its numbers, and says if ceil_mode adds or drops a window."""
    assert explain(layer, np.zeros(plane, np.float32)).formulas == (formula,)
    assert format_lines(explain(layer, np.zeros(plane, np.float32)))[-1].strip() == formula


def test_each_axis_has_its_formula_by_name():
    """A plane's axes are depths, rows and columns, in this order."""
    formulas = explain(MaxPool3d((1, 2, 3)), np.zeros((4, 4, 4), np.float32)).formulas
    assert [(formula.partition(":")[0], formula[-1]) for formula in formulas] == [
        ("depths", "4"),
        ("rows", "2"),
        ("columns", "1"),
    ]


@pytest.mark.parametrize("layer", [FractionalMaxPool2d(2, 2), MaxUnpool2d(2)], ids=repr)
def test_a_layer_without_fixed_windows_is_rejected(layer):
    """FractionalMaxPool and MaxUnpool are rejected with the layer."""
    with pytest.raises(InvalidArgumentError, match=re.escape(f"got {layer!r}")):
        explain(layer, KNOWN)


@pytest.mark.parametrize("shape", [(), (4,), (1, 1, 4), (1, 1, 4, 4), (0, 4), (4, 0)])
def test_a_plane_of_another_rank_is_rejected(shape):
    """A plane must have exactly the layer's spatial axes, and cells."""
    with pytest.raises(InvalidArgumentError):
        explain(MaxPool2d(1), np.zeros(shape, np.float32))


def test_a_plane_that_the_layer_cannot_pool_is_rejected():
    """A kernel larger than the plane is an error of kernel_size."""
    with pytest.raises(InvalidArgumentError, match=r"^kernel_size: expected an effective kernel of at most"):
        explain(MaxPool2d(5), KNOWN)
