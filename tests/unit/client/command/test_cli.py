"""The command `poolrpc` without a server: shape, explain, and errors in one line."""

import json
import re

import pytest

import poolrpc
from poolrpc.cli import main

PLANE = "[[1, 3, 2, 4], [5, 6, 8, 7], [4, 2, 1, 0], [9, 7, 3, 2]]"
BENCH = ["bench", "--shape", "1x3x8x8", "--layer", "MaxPool2d(2)"]
TUNE = ["tune", *BENCH[1:]]


def run(capsys, *arguments):
    """Run a command that must succeed, and return its output."""
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def parse_json(text):
    """Parse JSON without Python's extensions NaN and Infinity."""

    def fail(name):
        pytest.fail(f"{name} is not valid JSON")

    return json.loads(text, parse_constant=fail)


def test_shape_prints_every_layer_of_a_chain(capsys):
    """The shapes of a chain are printed on one line per layer."""
    chain = "[MaxPool2d(3, stride=2, padding=1), AvgPool2d(2), GlobalPool2d('max')]"
    assert run(capsys, "shape", "8x64x56x56", chain).splitlines() == [
        "MaxPool2d(3, stride=2, padding=1) -> (8, 64, 28, 28)",
        "  then AvgPool2d(2) -> (8, 64, 14, 14)",
        "  then GlobalPool2d('max') -> (8, 64, 1, 1)",
    ]


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        (["64x56x56", "MaxPool2d(2)"], [64, 28, 28]),
        (["8X64X56X56", "MaxPool2d(2)"], [8, 64, 28, 28]),
        (["0x64x56x56", "MaxPool2d(2)"], [0, 64, 28, 28]),
        (["56x56x3", "MaxPool2d(2)", "--layout", "NHWC"], [28, 28, 3]),
        (["64x56x56", "GlobalPool2d('mean')"], [64, 1, 1]),
        (["600x400x3", "GlobalPool2d('mean')", "--layout", "NHWC"], [1, 1, 3]),
        (["1x1x2147483647", "MaxPool1d(65535)"], [1, 1, 32768]),
    ],
    ids=repr,
)
def test_shape_as_json(capsys, arguments, shape):
    """Shapes may be batched or not, in either layout, and of any size; --json prints each layer and its shape."""
    assert parse_json(run(capsys, "shape", *arguments, "--json")) == [{"layer": arguments[1], "shape": shape}]


def test_explain_prints_windows_output_and_formula(capsys):
    """Explain prints each window, the output, and the formula of each axis."""
    printed = run(capsys, "explain", "MaxPool2d(2, 2)", "--input", PLANE)
    plane = r" +1 +3 +2 +4 *\n +5 +6 +8 +7 *\n +\[4\] +\[2\] +1 +0 *\n +\[9\] +\[7\] +3 +2 *\n"
    assert re.search(rf"window \(1, 0\): rows 2\.\.3, columns 0\.\.1\n{plane} +max 9 at \(3, 0\)\n", printed)
    assert re.search(r"output:\n +6 +8\n +9 +3\n", printed)
    assert "rows: floor((4 + 2*0 - 1*(2 - 1) - 1) / 2) + 1 = 2\n" in printed


def test_explain_as_json(capsys):
    """--json prints each window's index, positions, cells (null in the padding), value and computation."""
    printed = parse_json(run(capsys, "explain", "AvgPool1d(2, padding=1)", "--input", "[3, 5]", "--json"))
    assert printed == {
        "layer": "AvgPool1d(2, padding=1)",
        "windows": [
            {"index": [0], "positions": [[-1, 0]], "cells": [None, 3.0], "value": 1.5, "how": "(3) / 2 = 1.5"},
            {"index": [1], "positions": [[1, 2]], "cells": [5.0, None], "value": 2.5, "how": "(5) / 2 = 2.5"},
        ],
        "output": [1.5, 2.5],
        "unvisited": {"columns": []},
        "formulas": ["columns: floor((2 + 2*1 - 2) / 2) + 1 = 2"],
    }


