"""Pictures of explanations, in the three formats of `poolrpc explain --save`."""

import io
import re
import sys
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from poolrpc import InvalidArgumentError, parse_layer
from poolrpc.cli import main
from poolrpc.command.drawing import PALETTE
from poolrpc.command.explain import explain
from poolrpc.command.save_picture import save_picture

PLANE = np.array([[1, 3, 2, 4], [5, 6, 8, 7], [4, 2, 1, 0], [9, 7, 3, 2]], np.float32)
NAMESPACE = "{http://www.w3.org/2000/svg}"


def saved(path, layer, plane=PLANE, windows=20, **options):
    """Return the bytes of a picture."""
    save_picture(path, explain(parse_layer(layer), np.asarray(plane, np.float32)), windows, **options)
    return path.read_bytes()


def elements(data, name):
    """Return the elements of an SVG by their name."""
    return list(ET.fromstring(data).iter(NAMESPACE + name))  # noqa: S314 - what we wrote ourselves


def texts(data):
    """Return the texts of an SVG."""
    return [each.text for each in elements(data, "text")]


def cells(data, *fills):
    """Return the boxes of an SVG that have one of these colours."""
    classes = {f"f-{fill}" for fill in fills}
    return [each for each in elements(data, "rect") if classes & set(each.get("class", "").split())]


def test_a_still_picture_has_every_window_with_its_computation(tmp_path):
    """The windows are below each other: the layer, the shapes, each computation, and the output up to then."""
    data = saved(tmp_path / "max.svg", "MaxPool2d(2)")
    shown = texts(data)
    assert shown[:2] == ["MaxPool2d(2)", "4 × 4 → 2 × 2"]
    assert [each for each in shown if each.startswith("max")] == [
        "max(1, 3, 5, 6) = 6",
        "max(2, 4, 8, 7) = 8",
        "max(4, 2, 9, 7) = 9",
        "max(1, 0, 3, 2) = 3",
    ]
    assert len(cells(data, "chosen")) == 4
    assert len(cells(data, "output")) == 1 + 2 + 3 + 4
    assert len(cells(data, "window")) == 4 * 3


@pytest.mark.parametrize(
    ("layer", "marked", "dashed"),
    [
        ("MaxPool2d(3, stride=2, padding=1)", 4 * 9, 5 + 3 + 3),
        ("AvgPool2d(3, stride=2, padding=1)", 4 * 9, 5 + 3 + 3),
        ("MaxPool2d(2, stride=1, dilation=2)", 4 * 4, 0),
        ("MaxPool2d(2, stride=2, padding=1, dilation=2)", 4 * 4, 3 + 2 + 2 + 0),
        ("MaxPool2d(3, stride=2, ceil_mode=True)", 9 + 6 + 6 + 4, 0),
        ("GlobalPool2d('mean')", 16, 0),
    ],
)
def test_the_cells_of_a_window_are_marked(tmp_path, layer, marked, dashed):
    """Those of the padding are too, and are dashed; those in a dilation's gaps and beyond the input are not."""
    boxes = cells(saved(tmp_path / "x.svg", layer), "window", "chosen")
    assert len(boxes) == marked
    assert len([box for box in boxes if box.get("stroke-dasharray")]) == dashed


def test_padding_shows_what_it_counts_as(tmp_path):
    """A maximum has minus infinity, an average 0, or nothing if padding does not count."""
    shown = 4 * 9 + 11  # nine cells in each panel, and those of the windows once more
    assert texts(saved(tmp_path / "max.svg", "MaxPool2d(3, stride=2, padding=1)")).count("−∞") == shown
    counted = texts(saved(tmp_path / "average.svg", "AvgPool2d(3, stride=2, padding=1)"))
    left_out = texts(saved(tmp_path / "x.svg", "AvgPool2d(3, stride=2, padding=1, count_include_pad=False)"))
    assert counted.count("0") - left_out.count("0") == shown
    assert all(left_out)


