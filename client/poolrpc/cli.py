"""The command `poolrpc`: pool a file, compute a shape, explain a layer, describe a server, check its health."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import io
import json
import math
import os
import re
import sys
import textwrap
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from poolrpc._interrupt import INTERRUPTED
from poolrpc._shapes.rules import clip
from poolrpc._transport.join import JOINS
from poolrpc._version import __version__
from poolrpc.chains import as_steps, branch_shapes
from poolrpc.client import PoolClient
from poolrpc.command.bench import add_arguments as add_bench_arguments
from poolrpc.command.bench import bench, parse_shape
from poolrpc.command.explain import WINDOWS, explain, format_lines
from poolrpc.command.files import OPERANDS, load
from poolrpc.command.inputs import find_inputs, output_paths
from poolrpc.command.onnx_model import pool_onnx
from poolrpc.command.pool import Work, count_files, describe, pool_file, pool_files, step_lines, steps
from poolrpc.command.save_picture import save_picture
from poolrpc.command.tune import add_tune_arguments, tune
from poolrpc.errors import InvalidArgumentError, PoolError
from poolrpc.expression import parse_chain, parse_layer
from poolrpc.tensors import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from poolrpc.chains import Chain, Outputs

ADDRESS = "127.0.0.1:50051"
OPERAND_HELP = {
    "weights": "the weight of each cell, such as a mask, for GlobalPool",
    "offsets": "where each segment begins and the last one ends, for SegmentPool",
    "lengths": "the length of each segment, for SegmentPool",
    "ids": "the segment of each cell, for SegmentPool",
    "boxes": "the image, x1, y1, x2 and y2 of each box, for RoIPool and RoIAlign",
}
LAYER_HELP = "layer expression: 'MaxPool2d(2)', or for a chain '[MaxPool2d(2), AvgPool2d(2)]'"


class _OutputError(Exception):
    """The standard output can't be written; its cause is the OSError."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Returns:
        0; 1 with one line on stderr; 2 for a wrong command line; 130 after Ctrl-C, and 141 if the reader of the output
        is gone, as a shell has it for SIGINT and SIGPIPE.

    """
    with warnings.catch_warnings():
        # In the form of the command's own lines; Pillow warns of damaged metadata.
        warnings.showwarning = lambda message, *_: _note(" ".join(str(message).split()))
        try:
            # A terminal may lack characters of a file's name.
            if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
                sys.stdout.reconfigure(errors="backslashreplace")
            try:
                return _run(_parser().parse_args(arguments))
            finally:
                _flush()
        except _OutputError as error:
            _discard(sys.stdout)
            if isinstance(error.__cause__, BrokenPipeError):
                return 141
            _note(f"the output can't be written: {describe(error.__cause__ or error)}")
        except KeyboardInterrupt:
            return INTERRUPTED
        except (PoolError, OSError, MemoryError) as error:
            _note(describe(error))
        return 1


def _run(options: argparse.Namespace) -> int:
    data, text, status = options.run(options)
    line = json.dumps(_to_json(data), allow_nan=False) if options.json else ""
    if isinstance(options.json, Path):
        options.json.write_text(f"{line}\n")
    _write([line] if options.json is True else text)
    return int(status)


def _write(lines: Sequence[str]) -> None:
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # noqa: TRY301 - the same as one that can't be written
        if lines:
            print("\n".join(lines))
    except OSError as error:
        raise _OutputError from error


def _flush() -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        raise _OutputError from error


def _note(line: str) -> None:
    """Print a line on stderr, if there is one that can be written."""
    if sys.stderr is None:
        return
    try:
        print(f"poolrpc: {line}", file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Discard what a stream has in its buffer, since Python would try again to write it, and end with status 120."""
    with suppress(OSError, ValueError, AttributeError):  # a stream without a file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _to_json(data: Any) -> Any:  # noqa: ANN401 - any value of JSON
    # JSON has neither infinities nor NaN, so their names take their place.
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, dict):
        return {key: _to_json(value) for key, value in data.items()}
    return [_to_json(each) for each in data] if isinstance(data, list | tuple) else data


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "poolrpc",
        description="Run PyTorch's pooling layers on a poolrpc server, without PyTorch.",
        epilog="Environment: POOLRPC_TOKEN is the token that authenticates the client. For TLS, POOLRPC_CA is a PEM "
        "file with the certificate authorities to trust, and POOLRPC_CLIENT_CERT and POOLRPC_CLIENT_KEY are PEM files "
        "with the client's certificate and key.",
    )
    parser.add_argument("--version", action="version", version=f"poolrpc {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    server = argparse.ArgumentParser(add_help=False)
    server.add_argument(
        "--address",
        default=os.environ.get("POOLRPC_ADDRESS", ADDRESS),
        help="address of the server: host:port, dns:///name:port or unix:PATH "
        f"[default: {ADDRESS}; environment: POOLRPC_ADDRESS]",
    )
    server.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="deadline of the call, in seconds [default: 60]"
    )

    def command(name: str, run: Any, help: str, *, remote: bool = True) -> argparse.ArgumentParser:  # noqa: A002, ANN401 - argparse's own name; any function
        subparser = commands.add_parser(name, help=help, description=help, parents=[server] if remote else [])
        if run not in {bench, _tune}:  # which also write it to a file
            subparser.add_argument("--json", action="store_true", help="print the result as JSON")
        subparser.set_defaults(run=run)
        return subparser

    pool = command("pool", _pool, "Apply layers to images, .npy files and .npz files.")
    pool.add_argument(
        "files",
        nargs="+",
        metavar="file",
        help="image in a format that Pillow reads, .npy, or .npz with the array x and optional layout and "
        "operand (indices, weights, offsets, lengths, ids, boxes); "
        "folder with such files; pattern such as 'photos/**/*.png'; or - for a file on the standard input",
    )
    pool.add_argument(
        "--layer",
        action="append",
        required=True,
        metavar="EXPR",
        help=f"{LAYER_HELP}; repeat the flag to run several branches on the same input",
    )
    pool.add_argument(
        "--steps",
        metavar="STEPS",
        help="layers of the chain whose outputs are kept, such as the levels of a pyramid: all, or their numbers "
        "from 0 on, such as 0,2 [default: the last one]",
    )
    pool.add_argument(
        "--join",
        choices=JOINS,
        help="join the outputs of the branches to one: cat along the channels, flatten and concatenate, or their mean "
        "or sum [default: each branch has an output of its own]",
    )
    for name, taken in OPERAND_HELP.items():
        pool.add_argument(f"--{name}", type=Path, metavar="FILE", help=f".npy with {taken}, for every file")
    pool.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="layout of an array [default: the one that a .npz states, or else NCHW; images are NHWC]",
    )
    pool.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="file for the outputs; its suffix selects the format: .npy, .npz, or an image format such as .png; a "
        "folder for the outputs of several files, which keep their names",
    )
    pool.add_argument(
        "--suffix",
        metavar="SUFFIX",
        help="suffix of the outputs of several files, which selects their format; one of images leaves .npy and .npz "
        "as they are [default: each file's own]",
    )
    pool.add_argument(
        "--skip-existing", action="store_true", help="skip files whose outputs exist; continues an interrupted command"
    )

    shape = command("shape", _shape, "Print the shape after each layer of a chain, without a server.", remote=False)
    shape.add_argument("shape", help="shape of the input, with x between the sizes: 8x64x56x56")
    shape.add_argument("layer", metavar="EXPR", help=LAYER_HELP)
    shape.add_argument("--layout", choices=LAYOUTS, default="NCHW", help="layout of the shape [default: NCHW]")
    shape.add_argument(
        "--operand-shape", metavar="SHAPE", help="shape of the operand that the first layer takes, such as 33 or 100x5"
    )

    window = command(
        "explain",
        _explain,
        "Print each window of a layer on a small plane, and the shape formula, without a server.",
        remote=False,
    )
    window.add_argument("layer", metavar="EXPR", help="layer expression: 'MaxPool2d(2)'")
    window.add_argument(
        "--input", required=True, metavar="JSON", help="plane to pool, as nested lists: '[[1, 3, 2, 4], [5, 6, 8, 7]]'"
    )
    window.add_argument(
        "--windows",
        type=int,
        default=WINDOWS,
        metavar="N",
        help=f"number of windows to print and to draw; --json prints all [default: {WINDOWS}]",
    )
    window.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="file for a picture of the windows: .svg, which has light and dark colours; .png, or .gif, which moves, "
        "with Pillow and matplotlib",
    )
    window.add_argument("--animate", action="store_true", help="show the windows of a .svg one after the other")
    window.add_argument("--dark", action="store_true", help="use the dark colours for a .png or a .gif")
    window.add_argument("--address", help="address of a server that computes the output too, to compare it")
    window.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="deadline of that call, in seconds [default: 60]"
    )

    model = command(
        "pool-onnx", pool_onnx, "List the pooling nodes of an ONNX model as layers, without a server.", remote=False
    )
    model.add_argument("model", type=Path, metavar="MODEL.onnx", help="file of the model; its weights are not needed")

    add_bench_arguments(
        command("bench", bench, "Measure calls per second and latencies of a server under a load."), LAYER_HELP
    )
    add_tune_arguments(
        command(
            "tune",
            _tune,
            "Try flags of poolrpc-server on this machine under a load, in less than three minutes, and print the best.",
            remote=False,
        ),
        LAYER_HELP,
    )
    command("info", _info, "Print a server's versions, device, layers with their dtypes, and limits.")
    health = command("health", _health, "Print a server's health; the exit status is 0 if it is SERVING, and else 1.")
    health.add_argument(
        "--service",
        default="",
        help="full name of a gRPC service, such as poolrpc.v1.PoolService [default: the server]",
    )
    return parser


