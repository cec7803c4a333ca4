"""Addresses that several worker processes share: a TCP port, or the path of a unix socket.

The supervisor reserves them before it starts the workers, and fails if another server has one of them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

from poolrpc._wire.arena_packets import SUFFIX
from poolrpc.addresses import unix_path
from poolrpc_server.sockets import is_listening

WAIT_SECONDS = 3.0
"""Seconds to wait for an address that is in use: workers whose supervisor was killed are about to leave theirs."""


class SharedAddress(Protocol):
    """An address that several workers share.

    Attributes:
        address: The address for clients; port 0 is replaced by the port that was chosen.

    """

    address: str

    def worker_address(self, index: int) -> str:
        """Return the address on which worker `index` listens."""
        ...

    def direct_to(self, index: int) -> None:
        """Direct new connections to worker `index`, unless the kernel distributes connections itself."""
        ...

    def close(self) -> None:
        """Release the address; call it after the workers have ended."""
        ...


def reserve(address: str, wait_seconds: float = WAIT_SECONDS) -> SharedAddress:
    """Reserve an address for several workers.

    Args:
        address: The address.
        wait_seconds: Seconds to wait for another server to leave the address.

    Raises:
        ValueError: The address is in use, or does not belong to this machine.

    """
    path = unix_path(address)
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            return SharedPath(path) if path else SharedPort(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                raise ValueError(f"expected a free address, got {address!r}: {error.strerror or error}") from None
        time.sleep(0.05)  # the kernel reports to no process that an address becomes free


class SharedPort:
    """A TCP port, reserved by a bound socket that does not listen.

    The kernel distributes connections over the workers' sockets, which do.
    """

    def __init__(self, address: str) -> None:
        """Reserve a port; port 0 reserves a free one."""
        host, _, port = address.rpartition(":")
        number, failure = int(port), OSError(errno.EADDRNOTAVAIL, "it does not belong to this machine")
        with ExitStack() as sockets:
            found = socket.getaddrinfo(host.strip("[]"), number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            bound = 0
            for family, sockaddr in dict.fromkeys((each[0], each[4]) for each in found):
                try:
                    reserved = sockets.enter_context(_bind(family, (sockaddr[0], number, *sockaddr[2:])))
                except OSError as error:
                    # A name may resolve to an address of a family that this machine lacks.
                    if error.errno == errno.EADDRINUSE:
                        raise
                    failure = error
                else:
                    bound, number = bound + 1, reserved.getsockname()[1]
            if not bound:
                raise failure
            self._sockets = sockets.pop_all()
        self.address = f"{host}:{number}"

    def worker_address(self, _: int) -> str:
        """Return the port, which is the same for every worker."""
        return self.address

    def direct_to(self, index: int) -> None:
        """Do nothing: the kernel distributes connections."""

    def close(self) -> None:
        """Release the port."""
        self._sockets.close()


def _bind(family: int, sockaddr: tuple[object, ...]) -> socket.socket:
    # Without SO_REUSEPORT, this fails if any socket listens on the port. SO_REUSEADDR ignores connections in TIME_WAIT.
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(sockaddr)
    # Without SO_REUSEADDR, no other process can bind the port before the workers listen. But connections in TIME_WAIT,
    # of a server that did not set SO_REUSEPORT, make the first attempt fail.
    for reuse in (0, 1):
        reserved = socket.socket(family)
        try:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reserved.bind(sockaddr)
        except OSError as error:
            reserved.close()
            if reuse or error.errno != errno.EADDRINUSE:
                raise
        else:
            return reserved
    raise AssertionError("unreachable: the second attempt returns or raises")


class SharedPath:
    """The path of a unix socket: a symbolic link to one worker's socket, PATH.0 or PATH.1 and so on.

    PATH.arena, the path of the arenas' socket, is a link of the same kind.
    """

    def __init__(self, path: str) -> None:
        """Reserve a path, and remove the files that a server which has ended left there."""
        self._path = Path(path)
        self.address = f"unix:{path}"
        self._lock_file = Path(f"{path}.lock")
        self._lock = _acquire_lock(self._lock_file)
        try:
            self._remove_files()
        except BaseException:
            self._release_lock()
            raise

    def worker_address(self, index: int) -> str:
        """Return the address of worker `index`'s own socket."""
        return f"{self.address}.{index}"

    def direct_to(self, index: int) -> None:
        """Point the links at the sockets of worker `index`."""
        name = self._path.name
        links = ((self._path, f"{name}.{index}"), (Path(f"{self._path}{SUFFIX}"), f"{name}.{index}{SUFFIX}"))
        for link, target in links:
            # The target has no folder, because a client in a container may see the folder under another name.
            if not link.with_name(target).exists():
                link.unlink(missing_ok=True)
                continue
            temporary = Path(f"{self._path}.link")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            temporary.replace(link)  # atomic: the path exists at all times

    def close(self) -> None:
        """Remove the links, and the sockets that killed workers left behind."""
        with suppress(OSError, ValueError):
            self._remove_files()
        self._release_lock()

    def _remove_files(self) -> None:
        name, suffix = re.escape(self._path.name), re.escape(SUFFIX)
        ours = re.compile(rf"{name}(\.\d+)?({suffix})?|{name}\.link")
        for path in [each for each in self._path.parent.iterdir() if ours.fullmatch(each.name)]:
            _remove_stale(path, ours)

    def _release_lock(self) -> None:
        # A process that waits for this file's lock finds afterwards that the path no longer leads to this file.
        self._lock_file.unlink(missing_ok=True)
        os.close(self._lock)


def _acquire_lock(path: Path) -> int:
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise ValueError(f"expected a free address, got {path}: another server has locked it") from None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _remove_stale(path: Path, ours: re.Pattern[str]) -> None:
    with suppress(FileNotFoundError):  # its server may be ending and removing it at this moment
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode) and ours.fullmatch(str(path.readlink())):
            path.unlink()
        elif not stat.S_ISSOCK(mode):
            raise ValueError(f"expected no file or the socket of a server that has ended, got {path}: another file")
        elif is_listening(path):
            raise OSError(errno.EADDRINUSE, f"another server listens on {path}")
        else:
            path.unlink()
