"""Addresses that several processes have as one: a port that all listen on, a unix socket's path that leads to one.

They are taken by the process that starts the others, and refused where another server has them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

from poolrpc._wire.arena_packets import SUFFIX
from poolrpc.access import unix_path
from poolrpc_server.sockets import is_live


class Shared(Protocol):
    """An address of several processes.

    Attributes:
        address: Where clients find it; a free port is filled in.

    """

    address: str

    def of(self, index: int) -> str:
        """Give the address that process number `index` listens on."""
        ...

    def lead_to(self, index: int) -> None:
        """Let new connections go to process number `index`, where the kernel doesn't spread them."""
        ...

    def close(self) -> None:
        """Give the address back, once the processes have ended."""
        ...


def share(address: str) -> Shared:
    """Take an address for several processes.

    Raises:
        ValueError: It can't be had, and why.

    """
    path = unix_path(address)
    try:
        return SharedPath(path) if path else SharedPort(address)
    except OSError as error:
        raise ValueError(f"{address}: can't be had: {error.strerror or error}") from None


class SharedPort:
    """A TCP port, kept by a socket that doesn't listen; the kernel spreads connections over those that do."""

    def __init__(self, address: str) -> None:
        """Take a port, a free one where it is 0."""
        host, _, port = address.rpartition(":")
        number, failure = int(port), OSError(errno.EADDRNOTAVAIL, "not of this machine")
        with ExitStack() as held:
            places = socket.getaddrinfo(host.strip("[]"), number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            kept = 0
            for family, place in dict.fromkeys((each[0], each[4]) for each in places):
                try:
                    keeper = held.enter_context(_keep(family, (place[0], number, *place[2:])))
                except OSError as error:
                    # A name may have an address of a family that this machine lacks.
                    if error.errno == errno.EADDRINUSE:
                        raise
                    failure = error
                else:
                    kept, number = kept + 1, keeper.getsockname()[1]
            if not kept:
                raise failure
            self._held = held.pop_all()
        self.address = f"{host}:{number}"

    def of(self, _: int) -> str:
        """Give the port, which is every process's."""
        return self.address

    def lead_to(self, index: int) -> None:
        """Do nothing: the kernel spreads connections."""

    def close(self) -> None:
        """Give the port back."""
        self._held.close()


def _keep(family: int, place: tuple[object, ...]) -> socket.socket:
    # One that won't share finds whoever listens there, but for the rests of ended connections.
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(place)
    # Without SO_REUSEADDR nobody else can take it before the processes listen; with the rests of connections of a
    # server that shared nothing there is no taking it but with.
    for reuse in (0, 1):
        keeper = socket.socket(family)
        try:
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            keeper.bind(place)
        except OSError as error:
            keeper.close()
            if reuse or error.errno != errno.EADDRINUSE:
                raise
        else:
            return keeper
    raise AssertionError("unreachable: the second attempt returns or raises")


class SharedPath:
    """A unix socket's path: a link to the socket of one process, PATH.0 or PATH.1 or so on; the arenas' likewise."""

    def __init__(self, path: str) -> None:
        """Take a path, and remove what an ended server left there."""
        self._path = Path(path)
        self.address = f"unix:{path}"
        self._lock = Path(f"{path}.lock")
        self._held = _lock(self._lock)
        try:
            self._clear()
        except BaseException:
            self._unlock()
            raise

    def of(self, index: int) -> str:
        """Give the socket of one process."""
        return f"{self.address}.{index}"

    def lead_to(self, index: int) -> None:
        """Point the links at the sockets of one process."""
        name = self._path.name
        for link, target in ((self._path, f"{name}.{index}"), (self._arenas, f"{name}.{index}{SUFFIX}")):
            # By names without a folder, so that the folder may be another one to a client in a container.
            if not link.with_name(target).exists():
                link.unlink(missing_ok=True)
                continue
            fresh = Path(f"{self._path}.link")
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(target)
            fresh.replace(link)  # at once: there is always one of the two

    def close(self) -> None:
        """Remove the links, and the sockets that killed processes left behind."""
        with suppress(OSError, ValueError):
            self._clear()
        self._unlock()

    @property
    def _arenas(self) -> Path:
        return Path(f"{self._path}{SUFFIX}")

    def _clear(self) -> None:
        own = re.compile(
            rf"{re.escape(self._path.name)}(\.\d+)?({re.escape(SUFFIX)})?|{re.escape(self._path.name)}\.link"
        )
        for path in [each for each in self._path.parent.iterdir() if own.fullmatch(each.name)]:
            _remove_stale(path, own)

    def _unlock(self) -> None:
        # Whoever waits for the file that this removes finds that it is no more the one of that name.
        self._lock.unlink(missing_ok=True)
        os.close(self._held)


def _lock(path: Path) -> int:
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(held), path.stat()):
                return held
        except BlockingIOError:
            os.close(held)
            raise ValueError(f"{path}: can't be had: expected no other server, got one") from None
        except BaseException:
            os.close(held)
            raise
        os.close(held)


def _remove_stale(path: Path, own: re.Pattern[str]) -> None:
    with suppress(FileNotFoundError):  # its server may be ending
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode) and own.fullmatch(str(path.readlink())):
            path.unlink()
        elif not stat.S_ISSOCK(mode):
            raise ValueError(f"{path}: expected no file, or the socket of an ended server; got another one")
        elif is_live(path):
            raise ValueError(f"{path}: can't be had: expected no other server, got one")
        else:
            path.unlink()
