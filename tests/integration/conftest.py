"""A server on 127.0.0.1 for the tests: one in this process, or the one whose address the environment names.

POOLRPC_TEST_ADDRESS lets test_client.py run where there is no torch, against a server elsewhere on this machine: CI
does so at the lowest versions that the client claims to support.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import poolrpc

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The address of a server."""
    if "POOLRPC_TEST_ADDRESS" in os.environ:
        yield os.environ["POOLRPC_TEST_ADDRESS"]
        return
    import poolrpc_server  # noqa: PLC0415 - not where only the client is installed

    server = poolrpc_server.Server(poolrpc_server.Config(listen=("127.0.0.1:0",)))
    server.start()
    yield server.addresses[0]
    server.stop(grace=0)


@pytest.fixture
def client(address: str) -> Iterator[poolrpc.PoolClient]:
    """A client of that server."""
    with poolrpc.PoolClient(address) as made:
        yield made
