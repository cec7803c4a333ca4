"""The benchmark of GPUs, on the CPU: every part of it runs, so that a machine with a GPU only has to measure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

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


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a CUDA device")
def test_the_script_runs_to_its_end_without_a_gpu(tmp_path: Path) -> None:
    """The script says what there is, skips the tests in one line, and its status and last line are the benchmark's."""
    done = subprocess.run(  # noqa: S603 - our own command
        [ROOT / "scripts/gpu.sh", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable, "PYTEST_ADDOPTS": ""},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == gpu.NO_DEVICE
    assert lines[0].startswith("Python ")
    assert lines[0].endswith(", no CUDA device")
    assert sum(line.startswith("SKIPPED") for line in lines) == 1
    assert lines[-2:] == [
        "benchmarks gpu: expected a CUDA device, got none",
        "gpu.sh: the benchmark failed first, with the exit status 3",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.log"]
    assert (tmp_path / "gpu.log").read_text() == done.stdout
