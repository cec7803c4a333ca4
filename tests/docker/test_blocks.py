"""The code blocks of the docs that need Docker, run on free ports in a compose project of their own."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.docker.conftest import ROOT, run, succeeds
from tests.docs.blocks import ENVIRONMENT, Block, blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

PORTS = {
    "POOLRPC_PORT": 50051,
    "POOLRPC_GPU_PORT": 50052,
    "POOLRPC_CLUSTER_PORT": 50053,
    "PROMETHEUS_PORT": 9090,
    "GRAFANA_PORT": 3000,
}
UPGRADING = "docs/upgrading.md"
"""A page whose commands test_cluster.py runs, under load."""

REQUIREMENTS = {
    "grafana": ("docker", "pull", "-q", "grafana/grafana:12.1.0"),
    "server-gpu": ("docker", "run", "--rm", "--gpus=all", "poolrpc:cuda", "--help"),
}
"""What a block requires, by a word in the block: the command that succeeds if it is available."""


@pytest.fixture
def project() -> Iterator[dict[str, str]]:
    """The environment variables of a compose project on free ports, which is removed afterwards."""
    holders = {name: socket.create_server(("127.0.0.1", 0)) for name in PORTS}
    ports = {name: str(holder.getsockname()[1]) for name, holder in holders.items()}
    for holder in holders.values():
        holder.close()
    variables = {
        **ENVIRONMENT,
        **ports,
        "COMPOSE_PROJECT_NAME": f"poolrpc-docs-{os.getpid()}",
        "POOLRPC_ADDRESS": f"127.0.0.1:{ports['POOLRPC_PORT']}",
        "POOLRPC_CPUS": "1",
        "POOLRPC_MEMORY": "1g",
        "POOLRPC_PULL_POLICY": "missing",
        "PIP_DRY_RUN": "",
        "PIP_NO_INDEX": "",
        "DOCKER_BUILDKIT": "1",
    }
    yield variables
    run("docker", "compose", "down", "--volumes", "--timeout=1", **variables, COMPOSE_PROFILES="*")


@pytest.fixture
def _own_secrets() -> Iterator[None]:
    """Remove the folder that the page of containers creates, whose files belong to the container's user."""
    if (ROOT / "secrets").exists():
        pytest.skip("there is a folder secrets/, which the page would overwrite")
    yield
    if (ROOT / "secrets").exists():
        root = ("--user=0", "--entrypoint=rm", f"--volume={ROOT}:/root-folder")
        run("docker", "run", "--rm", *root, "poolrpc:cpu", "-r", "/root-folder/secrets")


@pytest.mark.parametrize("block", [each for each in blocks("docker") if each.page != UPGRADING], ids=str)
@pytest.mark.usefixtures("server_image", "client_image", "envoy_image", "prometheus_image", "_own_secrets")
def test_a_block_of_the_docs_runs(block: Block, project: dict[str, str]) -> None:
    """Each command succeeds with the output that the page shows; only the ports differ."""
    for word, check in REQUIREMENTS.items():
        if re.search(rf"\b{word}\b", block.source) and not succeeds(*check):
            pytest.skip(f"{word} is not available")
    source = block.source
    for name, port in PORTS.items():
        source = source.replace(f"127.0.0.1:{port}", f"127.0.0.1:{project[name]}")
    done = subprocess.run(  # noqa: S603 - our own docs
        ["bash", "-euo", "pipefail", "-c", source],  # noqa: S607 - found on the PATH
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **project},
    )
    assert not done.returncode, done.stdout + done.stderr
    block.check(done.stdout)
