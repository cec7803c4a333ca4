"""The device: its name, its errors, and the interface through which the engine uses it."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from poolrpc.errors import LimitExceededError
from poolrpc_server.compute.buffers import aligned
from poolrpc_server.compute.cuda import cuda_backend, is_accelerator_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from mmap import mmap

TORCH_VERSION = str(torch.__version__)
"""The version of torch that the kernels run with."""


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the first of cuda, mps and cpu that this machine has.

    Raises:
        ValueError: This machine has no such device.

    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        msg = f"device: expected auto or a device of this machine as torch names it, got {name!r}: {reason}"
        raise ValueError(msg) from None
    return torch.empty(0, device=device).device


class Event(Protocol):
    """The end of the work that was submitted to a stream up to a moment."""

    def wait(self) -> None:
        """Wait until it is reached, and raise what the work raised if that is known only then."""

    def seconds_since(self, earlier: Any) -> float:  # noqa: ANN401 - an event of the same class
        """Return the seconds from an earlier event of the device to this one; both must have been reached."""


class Stream(Protocol):
    """A queue of work of a device: work of one stream is done in order, work of several at the same time.

    What a submitted function reads and writes in host memory may be read and written at any time until a later event of
    the stream is reached.
    """

    def submit(self, work: Callable[[], object]) -> None:
        """Queue the torch calls that a function makes; what it raises may also be raised by a later event."""

    def record(self) -> Event:
        """Return an event that is reached when all work submitted so far is done."""


class Backend(Protocol):
    """What the engine needs of a device.

    Attributes:
        overlapped: Whether tensors are copied to the device and back, in blocks on its streams.
        asynchronous: Whether it works while the host does something else: it copies from and to page-locked memory
            directly, and its events have times.
        memory_bytes: The size of the device's memory, in bytes, as it reports it; 0 if it has none of its own.

    """

    overlapped: bool
    asynchronous: bool
    memory_bytes: int

    def streams(self) -> Sequence[Stream]:
        """Return new streams for one execution."""

    def allocate(self, size: int) -> memoryview:
        """Return new host memory of at least that size, page-locked, if possible, if the device is asynchronous."""

    def lock(self, address: int, size: int) -> bool:
        """Page-lock memory that was not allocated here, and return whether that succeeded."""

    def unlock(self, address: int) -> None:
        """Unlock it."""

    def reserved_bytes(self) -> int:
        """Return the bytes of the device's memory that this process has, in use or kept for reuse."""

    def free_cached(self) -> None:
        """Return the device's memory that is kept for reuse: it may be in blocks of the wrong size."""

    def is_lost(self, error: BaseException) -> bool:
        """Return whether an error means that the device's context is lost, so that every later call would fail too.

        Neither running out of memory nor a call that the device rejects is such an error.
        """


class _HostBackend:
    """The CPU, or a device of which each thread has one stream and whose memory is the host's (Apple's GPUs)."""

    asynchronous = False
    memory_bytes = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.overlapped = device.type != "cpu"

    def streams(self) -> Sequence[Stream]:
        return [_DirectStream(self._device)]

    def allocate(self, size: int) -> memoryview:
        return aligned(size)

    def lock(self, address: int, size: int) -> bool:  # noqa: ARG002 - the interface's
        return False

    def unlock(self, address: int) -> None:
        pass

    def reserved_bytes(self) -> int:
        return 0

    def free_cached(self) -> None:
        pass

    def is_lost(self, error: BaseException) -> bool:
        return is_accelerator_error(error)


class _DirectStream:
    """A stream on which the calling thread works itself; it is its own event."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def submit(self, work: Callable[[], object]) -> None:
        work()

    def record(self) -> Event:
        return self

    def wait(self) -> None:
        if self._device.type == "mps":
            torch.mps.synchronize()

    def seconds_since(self, earlier: Event) -> float:  # noqa: ARG002 - the interface's
        return 0.0


def backend_of(device: torch.device) -> Backend:
    """Return the backend of a device."""
    return cuda_backend(device) if device.type == "cuda" else _HostBackend(device)


class DeviceStreams:
    """The streams of a device, for a fixed number of executions at a time.

    Attributes:
        blocks: The number of blocks of planes whose copies and kernels are queued.

    """

    def __init__(self, device: torch.device, backend: Backend, executions: int) -> None:
        """Create the streams.

        Args:
            device: The device.
            backend: The device's backend.
            executions: The number of executions at a time.

        """
        self.blocks = 0
        self._device = device
        self._backend = backend
        self._lock = threading.Lock()
        self._idle: SimpleQueue[Sequence[Stream]] = SimpleQueue()
        for _ in range(executions):
            self._idle.put(backend.streams())

    def count_blocks(self, change: int) -> None:
        """Add to the number of blocks that are queued."""
        with self._lock:
            self.blocks += change

    @contextmanager
    def borrow(self) -> Iterator[Sequence[Stream]]:
        """Borrow the streams of one execution, waiting for others to return theirs.

        Raises:
            LimitExceededError: The device is out of memory.

        """
        streams = self._idle.get()
        try:
            yield streams
        except torch.OutOfMemoryError:
            self._backend.free_cached()
            msg = f"expected a request that fits into the memory of {self._device} with the others, got a larger one"
            raise LimitExceededError(msg, reason="DEVICE_MEMORY") from None
        finally:
            self._idle.put(streams)


class PageLocks:
    """Page-locked memory that the backend did not allocate: the device copies from and to it directly.

    Attributes:
        nbytes: The memory that is locked, in bytes.
        failures: The number of times that memory could not be locked.

    """

    def __init__(self, backend: Backend, limit: int) -> None:
        """Lock nothing yet.

        Args:
            backend: The device's backend; nothing is locked if it is not asynchronous.
            limit: Bytes to lock at most.

        """
        self.nbytes = self.failures = 0
        self._backend = backend
        self._limit = limit if backend.asynchronous else 0
        # Memory is unlocked by a destructor, which Python's garbage collection may call in a thread that has the lock.
        self._lock = threading.RLock()

    def lock(self, memory: mmap) -> Callable[[], None]:
        """Lock memory, and return the function that unlocks it, which must be called before it is unmapped.

        If the limit is reached or locking fails, the memory stays as it is: copies from and to it are slower.
        """
        view = np.frombuffer(memory, np.uint8)
        address, size = view.ctypes.data, len(view)
        with self._lock:
            if size > self._limit - self.nbytes:
                return _nothing
            self.nbytes += size
        if self._backend.lock(address, size):
            return partial(self._unlock, address, size)
        with self._lock:
            self.nbytes -= size
            self.failures += 1
        return _nothing

    def _unlock(self, address: int, size: int) -> None:
        self._backend.unlock(address)
        with self._lock:
            self.nbytes -= size


def _nothing() -> None:
    """Do nothing."""
