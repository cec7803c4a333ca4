"""The command `poolrpc`: pool a file, compute a shape, explain a layer, describe a server, check its health."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc._shapes.rules import clip
from poolrpc._version import __version__
from poolrpc.chains import branch_shapes
from poolrpc.client import PoolClient
from poolrpc.command import files
from poolrpc.command.explain import explain, format_lines
from poolrpc.errors import InvalidArgumentError, PoolError
from poolrpc.expression import parse_chain, parse_layer
from poolrpc.tensors import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from poolrpc.chains import Chain, Shape

ADDRESS = "127.0.0.1:50051"
LAYER_HELP = "layer expression: 'MaxPool2d(2)', or for a chain '[MaxPool2d(2), AvgPool2d(2)]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0; 1 with one line on stderr; or 2 for a wrong command line."""
    options = _parser().parse_args(arguments)
    try:
        report: tuple[object, list[str], int] = options.run(options)
    except (PoolError, OSError) as error:
        print(f"poolrpc: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    data, text, status = report
    print(json.dumps(_to_json(data), allow_nan=False) if options.json else "\n".join(text))
    return status


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
        subparser.add_argument("--json", action="store_true", help="print the result as JSON")
        subparser.set_defaults(run=run)
        return subparser

    pool = command("pool", _pool, "Apply layers to an image, a .npy file or a .npz file.")
    pool.add_argument(
        "file",
        type=Path,
        help="image in a format that Pillow reads, .npy, or .npz with the array x and optional indices",
    )
    pool.add_argument(
        "--layer",
        action="append",
        required=True,
        metavar="EXPR",
        help=f"{LAYER_HELP}; repeat the flag to run several branches on the same input",
    )
    pool.add_argument("--layout", choices=LAYOUTS, help="layout of the array [default: NCHW; NHWC for an image]")
    pool.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="file for the outputs; its suffix selects the format: .npy, .npz, or an image format such as .png",
    )

    shape = command("shape", _shape, "Print the shape after each layer of a chain, without a server.", remote=False)
    shape.add_argument("shape", help="shape of the input, with x between the sizes: 8x64x56x56")
    shape.add_argument("layer", metavar="EXPR", help=LAYER_HELP)
    shape.add_argument("--layout", choices=LAYOUTS, default="NCHW", help="layout of the shape [default: NCHW]")

    window = command("explain", _explain, "Print each window of a layer on a small plane, and the shape formula.")
    window.add_argument("layer", metavar="EXPR", help="layer expression: 'MaxPool2d(2)'")
    window.add_argument(
        "--input", required=True, metavar="JSON", help="plane to pool, as nested lists: '[[1, 3, 2, 4], [5, 6, 8, 7]]'"
    )
    window.add_argument("--local", action="store_true", help="compute the output locally instead of on a server")

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


def _pool(options: argparse.Namespace) -> tuple[object, list[str], int]:
    branches = [parse_chain(text) for text in options.layer]
    source = files.load(options.file, branches)
    layout = options.layout or source.layout
    with _client(options) as client:
        results = client.pool_each(source.x, branches, indices=source.indices, layout=layout)
    paths = files.save(options.save, results, source) if options.save else []
    data = {
        "input": {"shape": source.x.shape, "dtype": source.x.dtype.name, "layout": layout},
        "branches": [
            {"steps": _steps(chain, result.shapes), "dtype": result.output.dtype.name}
            for chain, result in zip(branches, results, strict=True)
        ],
        "saved": [str(path) for path in paths],
    }
    text = [f"input: {source.x.dtype.name} {source.x.shape} {layout}"]
    for chain, result in zip(branches, results, strict=True):
        text += _lines(chain, result.shapes)
    return data, [*text, *(f"saved {path}" for path in paths)], 0


def _shape(options: argparse.Namespace) -> tuple[object, list[str], int]:
    parts = options.shape.lower().split("x")
    if not all(part.isdecimal() and len(part) <= 10 for part in parts):  # noqa: PLR2004 - the digits of 2**31
        raise InvalidArgumentError(
            f"expected sizes with x between them, such as 8x64x56x56, got {clip(options.shape)}", field="shape"
        )
    chain = parse_chain(options.layer)
    shapes = branch_shapes(tuple(map(int, parts)), [chain], options.layout)[0]
    return _steps(chain, shapes), _lines(chain, shapes), 0


def _steps(chain: Chain, shapes: tuple[Shape, ...]) -> list[dict[str, object]]:
    return [{"layer": repr(layer), "shape": shape} for layer, shape in zip(chain, shapes, strict=True)]


def _lines(chain: Chain, shapes: tuple[Shape, ...]) -> list[str]:
    # The layers after a chain's first are indented, so that each branch starts at the margin.
    return [
        f"{'  then ' if step else ''}{layer!r} -> {shape}"
        for step, (layer, shape) in enumerate(zip(chain, shapes, strict=True))
    ]


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
    if not options.local:
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
        "formulas": explanation.formulas,
    }
    return data, format_lines(explanation), 0


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
        *(f"  {name}: {', '.join(dtypes)}" for name, dtypes in info.layers.items()),
    ]
    return dataclasses.asdict(info), text, 0


def _health(options: argparse.Namespace) -> tuple[object, list[str], int]:
    with _client(options) as client:
        status = client.health(options.service)
    return {"status": status}, [status], 0 if status == "SERVING" else 1
