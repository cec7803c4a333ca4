"""Third-party clients: tritonclient, and gRPC's client for Node, also in examples/node.

scripts/install_clients.sh installs them. If it can't reach the registries, the tests are skipped; in CI they fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from scripts.server_process import ServerProcess, serving
from tests.installing import ROOT, install
from tests.pictures import check_picture

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


def test_the_example_for_node(peers: Path, server: ServerProcess, tmp_path: Path) -> None:
    """examples/node/pool_photo.js writes the maxima and the rounded averages of a photo, next to each other."""
    photo, picture = tmp_path / "photo.png", tmp_path / "pooled.png"
    with Image.open(Path(mpl.get_data_path()) / "sample_data/grace_hopper.jpg") as image:
        image.save(photo)
        cells = np.asarray(image).reshape(150, 4, 128, 4, 3)
    run(
        shutil.which("node") or peers / "bin/node",
        ROOT / "examples/node/pool_photo.js",
        photo,
        picture,
        server.address,
        env={"NODE_PATH": str(peers / "node/node_modules")},
    )
    with Image.open(picture) as image:
        maxima, averages = np.hsplit(np.asarray(image), 2)
    np.testing.assert_array_equal(maxima, cells.max((1, 3)))
    np.testing.assert_array_equal(averages, np.rint(cells.mean((1, 3))))
    check_picture(picture.read_bytes(), ROOT / "docs/figures/examples/node.png")
