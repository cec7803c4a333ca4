"""A connection that breaks in the middle of an answer, which gRPC itself does not try again."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest

import poolrpc
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 60
X = np.random.default_rng(3).standard_normal((1, 16, 512, 512), np.float32)  # the answer has 4 MiB
EXPECTED = X.reshape(1, 16, 256, 2, 256, 2).max((3, 5))
LAYER = poolrpc.MaxPool2d(2)


class Breaking:
    """A way to a server, on which so many connections break off once a megabyte of answers has come by.

    Attributes:
        address: Where it begins.
        broken: How many have.

    """

    def __init__(self, server: str, most: int) -> None:
        host, _, port = server.rpartition(":")
        self._server = host, int(port)
        self._most = most
        self.broken = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Let nobody through any more."""
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                caller, server = self._listening.accept()[0], socket.create_connection(self._server)
                threading.Thread(target=self._copy, args=(caller, server, None), daemon=True).start()
                left = 2**20 if self.broken < self._most else None
                threading.Thread(target=self._copy, args=(server, caller, left), daemon=True).start()

    def _copy(self, source: socket.socket, goal: socket.socket, left: int | None) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                goal.sendall(data)
                left = None if left is None else left - len(data)
                if left is not None and left <= 0:
                    self.broken += 1
                    # A reset, as of a peer that was killed.
                    goal.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
        for each in (source, goal):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@contextmanager
def breaking(most: int) -> Iterator[Breaking]:
    """Give a way to a server on which so many connections break."""
    with serving() as server:
        made = Breaking(server.address, most)
        yield made
        made.close()


def test_the_client_asks_again() -> None:
    """The caller has its answer, and never hears of it."""
    with breaking(1) as way, poolrpc.PoolClient(way.address, timeout=PATIENCE) as client:
        assert np.array_equal(client.pool(X, LAYER, transport="unary").output, EXPECTED)
        assert way.broken == 1


async def test_the_async_client_asks_again() -> None:
    """So does the other client."""
    with breaking(1) as way:
        async with poolrpc.AsyncPoolClient(way.address, timeout=PATIENCE) as client:
            assert np.array_equal((await client.pool(X, LAYER, transport="unary")).output, EXPECTED)
        assert way.broken == 1


@pytest.mark.parametrize(("options", "asked"), [({}, 2), ({"grpc.enable_retries": 0}, 1)])
def test_it_does_so_once_and_not_without_retries(options: dict[str, int], asked: int) -> None:
    """Whatever breaks every connection is an error; and whoever wants no retries has none."""
    with breaking(100) as way, poolrpc.PoolClient(way.address, timeout=PATIENCE, options=options) as client:
        with pytest.raises(poolrpc.UnavailableError):
            client.pool(X, LAYER, transport="unary")
        assert way.broken == asked
