"""The good client: calls of every size through every transport, with each answer compared with NumPy's own."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np

import poolrpc
from fuzz.attacks.child import Recorder, run

OWN_CONNECTION = {"grpc.use_local_subchannel_pool": 1}
LAYER = poolrpc.MaxPool2d(2)


def tensor(planes: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a tensor, and the output of LAYER."""
    x = np.random.default_rng(planes).standard_normal((1, planes, size, size), np.float32)
    return x, x.reshape(1, planes, size // 2, 2, size // 2, 2).max((3, 5))


def compare(
    patience: float, client: poolrpc.PoolClient, tensors: tuple[np.ndarray, np.ndarray], transport: str | None = None
) -> str:
    """Pool a tensor; return what is wrong with the output, or an empty string.

    Args:
        patience: Seconds for which a call that is rejected for the moment is tried again, as its error says.
        client: The client.
        tensors: The tensor, and the output.
        transport: The transport.

    """
    x, expected = tensors
    until = time.monotonic() + patience
    while True:
        try:
            output = client.pool(x, LAYER, transport=transport).output
        except poolrpc.UnavailableError as error:
            if error.retry_delay is None or time.monotonic() > until:
                raise
            time.sleep(error.retry_delay)
        else:
            return "" if np.array_equal(output, expected) else "wrong"


def main(settings: dict[str, Any]) -> None:
    """Call until standard input ends.

    Args:
        settings: The address ("address"), the path of the unix socket ("path"), the token ("token"), the seconds
            after which a call counts as lost ("timeout"), and whether a call that is rejected for the moment is tried
            again until then ("patient"), as its error says, after the client's own attempts.

    """
    address, token = settings["address"], settings["token"] or None
    connect = partial(poolrpc.PoolClient, token=token, timeout=settings["timeout"], options=OWN_CONNECTION)
    recorder = Recorder()
    small, middle, large = tensor(3, 16), tensor(16, 128), tensor(64, 256)

    call = partial(compare, settings["timeout"] if settings["patient"] else 0.0)

    def small_calls() -> None:
        with connect(address) as client:
            recorder.repeat("small", partial(call, client, small), 0.02)

    def new_connections() -> None:
        def attempt() -> str:
            with connect(address) as client:
                return call(client, small)

        recorder.repeat("new connection", attempt, 0.5)

    def larger_calls() -> None:
        with connect(address) as client, connect(f"unix:{settings['path']}") as local:
            attempts = {
                "middle": partial(call, client, middle, "unary"),
                "large": partial(call, client, large, "unary"),
                "stream": partial(call, client, large, "stream"),
                "arena": partial(call, local, middle, "arena"),
                "local": partial(call, local, middle),
                "unix": partial(call, local, small),
            }
            while not recorder.until.is_set():
                for kind, attempt in attempts.items():
                    if not recorder.until.wait(0.05):
                        recorder.measure(kind, attempt)

    run(recorder, small_calls, larger_calls, *([new_connections] if settings["new_connections"] else []))
