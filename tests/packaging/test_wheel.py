"""The wheel in new virtual environments: a client-only install, and the client with the lowest supported versions.

These tests need a package registry, and take a minute or two.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scripts.server_process import serving

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REQUIRED = {"poolrpc", "grpcio", "protobuf", "numpy", "typing-extensions", "pip", "setuptools"}
"""All packages of a client-only install: ours, its three dependencies, grpcio's own, and those of every new venv."""


def run(*command: object, **options: object) -> str:
    """Run a command that must succeed, and return its output."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)  # noqa: S603 - our own commands
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(folder: Path, *packages: object) -> Path:
    """Make a virtual environment with these packages, and return its Python."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", *packages)
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    (built,) = folder.glob("poolrpc-*.whl")
    return built


@pytest.fixture(scope="module")
def thin(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and no extra."""
    return environment(tmp_path_factory.mktemp("thin") / "venv", wheel)


def test_a_thin_install_is_thin(thin: Path) -> None:
    """Without extras, only grpcio, protobuf, numpy and their dependencies are installed, in less than 120 MB."""
    installed = {
        each["name"].lower().replace("_", "-") for each in json.loads(run(thin, "-m", "pip", "list", "--format=json"))
    }
    assert installed <= REQUIRED
    site = Path(run(thin, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    tools = ("pip", "setuptools", "pkg_resources", "_distutils_hack")
    size = sum(
        path.lstat().st_size
        for path in site.rglob("*")
        if not path.relative_to(site).parts[0].startswith(tools) and "__pycache__" not in path.parts
    )
    assert size < 120 * 10**6


def test_import_is_light(thin: Path) -> None:
    """`import poolrpc` does not import torch and takes at most 1.5 times as long as `import grpc, numpy`."""
    # The CPU time of the importing thread, because NumPy's OpenBLAS starts threads that spin for a while.
    code = "import time; start = time.thread_time(); import {}; print(time.thread_time() - start)"
    base, package = [], []
    for _ in range(25):
        base.append(float(run(thin, "-c", code.format("grpc, numpy"))))
        package.append(float(run(thin, "-c", code.format("poolrpc"))))
    assert min(package) <= 1.5 * min(base)
    assert run(thin, "-c", "import sys, poolrpc; print('torch' in sys.modules)") == "False\n"


def test_commands_without_the_extra_name_it(thin: Path) -> None:
    """The client's command works, and poolrpc-server names the extra that it needs."""
    shape = run(thin.with_name("poolrpc"), "shape", "8x64x56x56", "MaxPool2d(3, stride=2, padding=1)")
    assert shape == "MaxPool2d(3, stride=2, padding=1) -> (8, 64, 28, 28)\n"
    done = subprocess.run([thin.with_name("poolrpc-server")], capture_output=True, text=True, check=False)  # noqa: S603 - our own
    assert done.returncode == 2
    assert done.stderr == "poolrpc-server: the server needs its extra: pip install 'poolrpc[server]'\n"
    done = subprocess.run(  # noqa: S603 - our own program
        [thin, "-c", "from poolrpc_server import embedded"], capture_output=True, text=True, check=False
    )
    assert "poolrpc_server.embedded: the server needs its extra: pip install 'poolrpc[server]'" in done.stderr


def test_the_client_works_at_its_lowest_versions(wheel: Path, tmp_path: Path) -> None:
    """The client's tests pass with the lowest versions that it supports, against a server of this environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = [re.sub(r"^([\w-]+)>=([\d.]+).*$", r"\1==\2", each) for each in project["dependencies"]]
    assert all("==" in each for each in lowest)
    python = environment(tmp_path / "venv", wheel, *lowest, "pytest", "pytest-asyncio", "pytest-timeout")
    tests = [ROOT / "tests/integration/test_client.py", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT / "tests"]
    # conftest.py in the root is for the docs, and needs packages that the client does not have.
    tests += ["--confcutdir", ROOT / "tests"]
    with serving() as server:
        report = run(
            python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests,
            env={**os.environ, "POOLRPC_TEST_ADDRESS": server.address}, cwd=tmp_path,
        )  # fmt: skip
    assert re.search(r"\d+ passed", report), report
    assert "failed" not in report
