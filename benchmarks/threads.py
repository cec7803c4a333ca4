"""An engine of two threads compared with one of one, for a single large call; and two processes that do half each.

The gain of two processes is what the machine allows: its cores may share caches, memory and power.
"""

from __future__ import annotations

import multiprocessing
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.context import DirectCall
from benchmarks.rounds import interleave, row
from poolrpc import AvgPool2d, Layer, MaxPool2d
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.batcher import Batcher
from poolrpc_server.calls.queue import QueueLimits
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

IMAGES, IMAGE = (2, 8, 16), (64, 112, 112)
"""Images of 3 MB: the smallest call is not split, and the largest one fits into no cache."""
LAYERS = (MaxPool2d(2), MaxPool2d(3, 2, 1), MaxPool2d(3, 1, 1), AvgPool2d(2), AvgPool2d(3, 1, 1))
LIMITS = Limits(2**31, 2**31, 64, 2**40)


def call(layer: Layer, images: int, threads: int) -> tuple[Engine, Callable[[], object]]:
    """Return an engine and a call of it with that many images."""
    engine = Engine("cpu", threads)
    x = np.random.default_rng(0).standard_normal((images, *IMAGE), np.float32)
    request = Request(TensorSpec("float32", x.shape), ((layer,),))
    schedule, payload = check_request(request, LIMITS, engine.schedule).schedule, x.tobytes()

    batcher = engine.slots = Batcher(threads, engine.execute, QueueLimits())
    context = DirectCall()
    # The memory of the results is reused.
    return engine, lambda: batcher.run(engine.run(schedule, payload, len), context)


def half(layer: Layer, images: int, pipe: Connection) -> None:
    """Pool half of the images whenever the pipe says so."""
    engine, run = call(layer, images // 2, 1)
    run()
    while pipe.recv():
        run()
        pipe.send(None)
    engine.close()


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows: for each layer two threads, and two processes, compared with one thread."""
    spawn = multiprocessing.get_context("spawn")
    for layer, images in product(LAYERS, IMAGES):
        one, alone = call(layer, images, 1)
        two, together = call(layer, images, 2)
        pipes = [spawn.Pipe() for _ in range(2)]
        workers = [spawn.Process(target=half, args=(layer, images, theirs)) for _, theirs in pipes]
        for worker in workers:
            worker.start()

        def apart(pipes: list[tuple[Connection, Connection]] = pipes) -> None:
            for ours, _ in pipes:
                ours.send(True)
            for ours, _ in pipes:
                ours.recv()

        times = interleave({"one thread": alone, "two threads": together, "two processes": apart}, rounds)
        for contender in ("two threads", "two processes"):
            yield row(f"{layer!r} {'x'.join(map(str, (images, *IMAGE)))}", "one thread", contender, times)
        for ours, _ in pipes:
            ours.send(False)
        for worker in workers:
            worker.join()
        one.close()
        two.close()
