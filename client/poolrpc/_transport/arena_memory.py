"""Memory shared with a server on the same host, and which parts of it are in use.

An arena is memory that the server creates (a sealed memfd) and shares with one client. An array in an arena keeps its
span reserved, and the whole arena mapped, even after the client is closed. After a fork the arenas are the parent's: if
the child did not leave them, both would reserve the same bytes.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc._transport.arena_socket import attach
from poolrpc.errors import PoolError
from poolrpc.tensors import ALIGNMENT, align

if TYPE_CHECKING:
    import mmap
    import socket as sockets
    from collections.abc import Iterable

    from poolrpc.tensors import Array

DEFAULT_ARENA_BYTES = 64 * 2**20
"""The size of an arena, in bytes, at least. Pages that have not been written to take no memory."""

ARENA_STEP_BYTES = 2**20
"""The size of a larger arena, in bytes, is a multiple of this."""

ATTACH_TIMEOUT = 2.0
"""Seconds that the server may take for each step of attaching an arena."""

RETRY_SECONDS = 5.0
"""Seconds after a rejection during which no arena is requested, so that calls send bytes instead without a delay."""


class AttachedArena:
    """The memory of one arena, and which parts of it are free.

    Args:
        arena_id: The server's id of the arena.
        mapping: The memory.
        socket: The name of the socket for calls that use the arena.

    Attributes:
        arena_id: The server's id of the arena.
        socket: The name of the socket, in the directory of the server's, for calls that use the arena; empty: the
            server's own.
        memory: The arena as an array of bytes, which keeps it mapped.
        address: The address of the first byte.
        free: The free parts, as (start, end), in order; no two of them touch.
        freed: The parts of spans that have ended since the last reservation.

    """

    def __init__(self, arena_id: bytes, mapping: mmap.mmap, socket: str = "") -> None:
        self.arena_id = arena_id
        self.socket = socket
        self.memory: Array = np.frombuffer(mapping, np.uint8)
        self.address: int = self.memory.__array_interface__["data"][0]
        self.free = [(0, len(mapping))]
        self.freed: deque[tuple[int, int]] = deque()

    def reserve(self, nbytes: int) -> int | None:
        """Reserve `nbytes`, a multiple of ALIGNMENT, and return their offset; None if there is no room."""
        while self.freed:
            self._free(*self.freed.popleft())
        # The first fit: low addresses are reused most, so their pages exist and are in the cache.
        for index, (start, end) in enumerate(self.free):
            if end - start >= nbytes:
                self.free[index : index + 1] = [(start + nbytes, end)] if end - start > nbytes else []
                return start
        return None

    @property
    def idle(self) -> bool:
        """Whether there was no span at the last reservation."""
        return self.free == [(0, len(self.memory))]

    def _free(self, start: int, end: int) -> None:
        index = bisect(self.free, (start, end))
        if index < len(self.free) and self.free[index][0] == end:
            end = self.free.pop(index)[1]
        if index and self.free[index - 1][1] == start:
            self.free[index - 1] = (self.free[index - 1][0], end)
        else:
            self.free.insert(index, (start, end))


class Span:
    """A part of an arena, reserved while this object or an array in it exists.

    Args:
        arena: The arena.
        offset: The offset in the arena, in bytes.
        nbytes: The length, in bytes.
        end: The offset of the end of the reserved bytes.

    Attributes:
        arena: The arena.
        offset: The offset in the arena, in bytes: a multiple of ALIGNMENT.
        nbytes: The length, in bytes.

    """

    __slots__ = ("_end", "arena", "nbytes", "offset")

    def __init__(self, arena: AttachedArena, offset: int, nbytes: int, end: int) -> None:
        self.arena = arena
        self.offset = offset
        self.nbytes = nbytes
        self._end = end

    def split(self, at: int) -> tuple[Span, Span]:
        """Return the first `at` bytes, a multiple of ALIGNMENT, and the rest, as spans that end independently."""
        rest = Span(self.arena, self.offset + at, self.nbytes - at, self._end)
        self.nbytes, self._end = at, self.offset + at
        return self, rest

    def __del__(self) -> None:
        # The garbage collector may run this in any thread, even within `reserve`. So it takes no lock.
        self.arena.freed.append((self.offset, self._end))

    @property
    def arena_id(self) -> bytes:
        """The server's id of the arena."""
        return self.arena.arena_id

    @property
    def __array_interface__(self) -> dict[str, Any]:
        # NumPy makes this object the base of the array, and so of every view of it.
        data = (self.arena.address + self.offset, False)
        return {"version": 3, "shape": (self.nbytes,), "typestr": "|u1", "data": data}

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> Array:
        """Return an uninitialised C-contiguous array in the span, `offset` bytes from its start.

        Raises:
            TypeError: The span is too small for the array.

        """
        return np.ndarray(shape, dtype, np.asarray(self), offset)

    def part(self, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> Array:
        """Return such an array for a moment: it does not keep the span reserved, and is made in a third of the time."""
        return np.ndarray(shape, dtype, self.arena.memory, self.offset + offset)


class Arenas:
    """The arenas of one client, attached when they are needed; any number of threads may use them.

    Args:
        path: The path of the server's unix socket.
        arena_bytes: The size of an arena, in bytes, at least.
        attach_timeout: Seconds that the server may take to attach an arena.
        retry_seconds: Seconds after a rejection during which no arena is requested.

    Attributes:
        rejection: Why the last request for an arena failed; None if it did not.

    """

    def __init__(
        self,
        path: str,
        *,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        attach_timeout: float = ATTACH_TIMEOUT,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.rejection: PoolError | None = None
        self._path = path
        self._arena_bytes = arena_bytes
        self._attach_timeout = attach_timeout
        self._retry_seconds = retry_seconds
        self._connections: dict[AttachedArena, sockets.socket] = {}
        self._closed = False
        self._make_locks()
        self._rejected_until = 0.0
        self._rejected_size = 0

    def _make_locks(self) -> None:
        self._lock = threading.Lock()  # guards the arenas; held for microseconds
        self._attach_lock = threading.Lock()  # held while an arena is requested, so that two threads request one

    @property
    def nbytes(self) -> int:
        """The size of all attached arenas, in bytes."""
        return sum(len(arena.memory) for arena in self._connections.copy())

    def allocate(self, nbytes: int, *, attach: bool = True, same_arena_as: Span | None = None) -> Span | None:
        """Reserve memory in an arena; return None if there is no room and no further arena is attached.

        Args:
            nbytes: The length, in bytes.
            attach: Whether to request a further arena if no other has room. That takes a fraction of a millisecond, or
                the whole timeout if the server does not answer.
            same_arena_as: A span whose arena must hold the memory; no arena is attached for it.

        """
        with self._lock:
            span = self._reserve(nbytes, None if same_arena_as is None else same_arena_as.arena)
        if span or not attach or same_arena_as is not None:
            return span
        with self._attach_lock:
            with self._lock:
                span = self._reserve(nbytes)  # another thread may have attached an arena
            return span or self._grow(nbytes)

    def allocate_with_room(self, nbytes: int) -> Span | None:
        """Reserve memory in an arena that has room for as many bytes again, if the server allows one of that size.

        The outputs of a call must be in its input's arena, or else the input is copied to another; few layers have
        outputs that are larger than the input.

        Args:
            nbytes: The length, in bytes.

        """
        reserved = align(max(nbytes, 1))
        both = self.allocate(2 * reserved)
        return self.allocate(nbytes) if both is None else both.split(reserved)[0]

    def find(self, array: Array) -> tuple[Span, int] | None:
        """Return the span that contains an array, and the offset of the array in the arena.

        The result is None if the server could not read the array there: it is not within one span of an attached arena,
        is not C-contiguous, does not start at a multiple of ALIGNMENT, or is empty.
        """
        base: object = array
        while isinstance(base, np.ndarray):
            base = base.base
        if not isinstance(base, Span) or base.arena not in self._connections:
            return None
        nbytes = array.nbytes
        if not nbytes or not array.flags.c_contiguous:
            return None
        if nbytes == base.nbytes:  # the whole span
            return base, base.offset
        offset: int = array.__array_interface__["data"][0] - base.arena.address
        inside = base.offset <= offset and nbytes <= base.offset + base.nbytes - offset
        return (base, offset) if inside and offset % ALIGNMENT == 0 else None

    def retire(self, span: Span) -> None:
        """Detach the arena of a span that the server may still write to; arrays in it stay valid."""
        with self._lock:
            self._detach([span.arena])

    def forget(self, socket: str | None = None) -> None:
        """Detach arenas that the server no longer knows, and allow the next request at once; arrays stay valid.

        Args:
            socket: The socket of the process that no longer knows its arenas. None: all processes.

        """
        with self._lock:
            self._detach([arena for arena in self._connections if socket in (None, arena.socket)])
            self._rejected_until = 0.0

    def leave_to_parent(self) -> None:
        """Detach all arenas in the child of a fork; arrays in them stay valid, and are the parent's.

        There are new locks: a thread of the parent may have held one.
        """
        self._make_locks()
        self.forget()

    def close(self) -> None:
        """Detach all arenas and attach no more; arrays stay valid."""
        with self._lock:
            self._closed = True
            self._detach(list(self._connections))

    def _reserve(self, nbytes: int, only: AttachedArena | None = None) -> Span | None:
        # Called with the lock held.
        reserved = align(max(nbytes, 1))
        for arena in self._connections if only is None else (only,) if only in self._connections else ():
            offset = arena.reserve(reserved)
            if offset is not None:
                return Span(arena, offset, nbytes, offset + reserved)
        return None

    def _grow(self, nbytes: int) -> Span | None:
        # Called after _reserve found no room, with the attach lock held.
        size = max(self._arena_bytes, -(-nbytes // ARENA_STEP_BYTES) * ARENA_STEP_BYTES)
        if not self._may_attach(size):
            return None
        with self._lock:
            # An arena without spans is too small. Detached, it leaves its bytes of the quota to the next one.
            self._detach([arena for arena in self._connections if arena.idle])
        try:
            attachment = attach(self._path, size, self._attach_timeout)
        except PoolError as error:
            self.rejection = error
            self._rejected_size = size if error.code == "RESOURCE_EXHAUSTED" else 0
            self._rejected_until = time.monotonic() + self._retry_seconds
            return None
        with self._lock:
            self.rejection = None
            arena = AttachedArena(*attachment[1:])
            self._connections[arena] = attachment.connection
            if self._closed:  # while the arena was attached
                self._detach([arena])
            return self._reserve(nbytes)

    def _may_attach(self, size: int) -> bool:
        # If the quota was exceeded, a smaller arena may still fit.
        rejected = size >= self._rejected_size and time.monotonic() < self._rejected_until
        return not (rejected or self._closed)

    def _detach(self, arenas: Iterable[AttachedArena]) -> None:
        # Called with the lock held. The memory stays mapped while an array in it exists.
        for arena in arenas:
            connection = self._connections.pop(arena, None)
            if connection:
                connection.close()
