"""A minute of the soak; benchmarks/soak.py describes it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_minute_of_faults(tmp_path: Path) -> None:
    """While clients, workers and connections are killed, every call ends in time and correctly."""
    rows = tmp_path / "soak.json"
    command = [sys.executable, "-m", "benchmarks", "soak", "--minutes", "1", "--json", str(rows)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (row,) = json.loads(rows.read_text())
    assert row["broken"] == row["wrong"] == []
    assert min(row["workers_killed"], row["clients_killed"], row["connections_cut"]) > 0
    assert {"unary", "stream", "local"} <= row["transports"].keys()
    assert row["came"]["good: right"] > row["came"].get("good: unavailable", 0)