def test_cells_in_no_window_are_crossed_out(tmp_path):
    """A line crosses each cell of a row or column that no window has."""
    crossed = elements(saved(tmp_path / "x.svg", "AvgPool2d(1, stride=2)"), "polyline")
    arrows = 2
    assert len(crossed) == 4 * (16 - 4 + arrows)
    assert len(elements(saved(tmp_path / "y.svg", "AvgPool2d(2)"), "polyline")) == 4 * arrows


def test_a_picture_that_moves_has_a_frame_for_each_window(tmp_path):
    """After the windows comes the whole output, which alone is shown where nothing moves."""
    data = saved(tmp_path / "x.svg", "MaxPool2d(2, stride=1)", moving=True)
    frames = [each for each in elements(data, "g") if "frame" in each.get("class")]
    assert len(frames) == 9 + 1
    assert [each.get("class") for each in frames if "last" in each.get("class")] == ["frame last"]
    assert frames[-1].get("class") == "frame last"
    assert len(list(frames[-1].iter(NAMESPACE + "rect"))) == 9
    style = elements(data, "style")[0].text
    assert ".frame{visibility:hidden}.last{visibility:visible}" in style
    assert "prefers-reduced-motion:no-preference" in style


def test_an_svg_is_light_and_dark_and_loads_nothing(tmp_path):
    """It has both values of its colours, says what it shows to screen readers, and names no other file."""
    data = saved(tmp_path / "x.svg", "AvgPool2d(2)")
    style = elements(data, "style")[0].text
    light, _, dark = style.partition("prefers-color-scheme:dark")
    assert PALETTE["ink"][0] in light
    assert PALETTE["ink"][1] in dark
    assert "(1 + 3 + 5 + 6) / 4 = 3.75" in elements(data, "title")[0].text
    assert not re.search(rb"href|url\(|@import|<script", data)


def test_png_and_gif_show_the_same(tmp_path):
    """They have twice the pixels; the GIF has a frame for each window and the output, and repeats."""
    width, height = (
        int(elements(saved(tmp_path / "x.svg", "MaxPool2d(2)"), "svg")[0].get(k)) for k in ("width", "height")
    )
    png = Image.open(io.BytesIO(saved(tmp_path / "x.png", "MaxPool2d(2)")))
    assert (png.format, png.size) == ("PNG", (2 * width, 2 * height))
    gif = Image.open(io.BytesIO(saved(tmp_path / "x.gif", "MaxPool2d(2)")))
    assert (gif.format, gif.n_frames, gif.info["loop"]) == ("GIF", 5, 0)
    assert gif.size[0] == 2 * width


@pytest.mark.parametrize("dark", [False, True])
def test_the_colours_of_a_png_are_light_or_dark(tmp_path, dark):
    """The background and the chosen cells have the colours of the palette."""
    data = saved(tmp_path / "x.png", "MaxPool2d(2, padding=1)", dark=dark)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    colours = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in image.getcolors(maxcolors=10**6)}
    assert {PALETTE[name][dark] for name in ("paper", "chosen", "window", "output")} <= colours
    assert PALETTE["paper"][not dark] not in colours


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        ("MaxPool1d(3, stride=2, padding=1)", (16 - 2,)),
        ("AvgPool2d(3, stride=1, padding=1)", (6, 14)),
        ("MaxPool3d(2, stride=1)", (2, 3, 3)),
        ("AdaptiveAvgPool2d((16, 16))", (5, 5)),
        ("LPPool2d(2, 2)", (4, 4)),
        ("GlobalPool3d('mean')", (2, 4, 5)),
    ],
)
def test_nothing_is_outside_of_the_picture_or_too_small(tmp_path, layer, shape, moving):
    """Boxes and texts are inside of the width of a phone, and texts have at least 8 pixels."""
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 3
    (root,) = elements(data := saved(tmp_path / "x.svg", layer, values, moving=moving), "svg")
    width, height = float(root.get("width")), float(root.get("height"))
    assert width == 360
    for rect in elements(data, "rect"):
        x, y = float(rect.get("x")), float(rect.get("y"))
        assert 0 <= x <= x + float(rect.get("width")) <= width
        assert 0 <= y <= y + float(rect.get("height")) <= height
    for text in elements(data, "text"):
        size, x = float(text.get("font-size")), float(text.get("x"))
        assert size >= 8
        shift = {"middle": 0.5, "end": 1}.get(text.get("text-anchor"), 0)
        left = x - shift * 0.6 * size * len(text.text)
        assert left >= -1
        assert left + 0.6 * size * len(text.text) <= width + 25  # letters of a sentence are narrower than digits
        assert float(text.get("y")) <= height


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.5, float("nan"), float("inf"), float("-inf")]), min_size=12, max_size=12),
    st.sampled_from(["MaxPool2d(2)", "MaxPool2d(3, padding=1)", "AvgPool2d(2)", "AdaptiveMaxPool2d(2)"]),
)
def test_any_values_can_be_drawn(tmp_path, values, layer):
    """Also infinities and NaN; the cell that is chosen has the value of the output."""
    plane = np.array(values, np.float32).reshape(3, 4)
    data = saved(tmp_path / "x.svg", layer, plane)
    windows = len(explain(parse_layer(layer), plane).windows)
    assert len(cells(data, "chosen")) == (0 if "Avg" in layer else windows)


