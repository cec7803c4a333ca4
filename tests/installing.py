"""What tests want that is no dependency of ours, and is installed by a script when a test asks for it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def install(script: str, what: str) -> None:
    """Run an installer. Where it can't reach the registries the test is skipped; in CI, which must, it fails."""
    done = subprocess.run([ROOT / script], capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if done.returncode and "CI" not in os.environ and unreachable(done.stderr):
        pytest.skip(f"the registries of {what} can't be reached")
    assert done.returncode == 0, done.stdout + done.stderr


def unreachable(said: str) -> bool:
    """Tell whether an installer failed for want of a network."""
    words = ("Connection", "Temporary failure", "ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT", "ENETUNREACH")
    return any(word in said for word in words)
