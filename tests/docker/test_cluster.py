"""Two replicas behind Envoy, under load, while one of them is stopped or killed."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import poolrpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAYER = poolrpc.MaxPool2d(2)


class Load:
    """Threads that make calls until `end`.

    Attributes:
        correct: The number of correct results.
        failures: The errors, and "differs" for each wrong result.

    """

    def __init__(self, address: str, callers: int, options: dict[str, Any]) -> None:
        self.correct = 0
        self.failures: list[object] = []
        self._address, self._options = address, options
        self._ending = threading.Event()
        self._counted = threading.Condition()
        self._threads = [threading.Thread(target=self._call, args=(seed,)) for seed in range(callers)]

    def start(self) -> None:
        """Start the threads."""
        for each in self._threads:
            each.start()

    def end(self) -> None:
        """Let every thread finish its call, and wait for it."""
        self._ending.set()
        for each in self._threads:
            each.join()

    def wait_for(self, calls: int) -> None:
        """Wait until this many more calls have ended."""
        with self._counted:
            total = self.correct + len(self.failures) + calls
            assert self._counted.wait_for(lambda: self.correct + len(self.failures) >= total, 300)

    def _call(self, seed: int) -> None:
        x = np.random.default_rng(seed).standard_normal((1, 16, 64, 64), np.float32)
        expected = x.reshape(1, 16, 32, 2, 32, 2).max((3, 5))
        with poolrpc.PoolClient(self._address, options=self._options) as client:
            while not self._ending.is_set():
                try:
                    outcome: object = np.array_equal(client.pool(x, LAYER, timeout=30).output, expected) or "differs"
                except poolrpc.PoolError as error:
                    outcome = error
                with self._counted:
                    if outcome is True:
                        self.correct += 1
                    else:
                        self.failures.append(outcome)
                    self._counted.notify_all()


@pytest.fixture
def cluster(project: Callable[..., Any], server_image: str, envoy_image: str) -> Iterator[Any]:
    """Two replicas behind Envoy."""
    assert server_image
    assert envoy_image
    with project("cluster", POOLRPC_CPUS="1", POOLRPC_MEMORY="1g") as running:
        running.up("envoy")
        with poolrpc.PoolClient(running.address("envoy")) as client:
            client.server_info()  # retried until Envoy has found the replicas
        yield running


@contextmanager
def loaded(cluster: Any, options: dict[str, Any]) -> Iterator[Load]:
    """Make calls before, during and after the block."""
    load = Load(cluster.address("envoy"), 6, options)
    load.start()
    try:
        load.wait_for(200)
        yield load
        load.wait_for(200)
    finally:
        load.end()


def test_scaling_down_loses_no_call(cluster: Any) -> None:
    """Both replicas get calls, and one is removed: no call fails, although the clients do not retry."""
    with loaded(cluster, {"grpc.enable_retries": 0}) as load:
        for index in ("1", "2"):
            log = cluster.log("--index", index, "replica")
            assert any(line.get("method", "").endswith("/Pool") for line in log)
        cluster.up("--scale", "replica=1", "--no-recreate", "envoy")
        assert len(cluster.containers("replica")) == 1
    assert load.failures == []


def test_a_killed_replica_causes_no_errors(cluster: Any) -> None:
    """One of two replicas is killed with SIGKILL under load: clients with the default retries get no error."""
    with loaded(cluster, {}) as load:
        cluster.kill("replica")
    assert load.failures == []
