"""The log of real servers: one shape for every line, the caller's address, and the id of its trace."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

import poolrpc
from poolrpc import MaxPool2d, PoolClient
from scripts.server_process import serving
from tests.integration.certificates import Authority
from tests.integration.injection import injected

if TYPE_CHECKING:
    from pathlib import Path

TRACE = "0af7651916cd43dd8448eb211c80319c"
X = np.ones((1, 1, 4, 4), np.float32)


def status_line(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command with wrong settings."""
    command = [sys.executable, "-m", "poolrpc_server", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)  # noqa: S603 - ours


def test_calls_have_the_callers_address_and_trace(tmp_path: Path) -> None:
    """Also those that are rejected for their token; the error is not quoted again. Other metadata are no trace."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"tester {hashlib.sha256(b'token').hexdigest()}\n")
    with serving("--token-file", str(tokens)) as server:
        for traceparent in (f"00-{TRACE}-b7ad6b7169203331-01", "00-x-y-01"):
            with grpc.insecure_channel(server.address) as channel, suppress(grpc.RpcError):
                method = channel.unary_unary("/poolrpc.v1.PoolService/Pool")
                method(b"", metadata=[("traceparent", traceparent)], timeout=60)
        with PoolClient(server.address, token="token") as client:  # noqa: S106 - the test's
            client.pool(X, MaxPool2d(2))
        rejected, other, served = server.wait_for("call", 3)
    assert rejected["status"] == "UNAUTHENTICATED"
    assert rejected["error"].startswith("expected a valid token, as ")
    assert {each["peer"].rpartition(":")[0] for each in (rejected, other, served)} == {"127.0.0.1"}
    assert (rejected["trace_id"], "trace_id" in other, "trace_id" in served) == (TRACE, False, False)


def test_an_unexpected_error_names_the_caller(tmp_path: Path) -> None:
    """The line that explains an INTERNAL has the caller's address and trace too."""
    program = "    from poolrpc_server.compute.engine import Engine\n    Engine.execute = lambda *_: 1 / 0\n"
    metadata = [("traceparent", f"00-{TRACE}-b7ad6b7169203331-01")]
    with serving(env=injected(tmp_path, program)) as server, PoolClient(server.address) as client:
        with pytest.raises(poolrpc.InternalError):
            client.pool(X, MaxPool2d(2), metadata=metadata)
        (call,), (error,) = server.wait_for("call"), server.wait_for("unexpected error")
    assert "ZeroDivisionError" in error["exception"]
    assert (error["error_id"], error["peer"], error["trace_id"]) == (call["error_id"], call["peer"], TRACE)


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_every_line_is_json(tmp_path: Path, workers: str) -> None:
    """Failed handshakes, warnings of other packages and threads that fail leave nothing but JSON."""
    program = """
    import faulthandler, logging, threading, warnings
    start = faulthandler.dump_traceback_later
    def fail(*arguments, **options):
        faulthandler.dump_traceback_later = start
        warnings.warn("careless", stacklevel=1)
        logging.getLogger("grpc._server").error("their error")
        thread = threading.Thread(target=lambda: 1 / 0, name="broken")
        thread.start()
        thread.join()
        start(*arguments, **options)
    faulthandler.dump_traceback_later = fail  # the watchdog calls it when the server serves
"""
    chain, key = Authority(tmp_path / "authority").issue("localhost")
    flags = ("--tls-cert", str(chain), "--tls-key", str(key), "--drain-seconds", "0", "--workers", workers)
    with serving(*flags, env=injected(tmp_path, program)) as server:
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as plaintext:
            plaintext.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            with suppress(OSError):
                while plaintext.recv(4096):
                    pass
        server.process.terminate()
        assert server.wait() == 0
    assert not server.lines("text")
    assert all({"event", "level", "timestamp"} <= line.keys() for line in server.log)
    assert any("careless" in each["event"] for each in server.log)
    assert server.lines("their error")
    assert {each["thread_name"] for each in server.lines("unexpected error")} == {"broken"}


@pytest.mark.parametrize(
    ("arguments", "variables", "reason"),
    [
        (("--log-format", "json", "--listen", "1"), {}, "listen: expected host:port or unix:PATH, got '1'"),
        (("--log-format=json", "--threads", "x"), {}, "argument --threads: invalid int value: 'x'"),
        (("--nothing",), {"POOLRPC_LOG_FORMAT": "json"}, "unrecognized arguments: --nothing"),
        (("--config", "FILE"), {}, "FILE: expected the name of a flag, got 'nothing'"),
        (("--log-format", "json", "--listen"), {}, "argument --listen: expected one argument"),
    ],
)
def test_a_wrong_setting_is_reported_as_json(
    tmp_path: Path, arguments: tuple[str, ...], variables: dict[str, str], reason: str
) -> None:
    """If the log is to be JSON, whatever else is wrong, the error is a line of JSON; the exit status is 2."""
    file = tmp_path / "settings.toml"
    file.write_text("log-format = 'json'\nnothing = 1\n")
    done = status_line(*(each.replace("FILE", str(file)) for each in arguments), **os.environ | variables)
    assert done.returncode == 2
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (line["event"], line["level"]) == ("failed", "critical")
    assert line["reason"] == reason.replace("FILE", str(file))


def test_a_wrong_setting_is_reported_as_text() -> None:
    """By default the error is text, as that of any command."""
    done = status_line("--listen", "1", **os.environ)
    assert (done.returncode, done.stderr) == (2, "poolrpc-server: listen: expected host:port or unix:PATH, got '1'\n")
