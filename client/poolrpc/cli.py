"""The command `poolrpc`: pool a file, infer a shape, explain a layer, ask a server how it is."""

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
from poolrpc.chains import LAYOUTS, branch_shapes
from poolrpc.client import PoolClient
from poolrpc.command import files
from poolrpc.command.explain import explain, lines
from poolrpc.errors import InvalidArgumentError, PoolError
from poolrpc.expression import parse_chain, parse_layer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from poolrpc.chains import Chain, Shape

ADDRESS = "127.0.0.1:50051"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status: 0, or 1 with one line on stderr, or 2 for a wrong command line."""
    given = _parser().parse_args(arguments)
    try:
        report: tuple[object, list[str], int] = given.run(given)
    except (PoolError, OSError) as error:
        print(f"poolrpc: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    data, text, status = report
    print(json.dumps(_plain(data), allow_nan=False) if given.json else "\n".join(text))
    return status


def _plain(data: Any) -> Any:  # noqa: ANN401 - whatever JSON has
    # JSON has no infinities and no NaN: their names.
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    return [_plain(each) for each in data] if isinstance(data, list | tuple) else data


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "poolrpc",
        description="PyTorch's pooling layers over gRPC, without PyTorch.",
        epilog="The environment's POOLRPC_TOKEN is sent as the token, and the PEM files that POOLRPC_CA, "
        "POOLRPC_CLIENT_CERT and POOLRPC_CLIENT_KEY name are for TLS.",
    )
    parser.add_argument("--version", action="version", version=f"poolrpc {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    server = argparse.ArgumentParser(add_help=False)
    server.add_argument(
        "--address",
        default=os.environ.get("POOLRPC_ADDRESS", ADDRESS),
        help=f"the server's: host:port, dns:///name:port or unix:PATH [default: {ADDRESS}; POOLRPC_ADDRESS]",
    )
    server.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="for the call [default: 60]")

    def command(name: str, run: Any, help: str, *, remote: bool = True) -> argparse.ArgumentParser:  # noqa: A002, ANN401
        made = commands.add_parser(name, help=help, description=help, parents=[server] if remote else [])
        made.add_argument("--json", action="store_true", help="print JSON")
        made.set_defaults(run=run)
        return made

    pool = command("pool", _pool, "Pool an image, a .npy or a .npz file.")
    pool.add_argument("file", type=Path, help="an image (as PIL reads it), or .npy, or .npz with x (and indices)")
    pool.add_argument(
        "--layer",
        action="append",
        required=True,
        metavar="EXPR",
        help="'MaxPool2d(2)', or a chain '[MaxPool2d(2), AvgPool2d(2)]'; repeat it for branches",
    )
    pool.add_argument("--layout", choices=LAYOUTS, help="of an array [default: NCHW]; an image is NHWC")
    pool.add_argument(
        "--save", type=Path, metavar="FILE", help="where outputs go: by its suffix .png etc., .npy or .npz"
    )

    shape = command("shape", _shape, "Give the shape after each step of a chain; offline.", remote=False)
    shape.add_argument("shape", help="the input's: 8x64x56x56")
    shape.add_argument("layer", metavar="EXPR", help="a layer, or a chain as a list")
    shape.add_argument("--layout", choices=LAYOUTS, default="NCHW", help="of the shape [default: NCHW]")

    window = command("explain", _explain, "Show each window of a layer on a small plane, and its shape formula.")
    window.add_argument("layer", metavar="EXPR", help="a layer")
    window.add_argument("--input", required=True, metavar="JSON", help="the plane: '[[1, 3, 2, 4], [5, 6, 8, 7]]'")
    window.add_argument("--local", action="store_true", help="compute it here, without a server")

    command("info", _info, "Tell a server's versions, device, layers with their dtypes, and limits.")
    health = command("health", _health, "Ask whether a server takes calls; exits 0 where it does.")
    health.add_argument("--service", default="", help="a service's full name [default: the server]")
    return parser


def _client(given: argparse.Namespace) -> PoolClient:
    return PoolClient(given.address, timeout=given.timeout)


def _pool(given: argparse.Namespace) -> tuple[object, list[str], int]:
    branches = [parse_chain(text) for text in given.layer]
    source = files.load(given.file, branches)
    layout = given.layout or source.layout
    with _client(given) as client:
        results = client.pool_each(source.x, branches, indices=source.indices, layout=layout)
    paths = files.save(given.save, results, source) if given.save else []
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


def _shape(given: argparse.Namespace) -> tuple[object, list[str], int]:
    parts = given.shape.lower().split("x")
    if not all(part.isdecimal() and len(part) <= 10 for part in parts):  # noqa: PLR2004 - the digits of 2**31
        raise InvalidArgumentError(
            f"expected sizes with x between them, as in 8x64x56x56, got {clip(given.shape)}", field="shape"
        )
    chain = parse_chain(given.layer)
    shapes = branch_shapes(tuple(map(int, parts)), [chain], given.layout)[0]
    return _steps(chain, shapes), _lines(chain, shapes), 0


def _steps(chain: Chain, shapes: tuple[Shape, ...]) -> list[dict[str, object]]:
    return [{"layer": repr(layer), "shape": shape} for layer, shape in zip(chain, shapes, strict=True)]


def _lines(chain: Chain, shapes: tuple[Shape, ...]) -> list[str]:
    # The steps of a chain below each other; a new branch starts at the margin.
    return [
        f"{'  then ' if step else ''}{layer!r} -> {shape}"
        for step, (layer, shape) in enumerate(zip(chain, shapes, strict=True))
    ]


def _explain(given: argparse.Namespace) -> tuple[object, list[str], int]:
    layer = parse_layer(given.layer)
    try:
        with np.errstate(over="ignore"):
            plane = np.array(json.loads(given.input), np.float32)
    except (ValueError, TypeError, RecursionError, OverflowError):
        raise InvalidArgumentError(
            f"expected nested lists of numbers, got {clip(given.input)}", field="input"
        ) from None
    told = explain(layer, plane)
    if not given.local:
        with _client(given) as client:
            output = client.pool(plane[None, None], layer).output[0, 0]
        if not np.allclose(output, told.output, rtol=1e-5, equal_nan=True):
            raise PoolError(f"the server's output {output.tolist()} differs from the windows' {told.output.tolist()}")
        told = dataclasses.replace(told, output=output)
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
            for each in told.windows
        ],
        "output": told.output.tolist(),
        "formulas": told.formulas,
    }
    return data, lines(told), 0


def _info(given: argparse.Namespace) -> tuple[object, list[str], int]:
    with _client(given) as client:
        info = client.server_info()
    text = [
        f"poolrpc {info.version} at {given.address}",
        f"torch {info.torch_version} on {info.device}, {info.threads} threads",
        "limits:",
        *(f"  {name}: {limit}" for name, limit in info.limits.items()),
        *(["features:"] if info.features else []),
        *(f"  {name}: {value}" for name, value in info.features.items()),
        "layers:",
        *(f"  {name}: {', '.join(dtypes)}" for name, dtypes in info.layers.items()),
    ]
    return dataclasses.asdict(info), text, 0


def _health(given: argparse.Namespace) -> tuple[object, list[str], int]:
    with _client(given) as client:
        status = client.health(given.service)
    return {"status": status}, [status], 0 if status == "SERVING" else 1
