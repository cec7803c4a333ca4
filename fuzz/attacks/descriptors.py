"""Connections that do nothing, until a server has no descriptor left."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from fuzz.attacks.attack import Target, attack, repeat
from fuzz.attacks.raw_peer import connect

if TYPE_CHECKING:
    from threading import Event

LIMIT = 256
"""The limit on the server's descriptors: with the usual 1024 or more, the attack takes as many connections."""


def _hold(address: str, until: Event) -> None:
    """Open silent connections for as long as the server takes them, and open those again that it closes."""
    with ExitStack() as held:
        connections: list[socket.socket] = []
        while not until.is_set():
            for connection in [*connections]:
                with suppress(BlockingIOError):
                    if not _is_open(connection):
                        connections.remove(connection)
            while len(connections) < LIMIT and not until.is_set():
                with suppress(OSError):
                    connections.append(held.enter_context(connect(address, timeout=1)))
                    connections[-1].setblocking(False)
                    continue
                break
            until.wait(0.1)


def _is_open(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(4096))
    except BlockingIOError:
        return True
    except OSError:
        return False


@attack(variants=("tcp", "unix", "tokens", "workers"), descriptors=LIMIT, alone=True)
def silent_connections(target: Target, until: Event) -> None:
    """Open 256 silent connections at `ulimit -n 256` (row M3: new clients and /healthz timed out, a thread spun).

    Sent: connections without a byte.
    Aims at: descriptors.
    """
    repeat(until, lambda: _hold(target.address, until))


@attack(variants=("tcp", "workers"), descriptors=LIMIT, alone=True)
def silent_metrics_connections(target: Target, until: Event) -> None:
    """Open 256 silent connections to the metrics at `ulimit -n 256` (row M3: the listener spun without a descriptor).

    Sent: connections without a byte to the address of /metrics.
    Aims at: descriptors, and the threads of the HTTP server, one for each connection.
    """
    repeat(until, lambda: _hold(target.metrics, until))


@attack()
def silent_connections_within_limits(target: Target, until: Event) -> None:
    """Open 256 silent connections without a low limit on descriptors (of the kind of M3).

    Sent: connections without a byte, and 64 to the metrics.
    Aims at: memory and threads for each connection.
    """
    repeat(until, lambda: _hold(target.address, until))
