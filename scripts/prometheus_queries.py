"""The expressions of the dashboard, the alerts and their runbook, and queries to Prometheus, for the tests."""

from __future__ import annotations

import json
import re
import threading
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus/alerts.yml"
RUNBOOK = ROOT / "docs/runbook.md"

# The parts of an expression that name no metric: strings, matchers and ranges, then lists of labels. Numbers, functions
# and metrics remain.
_MATCHERS = re.compile(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]')
_LABELS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_METRIC = re.compile(r"\b[a-z_][a-z_0-9:]*\b(?!\s*\()")
_OPERATORS = {"and", "or", "unless", "bool", "offset", "group_left", "group_right"}
_WINDOW = re.compile(r"(\[|\bfor: )(\d+)([smhd])\b")
_VARIABLE = re.compile(r"\$(?:instance|method)\b")
_OURS = re.compile(r"\b(?:poolrpc|grpc_server|process)_[a-z_]+")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def alerts() -> dict[str, str]:
    """Return the expressions of the alerts, by name."""
    return _rules("alert")


def recorded() -> dict[str, str]:
    """Return the expressions that are recorded under names of their own, by name."""
    return _rules("record")


def _rules(kind: str) -> dict[str, str]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule[kind]: str(rule["expr"]) for group in groups for rule in group["rules"] if kind in rule}


def scaled_rules(divisor: int) -> str:
    """Return the file of the rules with every window and every `for` shorter, so that a test need not wait as long."""

    def scale(match: re.Match[str]) -> str:
        return f"{match[1]}{int(match[2]) * _SECONDS[match[3]] // divisor}s"

    return _WINDOW.sub(scale, RULES.read_text())


def used_metrics() -> set[str]:
    """Return the names of the metrics that the dashboard and the rules use."""
    expressions = (*alerts().values(), *recorded().values(), *panels().values())
    return {name for expression in expressions for name in metric_names(expression)} - recorded().keys()


def panels(interval: str = "1m") -> dict[str, str]:
    """Return the expressions of the dashboard, by panel and letter, with `interval` and any value for its variables."""
    dashboard = json.loads((DEPLOY / "grafana/dashboards/poolrpc.json").read_text())
    return {
        f"{panel['title']} {target['refId']}": _VARIABLE.sub(".*", target["expr"].replace("$__rate_interval", interval))
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }


def runbook_section(alert: str) -> str:
    """Return the text of an alert's section of the runbook."""
    (section,) = re.findall(rf"^## {alert}\n(.*?)(?=^## |\Z)", RUNBOOK.read_text(), re.MULTILINE | re.DOTALL)
    return str(section)


def runbook_queries(alert: str) -> list[str]:
    """Return the expressions, single metrics included, that an alert's section of the runbook says to look at."""
    return [each for each in re.findall(r"`([^`]+)`", runbook_section(alert)) if _OURS.search(each)]


def metric_names(expression: str) -> set[str]:
    """Return the names of the metrics that an expression uses."""
    remaining = _LABELS.sub(" ", _MATCHERS.sub(" ", expression))
    return set(_METRIC.findall(remaining)) - _OPERATORS


def query_api(address: str, path: str, **query: str) -> Any:  # noqa: ANN401 - JSON
    """Return the data of a response of Prometheus's HTTP API."""
    url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=30) as response:
        return json.load(response)["data"]


def query_value(address: str, expression: str) -> float:
    """Return the current value of an expression with one sample; 0 if it has no sample."""
    samples = query_api(address, "query", query=expression)["result"]
    return float(samples[0]["value"][1]) if samples else 0.0


def wait_for_scrape(condition: Callable[[], bool], seconds: int = 60) -> bool:
    """Wait until a condition on the scraped metrics holds, and return whether it does."""
    # Prometheus scrapes every few seconds and does not notify anyone, so the condition has to be polled.
    never = threading.Event()
    return any(condition() or never.wait(0.5) for _ in range(2 * seconds))
