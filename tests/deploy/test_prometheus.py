"""The alerts and the dashboard in a real Prometheus, installed by scripts/install_prometheus.sh, and a real server."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
import yaml

import poolrpc
from poolrpc import LPPool2d, MaxPool2d, PoolClient
from poolrpc_server.protocols.triton.generated import open_inference_pb2
from scripts.prometheus_queries import RULES, alerts, metric_names, panels, query_api, query_value, wait_for_scrape
from scripts.server_process import ServerProcess, serving
from tests.installing import ROOT, install

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(300)]

CASES = Path(__file__).parent / "alerts"
CONFIG = RULES.with_name("prometheus.yml")
USED = {name for expression in (*alerts().values(), *panels().values()) for name in metric_names(expression)}
ONLY_WITH_WORKERS = "poolrpc_worker_restarts_total"
"""The only metric that requires a server with workers."""

X = np.random.default_rng(5).standard_normal((1, 16, 128, 128), np.float32)


@pytest.fixture(scope="session")
def programs() -> Path:
    """Install prometheus and promtool, and return their folder."""
    install("scripts/install_prometheus.sh", "Prometheus")
    return ROOT / ".debs/prometheus/usr/bin"


def promtool(programs: Path, *arguments: str | Path) -> str:
    """Run promtool and return its output, which is the assertion's message if it fails."""
    command = [programs / "promtool", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a program that we installed
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def test_the_configuration_and_the_rules_are_valid(programs: Path) -> None:
    """Prometheus's own tool accepts both, and finds the alerts."""
    promtool(programs, "check", "config", CONFIG)
    assert f"SUCCESS: {len(alerts())} rules found" in promtool(programs, "check", "rules", "--lint-fatal", RULES)


@pytest.mark.parametrize("alert", alerts())
def test_an_alert_fires_when_it_should(programs: Path, alert: str) -> None:
    """Each alert fires for the series of its file in alerts/ at the times in the file, and at no other time."""
    case = CASES / f"{alert}.yml"
    expected = [
        each["exp_alerts"] for test in yaml.safe_load(case.read_text())["tests"] for each in test["alert_rule_test"]
    ]
    assert [] in expected
    assert any(expected)
    assert "SUCCESS" in promtool(programs, "test", "rules", case)


def test_a_wrong_rule_fails_its_test(programs: Path, tmp_path: Path) -> None:
    """If a rule has a status in gRPC's own spelling, which the server's metrics do not use, its test fails."""
    text = (CASES / "PoolrpcInternalErrors.yml").read_text()
    (tmp_path / "case.yml").write_text(text.replace("../../../deploy/prometheus/alerts.yml", "alerts.yml"))
    (tmp_path / "alerts.yml").write_text(RULES.read_text().replace('"Internal"', '"INTERNAL"'))
    with pytest.raises(AssertionError, match="FAILED"):
        promtool(programs, "test", "rules", tmp_path / "case.yml")


@contextmanager
def prometheus(programs: Path, folder: Path, target: str) -> Iterator[str]:
    """Run Prometheus with our configuration, except for target and interval, and yield its address."""
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    flags = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "data", "log.format": "json"}
    process = subprocess.Popen(  # noqa: S603 - a program that we installed
        [programs / "prometheus", "--web.listen-address=127.0.0.1:0", *(f"--{k}={v}" for k, v in flags.items())],
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[dict[str, str]] = []
    ready = threading.Event()

    def read() -> None:
        for line in process.stderr or ():
            lines.append(json.loads(line))
            if lines[-1].get("msg", "").startswith("Server is ready"):
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(60)
        assert process.poll() is None, lines
        yield next(each["address"] for each in lines if each.get("msg") == "Listening on")
    finally:
        process.terminate()
        process.wait(60)
        reader.join()
        if process.stderr:
            process.stderr.close()


def open_too_many_streams(address: str) -> None:
    """Open three streams, of which at least one is rejected: a server may have two, and one for each worker."""
    with grpc.insecure_channel(address) as channel:
        ended, open_calls = threading.Event(), threading.Event()

        def messages() -> Iterator[bytes]:
            open_calls.wait(60)
            yield from ()

        calls = [channel.stream_stream("/poolrpc.v1.PoolService/PoolStream")(messages()) for _ in range(3)]
        for each in calls:
            if not each.add_callback(ended.set):  # it has ended
                ended.set()
        assert ended.wait(60)
        assert grpc.StatusCode.UNAVAILABLE in {each.code() for each in calls if not each.is_active()}
        for each in calls:
            each.cancel()
        open_calls.set()


def generate_traffic(server: ServerProcess) -> None:
    """Make calls of every kind: by every transport, invalid ones, rejected ones and cancelled ones."""
    tcp, unix = server.start_line["addresses"]
    with PoolClient(tcp) as client:
        client.pool(X, MaxPool2d(2))
        client.pool(X, MaxPool2d(2), transport="stream")
        with pytest.raises(poolrpc.InvalidArgumentError):
            client.pool(X, MaxPool2d(500))
        # On a machine of any speed, one of these timeouts passes after the call has arrived and before it is computed.
        for timeout in (0.1, 0.4, 1.6):
            with suppress(poolrpc.DeadlineExceededError):
                client.pool(X.repeat(2, 2).repeat(2, 3), LPPool2d(3, 63, stride=1), timeout=timeout)
    with PoolClient(unix) as client:
        assert client.pool(X, MaxPool2d(2), transport="arena").transport == "arena"
    with grpc.insecure_channel(tcp) as channel:
        request = open_inference_pb2.ModelInferRequest(model_name="stem", raw_input_contents=[X.tobytes()])
        request.inputs.add(name="input", datatype="FP32", shape=X.shape)
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(request.SerializeToString())
    open_too_many_streams(tcp)


def without_comparison(expression: str) -> str:
    """Return the left side of an alert's comparison."""
    return re.sub(r" (?:>|==) [0-9]+$", "", expression).removeprefix("absent")


@pytest.mark.parametrize("workers", [1, 2])
def test_every_expression_has_values(programs: Path, tmp_path: Path, workers: int) -> None:
    """The metrics of the dashboard and the alerts exist before the first call; then all expressions have values.

    The values of the dashboard are numbers, and no alert fires.
    """
    flags = ("--threads", str(workers), "--workers", str(workers), "--max-streams", "2")
    more = ("--metrics", "127.0.0.1:0", "--model", "stem=MaxPool2d(3, stride=2, padding=1)")
    unix = ("--listen", f"unix:{tmp_path}/sock", "--drain-seconds", "0")
    with (
        serving(*flags, *more, *unix) as server,
        prometheus(programs, tmp_path, server.start_line["metrics"]) as address,
    ):
        assert wait_for_scrape(lambda: query_value(address, "up") == 1)
        scraped = set(query_api(address, "label/__name__/values"))
        missing = {ONLY_WITH_WORKERS} if workers == 1 else set()
        assert USED - scraped == missing
        assert query_value(address, "sum(grpc_server_started_total)") == 0
        generate_traffic(server)
        for metric in ("poolrpc_rejects_total", "poolrpc_cancelled_total"):
            assert wait_for_scrape(lambda metric=metric: query_value(address, f"sum({metric})") >= 1), metric
        for name, expression in panels().items():
            if not metric_names(expression) & missing:
                samples = query_api(address, "query", query=expression)["result"]
                assert samples, name
                assert not any(each["value"][1] in {"NaN", "+Inf"} for each in samples), name
        for name, expression in alerts().items():
            query_api(address, "query", query=expression)
            if not metric_names(expression) & missing:
                assert query_api(address, "query", query=without_comparison(expression))["result"], name
        rules = query_api(address, "rules")["groups"][0]["rules"]
        assert {each["name"]: each["health"] for each in rules} == dict.fromkeys(alerts(), "ok")
        assert not [each["name"] for each in rules if each["state"] == "firing"]


def test_the_metrics_of_an_expression_are_found(programs: Path, tmp_path: Path) -> None:
    """The metric names of an expression are unchanged if Prometheus formats the expression."""
    with prometheus(programs, tmp_path, "127.0.0.1:1") as address:
        for expression in (*alerts().values(), *panels().values()):
            found = metric_names(expression)
            assert found
            assert metric_names(query_api(address, "format_query", query=expression)) == found