def test_windows_that_are_left_out_are_counted(tmp_path):
    """Of many windows the first ones are drawn, and the number of the others."""
    assert "+ 7" in texts(saved(tmp_path / "x.svg", "MaxPool2d(2, stride=1)", windows=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save", "x.pdf"], "save: expected the suffix .svg, .png, .gif, got '.pdf'"),
        (["--save", "x.png", "--animate"], "animate: expected .svg or .gif for a picture that moves, got '.png'"),
        (["--save", "x.svg", "--dark"], "dark: expected .png or .gif, since a .svg has both light and dark colours"),
        (["--animate"], "animate: expected --save with the file of a picture, got none"),
        (["--dark"], "dark: expected --save with the file of a picture, got none"),
        (["--save", "missing/x.svg"], "missing"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(tmp_path, monkeypatch, capsys, arguments, message):
    """The message says what was expected, and no file is written."""
    monkeypatch.chdir(tmp_path)
    assert main(["explain", "MaxPool2d(2)", "--input", "[[1, 2], [3, 4]]", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_plane_that_is_too_large_is_an_error(tmp_path):
    """More than 16 cells on an axis, with the padding, are not legible."""
    with pytest.raises(
        InvalidArgumentError, match="at most 16 cells on an axis of a picture, with its padding, got 17"
    ):
        saved(tmp_path / "x.svg", "MaxPool2d(3, stride=1, padding=1)", np.zeros((2, 15)))


def test_pixels_need_pillow_and_matplotlib(tmp_path, monkeypatch):
    """Without them the message names the extra; an SVG is drawn all the same."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InvalidArgumentError, match=r"pip install 'poolrpc\[viz\]'"):
        saved(tmp_path / "x.png", "MaxPool2d(2)")
    assert saved(tmp_path / "x.svg", "MaxPool2d(2)")


def test_the_command_saves_and_says_so(tmp_path, monkeypatch, capsys):
    """The picture is written in addition to what is printed, also with --json."""
    monkeypatch.chdir(tmp_path)
    arguments = ["explain", "MaxPool2d(2)", "--input", "[[1, 2], [3, 4]]", "--save", "x.svg", "--animate"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith("saved x.svg\n")
    assert main([*arguments[:-3], "--save", "y.svg", "--json"]) == 0
    assert capsys.readouterr().out.startswith("{")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.svg", "y.svg"]


def contrast(one, two):
    """Return the contrast of two colours, as the Web Content Accessibility Guidelines define it."""
    levels = []
    for colour in (one, two):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        levels.append(np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(levels) / min(levels)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("text", "behind"),
    [
        *(("ink", name) for name in ("paper", "cell", "window", "chosen", "output")),
        *((name, "paper") for name in ("muted", "amber", "teal", "blue", "rose", "violet", "green")),
        ("amber", "window"),
    ],
)
def test_text_has_enough_contrast(scheme, text, behind):
    """Text has the contrast of level AA: 4.5 to 1, or 3 to 1 on the chosen cell, where it is large."""
    least = 3 if behind == "chosen" else 4.5
    assert contrast(PALETTE[text][scheme], PALETTE[behind][scheme]) >= least
