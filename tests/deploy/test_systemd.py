"""The unit for systemd and its settings, checked by systemd-analyze and by the server itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from poolrpc_server.config import Config
from poolrpc_server.config_sources import parse
from scripts.server_process import serving
from tests.installing import ROOT

UNIT = ROOT / "deploy/systemd/poolrpc.service"
SETTINGS = ROOT / "deploy/systemd/poolrpc.toml"

MAX_EXPOSURE = 20
"""The limit of systemd's score of how much of the machine a service can reach: 100 is everything."""


@pytest.fixture(scope="module")
def analyze() -> str:
    """Return the path of systemd-analyze."""
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("systemd-analyze is not installed")
    return found


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """Return the unit with the path of this environment's command, since systemd-analyze looks for it."""
    command = Path(sys.executable).with_name("poolrpc-server")
    text, count = re.subn("/opt/poolrpc/bin/poolrpc-server", str(command), UNIT.read_text())
    assert count == 1
    path = tmp_path / UNIT.name
    path.write_text(text)
    return path


def run(*command: str | Path) -> tuple[int, str]:
    """Run a command, and return its status and what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - systemd's own tool
    return done.returncode, done.stdout + done.stderr


def test_the_unit_is_valid(analyze: str, unit: Path) -> None:
    """systemd-analyze verify finds nothing to say about the unit, and does about one with a wrong line."""
    assert run(analyze, "verify", unit) == (0, "")
    unit.write_text(unit.read_text().replace("ProtectSystem=strict", "ProtectSystem=strictly"))
    assert "strictly" in run(analyze, "verify", unit)[1]


def test_the_unit_is_hardened(analyze: str, unit: Path) -> None:
    """The service can reach little of the machine, by systemd's score; without the hardening it would be more."""
    security = (analyze, "security", "--offline=true", f"--threshold={MAX_EXPOSURE}", "--no-pager")
    status, printed = run(*security, unit)
    assert status == 0, printed
    unit.write_text(unit.read_text().replace("SystemCallFilter=@system-service\n", "").replace("DynamicUser=yes\n", ""))
    assert run(*security, unit)[0] != 0


def test_the_unit_waits_for_the_drain() -> None:
    """The service is killed later than the default drain and grace take together, with some seconds to spare."""
    config = Config()
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert int(seconds) >= config.drain_seconds + config.shutdown_grace + 10


def test_the_settings_are_valid(tmp_path: Path) -> None:
    """The file of settings is valid as it is, and with each of its alternatives that are comments."""
    assert parse(["--config", str(SETTINGS)]) == replace(
        Config(),
        listen=("127.0.0.1:50051", "unix:/run/poolrpc/pool.sock"),
        metrics="127.0.0.1:9464",
        log_format="json",
    )
    lines = [line for line in SETTINGS.read_text().splitlines() if not line.startswith(("listen", "# "))]
    path = tmp_path / "poolrpc.toml"
    path.write_text("\n".join(line.removeprefix("#") for line in lines))
    config = parse(["--config", str(path)])
    assert (config.listen, config.threads, config.max_inflight_bytes) == (("0.0.0.0:50051",), 4, 2 * 2**30)
    assert config.token_file


def test_the_server_runs_with_the_settings(tmp_path: Path) -> None:
    """The server starts with the file, on addresses of this test."""
    path = tmp_path / "poolrpc.toml"
    addresses = (
        SETTINGS.read_text().replace(":50051", ":0").replace(":9464", ":0").replace("/run/poolrpc", str(tmp_path))
    )
    path.write_text(addresses)
    with serving("--config", str(path), listen=f"unix:{tmp_path / 'other.sock'}") as server:
        assert server.start_line["metrics"].startswith("127.0.0.1:")
