"""Fixtures for tests of arenas."""

import logging
import sys
import threading

import pytest

if sys.platform != "linux":
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.unit.server.transports.local.fixtures import folder, listener, path
    from tests.unit.server.transports.local.raw_client import PATIENCE

    __all__ = ["folder", "listener", "log", "path"]


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
