"""A server in this process, a wait for what it shows, and the options of a client with a connection of its own."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import poolrpc_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OWN_CONNECTION = {"grpc.use_local_subchannel_pool": 1, "grpc.enable_retries": 0}
"""Options of a channel that tries once, on a connection of its own; others with the same options share one."""


@contextmanager
def server(**settings: object) -> Iterator[str]:
    """Run a server in this process, and return its address."""
    made = poolrpc_server.Server(poolrpc_server.Config(**{"listen": ("127.0.0.1:0",), **settings}))
    made.start()
    try:
        yield made.addresses[0].replace("127.0.0.1", "localhost")
    finally:
        made.stop(grace=0)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until a condition holds: what a server shows, some time after its caller has seen the cause."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
