"""A connection that breaks in the middle of a response, which gRPC itself does not try again."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest

import poolrpc
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integration.conftest import Connect

PATIENCE = 60
X = np.random.default_rng(3).standard_normal((1, 16, 512, 512), np.float32)  # the response has 4 MiB
EXPECTED = X.reshape(1, 16, 256, 2, 256, 2).max((3, 5))
LAYER = poolrpc.MaxPool2d(2)


class Proxy:
    """A TCP proxy, which resets its first connections after a megabyte of a response.

    Attributes:
        address: Its address.
        broken: The number of connections that it has reset.

    """

    def __init__(self, server: str, breaks: int) -> None:
        host, _, port = server.rpartition(":")
        self._server = host, int(port)
        self._breaks = breaks
        self.broken = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                caller, server = self._listening.accept()[0], socket.create_connection(self._server)
                threading.Thread(target=self._copy, args=(caller, server, None), daemon=True).start()
                left = 2**20 if self.broken < self._breaks else None
                threading.Thread(target=self._copy, args=(server, caller, left), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, left: int | None) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
                left = None if left is None else left - len(data)
                if left is not None and left <= 0:
                    self.broken += 1
                    # A reset, as of a peer that was killed.
                    target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def proxied() -> Iterator[Callable[[int], Proxy]]:
    """Return a function that starts a server behind a proxy that breaks so many connections."""
    with ExitStack() as stack:

        def start(breaks: int) -> Proxy:
            proxy = Proxy(stack.enter_context(serving()).address, breaks)
            stack.callback(proxy.close)
            return proxy

        yield start


def test_the_client_tries_again(proxied: Callable[[int], Proxy], connect: Connect) -> None:
    """The caller receives the result and no error."""
    proxy = proxied(1)
    assert np.array_equal(connect(proxy.address).pool(X, LAYER, transport="unary").output, EXPECTED)
    assert proxy.broken == 1


@pytest.mark.parametrize(("options", "attempts"), [({}, 2), ({"grpc.enable_retries": 0}, 1)])
def test_the_client_tries_again_once_and_only_with_retries(
    proxied: Callable[[int], Proxy], options: dict[str, int], attempts: int
) -> None:
    """If every connection breaks the call is an error; without retries there is one attempt."""
    proxy = proxied(100)
    with poolrpc.PoolClient(proxy.address, timeout=PATIENCE, options=options) as client:
        with pytest.raises(poolrpc.UnavailableError):
            client.pool(X, LAYER, transport="unary")
        assert proxy.broken == attempts
