"""Processes that hang: a server ends itself, and a supervisor replaces its worker."""

from __future__ import annotations

import hashlib
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
import numpy as np
import psutil
import pytest

from poolrpc import MaxPool2d, PoolClient
from poolrpc_server.process import FAILED
from scripts.server_process import serving
from tests.integration.injection import injected
from tests.scrape import Scrape, get

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow  # a watchdog waits for seconds in each test

X = np.random.default_rng(7).standard_normal((2, 3, 8, 8), np.float32)
WATCHED = ("--watchdog-seconds", "3", "--drain-seconds", "0")

HOLD_INTERPRETER = """
    import ctypes, signal
    signal.signal(signal.SIGUSR1, lambda *_: ctypes.PyDLL(None).sleep(3600))
"""


def test_a_server_whose_serving_thread_hangs_ends_itself(tmp_path: Path) -> None:
    """The serving thread of gRPC waits for a file that is never written: the log says so, and the status is FAILED."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"tester {hashlib.sha256(b'token').hexdigest()}\n")
    env = {"TMPDIR": str(tmp_path)}
    with serving(*WATCHED, "--token-file", str(tokens), env=env) as server:
        tokens.unlink()
        os.mkfifo(tokens)
        with grpc.insecure_channel(server.address) as channel:
            method = channel.unary_unary("/poolrpc.v1.PoolService/GetServerInfo")
            call = method.future(b"", metadata=[("authorization", "Bearer token")], timeout=60)
            assert server.wait() == FAILED
            call.cancel()
    (line,) = server.lines("failed")
    assert line["level"] == "critical"
    assert line["reason"] == "the server has not answered its own calls for 3 seconds"
    assert "reloading_file.py" in server.lines("stacks")[0]["stacks"]
    assert not server.lines("text"), "all lines are JSON"


@pytest.mark.slow
def test_a_server_that_hangs_while_it_stops_ends_itself(tmp_path: Path) -> None:
    """After SIGTERM, what never ends holds the process for its grace and the watchdog's time at most."""
    program = """
    import time
    from poolrpc_server.telemetry.logs import CallLog
    CallLog.close = lambda _: time.sleep(3600)
"""
    with serving(*WATCHED, "--shutdown-grace", "0", env=injected(tmp_path, program)) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == FAILED
    assert server.lines("failed")[0]["reason"] == "the server did not stop within 4 seconds"


@pytest.mark.slow
def test_a_server_whose_interpreter_is_held_ends(tmp_path: Path) -> None:
    """A thread never releases the interpreter: no Python code runs any more, and the stacks are on stderr."""
    with serving(*WATCHED, env=injected(tmp_path, HOLD_INTERPRETER)) as server:
        server.process.send_signal(signal.SIGUSR1)
        assert server.wait() == 1  # faulthandler's
    assert any("Timeout (0:00:06)!" in each["text"] for each in server.lines("text"))
    assert any("sitecustomize.py" in each["text"] for each in server.lines("text"))


@pytest.mark.parametrize("number", ["SIGSTOP", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_worker_that_hangs_is_replaced(tmp_path: Path, number: str) -> None:
    """A worker that is stopped, or whose interpreter is held, is killed; the server stays ready, and answers on."""
    path = tmp_path / "pool.sock"
    flags = ("--workers", "2", "--metrics", "127.0.0.1:0", *WATCHED)
    env = injected(tmp_path, HOLD_INTERPRETER) | {"TMPDIR": str(tmp_path)}
    with serving(*flags, listen=f"unix:{path}", env=env) as server:
        hung = server.lines("worker serving")[0]
        os.kill(hung["pid"], signal.Signals[number])
        killed = server.wait_for("worker killed: it does not answer")[0]
        assert killed["worker"] == hung["worker"]
        assert path.readlink().name != f"{path.name}.{hung['worker']}", "new connections lead to the other one"
        assert get(server.start_line["metrics"], "readyz") == (200, "ready\n")
        ended = server.wait_for("worker ended")[0]
        assert (ended["worker"], ended["pid"], ended["signal"]) == (hung["worker"], hung["pid"], "SIGKILL")
        assert server.wait_for("worker serving", 3)[-1]["worker"] == hung["worker"]
        with PoolClient(server.address) as client:
            assert client.pool(X, MaxPool2d(2)).shape == (2, 3, 4, 4)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert {each.name for each in tmp_path.iterdir()} - {"__pycache__"} == {"sitecustomize.py"}


@pytest.mark.slow
def test_a_server_without_a_worker_that_answers_is_not_ready() -> None:
    """/readyz says so before the silent workers are killed, and /metrics still answers; new ones make it ready."""
    flags = ("--workers", "2", "--metrics", "127.0.0.1:0", "--drain-seconds", "0", "--watchdog-seconds", "6")
    with serving(*flags) as server:
        address = server.start_line["metrics"]
        for each in server.lines("worker serving"):
            os.kill(each["pid"], signal.SIGSTOP)
        pages = []
        while not server.lines("worker killed: it does not answer"):
            pages.append(get(address, "readyz"))
            assert get(address, "metrics")[0] == 200
            assert get(address, "livez")[0] == 200
        assert pages[0] == (200, "ready\n")
        assert pages[-1] == (503, "not ready\n")
        server.wait_for("worker serving", 4)
        assert get(address, "readyz") == (200, "ready\n")


@pytest.mark.slow
def test_a_supervisor_that_was_stopped_kills_no_worker() -> None:
    """The time in which the supervisor itself does not run, and reads nothing, is not the workers' silence."""
    with serving("--workers", "2", *WATCHED) as server:
        server.process.send_signal(signal.SIGSTOP)
        with suppress(psutil.TimeoutExpired):
            psutil.Process(server.process.pid).wait(6)
        server.process.send_signal(signal.SIGCONT)
        with suppress(psutil.TimeoutExpired):
            psutil.Process(server.process.pid).wait(1)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert not server.lines("worker killed: it does not answer")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_that_answers_goes_on(workers: str) -> None:
    """Nothing is ended while the server serves, drains and stops, whether its health is public or not."""
    flags = ("--workers", workers, "--watchdog-seconds", "2", "--drain-seconds", "3")
    with serving(*flags) as server:
        with PoolClient(server.address) as client:
            client.pool(X, MaxPool2d(2))
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert not server.lines("failed")
    assert not server.lines("worker killed: it does not answer")


def test_the_calls_of_the_watchdog_are_not_seen(tmp_path: Path) -> None:
    """They need no token, even if health checks do; they are not in the metrics, and in the log only at DEBUG."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"tester {hashlib.sha256(b'token').hexdigest()}\n")
    flags = ("--token-file", str(tokens), "--health-requires-token", "--log-level", "debug", *WATCHED)
    with serving(*flags, "--metrics", "127.0.0.1:0") as server:
        calls = server.wait_for("call", 3)
        assert {(each["method"], each["status"]) for each in calls} == {("/poolrpc.v1.Watchdog/Check", "OK")}
        assert {each["level"] for each in calls} == {"debug"}
        samples = Scrape(server.start_line["metrics"]).samples
    assert not [each for each in samples if "Watchdog" in str(each.labels)]
