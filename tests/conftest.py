"""What every test has: the server's log as it was before; and the programs of others for those that want them."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]
UNREACHABLE = (
    *("Connection", "Temporary failure", "Could not", "ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT"),
    *("ENETUNREACH", "can't be fetched"),
)
"""What installers say for want of a network, or on a machine that they aren't for."""


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """Undo what a command that a test runs in this process does to the log: its stream is closed with the test."""
    log = logging.getLogger("poolrpc_server")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


@pytest.fixture(scope="session")
def fetch() -> Callable[[str, str], Path]:
    """Give the way to run a script that fetches programs of others, and the folder that it fills.

    Where they can't be had the tests are skipped; CI, which must, fails.
    """

    def fetched(script: str, folder: str) -> Path:
        command = [ROOT / "scripts" / script]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ours
        if done.returncode and "CI" not in os.environ and any(word in done.stderr for word in UNREACHABLE):
            pytest.skip(f"scripts/{script} has no way to fetch what it is to: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stdout + done.stderr
        return ROOT / folder

    return fetched
