"""Replicas behind Envoy and behind dns:///, under load, while some are stopped, killed, added or replaced."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import poolrpc
from tests.docker.conftest import ROOT, run
from tests.docs.blocks import blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAYER = poolrpc.MaxPool2d(2)

DISCOVERY_SECONDS = 60
"""The time within which clients of dns:/// must use a new replica."""

DNS_LOAD = """
import json, signal, threading
import numpy as np
import poolrpc

ending = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ending.set())
x = np.random.default_rng(0).standard_normal((1, 16, 64, 64), np.float32)
expected = x.reshape(1, 16, 32, 2, 32, 2).max((3, 5))
correct, failures = 0, []
with poolrpc.PoolClient("dns:///replica:50051") as client:
    client.wait_until_ready(timeout=60)
    print("ready", flush=True)
    while not ending.is_set():
        try:
            output = client.pool(x, poolrpc.MaxPool2d(2), timeout=30).output
            if np.array_equal(output, expected):
                correct += 1
            else:
                failures.append("differs")
        except poolrpc.PoolError as error:
            failures.append(str(error))
print(json.dumps([correct, failures]))
"""
"""A program that makes calls until SIGTERM, and prints the number of correct results and the errors."""


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


@contextmanager
def loaded_by_name(cluster: Any, client_image: str) -> Iterator[list[Any]]:
    """Call dns:///replica:50051 from a container of the cluster; the list then has the correct calls and the errors."""
    network = f"--network={cluster.name}_default"
    client = run("docker", "run", "-d", "--init", network, "--entrypoint=python", client_image, "-u", "-c", DNS_LOAD)
    outcome: list[Any] = []
    try:
        wait_for_line(client, "ready", 60)
        yield outcome
        run("docker", "stop", "--time=60", client)
        outcome += json.loads(run("docker", "logs", client).splitlines()[-1])
    finally:
        run("docker", "rm", "-f", client)


def wait_for_line(container: str, text: str, seconds: float) -> None:
    """Follow a container's log until a line has the text, for so many seconds at most."""
    command = ["docker", "logs", "--follow", container]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:  # noqa: S603 - Docker
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            assert process.stdout
            assert any(text in line for line in process.stdout), f"no {text} within {seconds:.0f} seconds"
        finally:
            timer.cancel()
            process.kill()


def test_clients_of_a_name_use_new_replicas(cluster: Any, client_image: str) -> None:
    """A client of dns:/// calls replicas that were started after it connected, within a minute, and loses no call."""
    with loaded_by_name(cluster, client_image) as outcome:
        before = {each["Id"] for each in cluster.containers("replica")}
        cluster.up("--scale", "replica=4", "--no-recreate", "replica")
        deadline = time.monotonic() + DISCOVERY_SECONDS
        for each in {each["Id"] for each in cluster.containers("replica")} - before:
            wait_for_line(each, "/poolrpc.v1.PoolService/Pool", deadline - time.monotonic())
    correct, failures = outcome
    assert correct
    assert failures == []


@pytest.fixture
def next_image(engine: Callable[..., str], server_image: str) -> Iterator[str]:
    """The name of an image of another version."""
    container = engine("create", server_image)
    engine("commit", "--change=LABEL org.opencontainers.image.version=next", container, "poolrpc:test-next")
    engine("rm", container)
    yield "poolrpc:test-next"
    engine("image", "rm", "poolrpc:test-next")


def test_an_upgrade_loses_no_call(next_image: str, cluster: Any, client_image: str) -> None:
    """The commands of the docs replace both replicas by those of another image, under load behind Envoy and dns:///."""
    (block,) = (each for each in blocks("docker") if each.page == "docs/upgrading.md")
    environment = cluster.environment(POOLRPC_IMAGE=next_image)
    before = {each["Id"] for each in cluster.containers("replica")}
    with loaded_by_name(cluster, client_image) as outcome, loaded(cluster, {"grpc.enable_retries": 0}) as load:
        done = subprocess.run(  # noqa: S603 - our own docs
            ["bash", "-euo", "pipefail", "-c", block.source],  # noqa: S607 - found on the PATH
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **environment},
        )
        assert not done.returncode, done.stdout + done.stderr
    after = cluster.containers("replica")
    assert len(after) == len(before) == 2
    assert not before & {each["Id"] for each in after}
    assert {each["Config"]["Labels"]["org.opencontainers.image.version"] for each in after} == {"next"}
    assert load.failures == []
    correct, failures = outcome
    assert correct
    assert failures == []
