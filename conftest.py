"""Makes tests of the code blocks in README.md and docs/."""

from __future__ import annotations

import pytest
from sybil.integration.pytest import SybilItem

from tests.docs.blocks import DOCUMENTS, MARKS

pytest_collect_file = DOCUMENTS.pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the pages of which a block needs something to be installed: its blocks share a server."""
    blocks = [item for item in items if isinstance(item, SybilItem)]
    marks = {item.path: mark for item in blocks if (mark := MARKS.get(item.example.parsed.rule))}
    for item in blocks:
        if mark := marks.get(item.path):
            item.add_marker(mark)
            item.add_marker(pytest.mark.timeout(600))
