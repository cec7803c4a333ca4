"""The images: their user, their contents, and the layers that a change of the code rebuilds."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from poolrpc import __version__
from tests.docker.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def inspect(engine: Callable[..., str], image: str) -> Any:
    """Return the engine's description of an image."""
    return json.loads(engine("image", "inspect", image))[0]


def python(engine: Callable[..., str], image: str, code: str) -> str:
    """Run a line of Python in an image, with the restrictions of the compose file."""
    hardened = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges:true", "--network=none")
    return engine("run", "--rm", *hardened, "--entrypoint=python", image, "-c", code)


def locked(name: str) -> set[str]:
    """Return the packages of a file in server/requirements/, as NAME==VERSION."""
    lines = (ROOT / f"server/requirements/{name}.txt").read_text().splitlines()
    return {each.removesuffix(" \\") for each in lines if "==" in each}


def test_the_configuration_of_the_servers_image(engine: Callable[..., str], server_image: str) -> None:
    """It runs as user 10001, has a health check, stops on SIGTERM, and has labels for its version and license."""
    config = inspect(engine, server_image)["Config"]
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"] == ["CMD", "healthcheck.sh"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"] == ["poolrpc-server"]
    assert config["Labels"]["org.opencontainers.image.title"] == "poolrpc"
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_the_package_is_not_writable(engine: Callable[..., str], server_image: str) -> None:
    """The package belongs to root, has compiled bytecode, and can be imported on a read-only file system."""
    code = (
        "import os, pathlib, poolrpc_server; folder = pathlib.Path(poolrpc_server.__file__).parent;"
        "print(os.getuid(), folder.stat().st_uid, os.access(folder, os.W_OK),"
        " any(folder.glob('__pycache__/app.*.pyc')))"
    )
    assert python(engine, server_image, code) == "10001 0 False True"


def test_packages_are_those_of_the_lock(engine: Callable[..., str], server_image: str) -> None:
    """The image has the packages and versions of server/requirements/, whose hashes pip has checked, and poolrpc."""
    code = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()), sep='\\n')"
    installed = {each.lower().replace("_", "-") for each in python(engine, server_image, code).split()}
    assert installed == locked("torch-cpu") | locked("server") | {f"poolrpc=={__version__}"}


def test_nothing_that_serves_nothing_is_in_the_image(engine: Callable[..., str], server_image: str) -> None:
    """There are no tests, headers, static libraries or programs of torch's, except the one that it looks for."""
    code = (
        "import pathlib, sysconfig; folder = pathlib.Path(sysconfig.get_path('purelib'));"
        "patterns = '**/tests', '**/*.a', 'torch/test', 'torch/include', 'torch/share';"
        "useless = [path for pattern in patterns for path in folder.glob(pattern)];"
        "print([path.name for path in folder.glob('torch/bin/*') if path.is_file()], useless)"
    )
    assert python(engine, server_image, code) == "['torch_shm_manager'] []"


def test_the_clients_image_has_no_torch(engine: Callable[..., str], client_image: str, server_image: str) -> None:
    """It computes shapes without torch, and adds less than a third of the bytes that the server's image adds."""
    assert python(engine, client_image, "import importlib.util; print(importlib.util.find_spec('torch'))") == "None"
    shape = engine("run", "--rm", "--read-only", "--network=none", client_image, "shape", "8x64x56x56", "MaxPool2d(2)")
    assert shape == "MaxPool2d(2) -> (8, 64, 28, 28)"
    layers = [inspect(engine, image)["RootFS"]["Layers"] for image in (client_image, server_image)]
    base = sum(first == second for first, second in zip(*layers, strict=False))
    sizes = [inspect(engine, image)["Size"] for image in (client_image, server_image)]
    shared = sum(
        int(each) for each in engine("history", "--human=false", "--format={{.Size}}", server_image).split()[-base:]
    )
    assert (sizes[0] - shared) * 3 < sizes[1] - shared


def test_a_change_of_the_code_rebuilds_one_layer(
    engine: Callable[..., str], build: Callable[..., str], server_image: str, root: Path, tmp_path: Path
) -> None:
    """If the code changes, all layers but the last are reused, so torch is not installed again."""
    ignored = shutil.ignore_patterns(".*cache*", "__pycache__", ".git", ".venv*", ".debs", "benchmarks")
    shutil.copytree(root, tmp_path / "tree", ignore=ignored)
    with (tmp_path / "tree/server/poolrpc_server/telemetry/logs.py").open("a") as file:
        file.write("# changed\n")
    changed = build("cpu", "poolrpc:test-changed", tmp_path / "tree")
    try:
        before, after = (inspect(engine, each)["RootFS"]["Layers"] for each in (server_image, changed))
        assert after[:-1] == before[:-1]
        assert after[-1] != before[-1]
    finally:
        engine("image", "rm", changed)
