"""Faults of real servers raise their alerts in a real Prometheus, whose rules are ours with shorter windows."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from poolrpc import MaxPool2d, PoolClient, PoolError
from poolrpc_server.protocols.triton.generated import open_inference_pb2
from scripts.prometheus_queries import metric_names, query_api, query_value, runbook_queries, wait_for_scrape
from scripts.server_process import ServerProcess, serving
from tests.deploy.real_prometheus import prometheus
from tests.integration.certificates import Authority
from tests.integration.injection import injected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.conformance, pytest.mark.slow, pytest.mark.timeout(400)]

DIVISOR = 10
"""By how much the windows of the rules are shortened."""

ALERT_SECONDS = 120
"""Seconds in which an alert has to fire."""

X = np.random.default_rng(5).standard_normal((1, 16, 128, 128), np.float32)

CRASH = """
    import os
    from poolrpc_server.telemetry.metrics import Metrics
    Metrics.received = lambda *_: os.abort()
"""
"""Ends a process by SIGABRT when a call's message has arrived."""

BROKEN_KERNELS = """
    from poolrpc_server.compute.engine import Engine
    Engine.execute = lambda *_: 1 / 0
"""

SLOW_DEVICE = """
    import time
    from poolrpc_server.compute.engine import Engine
    execute = Engine.execute
    Engine.execute = lambda *arguments: time.sleep(6) or execute(*arguments)
"""


def firing(address: str) -> set[str]:
    """Return the names of the alerts that fire."""
    found = query_api(address, "alerts")["alerts"]
    return {each["labels"]["alertname"] for each in found if each["state"] == "firing"}


def assert_raised(address: str, *names: str) -> None:
    """Wait until alerts fire, which may not take longer than two minutes, and look where the runbook says to look.

    Each expression of an alert's section has samples while the alert fires, unless no metric of it can be there: those
    of workers need several.
    """
    assert wait_for_scrape(lambda: set(names) <= firing(address), ALERT_SECONDS), firing(address)
    scraped = set(query_api(address, "label/__name__/values"))
    for name in names:
        for expression in runbook_queries(name):
            found = query_api(address, "query", query=expression)["result"]
            assert found or metric_names(expression) - scraped == {"poolrpc_worker_restarts_total"}, expression


@contextmanager
def watching(programs: Path, folder: Path, target: str) -> Iterator[str]:
    """Run Prometheus for a server that it finds well, and yield Prometheus's address."""
    with prometheus(programs, folder, target, DIVISOR) as address:
        # On a busy machine the first scrape may fail, which raises an alert for a moment.
        assert wait_for_scrape(lambda: query_value(address, "up") == 1 and not firing(address), ALERT_SECONDS)
        yield address


def call(address: str) -> grpc.StatusCode:
    """Make a call without a retry, and return its status."""
    with grpc.insecure_channel(address) as channel:
        method = channel.unary_unary("/poolrpc.v1.PoolService/Pool")
        with pytest.raises(grpc.RpcError) as raised:
            method(b"", timeout=60)
    status: grpc.StatusCode = raised.value.code()
    return status


