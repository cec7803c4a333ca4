"""Programs of other projects, which a script installs when a test needs them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def install(script: str, what: str) -> None:
    """Run an installer. If it cannot download what it installs, the test is skipped; in CI it fails."""
    done = subprocess.run([ROOT / script], capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if done.returncode and "CI" not in os.environ and unreachable(done.stderr):
        pytest.skip(f"{what} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr


def unreachable(said: str) -> bool:
    """Return whether an installer failed because of the network, or because the machine is not supported."""
    words = ("Connection", "Temporary failure", "Could not", "ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT")
    words += ("ENETUNREACH", "can't be fetched")
    return any(word in said for word in words)
