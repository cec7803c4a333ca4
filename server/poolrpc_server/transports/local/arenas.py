"""The arenas: memory that this process shares with clients on its host, one to a connection of a unix socket.

A client connects to the socket beside the gRPC one (its name has ".arena" added), sends one packet, an AttachRequest,
and gets an AttachResponse with the descriptor of a memfd. That is sealed: nobody can shrink it under its readers, whom
that would kill. Its id is 128 random bits and the only way to name it. The arena ends with the connection, so a client
that is killed leaves nothing behind.
"""

from __future__ import annotations

import mmap
import os
import secrets
import selectors
import socket
import stat
import sys
import threading
import time
import weakref
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from poolrpc._wire.arena_packets import (
    ID_BYTES,
    SUFFIX,
    decode_attach_request,
    encode_attach_error,
    encode_attach_response,
    peer_uid,
)
from poolrpc.errors import InvalidArgumentError, LimitExceededError, NotFoundError, PermissionDeniedError, PoolError
from poolrpc.tensors import ALIGNMENT
from poolrpc_server.telemetry.logs import log

if sys.platform == "linux":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_WAITING = 64
"""Connections without an arena, at most; a further one is closed at once."""

WAITING_SECONDS = 10.0
"""How long a connection may be without an arena."""

PAUSE_SECONDS = 1.0
"""How long none is accepted after accepting one failed (no descriptors left, say), unless one ends before."""

REQUEST_BYTES = 64
"""The largest packet that may be a request; a size takes 11 bytes."""


