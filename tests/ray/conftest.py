"""A Ray of this machine with two replicas, in an environment of its own that scripts/install_ray.sh makes."""

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
def rays_environment() -> dict[str, str]:
    """Give an environment with Ray, which is installed."""
    if subprocess.run([*IN_NAMESPACE, "true"], check=False).returncode and "CI" not in os.environ:  # noqa: S603 - ours
        pytest.skip("Ray listens on every interface, and this user can't have a network of its own")
    install("scripts/install_ray.sh", "Ray")
    return environment()


@pytest.fixture(scope="module")
def cluster(rays_environment: dict[str, str]) -> Iterator[RayCluster]:  # noqa: ARG001 - installed
    """Give a Ray that serves deploy/ray/serve.yaml; nothing of it is left at the end."""
    with ray_cluster() as made:
        yield made


@pytest.fixture
def client(cluster: RayCluster) -> Iterator[poolrpc.PoolClient]:
    """Give our client, unmodified: the application's name is metadata, which Ray wants where there are several."""
    with poolrpc.PoolClient(cluster.address, metadata=[("application", "pool")]) as made:
        yield made
