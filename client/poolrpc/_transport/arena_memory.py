"""Arenas from the client's side: memory shared with a server on the same host, what of it is in use, and its packets.

The server makes an arena, a sealed memfd, and hands its descriptor over on the socket beside its own whose name has
".arena" added; for the server the arena lasts as long as that connection. An array on an arena keeps its span of it
reserved and all of it mapped, even after the client is closed. Arenas do not survive a fork: parent and child would
both give out the same bytes.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import threading
import time
from array import array as array_of
from bisect import bisect
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc._wire.arena_packets import (
    ID_BYTES,
    SUFFIX,
    decode_attach_response,
    encode_attach_request,
    peer_uid,
    unexpected,
)
from poolrpc.errors import PoolError, UnavailableError
from poolrpc.tensors import ALIGNMENT, align

if sys.platform == "linux":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from poolrpc.tensors import Array

ARENA_BYTES = 64 * 2**20
"""The least size of an arena that is asked for. Pages that nobody wrote to take no memory."""

STEP_BYTES = 2**20
"""What the size of a larger arena is a multiple of."""

ATTACH_SECONDS = 2.0
"""How long the server may take to answer."""

REFUSED_SECONDS = 5.0
"""How long nothing is asked for after a refusal, so that calls which then send their bytes don't pay for it."""

_ANSWER_BYTES = 8192  # an arena's answer takes 30 bytes, a refusal's under 5 KB


class Region:
    """The memory of one arena, and which parts of it are free.

    Attributes:
        arena_id: The server's name for the arena.
        socket: The name of the socket, in the folder of the server's, for calls that use it; empty: the server's.
        memory: The arena as an array of bytes, which keeps it mapped.
        address: Where it starts.
        free: The parts that are free, as (start, end): in order, apart from each other.
        freed: Parts of spans that ended since `take` last looked.

    """

    def __init__(self, arena_id: bytes, mapping: mmap.mmap, socket: str = "") -> None:
        self.arena_id = arena_id
        self.socket = socket
        self.memory: Array = np.frombuffer(mapping, np.uint8)
        self.address: int = self.memory.__array_interface__["data"][0]
        self.free = [(0, len(mapping))]
        self.freed: deque[tuple[int, int]] = deque()

    def take(self, nbytes: int) -> int | None:
        """Reserve `nbytes`, a multiple of ALIGNMENT, and give their start; None where there is no room."""
        while self.freed:
            self._give_back(*self.freed.popleft())
        # The first fit: low addresses are used again and again, so their pages are there and warm.
        for index, (start, end) in enumerate(self.free):
            if end - start >= nbytes:
                self.free[index : index + 1] = [(start + nbytes, end)] if end - start > nbytes else []
                return start
        return None

    @property
    def idle(self) -> bool:
        """Whether no span was left when `take` last looked."""
        return self.free == [(0, len(self.memory))]

    def _give_back(self, start: int, end: int) -> None:
        index = bisect(self.free, (start, end))
        if index < len(self.free) and self.free[index][0] == end:
            end = self.free.pop(index)[1]
        if index and self.free[index - 1][1] == start:
            self.free[index - 1] = (self.free[index - 1][0], end)
        else:
            self.free.insert(index, (start, end))


