"""A CUDA device behind the server against a bare pinned copy and torch on the same device, and a few kernels alone.

On a GPU the copy decides: the upload of the input from page-locked memory is the least that a call can take.
"""

from __future__ import annotations

import mmap
import tempfile
from contextlib import ExitStack
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.rounds import interleave, row
from poolrpc import AvgPool2d, Layer, MaxPool2d, PoolClient
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec, align
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.engine import Engine
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from poolrpc.tensors import Array

SHAPES = ((1, 3, 224, 224), (32, 64, 56, 56), (32, 64, 112, 112), (84, 64, 112, 112))
"""0.6, 25.7, 102.8 and 269.7 MB of float32."""
LAYERS = (MaxPool2d(2), AvgPool2d(3, 1, 1))
DTYPES = ("float32", "float16")
LIMITS = Limits(2**40, 2**40, 2**40, 2**50)

KERNEL_SHAPES = ((8, 64, 112, 112), (32, 64, 56, 56), (64, 2048, 7, 7))
KERNEL_SIZES = (5, 7, 9, 13)


def torch_of(layer: Layer) -> torch.nn.Module:
    """Return torch's module of a layer."""
    module: torch.nn.Module = eval(f"torch.nn.{layer!r}")  # noqa: S307 - a layer's repr is torch.nn's expression
    return module


def engine_call(engine: Engine, layer: Layer, x: Array) -> Callable[[], object]:
    """Return a call of an engine with bytes from the network."""
    request = Request(TensorSpec(str(x.dtype), x.shape), ((layer,),))
    schedule, payload = check_request(request, LIMITS, engine.schedule).schedule, x.tobytes()
    return lambda: engine.execute([engine.run(schedule, payload, len)])


def engine_in_place(engine: Engine, layer: Layer, x: Array, ends: ExitStack) -> Callable[[], object]:
    """Return a call of an engine in page-locked memory of this process, as an arena's is."""
    request = Request(TensorSpec(str(x.dtype), x.shape), ((layer,),))
    schedule = check_request(request, LIMITS, engine.schedule).schedule
    start = align(x.nbytes)
    mapping = mmap.mmap(-1, start + schedule.outputs[0].nbytes)
    memory = memoryview(mapping)
    ends.callback(engine.page_locks.lock(mapping))
    np.frombuffer(memory, x.dtype, x.size)[:] = x.reshape(-1)
    inputs, outputs = [memory[: x.nbytes]], [memory[start:]]
    return lambda: engine.execute([engine.run_in_place(schedule, inputs, outputs)])


def contenders(
    engines: dict[str, Engine], client: PoolClient, layer: Layer, x: Array, ends: ExitStack
) -> dict[str, Callable[[], object]]:
    """Return the bare copies, torch from both kinds of memory, and the ways of this server, on one input."""
    device = engines["the engine"].device
    module, pageable = torch_of(layer), torch.from_numpy(x)
    pinned = pageable.pin_memory()
    on_device = pinned.to(device)
    result = module(on_device)
    output = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    shared = client.empty(x.shape, x.dtype)
    shared[...] = x

    def upload() -> None:
        on_device.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()

    def copy() -> None:
        on_device.copy_(pinned, non_blocking=True)
        output.copy_(result, non_blocking=True)
        torch.cuda.synchronize()

    return {
        "pinned upload": upload,
        "pinned copy both ways": copy,
        "torch from pageable memory": lambda: module(pageable.to(device)).cpu(),
        "torch from pinned memory": lambda: output.copy_(module(pinned.to(device, non_blocking=True))),
        **{name: engine_call(engine, layer, x) for name, engine in engines.items()},
        "the engine, in page-locked memory": engine_in_place(engines["the engine"], layer, x, ends),
        "a call, in place in the arena": lambda: client.pool(shared, layer, copy=False, transport="arena"),
        "a call, through the arena": lambda: client.pool(x, layer, transport="arena"),
    }


def kernels(rounds: int, card: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the operators that replace torch's own for a layer."""

    def timed(operator: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            operator()
            torch.cuda.synchronize()

        return run

    for shape in KERNEL_SHAPES:
        x = torch.randn(shape, device="cuda")
        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "AdaptiveMaxPool2d(1)": (
                partial(torch.nn.functional.adaptive_max_pool2d, x, 1),
                partial(torch.amax, x, (2, 3), keepdim=True),
            )
        }
        for size in KERNEL_SIZES:
            if size < shape[2]:
                half = size // 2
                pairs[f"MaxPool2d({size}, 1, {half})"] = (
                    partial(torch.max_pool2d, x, size, 1, half),
                    lambda size=size, half=half, x=x: torch.max_pool2d(
                        torch.max_pool2d(x, (size, 1), 1, (half, 0)), (1, size), 1, (0, half)
                    ),
                )
        for name, (whole, other) in pairs.items():
            names = "torch's operator", "amax" if "Adaptive" in name else "axis by axis"
            times = interleave(dict(zip(names, map(timed, (whole, other)), strict=True)), rounds)
            yield row(f"{name} {'x'.join(map(str, shape))}", *names, times, card=card)


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows: for each layer, dtype and size, torch and the server against the bare upload, with the card."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks gpu: expected a CUDA device, got none")
    torch.set_grad_enabled(False)
    card = torch.cuda.get_device_name()
    yield from kernels(rounds, card)
    with ExitStack() as ends:
        engines = {
            "the engine": Engine("cuda", 1, page_lock_limit=2**36),
            "the engine on the CPU": Engine("cpu", 1),
        }
        for engine in engines.values():
            ends.callback(engine.close)
        folder = ends.enter_context(tempfile.TemporaryDirectory())
        address = f"unix:{Path(folder) / 'pool.sock'}"
        ends.enter_context(serving("--device", "cuda", "--threads", "1", listen=address))
        client = ends.enter_context(PoolClient(address))
        for dtype, layer, shape in product(DTYPES, LAYERS, SHAPES):
            x = np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)
            with ExitStack() as unlock:
                times = interleave(contenders(engines, client, layer, x, unlock), rounds)
            baseline, *others = times
            for contender in others:
                case = f"{layer!r} {dtype} {'x'.join(map(str, shape))}"
                yield row(case, baseline, contender, times, bytes=prod(shape) * x.itemsize, card=card)
