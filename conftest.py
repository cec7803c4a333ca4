"""Makes tests of the code blocks in README.md and docs/."""

from __future__ import annotations

import pytest
from sybil.integration.pytest import SybilItem

from tests.docs.blocks import DOCUMENTS, MARKS

pytest_collect_file = DOCUMENTS.pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the blocks that need something to be installed."""
    for item in items:
        if isinstance(item, SybilItem) and (mark := MARKS.get(item.example.parsed.rule)):
            item.add_marker(mark)
            item.add_marker(pytest.mark.timeout(600))
