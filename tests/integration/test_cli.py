"""The command `poolrpc` against a real server: files in, files out, one line for an error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

import poolrpc
from poolrpc.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., tuple[int, str, str]]

PLANE = "[[1, 3, 2, 4], [5, 6, 8, 7], [4, 2, 1, 0], [9, 7, 3, 2]]"


@pytest.fixture
def run(address: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command against the server, and returns its status, stdout and stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        status = main([*map(str, arguments), "--address", address])
        output = capsys.readouterr()
        return status, output.out, output.err

    return command


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an image of 6 x 4 random pixels."""
    path = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 4, 3), np.uint8)).save(path)
    return path


def test_pool_an_image(run: Run, image: Path) -> None:
    """An image is sent as uint8 and the result is saved as an image; each step's shape is printed."""
    out = image.with_name("out.png")
    status, output, _ = run("pool", image, "--layer", "[MaxPool2d(2), MaxPool2d((3, 1))]", "--save", out)
    assert status == 0
    assert output.splitlines() == [
        "input: uint8 (6, 4, 3) NHWC",
        "MaxPool2d(2) -> (3, 2, 3)",
        "  then MaxPool2d((3, 1)) -> (1, 2, 3)",
        "  values: [[[255, 243, 250],",
        "            [236, 242, 246]]]",
        f"saved {out}",
    ]
    pixels = np.asarray(Image.open(image)).reshape(6, 2, 2, 3).max((0, 2))
    np.testing.assert_array_equal(np.asarray(Image.open(out))[0], pixels)


def test_an_average_of_an_image_is_rounded(run: Run, image: Path) -> None:
    """An image is sent as it is and converted for a layer without integer dtypes; the result is rounded."""
    out = image.with_name("out.png")
    status, output, _ = run("pool", image, "--layer", "AvgPool2d(2)", "--save", out)
    assert status == 0
    assert output.splitlines()[:3] == [
        "input: uint8 (6, 4, 3) NHWC",
        "ToDtype('float32') -> (6, 4, 3)",
        "  then AvgPool2d(2) -> (3, 2, 3)",
    ]
    means = np.asarray(Image.open(image)).reshape(3, 2, 2, 2, 3).mean((1, 3))
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.rint(means).astype(np.uint8))


def test_a_global_layer_pools_an_image(run: Run, image: Path) -> None:
    """The mean of an image is one pixel with a value for each channel."""
    out = image.with_name("out.npy")
    status, output, _ = run("pool", image, "--layer", 'GlobalPool2d("mean")', "--save", out)
    assert (status, output.splitlines()[2]) == (0, "  then GlobalPool2d('mean') -> (1, 1, 3)")
    np.testing.assert_allclose(np.load(out).ravel(), np.asarray(Image.open(image)).mean((0, 1)), rtol=1e-6)


PYRAMID = "[MaxPool2d(1), MaxPool2d(2), MaxPool2d((3, 1))]"


def test_the_steps_of_a_chain_are_saved_one_by_one(run: Run, image: Path) -> None:
    """--steps all keeps the output of every layer, each in a numbered file, and prints each layer once."""
    out = image.with_name("o.png")
    status, output, _ = run("pool", image, "--layer", PYRAMID, "--steps", "all", "--save", out)
    assert status == 0
    assert [line for line in output.splitlines() if line.startswith(("input", "Max", "  then", "saved"))] == [
        "input: uint8 (6, 4, 3) NHWC",
        "MaxPool2d(1) -> (6, 4, 3)",
        "  then MaxPool2d(2) -> (3, 2, 3)",
        "  then MaxPool2d((3, 1)) -> (1, 2, 3)",
        *(f"saved {image.with_name(f'o-{number}.png')}" for number in range(3)),
    ]
    pixels = np.asarray(Image.open(image))
    half = pixels.reshape(3, 2, 2, 2, 3).max((1, 3))
    for number, level in enumerate((pixels, half, half.max(0, keepdims=True))):
        np.testing.assert_array_equal(Image.open(image.with_name(f"o-{number}.png")), level)


def test_the_steps_of_averages_of_an_image(run: Run, image: Path) -> None:
    """Conversions that the command puts between the layers do not change their numbers."""
    out = image.with_name("o.npy")
    chain = "[MaxPool2d(1), AvgPool2d(2), MaxPool2d((3, 1))]"
    status, output, _ = run("pool", image, "--layer", chain, "--steps", "1,2", "--save", out)
    assert status == 0
    assert "  then AvgPool2d(2) -> (3, 2, 3)" in output.splitlines()
    half = np.asarray(Image.open(image)).reshape(3, 2, 2, 2, 3).mean((1, 3)).astype(np.float32).transpose(2, 0, 1)
    np.testing.assert_array_equal(np.load(image.with_name("o-0.npy")), half)
    np.testing.assert_array_equal(np.load(image.with_name("o-1.npy")), half.max(1, keepdims=True))


