"""A Ray of this machine with two replicas, in an environment of its own that scripts/ray.sh makes."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

import poolrpc
from tests.installing import ROOT, install

if TYPE_CHECKING:
    from collections.abc import Iterator

PYTHON = ROOT / ".venv-ray/bin/python"


def free_port() -> int:
    """Give a port that was free just now: Ray doesn't tell which one it took."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@dataclass(frozen=True)
class Cluster:
    """A running Ray that serves us.

    Attributes:
        address: Of its gRPC proxy.
        process: What started it.

    """

    address: str
    process: psutil.Process

    def replicas(self) -> list[psutil.Process]:
        """Give the processes of its replicas."""
        # Ray names them so once they are ready, and adds the name of what they do.
        return [each for each in self.process.children(recursive=True) if "ServeReplica:pool" in first_word(each)]


def first_word(process: psutil.Process) -> str:
    """Give how a process calls itself; empty where it has gone."""
    try:
        return "".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


@contextmanager
def all_ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """End a process by the end of its input, and hold it to leave none of its children."""
    try:
        yield
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.communicate(timeout=60)
        _, left = psutil.wait_procs(children, timeout=30)
        for each in left:
            each.kill()
    assert process.returncode == 0
    assert not left


@pytest.fixture(scope="session")
def installed() -> None:
    """Ray, installed."""
    install("scripts/ray.sh", "Ray")


@pytest.fixture(scope="session")
def environment(installed: None) -> dict[str, str]:  # noqa: ARG001 - first
    """Give what Ray's processes have in their environment: a token of their own, too, without which none is let in."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[Cluster]:
    """Give a Ray that serves deploy/ray/serve.yaml; nothing of it is left at the end."""
    port = free_port()
    # Ray's sockets lie there, whose paths may not be long.
    with tempfile.TemporaryDirectory(prefix="poolrpc-ray-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(  # noqa: S603 - our own command
            [PYTHON, Path(__file__).with_name("local_ray.py"), folder, str(port), str(free_port())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        with all_ended(process):
            said: list[str] = []
            for line in process.stdout or ():
                said.append(line)
                if line == "ready\n":
                    break
            else:
                pytest.fail("".join(said))
            yield Cluster(f"127.0.0.1:{port}", psutil.Process(process.pid))


@pytest.fixture
def client(cluster: Cluster) -> Iterator[poolrpc.PoolClient]:
    """Give our client, unmodified: the application's name is metadata, which Ray wants where there are several."""
    with poolrpc.PoolClient(cluster.address, metadata=[("application", "pool")]) as made:
        yield made
