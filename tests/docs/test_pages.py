"""The pages of docs/ agree with the code and the results."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import yaml
from sybil import Document

from poolrpc.errors import BY_CODE
from poolrpc_server.telemetry.metrics import Metrics
from scripts.prometheus_queries import RULES as ALERTS
from scripts.prometheus_queries import RUNBOOK, alerts, runbook_section
from scripts.tables import TABLES, pages, written
from tests.docs.blocks import PAGES, ROOT, RULES, read

if TYPE_CHECKING:
    from pathlib import Path

    from poolrpc import PoolError

ERRORS = ROOT / "docs/errors.md"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_tables_are_up_to_date(page: Path) -> None:
    """Tables of layers, flags, metrics, alerts and figures are what scripts.tables writes."""
    assert page.read_text() == written(page)


def test_every_table_is_on_a_page() -> None:
    """Every table that can be written is on a page."""
    text = "".join(page.read_text() for page in pages())
    assert all(f"<!-- {name}: written by" in text for name in TABLES)


@pytest.mark.parametrize("error", BY_CODE.values(), ids=lambda error: error.__name__)
def test_the_page_of_errors_has_every_error(error: type[PoolError]) -> None:
    """Every error has a line with its gRPC status."""
    assert f"| `{error.__name__}` | {error.code} |" in ERRORS.read_text()


def test_a_block_of_an_unknown_language_has_no_rule() -> None:
    """A block without a language, or of an unknown one, has no rule and so fails."""
    text = "```\nx\n```\n\n```cobol\nx\n```\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n"
    found = [block for _, block in read(Document(text, str(ROOT / "docs/none.md")))]
    assert [(each.rule, each.expected) for each in found] == [("", None), ("", None), ("python", "1\n")]


def test_every_rule_but_rays_is_used() -> None:
    """Every rule has a block, except for Ray's, whose pages are optional."""
    used = {block.rule for path in PAGES for _, block in read(Document(path.read_text(), str(path)))}
    assert set(RULES) - used <= {"ray"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_counters_on_a_page_exist(page: Path) -> None:
    """Every counter that a page names is in the table of metrics, or that of a server with workers."""
    known = {f"{each.name}_total" for each in Metrics().collect().collect()} | {"poolrpc_worker_restarts_total"}
    assert set(re.findall(r"\bpoolrpc_\w+_total\b", page.read_text())) - known == set()


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *PAGES], ids=lambda page: page.name)
def test_paths_on_a_page_exist(page: Path) -> None:
    """Every path of the repository that a page names in code exists."""
    folders = "benchmarks|client|deploy|docs|examples|fuzz|protos|scripts|server|tests"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text()))
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("alert", alerts())
def test_every_alert_has_a_section_of_the_runbook(alert: str) -> None:
    """The alert's annotation leads to the section, which says what the alert means, how to look, and what to do."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    (rule,) = (each for group in groups for each in group["rules"] if each.get("alert") == alert)
    assert rule["annotations"]["runbook"] == f"docs/runbook.md#{alert.lower()}"
    assert re.findall(r"^\*\*(\w+)\.\*\*", runbook_section(alert), re.MULTILINE) == ["Meaning", "Look", "Do"]


def test_the_runbook_has_no_other_sections() -> None:
    """A section whose alert was removed is removed too."""
    sections = re.findall(r"^## (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert set(sections) == set(alerts())