@contextmanager
def loaded(use: Callable[[], object], threads: int) -> Iterator[None]:
    """Call a function again and again in several threads, for as long as the block runs."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            use()

    running = [threading.Thread(target=repeat) for _ in range(threads)]
    for each in running:
        each.start()
    try:
        yield
    finally:
        ended.set()
        for each in running:
            each.join()


@contextmanager
def crash_loop(folder: Path) -> Iterator[tuple[str, str]]:
    """Start a server again whenever it ends, and yield the addresses of its calls and its metrics."""
    with ExitStack() as ports:
        bound = [ports.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        address, metrics = (f"127.0.0.1:{each.getsockname()[1]}" for each in bound)
    command = f"while :; do {sys.executable} -m poolrpc_server --listen {address} --metrics {metrics}; done"
    env = {**os.environ, **injected(folder, CRASH)}
    loop = subprocess.Popen(["bash", "-c", command], stderr=subprocess.DEVNULL, env=env, start_new_session=True)  # noqa: S603, S607 - ours
    try:
        yield address, metrics
    finally:
        os.killpg(loop.pid, signal.SIGKILL)
        loop.wait()


def test_a_crash_loop(programs: Path, tmp_path: Path) -> None:
    """Each process is seen at least once and ends at its first call: its counters never show a call."""
    starts: set[float] = set()

    def started_again() -> bool:
        latest = query_value(address, "process_start_time_seconds")
        again = latest > 0 and latest not in starts
        starts.add(latest)
        return again

    with crash_loop(tmp_path) as (server, metrics), watching(programs, tmp_path, metrics) as address:
        for _ in range(4):
            assert wait_for_scrape(started_again, ALERT_SECONDS)
            assert call(server) is grpc.StatusCode.UNAVAILABLE
        assert_raised(address, "PoolrpcRestarts")
        assert query_value(address, "sum(grpc_server_handled_total)") == 0


def test_a_crash_loop_of_workers(programs: Path, tmp_path: Path) -> None:
    """Workers end at a call while the process that starts them lives on."""
    with (
        serving("--workers", "2", "--metrics", "127.0.0.1:0", env=injected(tmp_path, CRASH)) as server,
        watching(programs, tmp_path, server.start_line["metrics"]) as address,
    ):
        for ended in range(1, 5):
            assert call(server.address) is grpc.StatusCode.UNAVAILABLE
            assert len(server.wait_for("worker ended", ended)) == ended
            server.wait_for("worker serving", 2 + ended)
        assert_raised(address, "PoolrpcRestarts")


def test_an_overload(programs: Path, tmp_path: Path) -> None:
    """Many callers want more than one thread computes: calls fail, by rejections, and every capacity is in use."""
    flags = ("--threads", "1", "--call-threads", "2", "--max-queue", "1", "--model", "slow=LPPool2d(3, 31, stride=1)")
    request = open_inference_pb2.ModelInferRequest(model_name="slow", raw_input_contents=[X.tobytes()])
    request.inputs.add(name="input", datatype="FP32", shape=X.shape)
    message = request.SerializeToString()

    def infer() -> None:
        with (
            grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel,
            suppress(grpc.RpcError),
        ):
            channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(message, timeout=10)

    with (
        serving(*flags, "--metrics", "127.0.0.1:0") as server,
        watching(programs, tmp_path, server.start_line["metrics"]) as address,
        loaded(infer, 6),
    ):
        assert_raised(address, "PoolrpcFailsFast", "PoolrpcFails", "PoolrpcFailsSlowly", "PoolrpcRejectsCalls")
        assert_raised(address, "PoolrpcSaturated")


def hang_a_thread(server: ServerProcess, folder: Path, calls: ExitStack) -> None:
    """Make gRPC's serving thread wait for a file that is never written."""
    (folder / "tokens").unlink()
    os.mkfifo(folder / "tokens")
    channel = calls.enter_context(grpc.insecure_channel(server.address))
    method = channel.unary_unary("/poolrpc.v1.PoolService/GetServerInfo")
    calls.callback(method.future(b"", metadata=[("authorization", "Bearer token")], timeout=300).cancel)


def stop_a_worker(server: ServerProcess, folder: Path, calls: ExitStack) -> None:  # noqa: ARG001 - one of several faults
    """Stop a worker's process."""
    os.kill(server.lines("worker serving")[0]["pid"], signal.SIGSTOP)


def stop_the_process(server: ServerProcess, folder: Path, calls: ExitStack) -> None:  # noqa: ARG001 - the same
    """Stop the server's process."""
    server.process.send_signal(signal.SIGSTOP)