def _client(options: argparse.Namespace) -> PoolClient:
    return PoolClient(options.address, timeout=options.timeout)


def _pool(options: argparse.Namespace) -> tuple[object, Sequence[str], int]:
    branches = tuple(map(parse_chain, options.layer))
    steps = None if options.steps is None else _steps(options.steps, branches)
    if options.join and steps is not None:
        raise InvalidArgumentError("expected no --steps together with --join, got both", field="join")
    work = Work(branches, options.layout, options.skip_existing, steps, _operand(options), options.join)
    inputs = find_inputs(options.files, options.save)
    inputs = dataclasses.replace(inputs, several=inputs.several or bool(options.save and options.save.is_dir()))
    for flag, given in (("save", options.skip_existing), ("save", options.suffix)):
        if given and not options.save:
            raise InvalidArgumentError("expected the folder or the file of the outputs, got none", field=flag)
    if options.suffix and not (inputs.several and re.fullmatch(r"\.\w+", options.suffix)):
        msg = f"expected a suffix such as .png, for several files, got {options.suffix}"
        raise InvalidArgumentError(msg, field="suffix")
    outputs = output_paths(inputs, options.save, options.suffix, work.results) if options.save else None
    if inputs.passed_over:
        _note(f"left out, since they are neither images nor arrays: {count_files(inputs.passed_over)}")
    if not inputs.several:
        with _client(options) as client:
            outcome = pool_file(client, inputs.files[0][0], outputs[0] if outputs else None, work)
        for each in outcome.notes:
            _note(f"{outcome.name}: {each}")
        return outcome.data, outcome.text, 0
    write = (lambda _: None) if options.json else _write
    data, summary = pool_files(_client(options), inputs, outputs, work, write=write, note=_note)
    for name, error in summary.failures:
        _note(f"{name} failed: {error}")
    return data, [str(summary)], 1 if summary.failures else 0


