"""The device: its name, its streams, its host memory and its errors. All code that is specific to CUDA is here."""

from __future__ import annotations

import ctypes
import threading
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from poolrpc.errors import LimitExceededError
from poolrpc_server.compute.buffers import aligned
from poolrpc_server.telemetry.logs import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from mmap import mmap

PINNED_BLOCK_BYTES = 512
"""Page-locked memory is allocated in multiples of this, the block size of torch's own cache."""

STREAMS = 3
"""The streams of an execution: while one uploads, another computes and the third downloads."""

PORTABLE = 1
"""The driver's CU_MEMHOSTREGISTER_PORTABLE: the memory is page-locked for every context."""

TORCH_VERSION = str(torch.__version__)
"""The version of torch that the kernels run with."""

_LOST_DEVICE: type[Exception] | None = getattr(torch, "AcceleratorError", None)
"""The class of a device's errors, since torch 2.8."""


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


def is_device_lost(error: BaseException) -> bool:
    """Return whether an error means that the device's context is lost, so that every later call would fail too.

    Running out of memory is not such an error.
    """
    if _LOST_DEVICE is None:
        return type(error) is RuntimeError and str(error).startswith("CUDA error: ")
    return isinstance(error, _LOST_DEVICE)


class Event(Protocol):
    """The end of the work that was submitted to a stream up to a moment."""

    def wait(self) -> None:
        """Wait until it is reached."""


class Stream(Protocol):
    """A queue of work of a device: work of one stream is done in order, work of several at the same time.

    What a submitted function reads and writes in host memory may be read and written at any time until a later event of
    the stream is reached.
    """

    def submit(self, work: Callable[[], object]) -> None:
        """Queue the torch calls that a function makes; what it raises may also be raised by a later event."""

    def record(self) -> Event:
        """Return an event that is reached when all work submitted so far is done."""


class _CudaStream:
    """A stream of a CUDA device: torch's calls only queue work."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def submit(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return _CudaEvent(event)


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class _DirectStream:
    """The stream of a device of which each thread has one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def submit(self, work: Callable[[], object]) -> None:
        work()

    def record(self) -> Event:
        return self

    def wait(self) -> None:
        if self._device.type == "mps":
            torch.mps.synchronize()


class DeviceStreams:
    """The streams of a device, for a fixed number of executions at a time.

    Attributes:
        device: The device.
        overlapped: Whether tensors are copied to the device and back, in blocks on these streams.

    """

    def __init__(
        self, device: torch.device, executions: int, streams: Callable[[], Sequence[Stream]] | None = None
    ) -> None:
        """Create the streams.

        Args:
            device: The device.
            executions: The number of executions at a time.
            streams: Creates the streams of one execution. None: as the device has them.

        """
        self.device = device
        self.overlapped = streams is not None or device.type != "cpu"
        self._cuda = device.type == "cuda"
        self._idle: SimpleQueue[Sequence[Stream]] = SimpleQueue()
        for _ in range(executions):
            self._idle.put(self._create() if streams is None else streams())

    def _create(self) -> Sequence[Stream]:
        if self._cuda:
            return [_CudaStream(self.device) for _ in range(STREAMS)]
        return [_DirectStream(self.device)]

    def allocate(self, size: int) -> memoryview:
        """Return new host memory; on CUDA it is page-locked, so that copies from and to it are asynchronous."""
        if not self._cuda:
            return aligned(size)
        rounded = -(-size // PINNED_BLOCK_BYTES) * PINNED_BLOCK_BYTES
        return torch.empty(rounded, dtype=torch.uint8, pin_memory=True).numpy().data[:size]

    def free_cached(self) -> None:
        """Return the device's memory that torch keeps for reuse: it may be in blocks of the wrong size."""
        if self._cuda:
            torch.cuda.empty_cache()

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
            self.free_cached()
            msg = f"expected a request that fits into the memory of {self.device} with the others, got a larger one"
            raise LimitExceededError(msg, reason="DEVICE_MEMORY") from None
        finally:
            self._idle.put(streams)


class PageLocks:
    """Page-locked memory that torch didn't allocate: a CUDA device copies from and to it directly.

    The driver is called instead of the runtime, because a failure of the runtime stays pending until some later torch
    call in the same thread reports it. Everything here is a no-op on other devices.

    Attributes:
        nbytes: The memory that is locked, in bytes.
        failures: The number of times that memory could not be locked.

    """

    def __init__(self, device: torch.device, limit: int) -> None:
        """Lock nothing yet.

        Args:
            device: The device.
            limit: Bytes to lock at most.

        """
        self.nbytes = self.failures = 0
        self._device = device
        self._limit = limit if device.type == "cuda" else 0
        self._driver = ctypes.CDLL("libcuda.so.1") if self._limit else None
        self._lock = threading.Lock()

    def lock(self, memory: mmap) -> Callable[[], None]:
        """Lock memory, and return the function that unlocks it, which must be called before it is unmapped.

        If the limit is reached or the driver fails, the memory stays as it is: copies from and to it are slower.
        """
        view = np.frombuffer(memory, np.uint8)
        address, size = view.ctypes.data, len(view)
        with self._lock:
            if self._driver is None or size > self._limit - self.nbytes:
                return _nothing
            self.nbytes += size
        if self._call("cuMemHostRegister_v2", address, size, PORTABLE):
            return partial(self._unlock, address, size)
        with self._lock:
            self.nbytes -= size
            self.failures += 1
        return _nothing

    def _unlock(self, address: int, size: int) -> None:
        self._call("cuMemHostUnregister", address)
        with self._lock:
            self.nbytes -= size

    def _call(self, function: str, address: int, *arguments: int) -> bool:
        """Call a function of the driver in the context that torch uses, and return whether it succeeded."""
        driver, context = self._driver, ctypes.c_void_p()
        assert driver is not None  # noqa: S101 - there is nothing to lock without one
        index = self._device.index or 0
        status = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), index)
        status = status or driver.cuCtxPushCurrent_v2(context)
        if status:
            return False
        status = getattr(driver, function)(ctypes.c_void_p(address), *map(ctypes.c_size_t, arguments))
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        driver.cuDevicePrimaryCtxRelease_v2(index)
        if status:
            log.warning("page-locking failed", function=function, status=status)
        return not status


def _nothing() -> None:
    """Do nothing."""
