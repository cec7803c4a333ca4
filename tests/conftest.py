"""A fixture of every test: the server's log is restored after the test."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _restore_log() -> Iterator[None]:
    """Remove the handlers of commands that ran in this process: their stream is closed with the test."""
    log = logging.getLogger("poolrpc_server")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)
