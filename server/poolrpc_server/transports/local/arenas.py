"""Arenas: shared memory that the server creates for clients on the same host.

A client connects to the arena socket, a SOCK_SEQPACKET socket whose path is the server's with ".arena" added, and sends
one packet, an AttachRequest. The server answers with an AttachResponse and the descriptor of a memfd. The memfd is
sealed: if a client could shrink it, the server would be killed by SIGBUS when it reads the missing pages. An arena is
named only by its id of 128 random bits, and ends with the connection, so that a killed client leaves nothing behind.
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
from poolrpc.errors import (
    InvalidArgumentError,
    LimitExceededError,
    NotFoundError,
    PermissionDeniedError,
    PoolError,
    UnsupportedError,
)
from poolrpc.tensors import ALIGNMENT
from poolrpc_server.calls.dispatch import no_arena
from poolrpc_server.compute.locations import Locations
from poolrpc_server.telemetry.logs import log

if sys.platform == "linux":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc_server.calls.dispatch import SharedMemory
    from poolrpc_server.transports.local.calls import LocalCalls

MAX_PENDING = 64
"""Maximum number of connections without an arena; further connections are closed at once."""

ATTACH_SECONDS = 10.0
"""Seconds after which a connection without an arena is closed."""

PAUSE_SECONDS = 1.0
"""Seconds without accepting after a failed accept, for example without free descriptors, unless a connection ends."""

MAX_REQUEST_BYTES = 64
"""Maximum size of a request packet, in bytes. The longest valid request has 13 bytes."""


class _Mapping(mmap.mmap):
    """A mapping that calls a function before it is unmapped."""

    before_end: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.before_end is not None:
            self.before_end()


class Arena:
    """Memory shared with one client. It stays mapped for as long as this object, or a slice of it, exists.

    Attributes:
        locations: The locations in it that calls use again and again.

    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self._view = memoryview(mapping)
        self.locations = Locations()

    @property
    def size(self) -> int:
        """The size, in bytes."""
        return len(self._view)

    def slice(self, part: tuple[int, int], field: str) -> memoryview:
        """Return a writable part of the arena, which the client may change at any time.

        Args:
            part: The offset and length of the part, in bytes.
            field: The path of the request's field that contains `part`, for the error.

        Raises:
            InvalidArgumentError: The part is not aligned, or not within the arena.

        """
        offset, length = part
        if offset % ALIGNMENT:
            raise InvalidArgumentError(f"expected a multiple of {ALIGNMENT}, got {offset}", field=f"{field}.offset")
        if not 0 <= offset <= self.size:
            msg = f"expected at most the arena's {self.size} bytes, got {offset}"
            raise InvalidArgumentError(msg, field=f"{field}.offset")
        # The offset and the length are never added, so the check stays correct if it is ported to fixed-size integers.
        if not 0 <= length <= self.size - offset:
            msg = f"expected at most the {self.size - offset} bytes between {offset} and the arena's end, got {length}"
            raise InvalidArgumentError(msg, field=f"{field}.length")
        return self._view[offset : offset + length]


