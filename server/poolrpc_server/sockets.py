"""The paths of unix sockets: whether a server listens on one, and preparing one for a new server."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from poolrpc._wire.arena_packets import SUFFIX


def prepare_path(path: Path) -> None:
    """Make the path of a unix socket ready for a server to bind: remove the links that ended workers left there.

    gRPC itself would silently take the path from a server that still listens on it.

    Raises:
        BlockingIOError: Another server listens on the path.

    """
    if is_listening(path):
        raise BlockingIOError(errno.EAGAIN, "expected a path that no server listens on", str(path))
    for link in (path, Path(f"{path}{SUFFIX}")):
        if link.is_symlink() and not link.exists():
            link.unlink(missing_ok=True)


def is_listening(path: Path) -> bool:
    """Return whether a process listens on a unix socket of any type."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a socket whose backlog is full must not block the probe
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # the backlog is full, or the socket is of another type
            return True
        return True