@pytest.mark.parametrize(
    ("hang", "workers", "alert"),
    [
        (hang_a_thread, "1", "PoolrpcHangs"),
        (stop_a_worker, "2", "PoolrpcHangs"),
        (stop_the_process, "1", "PoolrpcDown"),
    ],
)
def test_a_hang(programs: Path, tmp_path: Path, hang: Callable[..., None], workers: str, alert: str) -> None:
    """A server whose gRPC hangs still has metrics, and so has one whose worker hangs; one that is stopped has not."""
    (tmp_path / "tokens").write_text(f"tester {hashlib.sha256(b'token').hexdigest()}\n")
    flags = ("--token-file", str(tmp_path / "tokens"), "--workers", workers, "--watchdog-seconds", "60")
    with (
        serving(*flags, "--metrics", "127.0.0.1:0") as server,
        watching(programs, tmp_path, server.start_line["metrics"]) as address,
        ExitStack() as calls,
    ):
        hang(server, tmp_path, calls)
        assert_raised(address, alert)


def test_no_server_at_all(programs: Path, tmp_path: Path) -> None:
    """Prometheus has no target."""
    with prometheus(programs, tmp_path, "", DIVISOR) as address:
        assert_raised(address, "PoolrpcAbsent")


def test_an_expiring_certificate(programs: Path, tmp_path: Path) -> None:
    """A certificate that expires within a day raises both alerts; one that replaces it, and lasts, ends them."""
    authority = Authority(tmp_path / "authority")
    chain, key = authority.issue("localhost")
    flags = ("--tls-cert", str(chain), "--tls-key", str(key), "--metrics", "127.0.0.1:0")
    with (
        serving(*flags) as server,
        prometheus(programs, tmp_path, server.start_line["metrics"], DIVISOR) as address,
    ):
        assert_raised(address, "PoolrpcCertificateExpiresSoon", "PoolrpcCertificateExpires")
        newer, newer_key = authority.issue("127.0.0.1", days=90)
        newer_key.replace(key)
        newer.replace(chain)
        assert wait_for_scrape(lambda: not firing(address), ALERT_SECONDS)


def test_a_full_disk(programs: Path, tmp_path: Path) -> None:
    """Calls are answered while the log cannot be written, and the lines that are lost raise an alert."""
    with ExitStack() as ports:
        bound = [ports.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        server, metrics = (f"127.0.0.1:{each.getsockname()[1]}" for each in bound)
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
        command = [sys.executable, "-m", "poolrpc_server", "--listen", server, "--metrics", metrics]
        process = subprocess.Popen(command, stderr=full)  # noqa: S603 - our own command
    try:
        with prometheus(programs, tmp_path, metrics, DIVISOR) as address:
            assert wait_for_scrape(lambda: query_value(address, "up") == 1, ALERT_SECONDS)
            with PoolClient(server) as client:
                with loaded(lambda: client.pool(X, MaxPool2d(2)), 1):
                    assert_raised(address, "PoolrpcLosesLogs")
                assert query_value(address, 'sum(grpc_server_handled_total{grpc_code="OK"})') > 0
    finally:
        process.kill()
        process.wait()


def pool(address: str) -> None:
    """Make a call, which may fail."""
    with PoolClient(address) as client, suppress(PoolError):
        client.pool(X, MaxPool2d(2), timeout=60)


def test_broken_kernels(programs: Path, tmp_path: Path) -> None:
    """Calls that pass validation fail with INTERNAL."""
    with (
        serving("--metrics", "127.0.0.1:0", env=injected(tmp_path, BROKEN_KERNELS)) as server,
        watching(programs, tmp_path, server.start_line["metrics"]) as address,
    ):
        pool(server.address)
        assert_raised(address, "PoolrpcInternalErrors", "PoolrpcValidatorEscapes")


def test_a_slow_device(programs: Path, tmp_path: Path) -> None:
    """Each execution takes seconds, and others wait for it in the queue."""
    flags = ("--threads", "1", "--max-queue-seconds", "600", "--metrics", "127.0.0.1:0")
    with (
        serving(*flags, env=injected(tmp_path, SLOW_DEVICE)) as server,
        watching(programs, tmp_path, server.start_line["metrics"]) as address,
        loaded(lambda: pool(server.address), 6),
    ):
        assert_raised(address, "PoolrpcQueueSlow", "PoolrpcHighLatency")
