"""Fixtures of the tests of the client's transports."""

import shutil
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from poolrpc._transport.arena_memory import Arenas
from tests.unit.client.transport.peer import Peer
from tests.unit.server.transports.local.raw_client import MIB, listening

if sys.platform != "linux":
    collect_ignore_glob = ["test_arena_*.py"]


@pytest.fixture(scope="module")
def peer():
    """Return a server without gRPC, with wide limits."""
    made = Peer()
    yield made
    made.close()


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


@pytest.fixture
def arenas(listener, path):
    """Return a client's arenas, of 1 MiB each, from `listener`."""
    assert listener.live == 0
    with closing(Arenas(path, arena_bytes=MIB)) as made:
        yield made
