"""The engine on a CUDA device against torch on the same device, from pageable and from pinned memory, and a bare copy.

On a GPU the copy decides: the bare copy of the input from pinned memory to the device, and of the output back, is the
least that a call can take.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.rounds import interleave, row
from poolrpc import AvgPool2d, Layer, MaxPool2d
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHAPES = ((1, 3, 224, 224), (32, 64, 56, 56), (32, 64, 112, 112), (84, 64, 112, 112))
"""0.6, 25.7, 102.8 and 269.7 MB of float32."""
LAYERS = (MaxPool2d(2), AvgPool2d(3, 1, 1))
LIMITS = Limits(2**40, 2**40, 2**40, 2**50)


def torch_of(layer: Layer) -> torch.nn.Module:
    """Return torch's module of a layer."""
    module: torch.nn.Module = eval(f"torch.nn.{layer!r}")  # noqa: S307 - a layer's repr is torch.nn's expression
    return module


def contenders(engine: Engine, layer: Layer, shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """Return the engine, torch from both kinds of memory, and the bare copy, on one input."""
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    request = Request(TensorSpec("float32", shape), ((layer,),))
    schedule, payload = check_request(request, LIMITS, engine.schedule).schedule, x.tobytes()
    module, pageable = torch_of(layer), torch.from_numpy(x)
    pinned = pageable.pin_memory()
    on_device = pinned.to(engine.device)
    result = module(on_device)
    output = torch.empty(result.shape, pin_memory=True)

    def copy() -> None:
        on_device.copy_(pinned, non_blocking=True)
        output.copy_(result, non_blocking=True)
        torch.cuda.synchronize()

    return {
        "pinned copy both ways": copy,
        "torch from pageable memory": lambda: module(pageable.to(engine.device)).cpu(),
        "torch from pinned memory": lambda: module(pinned.to(engine.device, non_blocking=True)).cpu(),
        "the engine": lambda: engine.execute([engine.run(schedule, payload, len)]),
    }


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows: for each layer and size, the engine and torch against the bare copy, with the card's name."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks gpu: expected a CUDA device, got none")
    card = torch.cuda.get_device_name()
    engine = Engine("cuda", 1)
    for layer, shape in product(LAYERS, SHAPES):
        times = interleave(contenders(engine, layer, shape), rounds)
        baseline, *others = times
        for contender in others:
            case = f"{layer!r} {'x'.join(map(str, shape))}"
            yield row(case, baseline, contender, times, bytes=int(np.prod(shape)) * 4, card=card)
    engine.close()
