"""`poolrpc pool` on many files: folders, patterns, failures, interruptions, and memory."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from poolrpc import PoolClient
from poolrpc.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., tuple[int, str, str]]

LAYER = ("--layer", "MaxPool2d(2)")


@pytest.fixture
def run(address: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that pools files of an empty folder, and returns the status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str, str]:
        status = main(["pool", *map(str, arguments), *LAYER, "--address", address])
        output = capsys.readouterr()
        return status, output.out, output.err

    return command


def make_image(path: str | Path, seed: int = 0, size: tuple[int, int] = (4, 6)) -> np.ndarray:
    """Write a random image, and return it pooled."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    height, width = size[0] // 2, size[1] // 2
    return pixels[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).max((1, 3))


def read_image(path: str | Path) -> np.ndarray:
    """Return the pixels of an image."""
    with Image.open(path) as image:
        return np.asarray(image)


def files_in(folder: str | Path) -> list[str]:
    """Return the paths of all files in a folder and its subfolders."""
    return sorted(str(each.relative_to(folder)) for each in Path(folder).rglob("*") if each.is_file())


@pytest.mark.parametrize("name", ["in", "./in", "in/"])
def test_a_folder_is_pooled_with_its_subfolders(run: Run, name: str) -> None:
    """Images and arrays keep their names and subfolders; other files are counted on stderr."""
    expected = {each: make_image(f"in/{each}", seed) for seed, each in enumerate(["a.png", "b/c.png", "b/d/e.PNG"])}
    np.save("in/f.npy", np.ones((1, 4, 4), np.float32))
    Path("in/notes.txt").write_text("no image")
    assert run(name, "--save", "out") == (
        0,
        "4 files: 4 pooled\n",
        "poolrpc: left out, since they are neither images nor arrays: 1 file\n",
    )
    assert files_in("out") == [*sorted(expected), "f.npy"]
    for each, pixels in expected.items():
        np.testing.assert_array_equal(read_image(f"out/{each}"), pixels)
    assert np.load("out/f.npy").shape == (1, 2, 2)


def test_a_suffix_selects_the_format_of_all_outputs(run: Run) -> None:
    """--suffix takes the place of each file's own suffix, also for several branches, which are numbered."""
    make_image("a.jpg")
    make_image("b.png")
    assert run("a.jpg", "b.png", "--save", "out", "--suffix", ".npz", "--layer", "AvgPool2d(2)")[0] == 0
    assert files_in("out") == ["a-0.npz", "a-1.npz", "b-0.npz", "b-1.npz"]