class ArenaListener:
    """The arena socket and its thread, which runs from construction to `close`.

    Args:
        path: The path of the server's unix socket, without SUFFIX.
        max_bytes: Maximum size of all arenas together, in bytes. An arena whose client is gone counts until the last
            call that uses it has ended.
        max_arenas: Maximum number of arenas, counted likewise.
        allowed_uid: The user id that may connect. None: the user of this process.
        call_socket: The name of the socket, in the same folder, to which clients send the calls that use an arena.
            Empty: the server's socket.
        calls: Answers the calls of connections without an arena. None: there are no such connections.
        page_lock: Page-locks the memory of an arena for a GPU, and returns the function that unlocks it. None: no
            memory is locked.
        max_pending: Maximum number of connections without an arena.
        attach_seconds: Seconds after which a connection without an arena is closed.
        pause_seconds: Seconds without accepting after a failed accept.

    Raises:
        ValueError: The system has no arenas, or the path cannot be used.

    """

    def __init__(  # noqa: PLR0913 - all but the first two are optional
        self,
        path: str | Path,
        *,
        max_bytes: int,
        max_arenas: int,
        allowed_uid: int | None = None,
        call_socket: str = "",
        calls: LocalCalls | None = None,
        page_lock: Callable[[mmap.mmap], Callable[[], None]] | None = None,
        max_pending: int = MAX_PENDING,
        attach_seconds: float = ATTACH_SECONDS,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        if sys.platform != "linux":
            raise ValueError("arenas need Linux: other systems have no memfd")
        self._call_socket = call_socket
        self._calls = calls
        self._page_lock = page_lock
        self._max_bytes = max_bytes
        self._max_arenas = max_arenas
        self._allowed_uid = os.geteuid() if allowed_uid is None else allowed_uid
        self._max_pending = max_pending
        self._attach_seconds = attach_seconds
        self._pause_seconds = pause_seconds
        # Other threads read these three dicts, each with one atomic operation. Only this object's thread uses the rest.
        self._arenas: dict[bytes, Arena] = {}
        self._mapped_bytes: dict[bytes, int] = {}
        self._attached: dict[socket.socket, bytes] = {}
        self._changed = threading.Condition()
        self._pending: dict[socket.socket, float] = {}  # connections without an arena, with their deadlines, in order
        self._paused_until: float | None = None
        self._path = Path(f"{path}{SUFFIX}")
        self._socket, self._file = _listen(self._path)
        self._close_sender, self._close_receiver = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._close_receiver, selectors.EVENT_READ)
        self._selector.register(self._socket, selectors.EVENT_READ, self._accept)
        self._thread = threading.Thread(target=self._run, name="poolrpc-arena", daemon=True)
        self._thread.start()

    @property
    def live(self) -> int:
        """The number of arenas whose client is connected."""
        return len(self._attached)

    @property
    def nbytes(self) -> int:
        """The size of all arenas, in bytes, including those whose client is gone while a call still uses them."""
        return sum(self._mapped_bytes.copy().values())

    def find(self, arena_id: bytes) -> Arena:
        """Return an arena, which stays mapped for as long as the caller holds it or a slice of it.

        Raises:
            NotFoundError: There is no arena with this id, or it has ended.

        """
        arena = self._arenas.get(arena_id)
        if arena is None:
            raise NotFoundError("expected an arena of this server, got an unknown or ended one", reason="ARENA")
        return arena

    def wait_for(self, live: int, timeout: float | None = None) -> bool:
        """Wait until the number of arenas with a client is `live`; return False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.live == live, timeout)

    def close(self) -> None:
        """End all arenas, stop listening and remove the socket file. Calls in flight keep the memory that they use."""
        with suppress(OSError):  # closed before
            self._close_sender.send(b"\0")
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select(self._timeout()):
                    if key.data is None:
                        return
                    self._run_guarded(key.data)
                self._run_guarded(self._expire)
                with self._changed:
                    self._changed.notify_all()
        finally:
            self._end()

    def _run_guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:  # noqa: BLE001 - the thread must go on for the other clients
            log.exception("arena socket failed")

    def _timeout(self) -> float | None:
        deadlines = (next(iter(self._pending.values()), None), self._paused_until)
        times = [deadline for deadline in deadlines if deadline is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _expire(self) -> None:
        now = time.monotonic()
        for connection in [connection for connection, deadline in self._pending.items() if deadline <= now]:
            self._drop(connection)
        if self._paused_until is not None and self._paused_until <= now:
            self._resume()

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            # The selector would report the same connection at once, again and again.
            log.warning("arena socket pauses accepting", error=error.strerror)
            self._selector.unregister(self._socket)
            self._paused_until = time.monotonic() + self._pause_seconds
            return
        with ExitStack() as rejected:
            rejected.callback(connection.close)
            connection.setblocking(False)
            if peer_uid(connection) != self._allowed_uid:
                _reject(
                    connection,
                    PermissionDeniedError("expected the server's user, got another", reason="ARENA_USER"),
                )
            elif len(self._pending) >= self._max_pending:
                log.warning("arena rejected", reason="ARENA_WAITING")
            else:
                self._selector.register(connection, selectors.EVENT_READ, lambda: self._serve(connection))
                self._pending[connection] = time.monotonic() + self._attach_seconds
                rejected.pop_all()

    def _serve(self, connection: socket.socket) -> None:
        # A client with an arena has nothing more to send: anything it sends, and its end, ends the arena.
        if connection in self._attached:
            self._drop(connection)
            return
        try:
            self._attach(connection)
        except PoolError as error:
            _reject(connection, error)
            self._drop(connection)
        except ConnectionError:  # the client is gone
            self._drop(connection)
        except BaseException:
            self._drop(connection)
            raise

    def _attach(self, connection: socket.socket) -> None:
        size = _receive_size(connection)
        if size is None:
            self._carry_calls(connection)
            return
        self._check_quota(size)
        arena_id = secrets.token_bytes(ID_BYTES)
        descriptor = os.memfd_create("poolrpc-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            mapping = _Mapping(descriptor, size)
            if self._page_lock is not None:
                mapping.before_end = self._page_lock(mapping)
            self._mapped_bytes[arena_id] = size
            # The finalizer may run in any thread, so it takes no lock: removing a key of a dict is atomic.
            weakref.finalize(mapping, self._mapped_bytes.pop, arena_id).atexit = False
            # Registered before the client knows the id, so that its first call finds the arena.
            self._arenas[arena_id] = Arena(mapping)
            self._attached[connection] = arena_id
            del self._pending[connection]
            socket.send_fds(connection, [encode_attach_response(arena_id, size, self._call_socket)], [descriptor])
        finally:
            os.close(descriptor)

    def _carry_calls(self, connection: socket.socket) -> None:
        if self._calls is None:
            raise UnsupportedError("expected a request for an arena, got one for calls, which are not served here")
        self._calls.check_room()
        connection.send(encode_attach_response(b"", 0, self._call_socket, calls=True))
        self._selector.unregister(connection)
        del self._pending[connection]
        self._calls.adopt(connection)

    def _check_quota(self, size: int) -> None:
        nbytes, count = self.nbytes, len(self._mapped_bytes)
        if count >= self._max_arenas:
            msg = f"expected at most {self._max_arenas} arenas, got another"
            limits = {"limit": str(self._max_arenas), "actual": str(count + 1), "unit": "arenas"}
        elif size > self._max_bytes - nbytes:
            msg = f"expected at most {self._max_bytes} bytes of arenas, got {nbytes} and {size} more"
            limits = {"limit": str(self._max_bytes), "actual": str(nbytes + size), "unit": "bytes"}
        else:
            return
        raise LimitExceededError(msg, reason="ARENA_QUOTA", metadata=limits)

    def _drop(self, connection: socket.socket) -> None:
        # Dropping the last reference unmaps the memory. While a call holds a slice, it could not be unmapped anyway.
        if (arena := self._arenas.pop(self._attached.get(connection, b""), None)) is not None:
            arena.locations.end()
            del arena
        self._selector.unregister(connection)
        connection.close()
        # Last, so that an arena that no longer counts as live has released everything.
        self._pending.pop(connection, None)
        self._attached.pop(connection, None)
        self._resume()

    def _resume(self) -> None:
        if self._paused_until is not None:
            self._paused_until = None
            self._selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def _end(self) -> None:
        for connection in [*self._pending, *self._attached]:
            self._drop(connection)
        with suppress(OSError):
            # Another server may have replaced the file meanwhile.
            if os.path.samestat(self._path.lstat(), self._file):
                self._path.unlink()
        for resource in (self._socket, self._close_sender, self._close_receiver, self._selector):
            resource.close()
        with self._changed:
            self._changed.notify_all()


def arena_finder(listeners: Sequence[ArenaListener]) -> Callable[[bytes], SharedMemory]:
    """Return a function that finds an arena of any of the listeners, including those added to the sequence later."""

    def find(arena_id: bytes) -> SharedMemory:
        for listener in listeners[:-1]:
            with suppress(NotFoundError):
                return listener.find(arena_id)
        return listeners[-1].find(arena_id) if listeners else no_arena(arena_id)

    return find


def _receive_size(connection: socket.socket) -> int | None:
    """Return the size of the arena that a client requests, in bytes; None if it requests a connection for calls."""
    # There is no ancillary buffer, so the kernel closes any descriptors that the client sent.
    packet, _, flags, _ = connection.recvmsg(MAX_REQUEST_BYTES)
    size, calls = decode_attach_request(packet)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise InvalidArgumentError("expected a packet with a size and no more, got a larger one", field="request")
    if calls:
        return None
    if size == 0:  # also of an empty packet, and if the client has closed the connection
        raise InvalidArgumentError("expected at least 1 byte, got 0", field="size")
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _reject(connection: socket.socket, error: PoolError) -> None:
    log.info("arena rejected", reason=error.reason, error=error.message)
    with suppress(OSError):  # the client may be gone
        connection.send(encode_attach_error(error))
        # If unread packets were left at the close, the client would get ECONNRESET instead of the error.
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
            # No client can connect before listen(). A umask would affect the whole process.
            path.chmod(0o600)
            listener.listen(MAX_PENDING)
            file = path.lstat()
            failed.pop_all()
            return listener, file
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def _check_folder(path: Path) -> None:
    # A user who may rename files in the folder can put a socket of their own at the path. Clients check the socket's
    # user, so this would only deny them arenas, but it is most likely a mistake that the operator wants to know of.
    status = path.parent.stat()
    if status.st_uid not in (0, os.geteuid()):
        raise ValueError(f"{path}: expected a folder of the server's user or of root, got one of user {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
        raise ValueError(f"{path}: expected a folder that only its owner can write to, or a sticky one")


def _remove_stale(path: Path) -> None:
    # A server that was killed leaves its socket file behind.
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
        raise ValueError(f"{path}: expected no file, or the socket of an ended server of this user; got another one")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        # With a full backlog, a non-blocking connect fails with EAGAIN, which differs from there being no server.
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise ValueError(f"{path}: expected no other server, got one")
