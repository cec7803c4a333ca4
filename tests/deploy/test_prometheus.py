"""The alerts and the dashboard in a real Prometheus, installed by scripts/install_prometheus.sh, and a real server."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
import yaml

import poolrpc
from poolrpc import LPPool2d, MaxPool2d, PoolClient
from poolrpc_server.protocols.triton.generated import open_inference_pb2
from scripts.prometheus_queries import (
    RULES,
    alerts,
    metric_names,
    panels,
    query_api,
    query_value,
    recorded,
    used_metrics,
    wait_for_scrape,
)
from scripts.server_process import ServerProcess, serving
from tests.deploy.real_prometheus import CONFIG, prometheus

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(300)]

CASES = Path(__file__).parent / "alerts"
ONLY_WITH_WORKERS, ONLY_WITH_TLS = "poolrpc_worker_restarts_total", "poolrpc_certificate_expiry_timestamp_seconds"
"""The metrics that require a server with workers, or with TLS."""

X = np.random.default_rng(5).standard_normal((1, 16, 128, 128), np.float32)


def promtool(programs: Path, *arguments: str | Path) -> str:
    """Run promtool and return its output, which is the assertion's message if it fails."""
    command = [programs / "promtool", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a program that we installed
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def test_the_configuration_and_the_rules_are_valid(programs: Path) -> None:
    """Prometheus's own tool accepts both, and finds the alerts."""
    promtool(programs, "check", "config", CONFIG)
    assert f"SUCCESS: {len(alerts()) + len(recorded())} rules found" in promtool(
        programs, "check", "rules", "--lint-fatal", RULES
    )


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
    (tmp_path / "alerts.yml").write_text(RULES.read_text().replace('grpc_code="Internal"', 'grpc_code="INTERNAL"'))
    with pytest.raises(AssertionError, match="FAILED"):
        promtool(programs, "test", "rules", tmp_path / "case.yml")


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


def compared(expression: str) -> list[str]:
    """Return the left sides of an alert's comparisons."""
    parts = re.split(r"\s+(?:or|and)\s+", expression)
    return [re.sub(r" (?:>=|[><]|==) [0-9. *]+$", "", part).removeprefix("absent") for part in parts]


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
        missing = {ONLY_WITH_TLS, *([ONLY_WITH_WORKERS] if workers == 1 else [])}
        assert used_metrics() - scraped == missing
        assert query_value(address, "sum(grpc_server_started_total)") == 0
        generate_traffic(server)
        for metric in ("poolrpc_rejects_total", "poolrpc_cancelled_total"):
            assert wait_for_scrape(lambda metric=metric: query_value(address, f"sum({metric})") >= 1), metric
        for name, expression in panels().items():
            if not metric_names(expression) & missing:
                samples = query_api(address, "query", query=expression)["result"]
                assert samples, name
                assert not any(each["value"][1] in {"NaN", "+Inf"} for each in samples), name
        for name, expression in (alerts() | recorded()).items():
            for part in compared(expression):
                if not metric_names(part) & missing:
                    assert query_api(address, "query", query=part)["result"], (name, part)
        rules = [each for group in query_api(address, "rules")["groups"] for each in group["rules"]]
        assert {each["name"]: each["health"] for each in rules} == dict.fromkeys(alerts() | recorded(), "ok")
        assert not [each["name"] for each in rules if each.get("state") == "firing"]


def test_the_dashboard_can_be_limited() -> None:
    """Every panel is limited to the chosen instances, and those of calls to the chosen methods."""
    dashboard = json.loads((RULES.parents[1] / "grafana/dashboards/poolrpc.json").read_text())
    assert [each["name"] for each in dashboard["templating"]["list"]] == ["instance", "method"]
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for expression in expressions:
        if not metric_names(expression) & recorded().keys():
            assert expression.count('instance=~"$instance"') == len(re.findall(r"\{", expression)) > 0
            assert expression.count('grpc_method=~"$method"') == expression.count("grpc_server_")


def test_the_metrics_of_an_expression_are_found(programs: Path, tmp_path: Path) -> None:
    """The metric names of an expression are unchanged if Prometheus formats the expression."""
    with prometheus(programs, tmp_path, "127.0.0.1:1") as address:
        for expression in (*alerts().values(), *recorded().values(), *panels().values()):
            found = metric_names(expression)
            assert found
            assert metric_names(query_api(address, "format_query", query=expression)) == found
