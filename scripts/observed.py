"""What the dashboard and the alerts of deploy/ ask of Prometheus, and asking it, for the tests."""

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

DEPLOY = Path(__file__).parents[1] / "deploy"
RULES = DEPLOY / "prometheus/alerts.yml"

# Of an expression: strings, matchers and ranges, then lists of labels; what is left are numbers, functions and metrics.
_MATCHED = re.compile(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]')
_LABELS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_METRIC = re.compile(r"\b[a-z_][a-z_0-9]*\b(?!\s*\()")
_OPERATORS = {"and", "or", "unless", "bool", "offset"}


def alerts() -> dict[str, str]:
    """Give the alerts' expressions by their names."""
    rules = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: str(rule["expr"]) for group in rules for rule in group["rules"]}


def panels(interval: str = "1m") -> dict[str, str]:
    """Give the dashboard's expressions by panel and letter, with what Grafana fills in."""
    dashboard = json.loads((DEPLOY / "grafana/dashboards/poolrpc.json").read_text())
    return {
        f"{panel['title']} {target['refId']}": target["expr"].replace("$__rate_interval", interval)
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }


def metrics(expression: str) -> set[str]:
    """Give the names of the metrics that an expression uses."""
    left = _LABELS.sub(" ", _MATCHED.sub(" ", expression))
    return set(_METRIC.findall(left)) - _OPERATORS


def ask(address: str, path: str, **query: str) -> Any:  # noqa: ANN401 - JSON
    """Give the data of an answer of Prometheus's API."""
    url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)["data"]


def value(address: str, expression: str) -> float:
    """Give what an expression of one sample is now; 0 where it has none."""
    samples = ask(address, "query", query=expression)["result"]
    return float(samples[0]["value"][1]) if samples else 0.0


def await_scrape(true: Callable[[], bool], seconds: int = 60) -> bool:
    """Wait until something is true of what Prometheus has scraped; tell whether it is."""
    # It scrapes on its own, every few seconds, and tells nobody: asking again is the only way to hear of it.
    again = threading.Event()
    return any(true() or again.wait(0.5) for _ in range(2 * seconds))
