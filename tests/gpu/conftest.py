"""Every test of this folder needs a GPU: it has the mark for it, and without one all are skipped in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.hookimpl(tryfirst=True)  # so that -m sees the mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is of this folder."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup() -> None:
    """Skip from here, and not by a mark or a fixture, which would be a line for each test."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none here")