def test_a_suffix_of_images_leaves_arrays(run: Run) -> None:
    """Arrays among images keep their suffix, since their outputs cannot be images."""
    make_image("in/a.jpg")
    np.save("in/b.npy", np.ones((1, 4, 4), np.float32))
    assert run("in", "--save", "out", "--suffix", ".png", "--layer", "MaxPool2d(2)")[0] == 0
    assert files_in("out") == ["a-0.png", "a-1.png", "b-0.npy", "b-1.npy"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("in/*.png", ["a.png"]),
        ("in/**/*.png", ["a.png", "b/a.png", "b/c/d.png"]),
        ("in/[bx]", ["b/a.png", "b/c/d.png"]),
        ("in/b/?.png", ["a.png"]),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_pattern_names_files(run: Run, tmp_path: Path, pattern: str, expected: list[str], *, absolute: bool) -> None:
    """A quoted pattern is expanded, and outputs keep the paths below its fixed part."""
    for each in ("a.png", "b/a.png", "b/c/d.png", "e.npy.txt"):
        make_image(f"in/{each}") if each.endswith("png") else Path("in", each).write_text("no image")
    assert run(tmp_path / pattern if absolute else pattern, "--save", "out")[0] == 0
    assert files_in("out") == expected


def test_a_name_like_a_pattern_is_a_file_if_it_exists(run: Run) -> None:
    """A file whose name has brackets is pooled itself."""
    make_image("a[1].png")
    status, output, _ = run("a[1].png")
    assert (status, output.splitlines()[0]) == (0, "input: uint8 (4, 6, 3) NHWC")


def test_without_a_folder_the_report_of_each_file_is_printed(run: Run) -> None:
    """Without --save, each file's shapes are printed in order; with --json, all of it is one object."""
    for seed, name in enumerate("cab"):
        make_image(f"in/{name}.png", seed, (40, 40 + 2 * seed))
    status, output, error = run("in")
    assert (status, error) == (0, "")
    assert output.splitlines() == [
        *("in/a.png", "  input: uint8 (40, 42, 3) NHWC", "  MaxPool2d(2) -> (20, 21, 3)"),
        *("in/b.png", "  input: uint8 (40, 44, 3) NHWC", "  MaxPool2d(2) -> (20, 22, 3)"),
        *("in/c.png", "  input: uint8 (40, 40, 3) NHWC", "  MaxPool2d(2) -> (20, 20, 3)"),
        "3 files: 3 pooled",
    ]
    data = json.loads(run("in", "--json")[1])
    assert [each["file"] for each in data["files"]] == ["in/a.png", "in/b.png", "in/c.png"]
    assert data["files"][0]["branches"][0]["steps"] == [{"layer": "MaxPool2d(2)", "shape": [20, 21, 3]}]
    assert (data["pooled"], data["skipped"], data["failed"]) == (3, 0, 0)


def test_failures_are_listed_and_the_rest_is_pooled(run: Run) -> None:
    """A file that fails does not end the others: each is listed with its reason, and the status is 1."""
    for name in ("a", "c", "e"):
        make_image(f"in/{name}.png")
    Path("in/b.png").write_text("no image")
    make_image("in/d.png", size=(1, 6))
    Image.new("RGB", (4, 4)).save("in/f.gif")
    status, output, error = run("in", "--save", "out")
    assert (status, output) == (1, "6 files: 3 pooled, 3 failed\n")
    assert files_in("out") == ["a.png", "c.png", "e.png"]
    lines = error.splitlines()
    assert [line.partition(" failed: ")[0] for line in lines] == [
        f"poolrpc: in/{each}" for each in ("b.png", "d.png", "f.gif")
    ]
    assert "not in a format that Pillow reads" in lines[0]
    assert "kernel_size" in lines[1]
    assert "expected the suffix of a format that keeps" in lines[2]
    data = json.loads(run("in", "--save", "out", "--json")[1])
    assert ["error" in each for each in data["files"]] == [False, True, False, True, False, True]
    assert (data["pooled"], data["failed"]) == (3, 3)


def test_existing_outputs_are_skipped(run: Run) -> None:
    """With --skip-existing, files whose outputs all exist are not pooled again, and the summary counts them."""
    for name in ("a", "b", "c"):
        make_image(f"in/{name}.png")
    assert run("in", "--save", "out")[0] == 0
    Path("out/a.png").write_bytes(b"kept")
    Path("out/b.png").unlink()
    assert run("in", "--save", "out", "--skip-existing")[1] == "3 files: 1 pooled, 2 skipped\n"
    assert Path("out/a.png").read_bytes() == b"kept"
    assert read_image("out/b.png").shape == (2, 3, 3)
    assert run("in/a.png", "--save", "out/a.png", "--skip-existing") == (0, "skipped, since out/a.png exists\n", "")
    assert run("in", "--save", "out")[1] == "3 files: 3 pooled\n"
    assert read_image("out/a.png").shape == (2, 3, 3)
    both = ("in", "--save", "two", "--layer", "AvgPool2d(2)", "--skip-existing")
    assert run(*both)[1] == "3 files: 3 pooled\n"
    Path("two/c-1.png").unlink()
    assert run(*both)[1] == "3 files: 1 pooled, 2 skipped\n"


def test_outputs_are_not_inputs(run: Run) -> None:
    """A folder of outputs in the folder of inputs is left out, so that a second run has the same inputs."""
    make_image("a.png")
    for name in (".", ".", "**/*.png", "*"):
        assert run(name, "--save", "out")[1] == "1 file: 1 pooled\n"
    assert files_in(".") == ["a.png", "out/a.png"]


@pytest.mark.parametrize(
    ("layer", "operand", "value"),
    [('GlobalPool2d("mean")', "weights", np.ones((4, 6))), ("RoIAlign(2)", "boxes", np.array([[0, 0, 1, 3, 3]]))],
)
def test_an_image_with_an_operand_is_converted_first(
    address: str, tmp_path: Path, layer: str, operand: str, value: np.ndarray
) -> None:
    """Layers that take an operand have to be first, so that the server cannot convert the image before them."""
    make_image(tmp_path / "a.png")
    np.save(tmp_path / "operand.npy", value)
    command = ["pool", str(tmp_path / "a.png"), "--layer", layer, f"--{operand}", str(tmp_path / "operand.npy")]
    assert main([*command, "--address", address, "--save", str(tmp_path / "out.npz")]) == 0
    with PoolClient(address) as client:
        x = read_image(tmp_path / "a.png").astype(np.float32)
        expected = client.pool(x, layer, layout="NHWC", **{operand: value})  # type: ignore[arg-type]  # one of the names
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["x"], expected.output)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["in", "--save", "in"], "expected another file than the input"),
        (["in/a.png", "b/a.png", "--save", "out"], "expected an output of its own for each input"),
        (["in", "--save", "out", "--suffix", ".tiff"], "expected an output of its own for each input"),
        (["empty", "--save", "out"], "expected images or arrays in the folder 'empty', got none"),
        (["in", "--save", "out.npz"], "expected a folder for the outputs of several inputs"),
        (["in/n-0.png", "--save", "in/n.png", "--layer", "MaxPool2d(1)"], "expected another file than the input"),
        (["in/a.png", "--save", "in/o.tiff", "--layer", "RoIPool(2)", "--boxes", "b/b.npy"], "expected .npy or .npz"),
    ],
)
def test_outputs_that_would_replace_something_are_rejected(run: Run, arguments: list[str], words: str) -> None:
    """Nothing is pooled if two files have the same output, or an output would replace an input."""
    for each in ("in/a.png", "in/a.jpg", "b/a.png", "empty/b", "in/n-0.png"):
        make_image(each) if "." in each else Path(each).parent.mkdir()
    np.save("b/b.npy", np.zeros((1, 5)))
    before = {each: Path(each).read_bytes() for each in files_in(".")}
    status, output, error = run(*arguments)
    assert (status, output, error.count("\n")) == (1, "", 1)
    assert words in error
    assert {each: Path(each).read_bytes() for each in files_in(".")} == before