class Span:
    """A part of an arena, reserved for as long as this object or an array on it lives.

    Attributes:
        region: The arena that it is a part of.
        offset: Where it starts in the arena: a multiple of ALIGNMENT.
        nbytes: Its bytes.

    """

    __slots__ = ("_end", "nbytes", "offset", "region")

    def __init__(self, region: Region, offset: int, nbytes: int, end: int) -> None:
        self.region = region
        self.offset = offset
        self.nbytes = nbytes
        self._end = end

    def split(self, at: int) -> tuple[Span, Span]:
        """Give this span's first `at` bytes, a multiple of ALIGNMENT, and the rest, as spans that end apart."""
        rest = Span(self.region, self.offset + at, self.nbytes - at, self._end)
        self.nbytes, self._end = at, self.offset + at
        return self, rest

    def __del__(self) -> None:
        # It may run in any thread and amid `take`, where the garbage collector chose to: so it takes no lock.
        self.region.freed.append((self.offset, self._end))

    @property
    def arena_id(self) -> bytes:
        """The server's name for the arena."""
        return self.region.arena_id

    @property
    def __array_interface__(self) -> dict[str, Any]:
        # NumPy makes this object the base of the array, and so of every view of it.
        data = (self.region.address + self.offset, False)
        return {"version": 3, "shape": (self.nbytes,), "typestr": "|u1", "data": data}

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> Array:
        """Give a C-contiguous array on the span's memory, `offset` bytes from the span's start; its values are any.

        Raises:
            TypeError: The span is too small for it.

        """
        return np.ndarray(shape, dtype, np.asarray(self), offset)


