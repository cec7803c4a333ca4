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
        f"saved {out}",
    ]
    pixels = np.asarray(Image.open(image)).reshape(6, 2, 2, 3).max((0, 2))
    np.testing.assert_array_equal(np.asarray(Image.open(out))[0], pixels)


def test_an_average_of_an_image_is_rounded(run: Run, image: Path) -> None:
    """For a layer without integer dtypes the image is sent as float32, and the result is rounded."""
    out = image.with_name("out.png")
    assert run("pool", image, "--layer", "AvgPool2d(2)", "--save", out)[0] == 0
    means = np.asarray(Image.open(image)).reshape(3, 2, 2, 2, 3).mean((1, 3))
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.rint(means).astype(np.uint8))


def test_a_global_layer_pools_an_image(run: Run, image: Path) -> None:
    """The mean of an image is one pixel with a value for each channel."""
    out = image.with_name("out.npy")
    status, output, _ = run("pool", image, "--layer", 'GlobalPool2d("mean")', "--save", out)
    assert (status, output.splitlines()[:2]) == (
        0,
        ["input: float32 (6, 4, 3) NHWC", "GlobalPool2d('mean') -> (1, 1, 3)"],
    )
    np.testing.assert_allclose(np.load(out).ravel(), np.asarray(Image.open(image)).mean((0, 1)), rtol=1e-6)


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
    """.npy and .npz files are inputs and outputs; an .npz file also has indices."""
    x = np.random.default_rng(2).standard_normal((2, 3, 4, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    assert (
        run("pool", tmp_path / "x.npy", "--layer", "MaxPool2d(2, return_indices=True)", "--save", tmp_path / "y.npz")[0]
        == 0
    )
    with np.load(tmp_path / "y.npz") as pooled:
        np.testing.assert_array_equal(pooled["output"], x.reshape(2, 3, 2, 2, 2, 2).max((3, 5)))
        np.savez(tmp_path / "z.npz", x=pooled["output"], indices=pooled["indices"])
        kept = pooled["output"]
    assert run("pool", tmp_path / "z.npz", "--layer", "MaxUnpool2d(2)", "--save", tmp_path / "back.npy")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "back.npy"), np.where(np.isin(x, kept), x, 0))


def test_explain_checks_the_server_against_the_windows(run: Run) -> None:
    """Explain prints each window and compares the server's output with them."""
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
        (["pool", "{text}", "--layer", "MaxPool2d(2)"], "cannot identify image file"),
        (["pool", "{image}", "--layer", "MaxPool2d(2)", "--save", "x.nonsense"], "suffix"),
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
