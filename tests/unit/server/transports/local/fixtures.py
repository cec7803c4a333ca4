"""A listener of arenas and its socket, for the tests of the server's side and of the client's."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.unit.server.transports.local.raw_client import listening


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
