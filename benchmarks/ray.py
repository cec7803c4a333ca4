"""The same calls to our own server and to a replica behind Ray's gRPC proxy, one at a time and concurrently.

Run it as `python scripts/network_namespace.py python -m benchmarks ray`: from outside, connections are forwarded.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.rounds import interleave, row
from poolrpc import MaxPool2d, PoolClient
from scripts.ray_cluster import ray_cluster
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPES = ((1, 1, 4, 4), (1, 3, 224, 224), (1, 64, 112, 112), (8, 64, 112, 112))
CALLERS, CALLS = 4, 16
"""Concurrent callers, and their calls in total."""


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows."""
    layer = MaxPool2d(2)
    with (
        ray_cluster() as cluster,
        serving("--threads", "2") as server,
        PoolClient(server.address) as own,
        PoolClient(cluster.address) as ray,
        ThreadPoolExecutor(CALLERS) as callers,
    ):

        def at_once(call: Any) -> None:  # noqa: ANN401 - a bound method of the client
            for each in [callers.submit(call) for _ in range(CALLS)]:
                each.result()

        for shape in SHAPES:
            x = np.random.default_rng(0).standard_normal(shape, np.float32)
            for transport in ("unary", "stream"):
                calls = {
                    "our server": partial(own.pool, x, layer, transport=transport),
                    "ray": partial(ray.pool, x, layer, transport=transport),
                }
                outputs = [call().output for call in calls.values()]
                case = f"MaxPool2d(2) {'x'.join(map(str, shape))}, {transport}"
                more = {"bytes": x.nbytes, "equal": bool(np.array_equal(*outputs))}
                yield row(case, "our server", "ray", interleave(calls, rounds), **more)
                if transport == "unary":
                    times = interleave({name: partial(at_once, call) for name, call in calls.items()}, rounds)
                    yield row(f"{case}, {CALLERS} callers", "our server", "ray", times, **more)
