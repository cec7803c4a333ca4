"""The server process: its start line, signals, log, addresses, health, reflection and limits."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import grpc
import numpy as np
import psutil
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import poolrpc
import poolrpc_server
from poolrpc import AdaptiveAvgPool2d, AvgPool2d, GlobalPool2d, LPPool2d, MaxPool2d, PoolClient
from poolrpc.v1 import pool_pb2, pool_pb2_grpc
from poolrpc_server.cli import main
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from poolrpc._transport.options import Transport
    from tests.integration.conftest import Gate

X = np.random.default_rng(7).standard_normal((2, 3, 8, 10), np.float32)
HEAVY = np.zeros((1, 16, 512, 512), np.float32), LPPool2d(3.5, 11, stride=1)
"""Some seconds of work for one thread."""


def health_of(address: str) -> Iterator[int]:
    """Watch the server's health, and yield each status."""
    with grpc.insecure_channel(address) as channel:
        for response in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
            yield response.status


def test_the_start_line() -> None:
    """The first line has address, device, torch, threads and every limit; SIGTERM ends the server with status 0."""
    with serving("--threads", "2", "--max-work", "12345", "--drain-seconds", "0") as server:
        assert server.start_line["addresses"] == [server.address]
        assert server.start_line["device"] == "cpu"
        assert server.start_line["threads"] == 2
        assert server.start_line["max_work"] == 12345
        assert {"torch", "version", "max_message_bytes", "max_output_bytes", "max_inflight_bytes"} < set(
            server.start_line
        )
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert [each["event"] for each in server.log[-2:]] == ["stopping", "stopped"]


def test_sigterm_drains() -> None:
    """After SIGTERM health is NOT_SERVING, calls are still answered, and a call in flight receives its result."""
    with serving("--drain-seconds", "3", "--threads", "2") as server, PoolClient(server.address) as client:
        watched = health_of(server.address)
        assert next(watched) == health_pb2.HealthCheckResponse.SERVING
        with ThreadPoolExecutor(1) as threads:
            in_flight = threads.submit(client.pool, *HEAVY)
            client.pool(X, MaxPool2d(2))
            server.process.send_signal(signal.SIGTERM)
            assert next(watched) == health_pb2.HealthCheckResponse.NOT_SERVING
            assert client.pool(X, MaxPool2d(2)).shape == (2, 3, 4, 5)
            assert in_flight.result().shape == (1, 16, 502, 502)
        watched.close()
        assert server.wait() == 0


def test_a_second_signal_ends_the_server_at_once() -> None:
    """A second SIGTERM does not wait for the drain."""
    with serving("--drain-seconds", "3600") as server:
        watched = health_of(server.address)
        next(watched)
        server.process.send_signal(signal.SIGTERM)
        next(watched)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(30) == -signal.SIGTERM
        watched.close()


def test_each_call_is_a_line_in_the_log() -> None:
    """A call's line has method, layers, shape, dtype, status and duration, an error's reason, and no contents."""
    with serving("--drain-seconds", "0") as server, PoolClient(server.address) as client:
        client.pool(np.full((1, 1, 2, 2), 1234567.0, np.float32), MaxPool2d(2))
        with pytest.raises(poolrpc.LimitExceededError):
            client.pool(X, AdaptiveAvgPool2d(65535))
        client.output_shape(X.shape, MaxPool2d(2))
        client.health()
        server.process.send_signal(signal.SIGTERM)
        server.wait()
    calls = [each for each in server.log if each["event"] == "call"]
    assert [each["method"].rpartition("/")[2] for each in calls] == ["Pool", "Pool", "InferShape"]
    first, second, _ = calls
    assert (first["status"], first["dtype"], first["layers"]) == ("OK", "float32", "((MaxPool2d(2),),)")
    assert (first["shape"], first["output"]) == ([1, 1, 2, 2], [[1, 1, 1, 1]])
    assert first["ms"] > 0
    assert (second["status"], second["reason"]) == ("RESOURCE_EXHAUSTED", "OUTPUT_TOO_LARGE")
    assert "bytes of AdaptiveAvgPool2d's output" in second["error"]
    assert "output" not in second
    assert "1234567" not in json.dumps(server.log)


