"""Memory for outputs, used again: fresh pages cost the system more time than most pooling does."""

from __future__ import annotations

import ctypes
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from poolrpc.tensors import ALIGNMENT, align, spans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from poolrpc.tensors import TensorSpec

SMALL_BYTES = 64 * 2**10
"""Below this the allocator of the C library uses its memory again by itself."""


M_ARENA_MAX = -8
"""mallopt(3)'s number for the number of heaps."""


def one_heap() -> None:
    """Have all threads of this process take their memory from one heap, where the C library is glibc.

    It has up to eight for each CPU, and each keeps what was freed in it (see poolrpc.tensors.keep_freed_memory), for
    whichever thread has it next: with many callers of large tensors that is a gigabyte.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


class Buffers:
    """Buffers that nobody uses at the moment, up to a number of bytes."""

    def __init__(self, keep: int, allocate: Callable[[int], memoryview] | None = None) -> None:
        """Make a store of none.

        Args:
            keep: Bytes to keep for later at most.
            allocate: Gives new memory. None: the process's own.

        """
        self._keep = keep
        self._allocate = allocate or aligned
        self._idle: list[memoryview] = []  # the last used last: it may still be in the cache
        self._lock = threading.Lock()

    @property
    def idle_bytes(self) -> int:
        """What is kept for later."""
        with self._lock:
            return sum(map(len, self._idle))

    @contextmanager
    def lend(self, specs: Sequence[TensorSpec]) -> Iterator[list[memoryview]]:
        """Give memory for each of several tensors, for as long as the context lasts."""
        places, size = spans(specs)
        buffer = self._take(size)
        try:
            yield [buffer[start:end] for start, end in places]
        finally:
            self._put(buffer)

    def _take(self, size: int) -> memoryview:
        with self._lock:
            for i in reversed(range(len(self._idle))):
                # One that is far larger is left to those who need it.
                if size <= len(self._idle[i]) <= 4 * size:
                    return self._idle.pop(i)
        return self._allocate(align(size))

    def _put(self, buffer: memoryview) -> None:
        if len(buffer) < SMALL_BYTES:
            return
        with self._lock:
            self._idle.append(buffer)
            while sum(map(len, self._idle)) > self._keep:
                self._idle.pop(0)


def aligned(size: int) -> memoryview:
    """Give new memory of that many bytes, at a multiple of ALIGNMENT."""
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory.data[start : start + size]
