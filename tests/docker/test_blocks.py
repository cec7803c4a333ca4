"""The blocks of the docs that need Docker, run as they stand: on free ports, as a compose project of their own."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.docker.conftest import ROOT, run, works
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
NEEDS = {
    "grafana": ("docker", "pull", "-q", "grafana/grafana:12.1.0"),
    "server-gpu": ("docker", "run", "--rm", "--gpus=all", "poolrpc:cuda", "--help"),
}
"""What a block can't do without, by a word of it, and what shows that it is there."""


@pytest.fixture
def project() -> Iterator[dict[str, str]]:
    """The environment of a compose project on free ports, which leaves nothing behind."""
    holders = {name: socket.create_server(("127.0.0.1", 0)) for name in PORTS}
    ports = {name: str(holder.getsockname()[1]) for name, holder in holders.items()}
    for holder in holders.values():
        holder.close()
    made = {
        **ENVIRONMENT,
        **ports,
        "COMPOSE_PROJECT_NAME": f"poolrpc-docs-{os.getpid()}",
        "POOLRPC_ADDRESS": f"127.0.0.1:{ports['POOLRPC_PORT']}",
        "POOLRPC_CPUS": "1",
        "POOLRPC_MEMORY": "1g",
        "PIP_DRY_RUN": "",
        "PIP_NO_INDEX": "",
        "DOCKER_BUILDKIT": "1",
    }
    yield made
    run("docker", "compose", "down", "--volumes", "--timeout=1", **made, COMPOSE_PROFILES="*")


@pytest.mark.parametrize("block", blocks("docker"), ids=str)
@pytest.mark.usefixtures("server_image", "client_image", "envoy_image", "prometheus_image")
def test_a_block_of_the_docs_runs(block: Block, project: dict[str, str]) -> None:
    """Each command succeeds and the servers answer where the page says, but for the ports."""
    for word, shows in NEEDS.items():
        if re.search(rf"\b{word}\b", block.source) and not works(*shows):
            pytest.skip(f"there is no {word} here")
    source = block.source
    for name, port in PORTS.items():
        source = source.replace(f"127.0.0.1:{port}", f"127.0.0.1:{project[name]}")
    done = subprocess.run(  # noqa: S603 - our own docs
        ["bash", "-euo", "pipefail", "-c", source],  # noqa: S607 - wherever it is
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **project},
    )
    assert not done.returncode, done.stdout + done.stderr
    block.check(done.stdout)
