"""Third-party clients: tritonclient, and gRPC's client for Node.

scripts/install_clients.sh installs them. If it can't reach the registries, the tests are skipped; in CI they fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from scripts.server_process import ServerProcess, serving
from tests.installing import ROOT, install

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parent
PEERS = ROOT / ".venv-triton"
pytestmark = [pytest.mark.conformance, pytest.mark.timeout(600)]


def run(*command: object, env: dict[str, str] | None = None) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(  # noqa: S603 - our own commands
        [str(each) for each in command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(env or {})},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def peers() -> Path:
    """The virtual environment with the clients."""
    install("scripts/install_clients.sh", "the clients")
    return PEERS


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """A server with a preset that accepts clients' shared memory."""
    with serving("--model", "stem=MaxPool2d(3, stride=2, padding=1)", "--allow-client-shm") as process:
        yield process


@pytest.mark.parametrize(
    "case",
    ["describe", "infer", "unpool", "errors", "compression", "async_infer", "stream", "aio", "shared_memory_regions"],
)
def test_tritonclient(peers: Path, server: ServerProcess, case: str) -> None:
    """The results of an unmodified tritonclient equal those of our client: triton_peer.py."""
    run(peers / "bin/python", FOLDER / "triton_peer.py", case, server.address, env={"PYTHONPATH": str(ROOT / "client")})


def test_node(peers: Path, server: ServerProcess) -> None:
    """A Node client with gRPC's packages loads our protos and calls both services: node_peer.js."""
    node = shutil.which("node") or peers / "bin/node"
    run(
        node,
        FOLDER / "node_peer.js",
        ROOT / "protos",
        server.address,
        env={"NODE_PATH": str(peers / "node/node_modules")},
    )