def test_the_log_is_text_by_default() -> None:
    """Without --log-format json a line is text; the start line has what a person needs, and no limits."""
    command = [sys.executable, "-c", "import sys; from poolrpc_server.cli import main; sys.exit(main())"]
    with subprocess.Popen(  # noqa: S603 - our own command
        [*command, "--listen", "127.0.0.1:0", "--drain-seconds", "0"], stderr=subprocess.PIPE, text=True
    ) as process:
        lines = [process.stderr.readline(), process.stderr.readline()]
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert "] starting version=" in lines[0]
    assert re.search(r"\] serving addresses=127\.0\.0\.1:\d+ device=cpu threads=\d+ ", lines[1])
    assert "max_" not in lines[1]


def test_the_facts_of_the_start_line_are_logged_at_debug() -> None:
    """With --log-level debug a second line of the text has every fact, such as the limits."""
    command = [sys.executable, "-m", "poolrpc_server", "--listen", "127.0.0.1:0", "--log-level", "debug"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own command
        line = next(line for line in process.stderr if "] settings " in line)
        process.kill()
    assert re.search(r" max_work=4000000000 ", line)


def test_the_command_works_without_standard_streams() -> None:
    """With closed standard streams the server serves, and no socket of it has the number of one of them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-m", "poolrpc_server"]
    with subprocess.Popen([*command, "--listen", address, "--drain-seconds", "0"]) as process:  # noqa: S603 - ours
        try:
            with grpc.insecure_channel(address) as channel, PoolClient(address) as client:
                grpc.channel_ready_future(channel).result(60)
                assert client.pool(X, MaxPool2d(2)).shape == (2, 3, 4, 5)
            for descriptor in range(3):
                assert str(Path(f"/proc/{process.pid}/fd/{descriptor}").readlink()) == os.devnull
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    "flags", [["--threads", "-1"], ["--nothing"], ["--config", "/none"], ["--listen", "0.0.0.0:1"]]
)
def test_a_wrong_setting_without_stderr_is_status_2(flags: list[str]) -> None:
    """With a closed stderr, a wrong setting ends the command with its status, and stdout gets nothing."""
    command = ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "poolrpc_server", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)  # noqa: S603 - our own command
    assert (done.returncode, done.stdout) == (2, b"")


def test_an_unknown_variable_is_a_warning() -> None:
    """A POOLRPC_ variable that is not a setting is named in a warning, with the closest setting."""
    with serving(env={"POOLRPC_TREADS": "1", "POOLRPC_THREADS": "2"}) as server:
        assert server.start_line["threads"] == 2
    (warning,) = server.lines("unknown environment variable")
    assert (warning["level"], warning["variable"]) == ("warning", "POOLRPC_TREADS")
    assert warning["hint"] == "did you mean POOLRPC_THREADS?"


def test_a_configuration_file_is_read(tmp_path: Path) -> None:
    """The server has the settings of the file that --config names."""
    path = tmp_path / "poolrpc.toml"
    path.write_text('threads = 3\nmax-output-bytes = "1KiB"\nmodel = ["a=MaxPool2d(2)", "b=AvgPool2d(2)"]\n')
    with serving("--config", str(path), "--workers", "1") as server:
        assert (server.start_line["threads"], server.start_line["max_output_bytes"]) == (3, 1024)
        assert server.start_line["models"] == ["pool", "a", "b"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--listen", "0.0.0.0:0"], "for a public address"),
        (["--listen", "nonsense"], "expected host:port or unix:PATH"),
        (["--threads", "-1"], "threads: expected at least 0"),
        (["--listen", "127.0.0.1:0", "--device", "cuda:99"], "device: expected auto or a device of this machine"),
        (["--log-format", "xml"], "expected one of text, json"),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_2(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong setting ends the command with one line that says what was expected."""
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert words in error.splitlines()[-1]
    assert error.count("poolrpc-server: ") == 1


IN_USE = """
import sys
from poolrpc_server.cli import main
status = main(sys.argv[1:])
sys.exit(f"{status}, with torch" if "torch" in sys.modules else status)
"""


@pytest.mark.parametrize(("flag", "kind"), [("--listen", "tcp"), ("--listen", "unix"), ("--metrics", "tcp")])
def test_an_address_in_use_is_reported_before_torch_is_imported(
    flag: str, kind: str, address: str, unix_address: str
) -> None:
    """A taken port or path ends the command with one line, without the seconds that torch takes to import."""
    taken = address if kind == "tcp" else unix_address
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-c", IN_USE, "--listen", "127.0.0.1:0", flag, taken],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == f"poolrpc-server: {flag[2:]}: expected a free address, got {taken!r}: it is in use\n"


def test_an_address_in_use_is_rejected(address: str) -> None:
    """Two servers do not share a port."""
    with pytest.raises(poolrpc_server.ConfigError, match="expected a free address"):
        poolrpc_server.Server(poolrpc_server.Config(listen=(address,)))


def test_several_addresses(tmp_path: Path) -> None:
    """--listen may be repeated, with ports and sockets."""
    path = tmp_path / "pool.sock"
    with serving("--listen", f"unix:{path}") as server:
        addresses = server.start_line["addresses"]
        assert addresses[1] == f"unix:{path}"
        for address in addresses:
            with PoolClient(address) as client:
                assert client.pool(X, MaxPool2d(2)).shape == (2, 3, 4, 5)


def test_environment_variables_are_settings() -> None:
    """A POOLRPC_ variable is used unless there is a flag."""
    with serving("--threads", "1", env={"POOLRPC_THREADS": "7", "POOLRPC_MAX_OUTPUT_BYTES": "100"}) as server:
        assert (server.start_line["threads"], server.start_line["max_output_bytes"]) == (1, 100)
        with PoolClient(server.address) as client, pytest.raises(poolrpc.LimitExceededError) as caught:
            client.pool(X, MaxPool2d(2))
    assert caught.value.reason == "OUTPUT_TOO_LARGE"
    assert caught.value.metadata == {"limit": "100", "actual": "480"}


def test_help_does_not_import_torch() -> None:
    """--help names every setting and imports no torch."""
    code = """
import sys
from poolrpc_server.cli import main
try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own command
    assert "POOLRPC_MAX_WORK" in done.stdout


def test_reflection_lists_the_services(address: str) -> None:
    """Tools of gRPC find the API: services, methods and messages."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert {"poolrpc.v1.PoolService", "grpc.health.v1.Health"} < services
        file = database.FindFileContainingSymbol("poolrpc.v1.PoolService")
        assert [each.name for each in file.service[0].method] == ["Pool", "PoolStream", "InferShape", "GetServerInfo"]


def test_credentials_use_tls() -> None:
    """A client with credentials uses TLS; one without raises an error that says so at the same server."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    key, chain = certificate.private_key_pem.bytes(), b"".join(each.bytes() for each in certificate.cert_chain_pems)

    class Info(pool_pb2_grpc.PoolServiceServicer):
        def GetServerInfo(self, _: object, __: object) -> pool_pb2.GetServerInfoResponse:  # noqa: N802
            return pool_pb2.GetServerInfoResponse(version="tls")

    server = grpc.server(ThreadPoolExecutor(1))
    pool_pb2_grpc.add_PoolServiceServicer_to_server(Info(), server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
    server.start()
    trusted = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    with PoolClient(f"localhost:{port}", credentials=trusted) as client:
        assert client.server_info().version == "tls"
    with PoolClient(f"localhost:{port}", timeout=10) as client, pytest.raises(poolrpc.FailedPreconditionError):
        client.server_info()
    server.stop(0).wait()


def test_embedded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """embedded() returns a connected client, takes Config's settings, and leaves nothing behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = set(threading.enumerate())
    with poolrpc_server.embedded(threads=1, max_work=10**9) as client:
        assert client.address.startswith("unix:")
        assert client.pool(X, AvgPool2d(2)).shape == (2, 3, 4, 5)
        assert client.server_info().limits["max_work"].value == 10**9
        assert set(threading.enumerate()) - threads
    assert not list(tmp_path.iterdir())
    assert not [each for each in set(threading.enumerate()) - threads if each.name.startswith("poolrpc-")]


def test_embedded_without_a_block() -> None:
    """The client is used as it is, as over the cells of a notebook; closing it stops the server."""
    client = poolrpc_server.embedded()
    address = client.address
    copy = pickle.loads(pickle.dumps(client))  # noqa: S301 - our own
    assert repr(client) == repr(copy) == f"PoolClient({address!r})"
    with copy:
        assert copy.pool(X, AvgPool2d(2)).shape == client.pool(X, AvgPool2d(2)).shape
    client.close()
    assert not Path(address.removeprefix("unix:")).exists()


@pytest.mark.parametrize("embedded", [False, True], ids=["client", "embedded"])
@pytest.mark.parametrize("leave", ["", "del client", "sys.exit(0)"])
def test_a_client_that_is_never_closed(address: str, leave: str, *, embedded: bool) -> None:
    """The process of a client that is a module's variable ends without a word, and so does its embedded server."""
    made = "poolrpc_server.embedded()" if embedded else f"poolrpc.PoolClient({address!r})"
    program = (
        "import sys, numpy, poolrpc, poolrpc_server\n"
        f"client = {made}\n"
        "def shape():\n    return client.pool(numpy.zeros((1, 1, 4, 4), 'f4'), 'MaxPool2d(2)').shape\n"
        f"print(shape())\n{leave}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)  # noqa: S603 - ours
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 1, 2, 2)\n", "")


def test_embedded_keeps_the_callers_torch_threads() -> None:
    """The server's threads run torch with one thread each; the caller's thread keeps its own number."""
    import torch  # noqa: PLC0415 - for this one test

    before = torch.get_num_threads()
    with poolrpc_server.embedded() as client:
        client.pool(X, MaxPool2d(2))
        assert torch.get_num_threads() == before


def test_an_unexpected_exception_is_internal_with_an_id(
    patch_operation: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """The caller receives an id alone, under which the log has the exception."""

    def failing(*_: object) -> NoReturn:
        raise RuntimeError("a secret of the server's")

    patch_operation("max_pool", lambda _: failing)
    with poolrpc_server.embedded() as client, caplog.at_level(logging.INFO, "poolrpc_server"):
        with pytest.raises(poolrpc.InternalError) as caught:
            client.pool(X, MaxPool2d(2))
        assert client.pool(X, AvgPool2d(2)).shape == (2, 3, 4, 5)
    assert "secret" not in str(caught.value)
    assert caught.value.error_id
    logged = next(each for each in caplog.records if each.getMessage() == "unexpected error")
    assert logged.error_id == caught.value.error_id
    assert "a secret of the server's" in caplog.text


def test_a_call_whose_deadline_passed_is_not_computed(gate: Gate) -> None:
    """A call that waits past its deadline is DEADLINE_EXCEEDED and never computed; the call behind it is."""
    with poolrpc_server.embedded(threads=1) as client, ThreadPoolExecutor(2) as threads:
        first = threads.submit(client.pool, X, GlobalPool2d("max"))
        assert gate.entered.wait(60)
        with pytest.raises(poolrpc.DeadlineExceededError):
            client.pool(X, MaxPool2d(2), timeout=0.2)
        behind = threads.submit(client.pool, X, MaxPool2d(2))
        gate.opened.set()
        assert first.result().shape == (2, 3, 1, 1)
        assert behind.result().shape == (2, 3, 4, 5)
    assert gate.computed == 1


# Room for either call alone, with its header; by gRPC, its message is counted twice while it is received.
@pytest.mark.parametrize(("transport", "limit"), [("unary", 9 * X.nbytes // 2), ("local", 3 * X.nbytes + 64)])
def test_bytes_in_flight_are_bounded(gate: Gate, transport: Transport, limit: int) -> None:
    """Over the limit a call is UNAVAILABLE with a retry delay, and is answered later."""
    with (
        poolrpc_server.embedded(max_inflight_bytes=limit) as retrying,
        PoolClient(retrying.address, options={"grpc.enable_retries": 0}) as once,
        ThreadPoolExecutor(2) as threads,
    ):
        first = threads.submit(once.pool, X, GlobalPool2d("max"), transport=transport)
        assert gate.entered.wait(60)
        with pytest.raises(poolrpc.UnavailableError) as caught:
            once.pool(np.concatenate([X, X]), MaxPool2d(2), transport=transport)
        assert caught.value.reason == "IN_FLIGHT_BYTES"
        assert caught.value.metadata["limit"] == str(limit)
        assert caught.value.retry_delay > 0
        assert once.server_info().threads
        second = threads.submit(retrying.pool, np.concatenate([X, X]), MaxPool2d(2), transport=transport)
        gate.opened.set()
        assert first.result().shape == (2, 3, 1, 1)
        assert second.result().shape == (4, 3, 4, 5)


def test_rejected_calls_leave_no_memory() -> None:
    """Hundreds of rejected calls of a megabyte leave the server's memory where it was."""
    with serving() as server, PoolClient(server.address) as client:
        process = psutil.Process(server.process.pid)
        x = np.zeros((1, 1, 512, 512), np.float32)

        def rejected(times: int) -> int:
            for _ in range(times):
                with pytest.raises(poolrpc.InvalidArgumentError):
                    client.pool(x, MaxPool2d(600))
            return process.memory_info().rss

        before = rejected(100)
        assert rejected(500) < before * 1.1
