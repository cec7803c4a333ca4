"""Addresses to listen on: whether they are free, and preparing the path of a unix socket for a new server."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from poolrpc._wire.arena_packets import SUFFIX
from poolrpc.addresses import unix_path

MAX_PATH_BYTES = 107
"""Maximum length of a unix socket's path on Linux."""

BIND_FAILURES = {errno.EADDRINUSE: "it is in use", errno.EADDRNOTAVAIL: "it does not belong to this machine"}
"""What the usual errors of an address mean, for an operator."""


class AddressInUseError(ValueError):
    """Another process has the address now; it may be free later."""


def listen(address: str, *, backlog: int, share_port: bool = False) -> tuple[socket.socket, str]:
    """Return a socket that listens on "host:port", and its address: with the port that port 0 stands for."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if (v6 := ":" in host) else socket.AF_INET
    made = socket.create_server(
        (host.strip("[]"), int(port)), family=family, backlog=backlog, reuse_port=share_port, dualstack_ipv6=v6
    )
    return made, f"{host}:{made.getsockname()[1]}"


def require_free(address: str) -> None:
    """Raise if a server could not listen on an address, without waiting for its imports.

    The address may still be taken before the server has it, and a name that only gRPC can resolve is left to gRPC.

    Args:
        address: "host:port" or "unix:PATH".

    Raises:
        AddressInUseError: The address is in use.
        ValueError: The address is not one of this machine, or no path for a socket.

    """
    path = unix_path(address)
    if path:
        length = len(os.fsencode(path))
        if length > MAX_PATH_BYTES:
            raise ValueError(f"expected a path of at most {MAX_PATH_BYTES} bytes, got {length}: {address!r}")
        folder = Path(path).parent
        if not folder.is_dir():
            raise ValueError(f"expected a path in an existing folder, got {address!r}: there is no folder {folder}")
        if is_listening(Path(path)):
            raise AddressInUseError(f"expected a free address, got {address!r}: {BIND_FAILURES[errno.EADDRINUSE]}")
        return
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return
    failures = [_bind_error(family, sockaddr) for family, _, _, _, sockaddr in found]
    # Of several addresses of a name, gRPC needs one.
    if all(failures):
        in_use = (failure for failure in failures if failure and failure.errno == errno.EADDRINUSE)
        failure = next(in_use, failures[0])
        assert failure is not None  # noqa: S101 - all of them failed
        reason = BIND_FAILURES.get(failure.errno or 0, failure.strerror)
        cls = AddressInUseError if failure.errno == errno.EADDRINUSE else ValueError
        raise cls(f"expected a free address, got {address!r}: {reason}")


def _bind_error(family: int, sockaddr: tuple[object, ...]) -> OSError | None:
    """Return why a server could not bind an address."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As gRPC does: connections in TIME_WAIT do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(sockaddr)
    except OSError as error:
        return error
    return None


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