def test_some_steps_are_kept_with_their_indices(run: Run, tmp_path: Path) -> None:
    """--steps 0,2 keeps these two; the report has the layers that lead to each; a .npz has the indices of its step."""
    x = np.random.default_rng(3).standard_normal((2, 16, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    chain = "[MaxPool2d(2, return_indices=True), AvgPool2d(2), MaxPool2d(2, return_indices=True)]"
    status, output, _ = run(
        "pool", tmp_path / "x.npy", "--layer", chain, "--steps", "0,2", "--save", tmp_path / "y.npz", "--json"
    )
    assert status == 0
    assert [len(each["steps"]) for each in json.loads(output)["branches"]] == [1, 3]
    with np.load(tmp_path / "y-0.npz") as first, np.load(tmp_path / "y-1.npz") as last:
        np.testing.assert_array_equal(first["x"], x.reshape(2, 8, 2, 8, 2).max((2, 4)))
        np.testing.assert_array_equal(
            np.take_along_axis(x.reshape(2, -1), first["indices"].reshape(2, -1), 1).ravel(), first["x"].ravel()
        )
        assert last["indices"].shape == last["x"].shape == (2, 2, 2)


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ("3", "steps: expected 0 to 2, got 3"),
        ("first", "steps: expected all, or numbers of layers such as 0,2, got 'first'"),
        ("0,,1", "steps: expected all, or numbers of layers such as 0,2, got '0,,1'"),
        ("-1", "steps: expected all, or numbers of layers such as 0,2, got '-1'"),
        ("1,0", "branches[0].outputs: expected numbers of layers in ascending order, each in 0..2, got (1, 0)"),
    ],
)
def test_steps_that_there_are_not(run: Run, image: Path, steps: str, text: str) -> None:
    """Numbers of no layer, and what is not a list of numbers, are one line on stderr."""
    status, _, error = run("pool", image, "--layer", PYRAMID, f"--steps={steps}")
    assert (status, error) == (1, f"poolrpc: {text}\n")


def test_steps_need_one_chain(run: Run, image: Path) -> None:
    """Several --layer are branches, to which --steps does not apply."""
    status, _, error = run("pool", image, "--layer", "MaxPool2d(2)", "--layer", "MaxPool2d(1)", "--steps", "all")
    assert (status, error) == (1, "poolrpc: steps: expected one --layer, which is a chain, got 2\n")


def test_branches_are_saved_one_by_one(run: Run, image: Path) -> None:
    """Several --layer are branches, whose files are numbered."""
    status, output, _ = run(
        "pool",
        image,
        "--layer",
        "MaxPool2d(2)",
        "--layer",
        "MaxPool2d(1)",
        "--save",
        image.with_name("o.png"),
        "--json",
    )
    assert status == 0
    data = json.loads(output)
    assert data["saved"] == [str(image.with_name("o-0.png")), str(image.with_name("o-1.png"))]
    assert [each["steps"][0]["shape"] for each in data["branches"]] == [[3, 2, 3], [6, 4, 3]]
    np.testing.assert_array_equal(Image.open(image.with_name("o-1.png")), Image.open(image))


