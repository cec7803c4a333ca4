"""The metrics of real servers, over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import psutil
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

import poolrpc
import poolrpc_server
from poolrpc import AdaptiveAvgPool2d, InternalError, LimitExceededError, MaxPool2d, PoolClient
from poolrpc_server import Config
from poolrpc_server.cli import main
from poolrpc_server.telemetry.monitoring_server import MonitoringServer
from scripts.server_process import serving
from tests.integration.certificates import Authority
from tests.integration.injection import injected
from tests.scrape import Scrape, get

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

X = np.random.default_rng(3).standard_normal((2, 3, 8, 10), np.float32)
POOL = {"grpc_type": "unary", "grpc_service": "poolrpc.v1.PoolService", "grpc_method": "Pool"}


def test_calls_are_counted() -> None:
    """Each call is counted by its method and status; unknown methods leave nothing; the start line has the address."""
    with serving("--metrics", "127.0.0.1:0", "--drain-seconds", "0") as server, PoolClient(server.address) as client:
        address = server.start_line["metrics"]
        client.pool(X, MaxPool2d(2))
        client.pool(X, MaxPool2d(2), transport="stream")
        with pytest.raises(LimitExceededError):
            client.pool(X, AdaptiveAvgPool2d(65535))
        with grpc.insecure_channel(server.address) as channel:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
                channel.unary_unary("/poolrpc.v1.PoolService/Nothing")(b"")
        shown = Scrape(address)
        assert shown("grpc_server_handled_total", **POOL, grpc_code="OK") == 1
        assert shown("grpc_server_handled_total", **POOL, grpc_code="ResourceExhausted") == 1
        assert shown("grpc_server_handling_seconds_count", **POOL) == 2
        stream = POOL | {"grpc_type": "bidi_stream", "grpc_method": "PoolStream"}
        assert shown("grpc_server_handled_total", **stream, grpc_code="OK") == 1
        assert shown("poolrpc_validator_escapes_total") == 0
        assert "Nothing" not in {each.labels.get("grpc_method") for each in shown.samples}
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    with pytest.raises(urllib.error.URLError):
        get(address, "livez")


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_server_describes_itself(tmp_path: Path, workers: str) -> None:
    """The metrics have the build, every limit in force, and when the certificate expires, of all workers together.

    A certificate that replaces another one is seen by the next scrape.
    """
    authority = Authority(tmp_path / "authority")
    chain, key = authority.issue("localhost")
    flags = ("--tls-cert", str(chain), "--tls-key", str(key), "--tls-client-ca", str(authority.ca))
    limits = ("--workers", workers, "--max-inflight-bytes", "1GiB", "--max-queue", "8", "--threads", "2")
    with serving(*flags, *limits, "--metrics", "127.0.0.1:0") as server:
        address, line = server.start_line["metrics"], server.start_line
        shown = Scrape(address)
        (build,) = (each.labels for each in shown.samples if each.name == "poolrpc_build_info")
        assert (build["version"], build["torch"], build["device"]) == (line["version"], line["torch"], "cpu")
        settings = {each.labels["setting"] for each in shown.samples if "setting" in each.labels}
        numbers = {each.name for each in fields(Config) if Config.unit(each.name)}
        assert settings == numbers | {"tls_cert", "tls_client_ca"}
        assert shown("poolrpc_capacity", setting="max_inflight_bytes") == 2**30
        assert shown("poolrpc_capacity", setting="threads") == 2
        assert shown("poolrpc_capacity", setting="max_queue") == 8 * int(workers)
        assert shown("poolrpc_limit", setting="max_work") == line["max_work"]
        assert 0 < shown("poolrpc_memory_bytes") < shown("poolrpc_memory_limit_bytes") <= psutil.virtual_memory().total
        started = psutil.Process(server.process.pid).create_time()
        assert shown("process_start_time_seconds") == pytest.approx(started, abs=2)
        expiry = x509.load_pem_x509_certificate(chain.read_bytes()).not_valid_after_utc.timestamp()
        assert shown("poolrpc_certificate_expiry_timestamp_seconds", setting="tls_cert") == expiry
        newer, newer_key = authority.issue("127.0.0.1", expired=True)
        newer_key.replace(key)
        newer.replace(chain)
        expired = x509.load_pem_x509_certificate(chain.read_bytes()).not_valid_after_utc.timestamp()
        assert Scrape(address)("poolrpc_certificate_expiry_timestamp_seconds", setting="tls_cert") == expired < expiry


def test_readiness_follows_the_health_of_the_server() -> None:
    """After SIGTERM the server is alive and still has its metrics, but is not ready."""
    with serving("--metrics", "127.0.0.1:0", "--drain-seconds", "60") as server:
        address = server.start_line["metrics"]
        assert get(address, "readyz") == (200, "ready\n")
        with grpc.insecure_channel(server.address) as channel:
            watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
            server.process.send_signal(signal.SIGTERM)
            assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert get(address, "readyz") == (503, "not ready\n")
            assert get(address, "livez") == (200, "ok\n")
            assert Scrape(address).samples
            watched.cancel()


@pytest.mark.slow
def test_a_server_that_stops_is_not_silent(tmp_path: Path) -> None:
    """While calls are finished after the drain, the watchdog has ended, and its time is 0."""
    program = """
    import time
    from poolrpc_server.compute.engine import Engine
    execute = Engine.execute
    Engine.execute = lambda *arguments: time.sleep(3) or execute(*arguments)
