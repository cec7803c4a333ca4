"""The profile observe: a real Prometheus scrapes a real server, and knows every metric that is asked of it."""

from __future__ import annotations

import json
import re
import threading
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import poolrpc

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

METRIC = re.compile(r"\b(?:poolrpc|grpc_server)_[a-z_]+\b")


@pytest.fixture
def observed(root: Path) -> set[str]:
    """The names of the metrics that the alerts and the dashboard use."""
    dashboard = json.loads((root / "deploy/grafana/dashboards/poolrpc.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked.append((root / "deploy/prometheus/alerts.yml").read_text())
    return set(METRIC.findall(" ".join(asked)))


def asks(address: str, path: str, **query: str) -> Any:
    """Give the data of an answer of Prometheus's API."""
    url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)["data"]


def test_the_rules_are_right(engine: Callable[..., str], prometheus_image: str, root: Path) -> None:
    """Prometheus's own tool accepts the configuration and the alerts."""
    folder = ("-v", f"{root}/deploy/prometheus:/etc/prometheus:ro")
    arguments = ("--rm", "--network=none", "--entrypoint=/bin/promtool", *folder, prometheus_image)
    told = engine("run", *arguments, "check", "config", "/etc/prometheus/prometheus.yml")
    assert "SUCCESS: 7 rules found" in told


def test_prometheus_has_what_is_asked_of_it(
    project: Callable[..., Any], server_image: str, prometheus_image: str, observed: set[str]
) -> None:
    """It finds the server by its name, loads the alerts, and has every metric of the dashboard and the alerts."""
    assert server_image
    assert prometheus_image
    with project("observe", POOLRPC_CPUS="1", POOLRPC_MEMORY="1g") as it:
        it.up("server", "prometheus")
        with poolrpc.PoolClient(it.address("server")) as client:
            client.pool(np.ones((1, 1, 4, 4), np.float32), poolrpc.MaxPool2d(2))
        prometheus = it.address("prometheus", 9090)
        # It looks on its own, every few seconds, and tells nobody: asking again is the only way to hear of it.
        scraped, again = set[str](), threading.Event()
        for _ in range(60):
            scraped = set(asks(prometheus, "label/__name__/values"))
            if "grpc_server_handled_total" in scraped:
                break
            again.wait(1)
        assert [each["health"] for each in asks(prometheus, "targets", state="active")["activeTargets"]] == ["up"]
        rules = asks(prometheus, "rules")["groups"][0]["rules"]
        assert len(rules) == 7
        assert {each["health"] for each in rules} <= {"ok", "unknown"}
        # These have no samples before the first of their kind, or only with several workers.
        rare = {"poolrpc_rejects_total", "poolrpc_cancelled_total", "poolrpc_worker_restarts_total"}
        assert observed - rare <= scraped
