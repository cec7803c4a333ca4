"""Batching: requests computed together or one by one, and the batcher's overhead for a single caller."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.context import DirectCall
from benchmarks.rounds import interleave, row
from poolrpc import AdaptiveAvgPool2d, AvgPool2d, LPPool2d, MaxPool2d
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.batcher import Batcher
from poolrpc_server.calls.queue import QueueLimits
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from poolrpc.layers import Layer
    from poolrpc_server.compute.engine import Run

LAYERS = (
    MaxPool2d(2),
    MaxPool2d(3, 2, 1),
    AvgPool2d(3, 1, 1),
    AdaptiveAvgPool2d(3),
    LPPool2d(2, 2),
    MaxPool2d(2, return_indices=True),
)
SHAPES = ((1, 1, 4, 4), (1, 3, 16, 16), (1, 3, 32, 32), (1, 8, 48, 48), (1, 16, 48, 48))
"""The last is the largest that is batched on a CPU, for most of the layers."""
TOGETHER = (2, 8, 32)
LIMITS = Limits(2**31, 2**31, 64, 2**40)


def runs(engine: Engine, layer: Layer, shape: Sequence[int], count: int) -> list[Run]:
    """Return so many equal requests."""
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    request = Request(TensorSpec("float32", tuple(shape)), ((layer,),))
    schedule, payload = check_request(request, LIMITS, engine.schedule).schedule, x.tobytes()
    return [engine.run(schedule, payload, b"".join) for _ in range(count)]


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows: for each layer and shape, requests together and one by one, and a single caller."""
    engine = Engine("cpu", 1)
    batcher = engine.slots = Batcher(1, engine.execute, QueueLimits())
    context = DirectCall()
    for layer, shape in product(LAYERS, SHAPES):
        case = f"{layer!r} {'x'.join(map(str, shape))}"
        many = runs(engine, layer, shape, max(TOGETHER))
        if many[0].key is None:
            continue
        direct, lone = partial(engine.execute, many[:1]), partial(batcher.run, many[0], context)
        times = interleave({"the engine called directly": direct, "by the batcher, alone": lone}, rounds)
        yield row(case, "the engine called directly", "by the batcher, alone", times)
        for count in TOGETHER:
            apart, together = partial(one_by_one, engine, many[:count]), partial(engine.execute, many[:count])
            times = interleave({"one by one": apart, "together": together}, rounds)
            yield row(f"{case}, {count} requests", "one by one", "together", times)
    engine.close()


def one_by_one(engine: Engine, some: Sequence[Run]) -> None:
    """Execute each request alone."""
    for each in some:
        engine.execute([each])
