"""Triton's load generator perf_analyzer, installed by scripts/install_perf_analyzer.sh, against a preset."""

from __future__ import annotations

import csv
import subprocess
import urllib.request
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scripts.server_process import ServerProcess, serving
from tests.installing import ROOT, install

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(600)]
SHAPE = "--shape", "input:1,3,32,32"
FEW = "--request-count", "200"
# The fewest measurements of each step that perf_analyzer permits, accepted even if they vary widely.
SHORT = ("--measurement-mode", "count_windows", "--measurement-request-count", "50", "-r", "3", "-s", "1000000")


@pytest.fixture(scope="session")
def perf_analyzer() -> Path:
    """Install perf_analyzer and return its path."""
    install("scripts/install_perf_analyzer.sh", "perf_analyzer")
    return ROOT / ".debs/perf_analyzer/run"


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    """A server with a preset that accepts clients' shared memory."""
    with serving(
        *("--model", "stem=MaxPool2d(3, stride=2, padding=1)", "--allow-client-shm", "--metrics", "127.0.0.1:0")
    ) as process:
        yield process


def run(program: Path, server: ServerProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run perf_analyzer on the preset."""
    command = [program, "-m", "stem", "-i", "grpc", "-u", server.address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)  # noqa: S603 - a program that we installed


def calls_by_status(server: ServerProcess, method: str) -> dict[str, float]:
    """Return the number of calls of a method for each status, from the server's metrics."""
    with urllib.request.urlopen(f"http://{server.start_line['metrics']}/metrics", timeout=30) as page:
        families = text_string_to_metric_families(page.read().decode())
        return {
            sample.labels["grpc_code"]: sample.value
            for family in families
            for sample in family.samples
            if sample.name == "grpc_server_handled_total" and sample.labels["grpc_method"] == method and sample.value
        }


@pytest.mark.slow
def test_concurrency_1_to_8(perf_analyzer: Path, server: ServerProcess, tmp_path: Path) -> None:
    """perf_analyzer measures every concurrency and reports no errors, and every call ended with OK."""
    report = tmp_path / "report.csv"
    done = run(perf_analyzer, server, *SHAPE, "--concurrency-range", "1:8", *SHORT, "-f", str(report))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    rows = list(csv.DictReader(report.read_text().splitlines()))
    assert sorted(int(row["Concurrency"]) for row in rows) == list(range(1, 9))
    assert all(float(row["Inferences/Second"]) > 0 for row in rows)
    counts = calls_by_status(server, "ModelInfer")
    assert set(counts) == {"OK"}
    assert counts["OK"] >= 8 * 50


@pytest.mark.parametrize(
    "flags",
    [("--async",), ("--async", "--streaming"), ("--shared-memory", "system", "--output-shared-memory-size", "4096")],
    ids=["async", "stream", "shared_memory"],
)
def test_other_modes(perf_analyzer: Path, server: ServerProcess, flags: tuple[str, ...]) -> None:
    """All calls succeed when they are asynchronous, use a stream, or use shared memory."""
    done = run(perf_analyzer, server, *SHAPE, "--concurrency-range", "8", *FEW, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Request count: 200" in done.stdout
    assert "had error" not in done.stdout + done.stderr


def test_errors_of_the_server_are_reported(perf_analyzer: Path, server: ServerProcess) -> None:
    """A shape that is invalid for the preset ends perf_analyzer with the server's message: it does check responses."""
    done = run(perf_analyzer, server, "--shape", "input:3", "--concurrency-range", "2", *FEW)
    assert done.returncode
    assert "had error: input.shape: expected 4 dims" in done.stderr
    assert set(calls_by_status(server, "ModelInfer")) == {"InvalidArgument"}
