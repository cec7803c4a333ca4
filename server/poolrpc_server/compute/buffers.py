"""Reuse of buffers for tensors: the system takes longer to map new pages than most pooling takes."""

from __future__ import annotations

import ctypes
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from poolrpc.tensors import ALIGNMENT, align, size_of, tensor_ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from poolrpc.tensors import TensorSpec

MIN_BUFFER_BYTES = 64 * 2**10
"""Smaller buffers are not kept: the C library's allocator reuses such memory itself."""

M_ARENA_MAX = -8
"""The parameter of mallopt(3) that limits the number of heaps."""


def use_one_heap() -> None:
    """Make all threads of this process allocate from one heap, if the C library is glibc.

    glibc has up to eight heaps per CPU, and each keeps the memory that was freed in it (see
    poolrpc.tensors.keep_freed_memory): with many callers of large tensors that amounts to a gigabyte.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


class Buffers:
    """Buffers, of which idle ones are kept for reuse, limited in bytes; the least recently used are dropped first.

    Attributes:
        nbytes: The size of all buffers, in use or idle, in bytes.

    """

    def __init__(self, limit: int, allocate: Callable[[int], memoryview] | None = None) -> None:
        """Create an empty store.

        Args:
            limit: Bytes of idle buffers to keep.
            allocate: Allocates a buffer of a number of bytes. None: from the process's heap.

        """
        self.nbytes = 0
        self._limit = limit
        self._allocate = allocate or aligned
        self._idle: list[memoryview] = []  # the most recently used last: it may still be in the CPU's cache
        self._lock = threading.Lock()

    @property
    def idle_bytes(self) -> int:
        """The size of all idle buffers."""
        with self._lock:
            return sum(map(len, self._idle))

    @contextmanager
    def borrow(self, specs: Sequence[TensorSpec]) -> Iterator[list[memoryview]]:
        """Borrow memory for each of several tensors, which is returned when the context ends."""
        ranges = tensor_ranges(specs, ALIGNMENT)
        buffer = self._take(size_of(ranges))
        try:
            yield [buffer[each.start : each.end] for each in ranges]
        finally:
            self._put(buffer)

    def clear(self) -> None:
        """Drop every idle buffer."""
        with self._lock:
            self._keep(0)

    def _take(self, size: int) -> memoryview:
        with self._lock:
            for i in reversed(range(len(self._idle))):
                # A far larger one is left for larger tensors.
                if size <= len(self._idle[i]) <= 4 * size:
                    return self._idle.pop(i)
        buffer = self._allocate(align(size))
        with self._lock:
            self.nbytes += len(buffer)
        return buffer

    def _put(self, buffer: memoryview) -> None:
        with self._lock:
            if len(buffer) < MIN_BUFFER_BYTES:
                self.nbytes -= len(buffer)
                return
            self._idle.append(buffer)
            self._keep(self._limit)

    def _keep(self, limit: int) -> None:
        while self._idle and sum(map(len, self._idle)) > limit:
            self.nbytes -= len(self._idle.pop(0))


def aligned(size: int) -> memoryview:
    """Return `size` bytes of new memory that starts at a multiple of ALIGNMENT."""
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory.data[start : start + size]
