"""Programs that the tests of deploy/ run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.installing import ROOT, install

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def programs() -> Path:
    """Install prometheus and promtool, and return their folder."""
    install("scripts/install_prometheus.sh", "Prometheus")
    return ROOT / ".debs/prometheus/usr/bin"
