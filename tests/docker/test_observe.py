"""The profile observe: a real Prometheus scrapes a real server, and has every metric of dashboard and alerts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import poolrpc
from scripts.prometheus_queries import alerts, query_api, query_value, recorded, used_metrics, wait_for_scrape

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ELSEWHERE = {"poolrpc_worker_restarts_total", "poolrpc_certificate_expiry_timestamp_seconds"}
"""Metrics that only a server with workers, or with TLS, has."""


def test_the_rules_are_valid(engine: Callable[..., str], prometheus_image: str, root: Path) -> None:
    """Prometheus's own tool accepts the configuration and the alerts."""
    folder = ("-v", f"{root}/deploy/prometheus:/etc/prometheus:ro")
    arguments = ("--rm", "--network=none", "--entrypoint=/bin/promtool", *folder, prometheus_image)
    output = engine("run", *arguments, "check", "config", "/etc/prometheus/prometheus.yml")
    assert f"SUCCESS: {len(alerts()) + len(recorded())} rules found" in output


def test_prometheus_has_every_metric(project: Callable[..., Any], server_image: str, prometheus_image: str) -> None:
    """Prometheus finds the server by name, loads the alerts, and has all metrics of the dashboard and the alerts."""
    assert server_image
    assert prometheus_image
    with project("observe", POOLRPC_CPUS="1", POOLRPC_MEMORY="1g") as running:
        running.up("server", "prometheus")
        with poolrpc.PoolClient(running.address("server")) as client:
            client.pool(np.ones((1, 1, 4, 4), np.float32), poolrpc.MaxPool2d(2))
        prometheus = running.address("prometheus", 9090)
        assert wait_for_scrape(lambda: query_value(prometheus, "sum(grpc_server_handled_total)") >= 1)
        assert [each["health"] for each in query_api(prometheus, "targets", state="active")["activeTargets"]] == ["up"]
        rules = [each for group in query_api(prometheus, "rules")["groups"] for each in group["rules"]]
        assert {each["name"] for each in rules} == alerts().keys() | recorded().keys()
        assert {each["health"] for each in rules} <= {"ok", "unknown"}
        assert used_metrics() - ELSEWHERE <= set(query_api(prometheus, "label/__name__/values"))