def test_a_server_that_is_gone_ends_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """If the server can't be reached, the command ends at the first file: one error, how far it came, and status 1."""
    for i in range(30):
        make_image(tmp_path / f"in/{i}.png")
    arguments = ("pool", tmp_path / "in", *LAYER, "--save", tmp_path / "out", "--timeout", 5)
    assert main([*map(str, arguments), "--address", f"unix:{tmp_path}/none.sock"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert lines[0] == "poolrpc: 30 files: 0 pooled, 30 left; --skip-existing continues"
    assert len(lines) == 2


def test_a_full_disk_ends_the_command(run: Run) -> None:
    """If the disk is full, the command ends with one error, not one for each file."""
    for i in range(30):
        make_image(f"in/{i:02}.png")
    Path("out").mkdir()
    Path("out/03.png").symlink_to("/dev/full")
    status, output, error = run("in", "--save", "out")
    assert (status, output) == (1, "")
    lines = error.splitlines()
    assert lines[0] == "poolrpc: 30 files: 3 pooled, 27 left; --skip-existing continues"
    assert "No space left on device" in lines[1]
    assert len(lines) == 2


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start the command in a process."""
    command = [sys.executable, "-m", "poolrpc", "pool", *map(str, arguments)]
    return subprocess.Popen(command, text=True, **options)  # noqa: S603 - our own command


def test_a_terminal_has_a_progress_bar(address: str, tmp_path: Path) -> None:
    """On a terminal, tqdm's bar counts the files; otherwise nothing is printed on stderr."""
    for i in range(3):
        make_image(tmp_path / f"in/{i}.png")
    arguments = (tmp_path / "in", *LAYER, "--save", tmp_path / "out", "--address", address)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = start(*arguments, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.communicate()[0] == "3 files: 3 pooled\n"
    assert b"3/3" in shown
    assert b"file/s" in shown
    piped = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert piped.communicate() == ("3 files: 3 pooled\n", "")


@pytest.mark.usefixtures("interruptible")
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_thousand_images_interrupted_and_resumed(
    address: str, tmp_path: Path, patch_operation: Callable[..., None]
) -> None:
    """Images of mixed sizes, interrupted in the middle: what is there is whole, and --skip-existing does the rest."""
    sizes = np.random.default_rng(7).integers(2, 200, (2000, 2)).tolist()
    expected = {
        f"{i % 10}/{i:04}.png": make_image(tmp_path / f"in/{i % 10}/{i:04}.png", i, sizes[i]) for i in range(2000)
    }
    reached, opened, computed = threading.Event(), threading.Event(), []

    def hold(operator: Any) -> Any:
        def held(*values: Any) -> Any:
            computed.append(1)
            if len(computed) >= 700:
                reached.set()
                assert opened.wait(60)
            return operator(*values)

        return held

    patch_operation("max_pool", hold)
    arguments = (tmp_path / "in", *LAYER, "--save", tmp_path / "out", "--address", address)
    process = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert reached.wait(300)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    opened.set()
    written = files_in(tmp_path / "out")
    assert (process.returncode, output) == (130, "")
    assert error.count("\n") == 1
    assert error.endswith(" left; --skip-existing continues\n")
    assert 500 < len(written) < 1500
    for name in written:
        np.testing.assert_array_equal(read_image(tmp_path / "out" / name), expected[name])
    process = start(*arguments, "--skip-existing", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    left = len(expected) - len(written)
    assert process.communicate() == (f"2000 files: {left} pooled, {len(written)} skipped\n", "")
    assert files_in(tmp_path / "out") == sorted(expected)
    for name, pixels in expected.items():
        np.testing.assert_array_equal(read_image(tmp_path / "out" / name), pixels)


@pytest.mark.slow
def test_memory_is_steady(address: str, tmp_path: Path) -> None:
    """Many files need no more memory than few: 200 images of 3 MB about as much as 20."""
    make_image(tmp_path / "00.png", size=(1000, 1000))
    peaks = []
    for count in (20, 200):
        folder = tmp_path / f"in{count}"
        folder.mkdir()
        for i in range(count):
            (folder / f"{i:03}.png").hardlink_to(tmp_path / "00.png")
        process = start(folder, *LAYER, "--save", tmp_path / f"out{count}", "--address", address)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks.append(usage.ru_maxrss)
    assert peaks[1] < 1.3 * peaks[0]
