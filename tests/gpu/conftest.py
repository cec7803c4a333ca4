"""Mark every test of this folder as one that needs a GPU, and skip all in one line if there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.hookimpl(tryfirst=True)  # so that -m sees the mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup() -> None:
    """Skip from here: a mark or a fixture would print a line for each test."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, but this machine has none")
