"""A server in the process of its client: for notebooks, tests and examples."""

from __future__ import annotations

import os
import weakref
from contextlib import ExitStack
from typing import Any

from poolrpc import PoolClient
from poolrpc_server.app import Server
from poolrpc_server.config import Config
from poolrpc_server.process import private_folder


class _EmbeddedClient(PoolClient):
    """A client that stops its server when it is closed, or at the end of the process."""

    def __init__(self, address: str, server: ExitStack) -> None:
        super().__init__(address)
        self._stop_server = weakref.finalize(self, _close_in, os.getpid(), server)

    def __repr__(self) -> str:
        return f"PoolClient({self.address!r})"

    def __reduce__(self) -> tuple[object, ...]:
        # A copy in another process is an ordinary client of this server.
        return PoolClient, (self.address,)

    def close(self) -> None:
        super().close()
        self._stop_server()


def _close_in(pid: int, server: ExitStack) -> None:
    # A child after a fork has copies of the server's sockets, but none of its threads.
    if os.getpid() == pid:
        server.close()


def embedded(**settings: Any) -> PoolClient:  # noqa: ANN401 - Config's fields
    """Run a whole server in this process, on a private unix socket, and return a client that is connected to it.

    The server stops when the client is closed: at the end of a with block, by `close`, or with the process.

    Args:
        settings: Fields of Config: threads, device, limits. torch uses one thread on each of the server's own threads;
            the number of the caller's threads is left alone.

    Raises:
        ConfigError: A setting is wrong.

    Examples:
        >>> import numpy as np
        >>> from poolrpc import MaxPool2d
        >>> from poolrpc_server import embedded
        >>> with embedded() as client:
        ...     client.pool(np.zeros((1, 3, 8, 8), np.float32), MaxPool2d(2)).shape
        (1, 3, 4, 4)

    """
    with ExitStack() as stack:
        folder = stack.enter_context(private_folder())  # not in TMPDIR if its path is too long for a socket
        server = Server(Config(**{"listen": (f"unix:{folder / 'pool.sock'}",), **settings}))
        server.start()
        stack.callback(server.stop, grace=0)
        return _EmbeddedClient(server.addresses[0], stack.pop_all())
