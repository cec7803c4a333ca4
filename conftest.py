"""Makes the blocks of code in README.md and docs/ tests."""

from __future__ import annotations

import pytest
from sybil.integration.pytest import SybilItem

from tests.docs.blocks import DOCUMENTS, MARKS

pytest_collect_file = DOCUMENTS.pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the blocks that need more than is here."""
    for each in items:
        if isinstance(each, SybilItem) and (mark := MARKS.get(each.example.parsed.rule)):
            each.add_marker(mark)
            each.add_marker(pytest.mark.timeout(600))
