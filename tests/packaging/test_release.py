"""The parts of a release: the workflows, the version, the sdist and the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.metadata import Metadata

from poolrpc import __version__

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
IMAGES = {"cpu", "cuda", "client"}
WRITES = {"images": {"packages", "id-token", "attestations"}, "pypi": {"id-token"}}
"""The write permissions of the jobs that publish."""


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a command with this environment's Python."""
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)  # noqa: S603 - our own commands


def jobs(workflow: Path) -> dict[str, Any]:
    """Return the jobs of a workflow."""
    found: dict[str, Any] = yaml.safe_load(workflow.read_text())["jobs"]
    return found


def steps(workflow: Path) -> list[dict[str, Any]]:
    """Return the steps of all jobs of a workflow."""
    return [step for job in jobs(workflow).values() for step in job.get("steps", [])]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel, built like in `make dist`."""
    folder = tmp_path_factory.mktemp("dist")
    done = run("-m", "hatchling", "build", "-d", folder)
    assert not done.returncode, done.stdout + done.stderr
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def files(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel, by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda each: each.stem)
def test_commands_of_a_workflow_exist(workflow: Path) -> None:
    """The commands of a step are valid bash, and every make target and executable script that they name exists."""
    commands = "\n".join(step["run"] for step in steps(workflow) if "run" in step)
    subprocess.run(["bash", "-n"], input=commands, text=True, check=True)  # noqa: S607 - found on the PATH
    assert set(re.findall(r"\bmake ([a-z-]+)", commands)) <= TARGETS
    for before, script in re.findall(r"(\S*) ?((?:\.ci|scripts|server)/[\w./]+)", commands):
        assert (ROOT / script).is_file(), script
        if not before:
            assert (ROOT / script).stat().st_mode & 0o100, script


def test_every_folder_of_tests_is_in_one_job_of_ci() -> None:
    """CI's quick jobs run the docs and every folder of tests, except the folders whose tests are all marked."""
    parts = jobs(ROOT / ".github/workflows/ci.yml")["test"]["strategy"]["matrix"]["include"]
    named = [path for part in parts for path in part["paths"].split()]
    folders = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("tests/*/**/test_*.py")}
    top = {"/".join(Path(each).parts[:2]) for each in folders}
    assert sorted(named) == sorted(
        {*top - {"tests/browser", "tests/conformance", "tests/docker", "tests/gpu", "tests/ray"}, "README.md", "docs"}
    )


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda each: each.stem)
def test_actions_are_pinned(workflow: Path) -> None:
    """Every action is pinned to a commit, with its version in a comment, and to the same commit in all workflows."""
    used = re.findall(r"uses: (?!\$/)(\S+)@(.*)", workflow.read_text())
    assert used
    assert all(re.fullmatch(r"[0-9a-f]{40} # v\d+\.\d+\.\d+", pin) for _, pin in used), used
    everywhere = {pin for each in WORKFLOWS for pin in re.findall(r"uses: (?!\$/)(\S+@.*)", each.read_text())}
    assert len({pin.partition("@")[0] for pin in everywhere}) == len(everywhere)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda each: each.stem)
def test_jobs_have_minimal_permissions(workflow: Path) -> None:
    """A workflow has no permissions of its own, and only the jobs that publish have write permissions."""
    assert yaml.safe_load(workflow.read_text())["permissions"] == {}
    for name, job in jobs(workflow).items():
        writes = {scope for scope, access in job["permissions"].items() if access == "write"}
        assert writes == WRITES.get(name, set()), name


def test_workflows_use_the_lowest_supported_python() -> None:
    """Workflows run on the lowest version of Python that the package supports."""
    versions = {
        step["with"]["python-version"] for each in WORKFLOWS for step in steps(each) if "setup-python" in str(step)
    }
    assert versions == set(re.findall(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))


def test_the_version_script_checks_a_tag() -> None:
    """The script prints the package's version, without a tag or with the version's tag; another tag is an error."""
    for arguments in ([], [f"v{__version__}"]):
        done = run("scripts/version.py", *arguments)
        assert (done.returncode, done.stdout) == (0, f"{__version__}\n")
    done = run("scripts/version.py", "v99.0.0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"expected the tag v{__version__}, the version in _version.py, got v99.0.0\n"


def test_every_image_is_released_with_its_version() -> None:
    """Every image is released, and its version label is the argument VERSION, which is the version script's output."""
    stages = re.split(r"^FROM .* AS (\w[\w-]*)$", (ROOT / "server/Dockerfile").read_text(), flags=re.MULTILINE)
    labelled = {
        name
        for name, text in zip(stages[1::2], stages[2::2], strict=True)
        if "ARG VERSION=" in text and "LABEL org.opencontainers.image.version=$VERSION" in text
    }
    images = jobs(ROOT / ".github/workflows/release.yml")["images"]
    assert labelled == {each["target"] for each in images["strategy"]["matrix"]["include"]} == IMAGES
    (build,) = (step for step in images["steps"] if step.get("id") == "image")
    assert build["env"]["VERSION"] == "${{ needs.dist.outputs.version }}"
    assert '--build-arg VERSION="$VERSION"' in build["run"]
    assert {"--provenance=mode=max", "--sbom=true"} <= set(build["run"].split())


def test_the_metadata_is_valid_for_an_index(built: tuple[Path, Path]) -> None:
    """The metadata of the wheel and of the sdist are valid and equal, and contain the version and the README."""
    sdist, wheel = built
    texts = [text for name, text in files(wheel).items() if name.endswith(".dist-info/METADATA")]
    with tarfile.open(sdist) as archive:
        metadata = archive.extractfile(f"poolrpc-{__version__}/PKG-INFO")
        assert metadata
        texts.append(metadata.read())
    first, second = (Metadata.from_email(text, validate=True) for text in texts)
    assert first.name == second.name == "poolrpc"
    assert str(first.version) == str(second.version) == __version__
    assert first.description == second.description == (ROOT / "README.md").read_text()
    assert first.description_content_type == "text/markdown"
    assert first.license_expression == "Apache-2.0"


def test_the_sdist_builds_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    """A wheel that is built from the sdist holds the same files, byte by byte, as the one from the repository."""
    sdist, wheel = built
    with tarfile.open(sdist) as opened:
        opened.extractall(tmp_path, filter="data")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "again")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path / f"poolrpc-{__version__}")  # noqa: S603 - our own
    assert files(next((tmp_path / "again").glob("*.whl"))) == files(wheel)