class Arena:
    """Memory that one client shares with this process, mapped for as long as this object or a slice of it lives."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._view = memoryview(mapping)

    @property
    def size(self) -> int:
        """Its bytes."""
        return len(self._view)

    def slice(self, part: tuple[int, int], field: str) -> memoryview:
        """Give a part of the arena, writable; the client may change it at any time.

        Args:
            part: Its offset and its length.
            field: The path of the field that says so, for the error.

        Raises:
            InvalidArgumentError: It isn't aligned, or not inside the arena.

        """
        offset, length = part
        if offset % ALIGNMENT:
            raise InvalidArgumentError(f"expected a multiple of {ALIGNMENT}, got {offset}", field=f"{field}.offset")
        if not 0 <= offset <= self.size:
            msg = f"expected at most the arena's {self.size} bytes, got {offset}"
            raise InvalidArgumentError(msg, field=f"{field}.offset")
        # The two are never added, so nothing can wrap in whatever this may be rewritten in.
        if not 0 <= length <= self.size - offset:
            msg = f"expected at most the {self.size - offset} bytes between {offset} and the arena's end, got {length}"
            raise InvalidArgumentError(msg, field=f"{field}.length")
        return self._view[offset : offset + length]


class ArenaListener:
    """The socket that gives arenas out, and the thread that serves it, from the moment that this is made.

    Args:
        path: The server's unix socket, without SUFFIX.
        max_bytes: Bytes of all arenas together, at most; those of ended ones count while a call still uses them.
        max_arenas: Arenas, at most, counted likewise.
        allowed_uid: The one user who may connect. None: that of this process.
        calls: The name of the socket, in the same folder, to which clients are to send the calls that use an arena.
            Empty: where they send all others.

    Raises:
        ValueError: There can't be arenas there, and why.

    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_bytes: int,
        max_arenas: int,
        allowed_uid: int | None = None,
        calls: str = "",
    ) -> None:
        if sys.platform != "linux":
            raise ValueError("arenas need Linux, which alone has memfd")
        self._calls = calls
        self._max_bytes = max_bytes
        self._max_arenas = max_arenas
        self._allowed_uid = os.geteuid() if allowed_uid is None else allowed_uid
        # Other threads read these three, each time by one step of a dict's; all else belongs to the thread.
        self._arenas: dict[bytes, Arena] = {}
        self._mapped: dict[bytes, int] = {}
        self._attached: dict[socket.socket, bytes] = {}
        self._changed = threading.Condition()
        self._waiting: dict[socket.socket, float] = {}  # until when; the earliest is first
        self._paused_until: float | None = None
        self._path = Path(f"{path}{SUFFIX}")
        self._socket, self._file = _listen(self._path)
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._selector.register(self._socket, selectors.EVENT_READ, self._accept)
        self._thread = threading.Thread(target=self._run, name="poolrpc-arena", daemon=True)
        self._thread.start()

    @property
    def live(self) -> int:
        """How many arenas have a client."""
        return len(self._attached)

    @property
    def nbytes(self) -> int:
        """The bytes of all arenas, with those whose client is gone while a call still uses them."""
        return sum(self._mapped.copy().values())

    def find(self, arena_id: bytes) -> Arena:
        """Give an arena; it stays mapped for as long as the caller holds it or a slice of it.

        Raises:
            NotFoundError: There is none of that id, or no more.

        """
        arena = self._arenas.get(arena_id)
        if arena is None:
            raise NotFoundError("expected an arena of this server, got an unknown or ended one", reason="ARENA")
        return arena

    def wait_for(self, live: int, timeout: float | None = None) -> bool:
        """Wait until `live` arenas have a client; False where `timeout` seconds pass before."""
        with self._changed:
            return self._changed.wait_for(lambda: self.live == live, timeout)

    def close(self) -> None:
        """End every arena, stop listening, remove the socket's file; a call under way keeps the memory it uses."""
        with suppress(OSError):  # closed before
            self._wake.send(b"\0")
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select(self._patience()):
                    if key.data is None:
                        return
                    self._guarded(key.data)
                self._guarded(self._expire)
                with self._changed:
                    self._changed.notify_all()
        finally:
            self._end()

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:  # noqa: BLE001 - whatever a client does, the thread lives on for the others
            log.exception("arena socket failed")

    def _patience(self) -> float | None:
        times = [each for each in (next(iter(self._waiting.values()), None), self._paused_until) if each is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _expire(self) -> None:
        now = time.monotonic()
        for connection in [each for each, until in self._waiting.items() if until <= now]:
            self._drop(connection)
        if self._paused_until is not None and self._paused_until <= now:
            self._resume()

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as failure:
            # The connection that still waits would make the selector return at once, again and again.
            log.warning("arena socket accepts nothing for now", error=failure.strerror)
            self._selector.unregister(self._socket)
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            return
        with ExitStack() as refused:
            refused.callback(connection.close)
            connection.setblocking(False)
            if peer_uid(connection) != self._allowed_uid:
                error = PermissionDeniedError("expected the server's user, got another", reason="ARENA_USER")
                _refuse(connection, error)
            elif len(self._waiting) >= MAX_WAITING:
                log.warning("arena refused", reason="ARENA_WAITING")
            else:
                self._selector.register(connection, selectors.EVENT_READ, lambda: self._serve(connection))
                self._waiting[connection] = time.monotonic() + WAITING_SECONDS
                refused.pop_all()

    def _serve(self, connection: socket.socket) -> None:
        # A client that has its arena has nothing more to say: whatever comes, most often its end, ends the arena.
        if connection in self._attached:
            self._drop(connection)
            return
        try:
            self._attach(connection)
        except PoolError as error:
            _refuse(connection, error)
            self._drop(connection)
        except ConnectionError:  # the client is gone
            self._drop(connection)
        except BaseException:
            self._drop(connection)
            raise

    def _attach(self, connection: socket.socket) -> None:
        size = _requested(connection)
        self._check(size)
        arena_id = secrets.token_bytes(ID_BYTES)
        descriptor = os.memfd_create("poolrpc-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            mapping = mmap.mmap(descriptor, size)
            self._mapped[arena_id] = size
            # One step of a dict's, for the finalizer may run in any thread and can't take a lock.
            weakref.finalize(mapping, self._mapped.pop, arena_id).atexit = False
            # Found from here on, so before the client can ask for it.
            self._arenas[arena_id] = Arena(mapping)
            self._attached[connection] = arena_id
            del self._waiting[connection]
            socket.send_fds(connection, [encode_attach_response(arena_id, size, self._calls)], [descriptor])
        finally:
            os.close(descriptor)

    def _check(self, size: int) -> None:
        held, count = self.nbytes, len(self._mapped)
        if count >= self._max_arenas:
            msg = f"expected at most {self._max_arenas} arenas, got another"
            limits = {"limit": str(self._max_arenas), "actual": str(count + 1), "unit": "arenas"}
        elif size > self._max_bytes - held:
            msg = f"expected at most {self._max_bytes} bytes of arenas, got {held} and {size} more"
            limits = {"limit": str(self._max_bytes), "actual": str(held + size), "unit": "bytes"}
        else:
            return
        raise LimitExceededError(msg, reason="ARENA_QUOTA", metadata=limits)

    def _drop(self, connection: socket.socket) -> None:
        # Dropping the last reference unmaps; while a call holds a slice, the mapping could not be closed anyway.
        self._arenas.pop(self._attached.get(connection, b""), None)
        self._selector.unregister(connection)
        connection.close()
        # Last, so that what counts as ended has given everything back.
        self._waiting.pop(connection, None)
        self._attached.pop(connection, None)
        self._resume()

    def _resume(self) -> None:
        if self._paused_until is not None:
            self._paused_until = None
            self._selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def _end(self) -> None:
        for connection in [*self._waiting, *self._attached]:
            self._drop(connection)
        with suppress(OSError):
            # Not where another server has taken the place of this one.
            if os.path.samestat(self._path.lstat(), self._file):
                self._path.unlink()
        for each in (self._socket, self._wake, self._woken, self._selector):
            each.close()
        with self._changed:
            self._changed.notify_all()


def find_in(listeners: Sequence[ArenaListener]) -> Callable[[bytes], Arena]:
    """Give what finds an arena of any of several listeners, of which more may come."""

    def find(arena_id: bytes) -> Arena:
        for listener in listeners[:-1]:
            with suppress(NotFoundError):
                return listener.find(arena_id)
        if not listeners:
            raise NotFoundError("expected a call with its payload, got an arena: there are none here", reason="ARENA")
        return listeners[-1].find(arena_id)

    return find


def _requested(connection: socket.socket) -> int:
    # Without a buffer for them the kernel closes what descriptors a client sends.
    packet, _, flags, _ = connection.recvmsg(REQUEST_BYTES)
    size = decode_attach_request(packet)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise InvalidArgumentError("expected a packet with a size and no more, got a larger one", field="request")
    if size == 0:  # an empty packet too, and the client's end
        raise InvalidArgumentError("expected at least 1 byte, got 0", field="size")
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _refuse(connection: socket.socket, error: PoolError) -> None:
    log.info("arena refused", reason=error.reason, error=error.message)
    with suppress(OSError):  # the client may be gone
        connection.send(encode_attach_error(error))
        # A packet that is left unread at the close would make the client's read fail before it came to the answer.
        connection.shutdown(socket.SHUT_RD)
        while connection.recv(1):
            pass


def _listen(path: Path) -> tuple[socket.socket, os.stat_result]:
    try:
        with ExitStack() as failed:
            _check_folder(path)
            _remove_stale(path)
            listener = failed.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            listener.setblocking(False)
            listener.bind(str(path))
            # Before it listens nobody can connect. A umask would be the whole process's.
            path.chmod(0o600)
            listener.listen(MAX_WAITING)
            file = path.lstat()
            failed.pop_all()
            return listener, file
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def _check_folder(path: Path) -> None:
    # Whoever may rename in the folder can put a socket of his own there. A client sees whose it is and goes away, so
    # only the arenas' service is at stake; but such a folder is a mistake, and better told of.
    found = path.parent.stat()
    if found.st_uid not in (0, os.geteuid()):
        raise ValueError(f"{path}: expected a folder of the server's user or of root, got one of user {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        raise ValueError(f"{path}: expected a folder that only its owner can write to, or a sticky one")


def _remove_stale(path: Path) -> None:
    # A server that was killed leaves its socket's file behind.
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        raise ValueError(f"{path}: expected no file, or the socket of an ended server of this user; got another one")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)  # so that a server with no room for more connections is told from none
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise ValueError(f"{path}: expected no other server, got one")
