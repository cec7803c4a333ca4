"""Unix sockets' paths: whether a server is listening on one, and taking one over from a server that has ended."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from poolrpc._wire.arena_packets import SUFFIX


def take(path: Path) -> None:
    """Make sure that a unix socket's path is no other server's, from which gRPC would take it without a word.

    Raises:
        BlockingIOError: It is.

    """
    if is_live(path):
        raise BlockingIOError(errno.EAGAIN, "expected no other server, got one", str(path))
    for link in (path, Path(f"{path}{SUFFIX}")):  # which workers that ended may have left
        if link.is_symlink() and not link.exists():
            link.unlink(missing_ok=True)


def is_live(path: Path) -> bool:
    """Tell whether somebody listens on a unix socket, of whatever kind."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # so that one with no room for more connections is told from none
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
        return True