"""
    flags = ("--metrics", "127.0.0.1:0", "--drain-seconds", "0")
    with serving(*flags, env=injected(tmp_path, program)) as server, PoolClient(server.address) as client:
        address = server.start_line["metrics"]
        with ThreadPoolExecutor(1) as threads:
            call = threads.submit(client.pool, X, MaxPool2d(2))
            while not Scrape(address)("poolrpc_calls"):
                assert Scrape(address)("poolrpc_watchdog_silent_seconds") > 0
            server.process.send_signal(signal.SIGTERM)
            while get(address, "readyz")[0] == 200:
                pass
            silences = []
            while not call.done():
                with suppress(urllib.error.URLError, ConnectionError):
                    silences.append(Scrape(address)("poolrpc_watchdog_silent_seconds"))
            assert call.result().shape == (2, 3, 4, 5)
    assert silences[-1] == 0


def test_unexpected_errors_are_counted_as_escapes(patch_operation: Callable[..., None]) -> None:
    """A request that passed validation and failed in the engine is counted."""

    def fail(_: object) -> Callable[..., Any]:
        def failing(*_: object) -> None:
            raise KeyError

        return failing

    patch_operation("global_pool, max", fail)
    server = poolrpc_server.Server(poolrpc_server.Config(listen=("127.0.0.1:0",), metrics="127.0.0.1:0"))
    server.start()
    try:
        with PoolClient(server.addresses[0]) as client, pytest.raises(InternalError):
            client.pool(X, poolrpc.GlobalPool2d("max"))
        shown = Scrape(server.metrics_address)
        assert shown("poolrpc_validator_escapes_total") == 1
        assert shown("grpc_server_handled_total", **POOL, grpc_code="Internal") == 1
    finally:
        server.stop(grace=0)


def test_arenas_are_counted(tmp_path: Path) -> None:
    """A client's shared memory is in the gauges."""
    flags = "--metrics", "127.0.0.1:0"
    with serving(*flags, listen=f"unix:{tmp_path}/s") as server, PoolClient(server.address) as client:
        x = client.empty((1, 4, 256, 256), np.float32)
        x[...] = 1
        assert client.pool(x, MaxPool2d(2), transport="arena").transport == "arena"
        shown = Scrape(server.start_line["metrics"])
        assert shown("poolrpc_arenas") == 1
        assert shown("poolrpc_arena_bytes") >= x.nbytes


@pytest.fixture
def full_folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder in which no file can have any contents."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(  # noqa: S603 - our own folder
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)],  # noqa: S607 - the machine's
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"needs a file system of its own: {mounted.stderr}")
    try:
        with suppress(OSError), (folder / "filling").open("wb", buffering=0) as filling:
            while True:
                filling.write(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)  # noqa: S603, S607 - as above


@pytest.mark.slow
def test_workers_are_summed(full_folder: Path) -> None:
    """A scrape has the calls of all workers so far; a killed worker leaves its counts, though TMPDIR is full.

    Every worker is restarted without a file.
    """
    with (
        serving("--workers", "2", "--metrics", "127.0.0.1:0", env={"TMPDIR": str(full_folder)}) as server,
        ExitStack() as stack,
    ):
        address = server.start_line["metrics"]
        assert server.start_line["watchdog"] == "on"
        calls = 0
        while len({each["worker"] for each in server.lines("call")}) < 2:
            client = stack.enter_context(PoolClient(server.address, options={"grpc.use_local_subchannel_pool": 1}))
            client.pool(X, MaxPool2d(2))
            calls += 1
            assert Scrape(address)("grpc_server_handled_total", **POOL, grpc_code="OK") == calls
            server.wait_for("call", calls)
        for restarts, line in enumerate(server.lines("worker serving"), 1):
            os.kill(line["pid"], signal.SIGKILL)
            assert len(server.wait_for("worker serving", 2 + restarts)) == 2 + restarts
            shown = Scrape(address)
            assert shown("grpc_server_handled_total", **POOL, grpc_code="OK") == calls
            assert shown("poolrpc_worker_restarts_total") == restarts
        assert {each["signal"] for each in server.lines("worker ended")} == {"SIGKILL"}


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_server_without_descriptors_answers_probes(tmp_path: Path, workers: str) -> None:
    """Silent connections that take every descriptor do not keep a probe from its answer."""
    program = "    import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
    flags = ("--workers", workers, "--metrics", "127.0.0.1:0")
    with serving(*flags, env=injected(tmp_path, program)) as server, ExitStack() as silent:
        for address in (server.address, server.start_line["metrics"]):
            host, port = address.split(":")
            for _ in range(300):
                silent.enter_context(socket.create_connection((host, int(port)), timeout=60))
        for page in ("livez", "readyz", "metrics"):
            assert get(server.start_line["metrics"], page)[0] == 200


def test_an_address_in_use_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with status 2 and one line, before it serves."""
    other = MonitoringServer("127.0.0.1:0", CollectorRegistry, lambda: True)
    try:
        assert main(["--listen", "127.0.0.1:0", "--metrics", other.address]) == 75
    finally:
        other.close()
    error = capsys.readouterr().err
    assert error.startswith(f"poolrpc-server: metrics: expected a free address, got {other.address!r}: ")
    assert error.count("\n") == 1
