"""Fixtures for tests of arenas."""

import logging
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import pytest

if sys.platform != "linux":
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.unit.server.transports.local.raw_client import PATIENCE, listening


@pytest.fixture
def folder():
    """Return a new folder that other users may enter, unlike those of pytest."""
    made = Path(tempfile.mkdtemp(prefix="arena-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def path(folder):
    """Return the path of the server's own socket, which these tests do not need to exist."""
    return str(folder / "pool.sock")


@pytest.fixture
def listener(path):
    """Return a running listener with room for 8 arenas and 64 MiB."""
    with listening(path) as made:
        yield made


class LogLines(logging.Handler):
    """The messages of the server's log.

    Attributes:
        lines: The messages so far.

    """

    def __init__(self):
        super().__init__()
        self.lines = []
        self._changed = threading.Condition()

    def emit(self, record):
        """Keep a message."""
        with self._changed:
            self.lines.append(record.getMessage())
            self._changed.notify_all()

    def wait_for(self, line):
        """Wait for a message."""
        with self._changed:
            return self._changed.wait_for(lambda: line in self.lines, PATIENCE)


@pytest.fixture
def log():
    """Return the messages that the server logs during the test."""
    logger, handler = logging.getLogger("poolrpc_server"), LogLines()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
