"""server/requirements/: the packages of the images, with hashes, agree with pyproject.toml and constraints.txt."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "server/requirements"
LINE = re.compile(r"^([\w.-]+)==(\S+) \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)


def normal(name: str) -> str:
    """Return the name of a package in the form in which names are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(name: str) -> dict[str, str]:
    """Return the versions of a file by package; each of its lines belongs to a package with hashes."""
    text = (FOLDER / f"{name}.txt").read_text()
    assert LINE.sub("", text) == "# Written by scripts/lock.sh.\n"
    return {normal(package): version for package, version, _ in LINE.findall(text)}


def required(*extras: str) -> set[str]:
    """Return the packages that pyproject.toml requires."""
    command = (sys.executable, ROOT / "scripts/requirements.py", ROOT / "pyproject.toml", *extras)
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()  # noqa: S603 - ours
    return {normal(re.split(r"[<>=]", each)[0]) for each in lines}


@pytest.mark.parametrize("name", [each.stem for each in sorted(FOLDER.iterdir())])
def test_the_versions_are_those_of_the_tests(name: str) -> None:
    """Each package has hashes, and the version that the tests run with if constraints.txt has one."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {normal(package): version for package, version in (each.split("==") for each in lines if "==" in each)}
    versions = locked(name)
    assert versions
    different = {
        package: version
        for package, version in versions.items()
        if tested.get(package, version) != version.split("+")[0]
    }
    assert not different


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_every_requirement_is_there(variant: str) -> None:
    """An image has what pyproject.toml requires; the CPU image has none of CUDA's libraries."""
    assert required() <= set(locked("client"))
    packages = set(locked("server")) | set(locked(f"torch-{variant}"))
    assert required("server", "otel") <= packages
    assert any(each.startswith("nvidia-") for each in packages) == (variant == "cuda")
    assert locked("torch-cpu")["torch"] == f"{locked('torch-cuda')['torch']}+cpu"
