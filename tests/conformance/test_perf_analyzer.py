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
# Every step is measured the fewest times that it can be, and is taken as it is, however unstable.
SHORT = ("--measurement-mode", "count_windows", "--measurement-request-count", "50", "-r", "3", "-s", "1000000")


@pytest.fixture(scope="session")
def perf_analyzer() -> Path:
    """Have the program."""
    install("scripts/install_perf_analyzer.sh", "perf_analyzer")
    return ROOT / ".debs/perf_analyzer/run"


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    """A server with a preset, that takes its clients' shared memory."""
    with serving(
        *("--model", "stem=MaxPool2d(3, stride=2, padding=1)", "--allow-client-shm", "--metrics", "127.0.0.1:0")
    ) as made:
        yield made


def run(program: Path, server: ServerProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Let it load the preset."""
    command = [program, "-m", "stem", "-i", "grpc", "-u", server.address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)  # noqa: S603 - its own


def answers(server: ServerProcess, method: str) -> dict[str, float]:
    """Give how many calls of a method ended with each status, as the server counts them."""
    with urllib.request.urlopen(f"http://{server.start_line['metrics']}/metrics", timeout=30) as page:
        families = text_string_to_metric_families(page.read().decode())
        return {
            each.labels["grpc_code"]: each.value
            for family in families
            for each in family.samples
            if each.name == "grpc_server_handled_total" and each.labels["grpc_method"] == method and each.value
        }


@pytest.mark.slow
def test_concurrency_1_to_8(perf_analyzer: Path, server: ServerProcess, tmp_path: Path) -> None:
    """It measures each concurrency to its end, says nothing of errors, and no call had another answer than OK."""
    report = tmp_path / "report.csv"
    done = run(perf_analyzer, server, *SHAPE, "--concurrency-range", "1:8", *SHORT, "-f", str(report))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    rows = list(csv.DictReader(report.read_text().splitlines()))
    assert sorted(int(row["Concurrency"]) for row in rows) == list(range(1, 9))
    assert all(float(row["Inferences/Second"]) > 0 for row in rows)
    counted = answers(server, "ModelInfer")
    assert set(counted) == {"OK"}
    assert counted["OK"] >= 8 * 50


@pytest.mark.parametrize(
    "way",
    [("--async",), ("--async", "--streaming"), ("--shared-memory", "system", "--output-shared-memory-size", "4096")],
    ids=["async", "stream", "shared_memory"],
)
def test_its_other_ways(perf_analyzer: Path, server: ServerProcess, way: tuple[str, ...]) -> None:
    """Calls that don't wait for each other, a stream, and shared memory give it every answer that it asks for."""
    done = run(perf_analyzer, server, *SHAPE, "--concurrency-range", "8", *FEW, *way)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Request count: 200" in done.stdout
    assert "had error" not in done.stdout + done.stderr


def test_it_says_what_the_server_refuses(perf_analyzer: Path, server: ServerProcess) -> None:
    """A shape that the preset can't take ends it with the server's own words: it does look at the answers."""
    done = run(perf_analyzer, server, "--shape", "input:3", "--concurrency-range", "2", *FEW)
    assert done.returncode
    assert "had error: input.shape: expected 4 dims" in done.stderr
    assert set(answers(server, "ModelInfer")) == {"InvalidArgument"}
