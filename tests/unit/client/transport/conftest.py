"""Fixtures of the tests of the client's transports."""

import sys
from contextlib import closing

import pytest

from poolrpc._transport.arena_memory import Arenas
from tests.unit.client.transport.peer import Peer
from tests.unit.server.transports.local.fixtures import folder, listener, path
from tests.unit.server.transports.local.raw_client import MIB

__all__ = ["arenas", "folder", "listener", "path", "peer"]

if sys.platform != "linux":
    collect_ignore_glob = ["test_arena_*.py"]


@pytest.fixture(scope="module")
def peer():
    """Return a server without gRPC, with wide limits."""
    made = Peer()
    yield made
    made.close()


@pytest.fixture
def arenas(listener, path):
    """Return a client's arenas, of 1 MiB each, from `listener`."""
    assert listener.live == 0
    with closing(Arenas(path, arena_bytes=MIB)) as made:
        yield made