def test_arrays_are_read_and_written(run: Run, tmp_path: Path) -> None:
    """.npy and .npz files are inputs and outputs; an .npz file also has indices, with which it can be unpooled."""
    x = np.random.default_rng(2).standard_normal((2, 3, 4, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    layer = "MaxPool2d(2, return_indices=True)"
    assert run("pool", tmp_path / "x.npy", "--layer", layer, "--save", tmp_path / "y.npz")[0] == 0
    with np.load(tmp_path / "y.npz") as pooled:
        kept = x.reshape(2, 3, 2, 2, 2, 2).max((3, 5))
        np.testing.assert_array_equal(pooled["x"], kept)
    assert run("pool", tmp_path / "y.npz", "--layer", "MaxUnpool2d(2)", "--save", tmp_path / "back.npy")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "back.npy"), np.where(np.isin(x, kept), x, 0))
    status, _, error = run("pool", tmp_path / "y.npz", "--layer", "MaxPool2d(2)")
    assert (status, error) == (
        0,
        f"poolrpc: {tmp_path / 'y.npz'}: the indices are left out, since no layer takes them\n",
    )


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".png", ".tiff"])
@pytest.mark.parametrize("layer", ["MaxPool2d(2)", "AvgPool2d(2)", "MaxPool2d((1, 2))"])
def test_a_pooled_image_is_read_again_as_it_is(run: Run, tmp_path: Path, suffix: str, layer: str) -> None:
    """What is saved in any format can be pooled again: in two commands as in one."""
    pixels = np.random.default_rng(4).integers(0, 64, (8, 12), np.uint16) * 4
    Image.fromarray(np.kron(pixels, np.ones((2, 2), np.uint16))).save(tmp_path / "x.png")
    once, twice, chained = (tmp_path / f"{name}{suffix}" for name in ("once", "twice", "chained"))
    assert run("pool", tmp_path / "x.png", "--layer", layer, "--save", once)[0] == 0
    assert run("pool", once, "--layer", "MaxPool2d((3, 2))", "--save", twice)[0] == 0
    assert run("pool", tmp_path / "x.png", "--layer", f"[{layer}, MaxPool2d((3, 2))]", "--save", chained)[0] == 0
    first, second = (json.loads(run("pool", each, "--layer", "MaxPool2d(1)", "--json")[1]) for each in (twice, chained))
    assert first["branches"] == second["branches"]
    assert first["input"] == second["input"]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_unpooling_in_two_commands_in_either_layout(run: Run, tmp_path: Path, layout: str) -> None:
    """A .npz with indices states its layout, so that the second command needs no --layout."""
    x = np.random.default_rng(5).permutation(4 * 6 * 8).reshape(1, 4, 6, 8).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    layer = "MaxPool2d(2, return_indices=True)"
    kept, back = tmp_path / "y.npz", tmp_path / "z.npz"
    assert run("pool", tmp_path / "x.npy", "--layer", layer, "--layout", layout, "--save", kept)[0] == 0
    assert run("pool", kept, "--layer", "MaxUnpool2d(2)", "--save", back)[0] == 0
    with np.load(kept) as pooled, np.load(back) as unpooled:
        assert unpooled["layout"] == layout
        np.testing.assert_array_equal(unpooled["x"], np.where(np.isin(x, pooled["x"]), x, 0))
    status, _, error = run("pool", kept, "--layer", "MaxUnpool2d(2)", "--layout", {"NCHW": "NHWC"}.get(layout, "NCHW"))
    assert status == 1
    assert f"layout: expected {layout}, which is the layout of the file" in error


def test_a_deep_image_keeps_its_depth(run: Run, tmp_path: Path) -> None:
    """A 16-bit image is pooled with its values, also by a layer that has no integers, and saved with 16 bits."""
    pixels = np.random.default_rng(6).integers(0, 65536, (4, 6), np.uint16)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    for layer, expected in (
        ("MaxPool2d(2)", pixels.reshape(2, 2, 3, 2).max((1, 3))),
        ("AvgPool2d(2)", np.rint(pixels.reshape(2, 2, 3, 2).mean((1, 3), np.float32))),
    ):
        assert run("pool", tmp_path / "x.png", "--layer", layer, "--save", tmp_path / "y.png")[0] == 0
        with Image.open(tmp_path / "y.png") as saved:
            assert saved.mode == "I;16"
            np.testing.assert_array_equal(np.asarray(saved), expected)


