"""Connections that do nothing, until a server has no descriptor left."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from fuzz.attacks.attack import Target, attack, in_threads
from fuzz.attacks.raw_peer import connect

if TYPE_CHECKING:
    import socket
    from threading import Event

LIMIT = 256
"""The limit on the server's descriptors: with the usual 1024 or more, the attack takes as many connections."""

THREADS = 8


def _hold(address: str, until: Event, count: int) -> None:
    """Open silent connections from eight threads, keep them, and open those again that the server closes."""

    def hold() -> None:
        connections: list[socket.socket] = []
        try:
            while not until.wait(0.02):
                connections = [connection for connection in connections if _is_open(connection)]
                if len(connections) < count // THREADS:
                    with suppress(OSError):
                        connections.append(connect(address, timeout=3))
                        connections[-1].setblocking(False)
        finally:
            for connection in connections:
                connection.close()

    in_threads(*[hold] * THREADS)


def _is_open(connection: socket.socket) -> bool:
    """Return whether the server has not closed a connection; close it otherwise."""
    with suppress(OSError):
        try:
            if connection.recv(4096):
                return True
        except BlockingIOError:
            return True
    connection.close()
    return False


@attack(variants=("tcp", "unix", "tokens", "workers"), descriptors=LIMIT, alone=True, new_connections_fail=True)
def silent_connections(target: Target, until: Event) -> None:
    """Open 256 silent connections at `ulimit -n 256` (row M3: new clients and /livez timed out, a thread spun).

    Sent: connections without a byte.
    Aims at: descriptors.
    """
    _hold(target.address, until, LIMIT * len(target.pids))


@attack(variants=("tcp", "workers"), descriptors=LIMIT, alone=True)
def silent_metrics_connections(target: Target, until: Event) -> None:
    """Open 256 silent connections to the metrics at `ulimit -n 256` (row M3: the listener spun without a descriptor).

    Sent: connections without a byte to the address of /metrics.
    Aims at: descriptors, and the threads of the HTTP server, one for each connection.
    """
    _hold(target.metrics, until, LIMIT)


@attack()
def silent_connections_within_limits(target: Target, until: Event) -> None:
    """Open 256 silent connections without a low limit on descriptors (of the kind of M3).

    Sent: connections without a byte.
    Aims at: memory and threads for each connection.
    """
    _hold(target.address, until, LIMIT * len(target.pids))
