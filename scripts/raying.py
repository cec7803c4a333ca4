"""A Ray of this machine that serves deploy/ray/serve.yaml, for the tests and the benchmarks."""

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

if TYPE_CHECKING:
    from collections.abc import Iterator

BIN = Path(__file__).parents[1] / ".venv-ray/bin"
"""Made by scripts/ray.sh."""


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
        return [each for each in self.process.children(recursive=True) if "ServeReplica:pool" in _title(each)]


def environment() -> dict[str, str]:
    """Give an environment for Ray's processes, with a token of their own, without which Ray lets nobody in."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@contextmanager
def folder() -> Iterator[str]:
    """Give a folder for what Ray writes, with a short path: its sockets lie there."""
    with tempfile.TemporaryDirectory(prefix="poolrpc-ray-", ignore_cleanup_errors=True) as made:
        yield made


@contextmanager
def raying() -> Iterator[Cluster]:
    """Start a Ray with two replicas, wait until they serve, and end it with all that it started.

    Raises:
        RuntimeError: It ended before they served, not well, or left processes; says its last words.

    """
    grpc_port, http_port = _free_port(), _free_port()
    with folder() as made:
        process = subprocess.Popen(  # noqa: S603 - our own command
            [BIN / "python", Path(__file__).with_name("local_ray.py"), made, str(grpc_port), str(http_port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        said: list[str] = []
        try:
            for line in process.stdout or ():
                said.append(line)
                if line == "ready\n":
                    yield Cluster(f"127.0.0.1:{grpc_port}", psutil.Process(process.pid))
                    break
        finally:
            started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            said.append(process.communicate(timeout=120)[0])
            _, left = psutil.wait_procs(started, timeout=60)
            for each in left:
                each.kill()
        if process.returncode or left or "ready\n" not in said:
            raise RuntimeError(f"Ray ended with {process.returncode} and left {left}: {''.join(said)}")


def _free_port() -> int:
    """Give a port that was free just now: Ray doesn't tell which one it takes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _title(process: psutil.Process) -> str:
    # Ray's workers change the first word of their command line, and say there what they do.
    try:
        return "".join(process.cmdline()[:1])
    except psutil.Error:
        return ""
