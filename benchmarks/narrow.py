"""Integers sent as they are and converted by the server, compared with the same call made from float32.

One compute thread on each side. The baselines are the call with the float32 tensor ("float32"), the conversion here and
that call ("converted here"), eager torch and NumPy doing the same steps here. The last rows are those of the engine
alone, in this process, without a transport: the steps and the layer, compared with the layer of float32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.rounds import interleave, row
from poolrpc import PoolClient, parse_chain
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec, array_bytes
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.engine import Engine
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from poolrpc.chains import Chain
    from poolrpc.tensors import Array

SHAPE = (32, 3, 224, 224)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGE = ("--max-message-bytes", str(2**30))
LIMITS = Limits(2**40, 2**40, 2**20, 2**60)


def averaged(x: torch.Tensor) -> torch.Tensor:
    """Return the average of each 2 x 2 cells."""
    return torch.nn.functional.avg_pool2d(x, 2)


def preprocessed(x: torch.Tensor) -> torch.Tensor:
    """Return scaled and normalised averages, as torchvision computes them."""
    scaled = x.to(torch.float32).mul_(1 / torch.iinfo(x.dtype).max)
    return averaged(scaled.sub(torch.tensor(MEAN).view(-1, 1, 1)).div_(torch.tensor(STD).view(-1, 1, 1)))


def numpy_averages(x: Array) -> Array:
    """Return the average of each 2 x 2 cells as float32."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5), dtype=np.float32)


CASES: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor], Callable[[Array], Array] | None]] = {
    "[ToDtype('float32'), AvgPool2d(2)]": (
        "uint8",
        "AvgPool2d(2)",
        lambda x: averaged(x.to(torch.float32)),
        numpy_averages,
    ),
    f"[ToDtype('float32', scale=True), Normalize({MEAN}, {STD}), AvgPool2d(2)]": (
        "uint8",
        f"[Normalize({MEAN}, {STD}), AvgPool2d(2)]",
        preprocessed,
        None,
    ),
    "[ToDtype('float32'), AvgPool2d(2), Round(), ToDtype('uint8')]": (
        "uint8",
        "AvgPool2d(2)",
        lambda x: torch.round(averaged(x.to(torch.float32))).to(torch.uint8),
        lambda x: np.rint(numpy_averages(x)).astype(np.uint8),
    ),
    "[ToDtype('float32'), AvgPool2d(2), Round(), ToDtype('uint16')]": (
        "uint16",
        "AvgPool2d(2)",
        lambda x: torch.round(averaged(x.to(torch.float32))).to(torch.uint16),
        lambda x: np.rint(numpy_averages(x)).astype(np.uint16),
    ),
}
"""For each chain: the dtype of its input, the layers of the same call from float32, and torch's and NumPy's steps."""


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = f"unix:{Path(folder) / 'pool.sock'}"
        with (
            serving("--threads", "1", "--listen", path, *LARGE) as server,
            PoolClient(server.address, max_message_bytes=2**30) as tcp,
            PoolClient(path, max_message_bytes=2**30) as unix,
        ):
            for text in CASES:
                yield from compared(text, tcp, unix, rounds)
    engine = Engine("cpu", 1)
    try:
        for text in CASES:
            yield in_engine(text, engine, rounds)
    finally:
        engine.close()


def inputs(dtype: str) -> tuple[Array, Array]:
    """Return a batch of images of a dtype, and the same numbers as float32."""
    x = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, SHAPE, dtype=dtype, endpoint=True)
    return x, x.astype(np.float32)


def compared(text: str, tcp: PoolClient, unix: PoolClient, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a chain by each transport."""
    dtype, plain, steps, numpy_steps = CASES[text]
    x, wide = inputs(dtype)
    tensor, chain, layers = torch.from_numpy(x), parse_chain(text), parse_chain(plain)
    expected = steps(tensor)
    for name, client, transport in (("unary", tcp, "unary"), ("stream", tcp, "stream"), ("arena", unix, "arena")):
        runs: dict[str, Callable[[], Any]] = {
            name: lambda client=client, transport=transport: client.pool(x, chain, transport=transport).output,
            "float32": lambda client=client, transport=transport: client.pool(wide, layers, transport=transport),
            "converted here": lambda client=client, transport=transport: client.pool(
                x.astype(np.float32), layers, transport=transport
            ),
            "torch": lambda: steps(tensor),
        }
        if numpy_steps is not None:
            runs["NumPy"] = lambda: numpy_steps(x)
        equal = torch.equal(torch.from_numpy(runs[name]()), expected)
        times = interleave(runs, rounds, least=0.05)
        for baseline in list(runs)[1:]:
            case = f"{text} {dtype} {'x'.join(map(str, SHAPE))}"
            yield row(case, baseline, name, times, bytes=x.nbytes, equal=equal)


def in_engine(text: str, engine: Engine, rounds: int) -> dict[str, Any]:
    """Return the row of a chain in the engine alone, compared with the layer of float32."""
    dtype, _, _, _ = CASES[text]
    x, wide = inputs(dtype)
    layer = tuple(layer for layer in parse_chain(text) if layer.spatial_dims)
    times = interleave({"engine": call(engine, x, parse_chain(text)), "layer alone": call(engine, wide, layer)}, rounds)
    return row(f"{text} {dtype} {'x'.join(map(str, SHAPE))}", "layer alone", "engine", times, bytes=x.nbytes)


def call(engine: Engine, x: Array, chain: Chain) -> Callable[[], object]:
    """Return a function that computes a chain from and to fixed memory."""
    checked = check_request(Request(TensorSpec(x.dtype.name, x.shape), (chain,)), LIMITS, engine.schedule)
    location = engine.location([array_bytes(x)], [memoryview(bytearray(spec.nbytes)) for spec in checked.outputs])
    return lambda: engine.execute([engine.run_in_place(checked.schedule, location)])
