"""A Ray of this machine that serves deploy/ray/serve.yaml, for the tests and the benchmarks.

Ray listens on every interface that there is, so it has a network of its own: apart.py.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

BIN = Path(__file__).parents[1] / ".venv-ray/bin"
"""Made by scripts/ray.sh."""

PORT = 9000
"""Of the gRPC proxy, by deploy/ray/serve.yaml."""

HERE = Path(__file__).parent
APART = sys.executable, str(HERE / "apart.py")
"""What runs a command in a network of its own."""


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
    command = [str(BIN / "python"), str(HERE / "local_ray.py")]
    with folder() as made, ExitStack() as opened:
        port, descriptors = PORT, ()
        if "POOLRPC_APART" not in os.environ:
            listening = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
            port, descriptors = listening.getsockname()[1], (listening.fileno(),)
            command = [*APART, "--through", str(listening.fileno()), str(PORT), *command]
        process = subprocess.Popen(  # noqa: S603 - our own command
            [*command, made],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
            pass_fds=descriptors,
        )
        opened.close()  # our own: whoever connects when Ray has ended is refused
        said: list[str] = []
        try:
            for line in process.stdout or ():
                said.append(line)
                if line == "ready\n":
                    yield Cluster(f"127.0.0.1:{port}", psutil.Process(process.pid))
                    break
        finally:
            started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            said.append(process.communicate(timeout=120)[0])
            _, left = psutil.wait_procs(started, timeout=60)
            for each in left:
                each.kill()
        if process.returncode or left or "ready\n" not in said:
            raise RuntimeError(f"Ray ended with {process.returncode} and left {left}: {''.join(said)}")


def _title(process: psutil.Process) -> str:
    # Ray's workers change the first word of their command line, and say there what they do.
    try:
        return "".join(process.cmdline()[:1])
    except psutil.Error:
        return ""