def _tune(options: argparse.Namespace) -> tuple[object, Sequence[str], int]:
    return tune(options, _note)


def _operand(options: argparse.Namespace) -> dict[str, Any]:
    """Return the operand of every file, by its name; empty if no flag names one."""
    given = {name: path for name in OPERANDS if (path := getattr(options, name)) is not None}
    if len(given) > 1:
        raise InvalidArgumentError(f"expected one operand, got {' and '.join(given)}", field=[*given][1])
    return {name: load(path).x for name, path in given.items()}


def _steps(text: str, branches: Sequence[Chain]) -> Outputs:
    """Return the numbers of the layers that --steps names."""
    if len(branches) > 1:
        raise InvalidArgumentError(f"expected one --layer, which is a chain, got {len(branches)}", field="steps")
    numbers = text.split(",")
    if text != "all" and not all(number.isdecimal() and len(number) <= 3 for number in numbers):  # noqa: PLR2004 - of 64 layers
        raise InvalidArgumentError(f"expected all, or numbers of layers such as 0,2, got {clip(text)}", field="steps")
    return as_steps(branches[0], None if text == "all" else map(int, numbers))[1]


def _shape(options: argparse.Namespace) -> tuple[object, list[str], int]:
    chain = parse_chain(options.layer)
    operand = None if options.operand_shape is None else parse_shape(options.operand_shape)
    shapes = branch_shapes(parse_shape(options.shape), [chain], options.layout, (), operand)[0]
    return steps(chain, shapes), step_lines(chain, shapes), 0


