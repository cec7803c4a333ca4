"""A local Ray cluster that serves deploy/ray/serve.yaml, for the tests and the benchmarks.

Ray listens on every interface, so the cluster runs in a network namespace of its own: network_namespace.py.
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
"""The programs that scripts/install_ray.sh installs."""

PORT = 9000
"""The port of the gRPC proxy in deploy/ray/serve.yaml."""

SCRIPTS = Path(__file__).parent
IN_NAMESPACE = sys.executable, str(SCRIPTS / "network_namespace.py")
"""The command that runs another command in a network namespace of its own."""


@dataclass(frozen=True)
class RayCluster:
    """A running Ray cluster that serves the application.

    Attributes:
        address: The address of its gRPC proxy.
        process: The process that started it.

    """

    address: str
    process: psutil.Process

    def replicas(self) -> list[psutil.Process]:
        """Return the processes of its replicas."""
        return [each for each in self.process.children(recursive=True) if "ServeReplica:pool" in _title(each)]


def environment() -> dict[str, str]:
    """Return an environment for Ray's processes, with a new token: Ray rejects every caller without it."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@contextmanager
def ray_folder() -> Iterator[str]:
    """Make a temporary folder for Ray's files; its path is short, because it contains the paths of sockets."""
    with tempfile.TemporaryDirectory(prefix="poolrpc-ray-", ignore_cleanup_errors=True) as path:
        yield path


@contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """Start a Ray cluster with two replicas, wait until they serve, and end all its processes after the block.

    Raises:
        RuntimeError: The cluster ended before it served, ended with an error, or left processes; contains its output.

    """
    command = [str(BIN / "python"), str(SCRIPTS / "run_ray.py")]
    with ray_folder() as folder, ExitStack() as sockets:
        port, descriptors = PORT, ()
        if "POOLRPC_NETWORK_NAMESPACE" not in os.environ:
            listener = sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
            port, descriptors = listener.getsockname()[1], (listener.fileno(),)
            command = [*IN_NAMESPACE, "--forward", str(listener.fileno()), str(PORT), *command]
        process = subprocess.Popen(  # noqa: S603 - our own command
            [*command, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
            pass_fds=descriptors,
        )
        sockets.close()  # so that connections fail once Ray, which has inherited the socket, has ended
        output: list[str] = []
        try:
            for line in process.stdout or ():
                output.append(line)
                if line == "ready\n":
                    yield RayCluster(f"127.0.0.1:{port}", psutil.Process(process.pid))
                    break
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            output.append(process.communicate(timeout=120)[0])
            _, remaining = psutil.wait_procs(children, timeout=60)
            for each in remaining:
                each.kill()
        if process.returncode or remaining or "ready\n" not in output:
            raise RuntimeError(f"Ray ended with {process.returncode} and left {remaining}: {''.join(output)}")


def _title(process: psutil.Process) -> str:
    # Ray's workers replace the first word of their command line with a description of what they do.
    try:
        return "".join(process.cmdline()[:1])
    except psutil.Error:
        return ""
