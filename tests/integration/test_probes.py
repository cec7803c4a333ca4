"""The probes of real servers: /livez and /readyz on an address of their own, and the health check of the images."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from poolrpc_server.cli import main
from poolrpc_server.process import FAILED
from scripts.server_process import serving
from tests.integration.certificates import Authority
from tests.scrape import get

if TYPE_CHECKING:
    from collections.abc import Sequence

HEALTHCHECK = Path(__file__).parents[2] / "server/healthcheck.sh"
PROBES = ("--probes", "127.0.0.1:0", "--drain-seconds", "0")


def healthcheck(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the health check of the images."""
    env = {**os.environ, **variables}
    return subprocess.run([HEALTHCHECK, *arguments], env=env, capture_output=True, text=True, check=False)  # noqa: S603 - ours


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_probes_need_neither_certificate_nor_token(tmp_path: Path, workers: str) -> None:
    """A server with mutual TLS, and tokens for health too, answers probes, which say when it stops; it has no metrics.

    The health check of the images is successful for as long as it is ready.
    """
    tokens = tmp_path / "tokens"
    tokens.write_text(f"tester {hashlib.sha256(b'token').hexdigest()}\n")
    authority = Authority(tmp_path / "authority")
    chain, key = map(str, authority.issue("localhost"))
    secrets = ("--tls-cert", chain, "--tls-key", key, "--tls-client-ca", str(authority.ca), "--token-file", str(tokens))
    flags = (*secrets, "--health-requires-token", "--workers", workers, "--probes", "127.0.0.1:0")
    with serving(*flags, "--drain-seconds", "60") as server:
        address = server.start_line["probes"]
        assert get(address, "livez") == (200, "ok\n")
        assert get(address, "readyz") == (200, "ready\n")
        assert get(address, "metrics")[0] == 404
        assert healthcheck(address).returncode == 0
        assert healthcheck(POOLRPC_PROBES=address).returncode == 0
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        assert healthcheck(address).returncode == 1
        assert get(address, "livez") == (200, "ok\n")
        assert get(address, "readyz") == (503, "not ready\n")


def test_the_health_check_fails_without_a_server() -> None:
    """Where nothing listens, and without an address, it fails and says why."""
    with serving(*PROBES) as server:
        address = server.start_line["probes"]
    failed = healthcheck(address)
    assert (failed.returncode, "Connection refused" in failed.stderr) == (1, True)
    missing = healthcheck(POOLRPC_PROBES="")
    assert missing.returncode
    assert "expected the address of --probes, host:port" in missing.stderr


def cpu_seconds(command: Sequence[str | Path]) -> float:
    """Return the CPU time of a successful command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)  # noqa: S603 - ours
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_health_check_costs_next_to_nothing() -> None:
    """It takes less than a twentieth of the CPU time of the command that also checks the server's health."""
    with serving(*PROBES) as server:
        address = server.start_line["probes"]
        ours = min(cpu_seconds([HEALTHCHECK, address]) for _ in range(5))
        command = [sys.executable, "-m", "poolrpc", "health", "--address", server.address]
        python = min(cpu_seconds(command) for _ in range(3))
    assert ours < python / 20, (ours, python)


@pytest.mark.slow
def test_a_server_that_hangs_is_not_ready(tmp_path: Path) -> None:
    """While gRPC's serving thread waits for a file that is never written, /readyz is 503; then the process is ended."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"tester {hashlib.sha256(b'token').hexdigest()}\n")
    with serving("--token-file", str(tokens), "--watchdog-seconds", "3", *PROBES) as server:
        address = server.start_line["probes"]
        assert get(address, "readyz")[0] == 200
        tokens.unlink()
        os.mkfifo(tokens)
        pages = []
        with grpc.insecure_channel(server.address) as channel:
            method = channel.unary_unary("/poolrpc.v1.PoolService/GetServerInfo")
            call = method.future(b"", metadata=[("authorization", "Bearer token")], timeout=60)
            try:
                while server.process.poll() is None:
                    pages.append((get(address, "readyz")[0], get(address, "livez")[0]))
            except (urllib.error.URLError, ConnectionError):
                pass  # the process is ending
            assert server.wait() == FAILED
            call.cancel()
    assert (503, 200) in pages


def test_an_address_of_probes_in_use_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with status 75 and one line that names the setting, also with several workers."""
    with serving(*PROBES) as server:
        address = server.start_line["probes"]
        for workers in ("1", "2"):
            assert main(["--listen", "127.0.0.1:0", "--probes", address, "--workers", workers]) == 75
            (line,) = capsys.readouterr().err.splitlines()
            assert f"probes: expected a free address, got {address!r}: " in line