@pytest.mark.parametrize(
    ("layer", "plane"),
    [
        ("MaxPool1d(2, padding=1, dilation=3)", "[1, 2]"),
        ("MaxPool1d(1)", "[1, NaN]"),
        ("AvgPool1d(1)", "[1e39]"),
        ("LPPool1d(0.5, 1)", "[-1]"),
    ],
)
def test_infinities_and_nan_are_valid_json(capsys, layer, plane):
    """Infinities and NaN, which JSON lacks, are printed as strings."""
    parse_json(run(capsys, "explain", layer, "--input", plane, "--json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shape", "8x64", "MaxPool2d(2)"], "expected 4 dims"),
        (["shape", "", "MaxPool2d(2)"], "expected"),
        (["shape", "8x-1x4x4", "MaxPool2d(2)"], "expected"),
        (["shape", "8x6.5x4x4", "MaxPool2d(2)"], "expected"),
        (["shape", f"8x3x4x{'9' * 10_000}", "MaxPool2d(2)"], "expected"),
        (["shape", "8x3x4x9999999999", "MaxPool2d(2)"], "expected every dim to be 1 to 2147483647"),
        (["shape", "8x0x4x4", "MaxPool2d(2)"], "expected every dim"),
        (["shape", "8x3x4x4", "MaxPool2d(5)"], "kernel_size: expected"),
        (["shape", "8x3x4x4", "[MaxPool2d(2), AvgPool2d(3)]"], "branches[0].layers[1].avg_pool.kernel_size"),
        (
            ["shape", "8x3x4x4", "MaxPol2d(2)"],
            "column 1: expected the name of a layer, got 'MaxPol2d'; did you mean MaxPool2d?",
        ),
        (["shape", "8x3x4x4", "MaxPool2d(2"], "column 10: expected a layer expression"),
        (["shape", "8x3x4x4", "MaxPool2d(\n0)"], "column 12: kernel_size"),
        (["shape", "8x3x4x4", f"MaxPool2d(0x{'f' * 4000})"], "kernel_size: expected"),
        (["shape", "8x3x4x4", "MaxPool2d('\\d')"], "column 12: "),
        (["explain", "MaxPool2d(2)", "--input", "[[1, 2], [3]]"], "expected nested lists of numbers"),
        (["explain", "MaxPool2d(2)", "--input", "[[1, 2"], "expected nested lists of numbers"),
        (["explain", "MaxPool2d(2)", "--input", '{"a": 1}'], "expected nested lists of numbers"),
        (["explain", "MaxPool2d(2)", "--input", '[["a"]]'], "expected nested lists of numbers"),
        (["explain", "MaxPool2d(2)", "--input", "[" * 100_000], "expected nested lists of numbers"),
        (["explain", "MaxPool1d(1)", "--input", f"[{'9' * 400}]"], "expected nested lists of numbers"),
        (["explain", "MaxPool2d(2)", "--input", "[1, 2]"], "expected"),
        (["explain", "MaxPool2d(2)", "--input", "1"], "expected"),
        (["explain", "MaxPool2d(2)", "--input", "[]"], "expected"),
        (["explain", "FractionalMaxPool2d(2, 1)", "--input", PLANE], "fixed"),
        (["explain", "[MaxPool2d(2)]", "--input", PLANE], "expected a layer such as"),
        (["explain", "MaxPool2d(2)", "--windows", "0", "--input", PLANE], "windows: expected at least 1, got 0"),
        (["pool", "no-such-file.npy", "--layer", "MaxPool2d(2)"], "no-such-file.npy"),
        (["pool", "", "--layer", "MaxPool2d(2)"], "file: expected the name of a file, got ''"),
        (["pool", "no-such-*.png", "--layer", "MaxPool2d(2)"], "expected files that match 'no-such-*.png', got none"),
        (["pool", "-", "x.npy", "--layer", "MaxPool2d(2)"], "expected - alone, got 2 names"),
        (["pool", "x.npy", "--layer", "MaxPool2d(2)", "--skip-existing"], "save: expected"),
        (["pool", "x.npy", "--layer", "MaxPool2d(2)", "--suffix", ".png"], "save: expected"),
        (["pool", "x.npy", "--layer", "MaxPool2d(2)", "--suffix", ".png", "--save", "y.npy"], "suffix: expected"),
        (["pool", "x.npy", "y.npy", "--layer", "MaxPool2d(2)", "--suffix", "png", "--save", "y"], "suffix: expected"),
        (["pool", "x.npy", "--layer", "MaxPool2d(2)", "--save", "x.npy"], "expected another file than the input"),
        (["pool", "x.npy", "y.npy", "--layer", "MaxPool2d(2)", "--save", "z.npy"], "expected a folder for the outputs"),
        (["pool", "a/x.npy", "b/x.npy", "--layer", "MaxPool2d(2)", "--save", "z"], "an output of its own for each"),
        (["pool", "no-such-file.png", "--layer", "MaxPool2d(2)"], "no-such-file.png"),
        ([*BENCH, "--concurrency", "0"], "concurrency: expected 1 to 4096, got 0"),
        ([*BENCH, "--concurrency", "2", "--processes", "3"], "concurrency: expected 3 to 4096, got 2"),
        ([*BENCH, "--connections", "1", "--processes", "2"], "connections: expected 2 to 1024, got 1"),
        ([*BENCH, "--processes", "0"], "processes: expected 1 to 4096, got 0"),
        ([*BENCH, "--rate", "0"], "rate: expected a number above 0, got 0.0"),
        ([*BENCH, "--rate", "nan"], "rate: expected a number above 0, got nan"),
        ([*BENCH, "--rate", "2e6"], "rate: expected at most 1e+06 calls per second, got 2e+06"),
        ([*BENCH, "--rate", "1e6", "--duration", "60"], "rate: expected at most 10,000,000 calls in all"),
        ([*BENCH, "--duration", "0"], "duration: expected a number above 0, got 0.0"),
        ([*BENCH, "--duration", "inf"], "duration: expected at most 86400 seconds, got inf"),
        ([*BENCH, "--warmup", "-1"], "warmup: expected a number above 0, got -1.0"),
        ([*BENCH, "--dtype", "float8"], "dtype: expected one of float16, bfloat16, float32, float64, uint8"),
        ([*BENCH, "--shape", "8"], "expected 4 dims"),
        (["bench", "--shape", "8x3x-4x4", "--layer", "MaxPool2d(2)"], "shape: expected sizes with x between them"),
        (["bench", "--shape", "8x3x4x4", "--layer", "MaxUnpool2d(2)"], "layer: expected layers that need no indices"),
        ([*TUNE, "--p99", "1"], "rate: expected calls per second, or a concurrency, got neither"),
        ([*TUNE, "--p99", "0", "--concurrency", "1"], "p99: expected a number above 0, got 0.0"),
        ([*TUNE, "--p99", "1", "--rate", "5"], "rate: expected at least 10 calls per second"),
        ([*TUNE, "--p99", "1", "--rate", "50", "--duration", "0"], "duration: expected a number above 0"),
        ([*TUNE, "--p99", "1", "--rate", "50", "--dtype", "x"], "dtype: expected one of"),
        (["pool", "no-such-file.npy", "--layer", "MaxPool2d()"], "column 1: expected the parameter kernel_size of"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_is_one_line(capsys, arguments, words, as_json):
    """An error is one short line on stderr with status 1 and nothing on stdout, with --json too."""
    assert main([*arguments, *(["--json"] if as_json else [])]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("poolrpc: ")
    assert printed.err.count("\n") == 1
    assert len(printed.err) < 1000
    assert words in printed.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["pol"],
        ["shape"],
        ["shape", "1x1x1x1", "MaxPool2d(1)", "--layout", "nchw"],
        ["explain", "MaxPool2d(1)"],
        ["pool", "x.npy"],
        ["info", "--timeout", "soon"],
        ["bench", "--shape", "1x1x4x4"],
        ["bench", "--layer", "MaxPool2d(2)"],
        ["tune", "--shape", "1x1x4x4", "--layer", "MaxPool2d(2)", "--rate", "50"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_with_status_2(capsys, arguments):
    """An unknown command or flag, or a missing one, is reported by argparse."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("poolrpc")


def test_version_prints_the_packages_version(capsys):
    """--version prints the package's version."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"poolrpc {poolrpc.__version__}\n"


def test_help_names_every_command(capsys):
    """--help lists the commands."""
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n    {name} " in printed for name in ("pool", "shape", "explain", "bench", "tune", "info", "health"))
