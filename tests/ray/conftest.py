"""A local Ray cluster with two replicas, in the virtual environment that scripts/install_ray.sh makes."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

import poolrpc
from scripts.ray_cluster import IN_NAMESPACE, RayCluster, environment, ray_cluster
from tests.installing import install

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def ray_environment() -> dict[str, str]:
    """Install Ray, and return the environment variables for its processes."""
    if subprocess.run([*IN_NAMESPACE, "true"], check=False).returncode and "CI" not in os.environ:  # noqa: S603 - ours
        pytest.skip("Ray listens on every interface, and this user can't make a network namespace")
    install("scripts/install_ray.sh", "Ray")
    return environment()


@pytest.fixture(scope="module")
def cluster(ray_environment: dict[str, str]) -> Iterator[RayCluster]:  # noqa: ARG001 - installed
    """A Ray cluster that serves deploy/ray/serve.yaml; all its processes are ended afterwards."""
    with ray_cluster() as running:
        yield running


@pytest.fixture
def client(cluster: RayCluster) -> Iterator[poolrpc.PoolClient]:
    """An unmodified client; the name of the application is metadata, which Ray needs if there are several."""
    with poolrpc.PoolClient(cluster.address, metadata=[("application", "pool")]) as connected:
        yield connected