def test_what_is_left_out_is_said_on_stderr(run: Run, tmp_path: Path) -> None:
    """Later frames are left out with a line on stderr, and the command succeeds."""
    frames = [Image.fromarray(np.full((4, 6), value, np.uint8)) for value in (10, 200, 90)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    status, output, error = run("pool", tmp_path / "x.gif", "--layer", "MaxPool2d(2)")
    assert status == 0
    assert "MaxPool2d(2) -> (2, 3, " in output
    assert error == f"poolrpc: {tmp_path / 'x.gif'}: the frames after the first (2) are left out\n"


@pytest.mark.parametrize(
    ("shape", "printed"),
    [((1, 1, 8, 8), True), ((1, 1, 8, 10), True), ((1, 2, 16, 10), False), ((0, 1, 8, 8), False)],
)
def test_the_values_of_a_small_output_are_printed(
    run: Run, tmp_path: Path, shape: tuple[int, ...], *, printed: bool
) -> None:
    """Up to 64 values of an output, and of its indices, are printed, as text and as JSON."""
    np.save(tmp_path / "x.npy", np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    command = ("pool", tmp_path / "x.npy", "--layer", "MaxPool2d((2, 1), return_indices=True)")
    text, data = run(*command)[1], json.loads(run(*command, "--json")[1])["branches"][0]
    assert ("  values: [[[[" in text, "  indices: [[[[" in text) == (printed, printed)
    assert ("values" in data, "indices" in data) == (printed, printed)
    if printed:
        assert text.count("\n") < 25
        assert np.array(data["values"]).shape == (1, 1, 4, shape[3])
        assert np.array_equal(data["values"], data["indices"])


def test_branches_with_arrays_are_numbered_files(run: Run, tmp_path: Path) -> None:
    """Several branches have a .npz each, so that each can be read again."""
    np.save(tmp_path / "x.npy", np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4))
    layers = ("--layer", "MaxPool2d(2, return_indices=True)", "--layer", "AvgPool2d(2)")
    assert run("pool", tmp_path / "x.npy", *layers, "--save", tmp_path / "y.npz")[0] == 0
    with np.load(tmp_path / "y-0.npz") as first, np.load(tmp_path / "y-1.npz") as second:
        assert sorted(first) == ["indices", "layout", "x"]
        assert sorted(second) == ["layout", "x"]
        assert second["x"].tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]


def test_explain_checks_the_server_against_the_windows(run: Run) -> None:
    """With --address, explain compares the server's output with the windows."""
    status, output, _ = run("explain", "MaxPool2d(2, 2)", "--input", PLANE)
    assert status == 0
    assert "window (1, 0): rows 2..3, columns 0..1" in output
    assert "max 9 at (3, 0)" in output
    data = json.loads(run("explain", "AvgPool2d(2)", "--input", PLANE, "--json")[1])
    assert data["output"] == [[3.75, 5.25], [5.5, 1.5]]
    assert data["windows"][0]["how"] == "(1 + 3 + 5 + 6) / 4 = 3.75"


def test_info_and_health(run: Run) -> None:
    """Info and health print the server's answers."""
    status, output, _ = run("info")
    assert status == 0
    assert output.startswith(f"poolrpc {poolrpc.__version__} at 127.0.0.1:")
    assert "  MaxPool2d: float16, bfloat16" in output
    assert json.loads(run("info", "--json")[1])["limits"]["max_work"]["unit"] == "cells"
    assert run("health") == (0, "SERVING\n", "")
    assert run("health", "--service", "unknown")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pool", "{missing}", "--layer", "MaxPool2d(2)"], "No such file"),
        (["pool", "{image}", "--layer", "MaxPool2d(2"], "column"),
        (["pool", "{image}", "--layer", "MaxPool2d(9)"], "kernel_size"),
        (["pool", "{text}", "--layer", "MaxPool2d(2)"], "not in a format that Pillow reads"),
        (["pool", "{image}", "--layer", "MaxPool2d(2)", "--save", "x.nonsense"], "suffix"),
        (["pool", "{image}", "--layer", "MaxPool2d(2, return_indices=True)", "--save", "x.npy"], "expected .npz"),
        (["pool", "{image}", "--layer", "MaxPool2d(2, return_indices=True)", "--save", "x.png"], "expected .npz"),
        (["pool", "{image}", "--layer", "MaxPool2d(2)", "--layout", "NCHW"], "expected NHWC"),
        (["pool", "{image}", "--layer", "MaxPool1d(2)"], "expected 2d layers for an image"),
        (["pool", "{image}", "--layer", "MaxPool2d(2)", "--save", "x.gif"], "expected the suffix of a format"),
        (["explain", "MaxPool2d(2)", "--input", "[[1, 2], [3]]"], "expected nested lists of numbers"),
        (["explain", "MaxPool2d(2)", "--input", "[[1, 2]]"], "kernel_size"),
        (["explain", "FractionalMaxPool2d(2, 1)", "--input", PLANE], "fixed"),
    ],
)
def test_errors_are_one_line(run: Run, image: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    """An error is one line on stderr, with status 1 and nothing on stdout."""
    (tmp_path / "text.png").write_text("no image")
    names: dict[str, Any] = {"image": image, "missing": tmp_path / "no.png", "text": tmp_path / "text.png"}
    status, output, error = run(*(each.format(**names) if each.startswith("{") else each for each in arguments))
    assert (status, output) == (1, "")
    assert error.startswith("poolrpc: ")
    assert error.count("\n") == 1
    assert words in error
