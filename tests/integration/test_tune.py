"""The command `poolrpc tune` with real servers: what it measured, and the flags that it prints."""

from __future__ import annotations

import importlib.util
import json
import shlex
from typing import TYPE_CHECKING

import pytest

from poolrpc.cli import main
from poolrpc.client import PoolClient
from poolrpc.command.local_server import local_server, without_settings
from poolrpc.errors import PoolError
from scripts.server_process import serving

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ("--shape", "1x3x16x16", "--layer", "MaxPool2d(2)")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "load",
    [["--concurrency", "4"], ["--rate", "50", "--transport", "arena"], ["--rate", "50", "--transport", "local"]],
    ids=["closed", "open", "local"],
)
def test_the_printed_flags_start_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, load: list[str]
) -> None:
    """The defaults are measured twice in each round, other flags once, and what is printed starts a server as it is."""
    # Settings of the user's own server and client, which are not those of the servers that are measured.
    monkeypatch.setenv("POOLRPC_CA", "/nowhere")
    monkeypatch.setenv("POOLRPC_TLS_CERT", "/nowhere")
    figures = tmp_path / "tune.json"
    options = ("--p99", "5", "--duration", "25", "--json", str(figures))
    assert main(["tune", *SMALL, *load, *options]) == 0
    output = capsys.readouterr()
    data = json.loads(figures.read_text())
    trials = data["trials"]
    assert trials[0]["flags"] == []
    assert trials[0]["runs"] == 10
    assert {each["runs"] for each in trials[1:]} <= {0, 1, 5}
    assert [each for each in trials if each["runs"] == 5]
    assert all(each["calls_per_second"] > 0 and each["failed"] == 0 for each in trials if each["runs"])
    assert data["met"]
    assert data["gain"] == 1 or data["gain"] >= 1.05
    # One line for the first run of each, and one for each run of the rounds.
    runs = [each["runs"] for each in trials]
    assert output.err.count("calls per second, p99") == sum(each + (each in {5, 10}) for each in runs)

    lines = output.out.splitlines()
    command = next(line for line in lines if line.startswith("poolrpc-server"))
    assert command == data["command"]
    monkeypatch.delenv("POOLRPC_CA")
    monkeypatch.delenv("POOLRPC_TLS_CERT")
    with serving(*shlex.split(command)[1:]) as server, PoolClient(server.address) as client:
        assert client.health() == "SERVING"


def test_a_server_that_does_not_start_says_why() -> None:
    """Flags with which a server does not start are an error with its last words."""
    with (
        without_settings(),
        pytest.raises(PoolError, match=r"starts with --threads -1, got status 2: .*threads: expected at least 0"),
        local_server(("--threads", "-1"), unix=False),
    ):
        pass


def test_without_the_server_package_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with the client only, the command says what to install."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "poolrpc_server" else find_spec(name, *rest)
    )
    assert main(["tune", *SMALL, "--concurrency", "1", "--p99", "1"]) == 1
    assert capsys.readouterr().err == (
        "poolrpc: expected the server on this machine, got the client only; pip install 'poolrpc[server]'\n"
    )


def test_a_file_that_cannot_be_written_is_an_error_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A file for the figures that can't be written ends the command before anything is measured."""
    assert main(["tune", *SMALL, "--rate", "50", "--p99", "1", "--json", "/nowhere/x.json"]) == 1
    assert capsys.readouterr().err == "poolrpc: [Errno 2] No such file or directory: '/nowhere/x.json'\n"
