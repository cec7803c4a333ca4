"""A device whose streams are threads that start each piece of work late: the CPU, behind the interface of a GPU."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from queue import SimpleQueue
from random import Random
from typing import TYPE_CHECKING

import torch

from poolrpc_server.compute.buffers import aligned
from poolrpc_server.compute.cuda import is_accelerator_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from poolrpc_server.compute.device import Event

STREAMS = 3
LATEST_SECONDS = 0.002
"""The longest delay before a piece of work."""


class LateEvent:
    """An event of a LateStream."""

    def __init__(self, stream: LateStream) -> None:
        self.stream, self.reached = stream, threading.Event()
        self.at = 0.0

    def wait(self) -> None:
        """Wait for it, and raise what the work before it raised, once."""
        assert self.reached.wait(60)
        if self.stream.errors:
            raise self.stream.errors.pop(0)

    def seconds_since(self, earlier: LateEvent) -> float:
        """Return the seconds since an earlier event."""
        assert self.reached.is_set()
        return self.at - earlier.at


class LateStream:
    """A stream that does its work in a thread of its own, each piece after a delay."""

    def __init__(self, seed: int = 0) -> None:
        self.errors: list[BaseException] = []
        self.submitted = self.done = 0
        self._random = Random(seed)  # noqa: S311 - delays
        self._work: SimpleQueue[Callable[[], object] | LateEvent | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def submit(self, work: Callable[[], object]) -> None:
        """Queue work."""
        self.submitted += 1
        self._work.put(work)

    def record(self) -> Event:
        """Queue an event."""
        event = LateEvent(self)
        self._work.put(event)
        return event

    def close(self) -> None:
        """End the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        while (work := self._work.get()) is not None:
            if isinstance(work, LateEvent):
                work.at = time.monotonic()
                work.reached.set()
                continue
            time.sleep(self._random.random() * LATEST_SECONDS)
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised where its event is waited for
                self.errors.append(error)
            self.done += 1


class LateBackend:
    """A device of late streams.

    Attributes:
        made: Its streams.
        locked: The memory that is page-locked: sizes by address.
        lockable: Whether memory can be page-locked.
        memory_bytes: The memory that it reports.

    """

    overlapped = asynchronous = True

    def __init__(self, memory_bytes: int = 2**40, *, lockable: bool = True) -> None:
        self.made: list[LateStream] = []
        self.locked: dict[int, int] = {}
        self.lockable = lockable
        self.memory_bytes = memory_bytes

    @property
    def queued(self) -> int:
        """The number of pieces of work that are queued or being done."""
        return sum(stream.submitted - stream.done for stream in self.made)

    def streams(self) -> list[LateStream]:
        """Return new streams."""
        new = [LateStream(len(self.made) + number) for number in range(STREAMS)]
        self.made += new
        return new

    def allocate(self, size: int) -> memoryview:
        """Return host memory."""
        return aligned(size)

    def lock(self, address: int, size: int) -> bool:
        """Page-lock memory."""
        if self.lockable:
            self.locked[address] = size
        return self.lockable

    def unlock(self, address: int) -> None:
        """Unlock memory."""
        del self.locked[address]

    def reserved_bytes(self) -> int:
        """Return 0: the memory is the host's."""
        return 0

    def free_cached(self) -> None:
        """Do nothing."""

    def is_lost(self, error: BaseException) -> bool:
        """Return whether the device reported the error."""
        return is_accelerator_error(error)


@contextmanager
def late_backend(memory_bytes: int = 2**40, *, lockable: bool = True) -> Iterator[LateBackend]:
    """Make a late device, and end its threads."""
    backend = LateBackend(memory_bytes, lockable=lockable)
    try:
        yield backend
    finally:
        for stream in backend.made:
            stream.close()