class Arenas:
    """The arenas of one client, attached as they are needed; for any number of threads.

    Args:
        path: The server's unix socket, without SUFFIX.
        arena_bytes: The least size of an arena that is asked for.

    Attributes:
        refused: Why no arena could be had when one was last asked for; None where it could.

    """

    def __init__(self, path: str, *, arena_bytes: int = ARENA_BYTES) -> None:
        self.refused: PoolError | None = None
        self._path = path
        self._arena_bytes = arena_bytes
        self._connections: dict[Region, socket.socket] = {}
        self._closed = False
        self._lock = threading.Lock()  # over the regions; held for microseconds
        self._attaching = threading.Lock()  # held while an arena is asked for, so that two threads don't get two
        self._refused_until = 0.0
        self._refused_size = 0

    @property
    def nbytes(self) -> int:
        """The bytes of the arenas that are attached."""
        return sum(len(region.memory) for region in self._connections.copy())

    def allocate(self, nbytes: int, *, attach: bool = True, beside: Span | None = None) -> Span | None:
        """Reserve `nbytes` of an arena; None where no arena has room and no further one can be had.

        Args:
            nbytes: The bytes.
            attach: Whether to ask the server for a further arena where no other has room. That takes a fraction of a
                millisecond; ATTACH_SECONDS where the server hangs.
            beside: A span whose arena alone will do; it isn't attached anew.

        """
        with self._lock:
            span = self._take(nbytes, None if beside is None else beside.region)
        if span or not attach or beside is not None:
            return span
        with self._attaching:
            with self._lock:
                span = self._take(nbytes)  # another thread may have had the same wish
            return span or self._grow(nbytes)

    def find(self, array: Array) -> tuple[Span, int] | None:
        """Give the span in which an array lies, and how far from the arena's start it does.

        None where the server couldn't read it there: it isn't in one span of an attached arena, isn't C-contiguous,
        doesn't start at a multiple of ALIGNMENT, or has no bytes.
        """
        base: object = array
        while isinstance(base, np.ndarray):
            base = base.base
        if not isinstance(base, Span) or base.region not in self._connections:
            return None
        if not array.nbytes or not array.flags.c_contiguous:
            return None
        offset: int = array.__array_interface__["data"][0] - base.region.address
        inside = base.offset <= offset and array.nbytes <= base.offset + base.nbytes - offset
        return (base, offset) if inside and offset % ALIGNMENT == 0 else None

    def retire(self, span: Span) -> None:
        """Let go of the span's whole arena, into which the server may still write; arrays on it stay valid."""
        with self._lock:
            self._let_go([span.region])

    def forget(self, socket: str | None = None) -> None:
        """Let go of every arena: the server knows none of them any more. The next are attached anew, and at once.

        Args:
            socket: That of the one process that knows none of its own any more. None: all of them.

        """
        with self._lock:
            self._let_go([region for region in self._connections if socket in (None, region.socket)])
            self._refused_until = 0.0

    def close(self) -> None:
        """Let go of every arena, for good; arrays stay valid."""
        with self._lock:
            self._closed = True
            self._let_go(list(self._connections))

    def _take(self, nbytes: int, only: Region | None = None) -> Span | None:
        # Under the lock.
        reserved = align(max(nbytes, 1))
        for region in self._connections if only is None else {only} & self._connections.keys():
            offset = region.take(reserved)
            if offset is not None:
                return Span(region, offset, nbytes, offset + reserved)
        return None

    def _grow(self, nbytes: int) -> Span | None:
        # After _take found no room, under the lock of those who attach.
        size = max(self._arena_bytes, -(-nbytes // STEP_BYTES) * STEP_BYTES)
        if not self._may_ask(size):
            return None
        with self._lock:
            # An arena without a span is one that is too small: let its bytes count for the one that replaces it.
            self._let_go([region for region in self._connections if region.idle])
        try:
            region, connection = _attach(self._path + SUFFIX, size)
        except PoolError as error:
            self.refused = error
            self._refused_size = size if error.code == "RESOURCE_EXHAUSTED" else 0
            self._refused_until = time.monotonic() + REFUSED_SECONDS
            return None
        with self._lock:
            self.refused = None
            self._connections[region] = connection
            if self._closed:  # while the server was asked
                self._let_go([region])
            return self._take(nbytes)

    def _may_ask(self, size: int) -> bool:
        # A refusal for a quota says nothing of a smaller arena.
        refused = size >= self._refused_size and time.monotonic() < self._refused_until
        return not (refused or self._closed)

    def _let_go(self, regions: Iterable[Region]) -> None:
        # Under the lock. The mapping lasts as long as an array on it.
        for region in regions:
            connection = self._connections.pop(region, None)
            if connection:
                connection.close()


def _attach(path: str, size: int) -> tuple[Region, socket.socket]:
    if sys.platform != "linux":
        raise UnavailableError("arenas need Linux, which alone has memfd", reason="ARENA")
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(ATTACH_SECONDS)
            connection.connect(path)
            return _receive(connection, size, Path(path)), connection
        except BaseException:
            connection.close()
            raise
    except PoolError:
        raise
    except OSError as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnavailableError(f"{path}: {reason}", reason="ARENA") from None


def _receive(connection: socket.socket, size: int, path: Path) -> Region:
    # Anyone may have put a socket there, and whoever can shrink what he shares can kill who reads it.
    if (uid := peer_uid(connection)) not in (os.geteuid(), 0):
        raise unexpected(f"a server of user {os.geteuid()} or 0", f"one of user {uid}")
    with suppress(BrokenPipeError):  # a refusal may be there before anything was asked
        connection.send(encode_attach_request(size))
    # Not socket.recv_fds, which ignores its flags until 3.12: a descriptor without close-on-exec outlives an exec.
    packet, ancillary, flags, _ = connection.recvmsg(_ANSWER_BYTES, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC)
    descriptors = array_of("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) // descriptors.itemsize * descriptors.itemsize])
    try:
        arena_id, given, calls = decode_attach_response(packet)
        if len(descriptors) != 1 or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or len(arena_id) != ID_BYTES:
            raise unexpected("an arena and 1 descriptor", f"{len(packet)} bytes and {len(descriptors)} descriptors")
        needed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        if fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & needed != needed:
            raise unexpected("memory that can't shrink", "memory without seals")
        held = os.fstat(descriptors[0]).st_size
        if not size <= given <= held:
            raise unexpected(f"{size} bytes", f"{given}, of which {held} are there")
        # Said here, once, not by each call that would then go there.
        if calls and ("/" in calls or not path.with_name(calls).exists()):
            raise unexpected(f"the name of a socket beside {path}", repr(calls))
        return Region(arena_id, mmap.mmap(descriptors[0], given), calls)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