def _explain(options: argparse.Namespace) -> tuple[object, list[str], int]:
    layer = parse_layer(options.layer)
    try:
        with np.errstate(over="ignore"):
            plane = np.array(json.loads(options.input), np.float32)
    except (ValueError, TypeError, RecursionError, OverflowError):
        raise InvalidArgumentError(
            f"expected nested lists of numbers, got {clip(options.input)}", field="input"
        ) from None
    explanation = explain(layer, plane)
    if options.windows < 1:
        raise InvalidArgumentError(f"expected at least 1, got {options.windows}", field="windows")
    if options.address:
        with _client(options) as client:
            output = client.pool(plane[None, None], layer).output[0, 0]
        if not np.allclose(output, explanation.output, rtol=1e-5, equal_nan=True):
            msg = f"expected the output {explanation.output.tolist()}, got {output.tolist()} from the server"
            raise PoolError(msg)
        explanation = dataclasses.replace(explanation, output=output)
    data = {
        "layer": repr(layer),
        "windows": [
            {
                "index": each.index,
                "positions": [axis.positions for axis in each.axes],
                "cells": each.cells,
                "value": each.value,
                "how": each.how,
            }
            for each in explanation.windows
        ],
        "output": explanation.output.tolist(),
        "unvisited": explanation.unvisited,
        "formulas": explanation.formulas,
    }
    lines = format_lines(explanation, options.windows)
    for flag, given in (("animate", options.animate), ("dark", options.dark)):
        if given and not options.save:
            raise InvalidArgumentError("expected --save with the file of a picture, got none", field=flag)
    if options.save:
        save_picture(options.save, explanation, options.windows, moving=options.animate, dark=options.dark)
        lines += ["", f"saved {options.save}"]
    return data, lines, 0


def _info(options: argparse.Namespace) -> tuple[object, list[str], int]:
    with _client(options) as client:
        info = client.server_info()
    text = [
        f"poolrpc {info.version} at {options.address}",
        f"torch {info.torch_version} on {info.device}, {info.threads} threads",
        "limits:",
        *(f"  {name}: {limit}" for name, limit in info.limits.items()),
        *(["features:"] if info.features else []),
        *(f"  {name}: {value}" for name, value in info.features.items()),
        "layers:",
    ]
    for name, dtypes in info.layers.items():
        text += textwrap.wrap(f"{name}: {', '.join(dtypes)}", 80, initial_indent="  ", subsequent_indent="    ")
    return dataclasses.asdict(info), text, 0


def _health(options: argparse.Namespace) -> tuple[object, list[str], int]:
    with _client(options) as client:
        status = client.health(options.service)
    return {"status": status}, [status], 0 if status == "SERVING" else 1
