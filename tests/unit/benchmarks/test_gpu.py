"""The benchmark of GPUs, on the CPU: every part of it runs, so that a machine with a GPU only has to measure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from tests.installing import unreachable

ROOT = Path(__file__).parents[3]
CALLS = {
    "a call, in place in the arena",
    "a call, through the arena",
    "a local call, in place",
    "a local call",
    "a call over TCP",
}
WAYS = CALLS | {
    "pinned copy both ways",
    "torch from pageable memory",
    "torch from pinned memory",
    "the engine",
    "the engine on the CPU",
    "the engine, in page-locked memory",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_part_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each dtype, transport and number of callers has a row, and every call has torch's values."""
    monkeypatch.setattr(gpu, "CASE_SECONDS", 0.0)
    monkeypatch.setattr(gpu, "CALLS", 64)
    enabled = torch.is_grad_enabled()
    try:
        rows = list(gpu.measure(torch.device("cpu"), [(1, 3, 16, 16)], [(1, 3, 16, 16)], 1, card="none"))
    finally:
        torch.set_grad_enabled(enabled)
    assert all(row["card"] == "none" and row["ms"] > 0 for row in rows)
    sized = [row for row in rows if row["baseline"] == "pinned upload"]
    assert len({row["case"] for row in sized}) == len(gpu.DTYPES) * len(gpu.LAYERS)
    assert {row["contender"] for row in sized} == WAYS
    assert all(row["equal"] for row in sized if row["contender"] in CALLS)
    assert all(row["equal"] for row in rows if row["baseline"] == "torch's operator")
    assert {row["contender"] for row in rows if row["baseline"] == "float32"} == {"uint8"}
    small = [row for row in rows if "calls" in row]
    assert {row["case"].rpartition(", ")[2] for row in small} == {"1 caller", "8 callers", "64 callers"}
    assert {row["contender"] for row in small} == {"unix", "tcp"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    """The command ends with one line, a status of its own, and no file."""
    command = [sys.executable, "-m", "benchmarks", "gpu", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)  # noqa: S603 - our own command
    assert (done.returncode, done.stdout) == (gpu.NO_DEVICE, "")
    assert done.stderr == "benchmarks gpu: expected a CUDA device, got none\n"
    assert not list(tmp_path.iterdir())


def run_script(root: Path, python: str | Path, results: Path) -> None:
    """Run the script on a machine without a CUDA device, and check its log and its exit status."""
    done = subprocess.run(  # noqa: S603 - our own command
        [root / "scripts/gpu.sh", results],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": str(python), "PYTEST_ADDOPTS": ""},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == gpu.NO_DEVICE, done.stdout
    assert lines[0].startswith("Python ")
    assert lines[0].endswith(", no CUDA device")
    assert sum(line.startswith("SKIPPED") for line in lines) == 1
    assert lines[-2:] == [
        "benchmarks gpu: expected a CUDA device, got none",
        "gpu.sh: the benchmark failed first, with the exit status 3",
    ]
    assert [path.name for path in results.iterdir()] == ["gpu.log"]
    assert (results / "gpu.log").read_text() == done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a CUDA device")
def test_the_script_runs_to_its_end_without_a_gpu(tmp_path: Path) -> None:
    """The script says what there is, skips the tests in one line, and its status and last line are the benchmark's."""
    run_script(ROOT, sys.executable, tmp_path)


def link_packages(site: Path, names: list[str]) -> None:
    """Link this environment's packages of these names, and what they require, into another's."""
    for name in names:  # which grows
        try:
            found = distribution(name)
        except PackageNotFoundError:  # what only other systems require
            continue
        for parts in {file.parts[:2] for file in found.files or () if file.parts[0] != ".."}:
            top = Path(found.locate_file(parts[0]))
            # Several distributions have parts of a folder that is not a package itself, as `google` is.
            shared = top.is_dir() and top.suffix != ".dist-info" and not (top / "__init__.py").exists()
            link = site.joinpath(*parts[: 1 + shared])
            link.parent.mkdir(exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(found.locate_file(link.relative_to(site)))
        required = [re.split(r"[^\w.-]", line)[0] for line in found.requires or () if "extra ==" not in line]
        names += [each for each in required if each not in names]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a CUDA device")
def test_the_script_needs_only_the_wheels_that_make_downloads(tmp_path: Path) -> None:
    """A Python with torch, grpcio, protobuf, NumPy and pip runs it, with what `make gpu-wheels` downloads."""
    root, python = tmp_path / "root", tmp_path / "venv/bin/python"
    root.mkdir()
    for name in ("Makefile", "benchmarks", "client", "constraints.txt", "pyproject.toml", "scripts", "server", "tests"):
        (root / name).symlink_to(ROOT / name)
    made = subprocess.run(  # noqa: S603 - our own command
        ["make", "gpu-wheels", f"PYTHON={sys.executable}"],  # noqa: S607 - found by PATH
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    if made.returncode and unreachable(made.stderr):
        pytest.skip("the wheels cannot be downloaded")
    assert made.returncode == 0, made.stderr
    venv.create(tmp_path / "venv", symlinks=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    link_packages(site, ["torch", "grpcio", "protobuf", "numpy", "pip"])
    run_script(root, python, tmp_path / "results")
