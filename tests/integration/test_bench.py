"""The command `poolrpc bench` against a real server: its figures, what it counts, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest

import poolrpc_server
from poolrpc.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Bench = Callable[..., tuple[int, dict[str, Any]]]
    Serve = Callable[..., str]

SMALL = ("--shape", "1x3x16x16", "--layer", "MaxPool2d(2)")
BRIEF = ("--duration", "1.5", "--warmup", "0.1")
"""Long enough for some answers also on a busy machine: without any, the status is 1."""
SLOW_SECONDS = 0.03


@pytest.fixture
def bench(address: str, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Return a function that runs `poolrpc bench` with --json, and returns its status and its figures."""

    def command(*arguments: object, address: str = address) -> tuple[int, dict[str, Any]]:
        status = main(["bench", *map(str, arguments), "--address", address, "--json"])
        output = capsys.readouterr()
        assert output.err == ""
        return status, json.loads(output.out)

    return command


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that starts a server in this process, and returns its address."""
    servers: list[poolrpc_server.Server] = []

    def start(**settings: Any) -> str:
        servers.append(poolrpc_server.Server(poolrpc_server.Config(listen=("127.0.0.1:0",), **settings)))
        servers[-1].start()
        return str(servers[-1].addresses[0])

    yield start
    for server in servers:
        server.stop(grace=0)


@pytest.fixture
def slow(patch_operation: Callable[..., None]) -> None:
    """Let maxima take SLOW_SECONDS in the servers of this process."""

    def delayed(run: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*arguments: Any) -> Any:
            time.sleep(SLOW_SECONDS)  # the work of a call, for which nothing waits
            return run(*arguments)

        return wait

    patch_operation("max_pool", delayed)


@pytest.mark.parametrize("load", [["--concurrency", "4"], ["--rate", "100"]], ids=["closed", "open"])
def test_figures_agree_with_each_other(bench: Bench, load: list[str]) -> None:
    """Calls, bytes, percentiles, requests and the histogram are figures of the same calls."""
    mix = ("--shape", "2x3x16x16", "--shape", "1x3x32x32", "--layer", "MaxPool2d(2)", "--layer", "AvgPool2d(2)")
    status, data = bench(*mix, *load, "--processes", "2", *BRIEF)
    assert (status, data["failed"], data["unsent"], data["errors"]) == (0, 0, 0, [])
    assert data["answered"] > 0
    assert data["seconds"] >= 0.3
    assert data["calls_per_second"] == pytest.approx(data["answered"] / data["seconds"])
    requests = data["requests"]
    assert [each["input_bytes"] for each in requests] == [4 * 2 * 3 * 16 * 16, 4 * 3 * 32 * 32]
    assert [each["output_bytes"] for each in requests] == [each["input_bytes"] // 2 for each in requests]
    assert all(each["transport"] == "unary" and each["answered"] for each in requests)
    for way, size in (("sent", "input_bytes"), ("received", "output_bytes")):
        total = sum(each["answered"] * each[size] for each in requests)
        assert data[f"{way}_bytes_per_second"] == pytest.approx(total / data["seconds"])
    assert sum(each["answered"] for each in requests) == data["answered"]
    assert sum(each["calls"] for each in data["histogram"]) == data["answered"]
    latency = list(data["latency_ms"].values())
    assert latency == sorted(latency)
    assert latency[-1] == max(each["latency_ms"]["max"] for each in requests)
    assert data["histogram"][-1]["to_ms"] == pytest.approx(latency[-1])
    if "--rate" in load:
        assert data["answered"] == 150
        assert data["late_ms"]["max"] <= latency[-1]


@pytest.mark.usefixtures("slow")
def test_an_open_loop_counts_the_time_for_which_calls_wait(bench: Bench, serve: Serve) -> None:
    """With a rate above what a server does, the latency is from the time when a call was due, and the rest is named."""
    load = ("--rate", "200", "--concurrency", "1", "--duration", "0.5", "--warmup", "0")
    status, data = bench(*SMALL, *load, address=serve())
    assert status == 0
    assert data["answered"] + data["unsent"] == 100
    assert data["answered"] <= 0.5 / SLOW_SECONDS + 2
    # One call at a time: the last ones were due long before they were sent.
    assert data["late_ms"]["max"] > 5 * SLOW_SECONDS * 1000
    assert data["latency_ms"]["max"] >= data["late_ms"]["max"] + SLOW_SECONDS * 1000
    assert data["latency_ms"]["p50"] > 2 * SLOW_SECONDS * 1000


@pytest.mark.usefixtures("slow")
def test_the_warm_up_is_not_counted(bench: Bench, serve: Serve) -> None:
    """Neither the calls of the warm-up nor what they left undone are in the figures."""
    address = serve()
    load = ("--rate", "100", "--concurrency", "1", "--duration", "0.2", "--warmup", "0.6")
    _, data = bench(*SMALL, *load, address=address)
    assert data["answered"] + data["unsent"] == 20
    _, data = bench(*SMALL, "--duration", "0.3", "--warmup", "0.3", address=address)
    assert 0 < data["answered"] <= 0.3 / SLOW_SECONDS + 1


@pytest.mark.usefixtures("slow")
def test_errors_are_counted_by_class(bench: Bench, serve: Serve) -> None:
    """Calls that the server rejects are counted by their error, are not sent again, and have no latency."""
    status, data = bench(*SMALL, "--concurrency", "8", *BRIEF, address=serve(threads=1, max_queue=1))
    assert status == 0
    assert [each["kind"].split()[0] for each in data["errors"]] == ["UnavailableError"]
    assert sum(each["count"] for each in data["errors"]) == data["failed"] > 0
    assert "queue" in data["errors"][0]["message"]
    assert sum(each["calls"] for each in data["histogram"]) == data["answered"] > 0


def test_a_server_that_goes_away_is_counted(bench: Bench, patch_operation: Callable[..., None]) -> None:
    """A server that ends during the load makes the rest of the calls fail, and the load goes on to its end."""
    server = poolrpc_server.Server(poolrpc_server.Config(listen=("127.0.0.1:0",)))
    server.start()
    calls: list[None] = []
    enough = threading.Event()

    def counted(run: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            calls.append(None)
            if len(calls) == 3:  # after the first call of all, and that of the process
                enough.set()
            return run(*arguments)

        return count

    patch_operation("max_pool", counted)
    stopping = threading.Thread(target=lambda: enough.wait(60) and server.stop(grace=0))
    stopping.start()
    _, data = bench(*SMALL, "--duration", "1", "--warmup", "0", address=server.addresses[0])
    stopping.join()
    assert {each["kind"].split()[0] for each in data["errors"]} <= {"UnavailableError", "CancelledError"}
    assert data["failed"] > 0
    assert data["seconds"] >= 1


def test_answers_are_checked(bench: Bench, serve: Serve, patch_operation: Callable[..., None]) -> None:
    """With --check, an answer whose bits are not those of the first one is an error, and the status is 1."""
    status, data = bench(*SMALL, *BRIEF, "--check")
    assert (status, data["failed"], data["load"]["checked"]) == (0, 0, True)
    calls: list[None] = []

    def changing(run: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any) -> Any:
            calls.append(None)
            output, indices = run(*arguments)
            return output + len(calls) % 2, indices

        return changed

    patch_operation("max_pool", changing)
    status, data = bench(*SMALL, *BRIEF, "--check", address=serve())
    assert status == 1
    assert [each["kind"] for each in data["errors"]] == ["different answer"]
    assert 0 < data["failed"] < data["failed"] + data["answered"]


@pytest.mark.parametrize("transport", ["unary", "stream", "arena"])
def test_every_transport(bench: Bench, unix_address: str, transport: str) -> None:
    """The transport is the one that was asked for."""
    status, data = bench(*SMALL, *BRIEF, "--transport", transport, "--check", address=unix_address)
    assert (status, data["failed"]) == (0, 0)
    assert [each["transport"] for each in data["requests"]] == [transport]


def test_the_environments_token_is_sent(
    bench: Bench, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process authenticates itself as the other commands do, by the environment."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"bench {sha256(b'secret').hexdigest()}\n")
    monkeypatch.setenv("POOLRPC_TOKEN", "secret")
    status, data = bench(*SMALL, *BRIEF, address=serve(token_file=str(tokens)))
    assert (status, data["failed"]) == (0, 0)


def test_the_text_and_the_files(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text has the figures that --json writes to its file, and --plot draws them as SVG."""
    figures, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    options = ("--address", address, "--json", str(figures), "--plot", str(plot), "--check")
    assert main(["bench", *SMALL, *BRIEF, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    data = json.loads(figures.read_text())
    assert lines[0] == "MaxPool2d(2) of float32 1x3x16x16: 0.003 MB, answered with 0.001 MB, unary"
    assert lines[1] == "calls: 1 at a time, 1.5 s, 1 connection, 1 process"
    assert lines[3].startswith(f"answered   {data['answered']:,}, ")
    assert lines[3].endswith(", all as the first")
    assert [line.split()[0] for line in lines[4:8]] == ["sent", "received", "latency", "client"]
    bars = [line for line in lines if "#" in line]
    assert sum(int(line.split()[-1].replace(",", "")) for line in bars) == data["answered"]
    lines_drawn = ET.fromstring(plot.read_text()).findall("{*}polyline")  # noqa: S314 - our own
    assert len([line for line in lines_drawn if line.get("stroke-width") == "2"]) == 4


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_prints_what_has_been_measured(
    serve: Serve, tmp_path: Path, patch_operation: Callable[..., None], *, as_json: bool
) -> None:
    """SIGINT to the whole group of processes ends the load; the figures so far are printed, and the status is 130."""
    enough = threading.Semaphore(0)

    def counted(run: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            enough.release()
            return run(*arguments)

        return count

    patch_operation("max_pool", counted)
    command = [sys.executable, "-m", "poolrpc", "bench", *SMALL, "--address", serve(), "--duration", "600"]
    with subprocess.Popen(  # noqa: S603 - our own command
        [*command, "--processes", "2", "--warmup", "0", *(["--json"] if as_json else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        process_group=0,
    ) as process:
        try:
            # The first call of all, and that of each process, are not counted.
            assert all(enough.acquire(timeout=60) for _ in range(20))
        finally:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "")
    if as_json:
        data = json.loads(output)
        assert data["answered"] > 0
        assert data["failed"] == 0
        assert data["seconds"] < 600
    else:
        assert "\nanswered   " in output


@pytest.mark.parametrize(
    ("shape", "plot", "words"),
    [("4", "new.svg", "expected 4 dims"), ("1x1x4x4", "new.json", "expected another file than that of --plot")],
)
def test_a_load_that_fails_leaves_no_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shape: str, plot: str, words: str
) -> None:
    """Files are made when there is something to write to them, and each has its own."""
    files = ("--json", str(tmp_path / "new.json"), "--plot", str(tmp_path / plot))
    assert main(["bench", "--address", "127.0.0.1:1", "--shape", shape, "--layer", "MaxPool2d(2)", *files]) == 1
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "uint8", "--layer", "AvgPool2d(2)", "--shape", "1x1x4x4"], "AvgPool2d takes float16"),
        ([*SMALL, "--transport", "arena"], "expected the address of a unix socket"),
        ([*SMALL, "--plot", "/nowhere/plot.svg"], "No such file or directory"),
        ([*SMALL, "--json", "/nowhere/data.json"], "No such file or directory"),
    ],
    ids=["dtype", "arena", "plot", "json"],
)
def test_what_the_server_or_the_disk_rejects_is_one_line(
    address: str, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """What can't work ends the command before the load, with one line and status 1."""
    assert main(["bench", *arguments, "--address", address, "--duration", "600"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert words in output.err
    assert output.err.count("\n") == 1
