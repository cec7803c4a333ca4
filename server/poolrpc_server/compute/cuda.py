"""CUDA: its streams and events, page-locked memory, and what a device reports. Only this module calls CUDA."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from poolrpc_server.telemetry.logs import log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc_server.compute.device import Backend, Event, Stream

PINNED_BLOCK_BYTES = 512
"""Page-locked memory is allocated in multiples of this, the block size of torch's own cache."""

STREAMS = 3
"""The streams of an execution: while one uploads, another computes and the third downloads."""

PORTABLE = 1
"""The driver's CU_MEMHOSTREGISTER_PORTABLE: the memory is page-locked for every context."""


def cuda_backend(device: torch.device) -> Backend:
    """Return the backend of a CUDA device."""
    return _CudaBackend(device)


class _CudaBackend:
    overlapped = asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.memory_bytes = int(torch.cuda.get_device_properties(device).total_memory)  # of a MIG slice: the slice's
        self._driver: ctypes.CDLL | None = None
        with suppress(OSError):  # torch's build for AMD's devices calls them "cuda" too, but has another driver
            self._driver = ctypes.CDLL("libcuda.so.1")

    def streams(self) -> Sequence[Stream]:
        return [_CudaStream(self._device) for _ in range(STREAMS)]

    def allocate(self, size: int) -> memoryview:
        rounded = -(-size // PINNED_BLOCK_BYTES) * PINNED_BLOCK_BYTES
        return torch.empty(rounded, dtype=torch.uint8, pin_memory=True).numpy().data[:size]

    def reserved_bytes(self) -> int:
        return int(torch.cuda.memory_reserved(self._device))

    def free_cached(self) -> None:
        torch.cuda.empty_cache()

    # The driver is called instead of the runtime, because a failure of the runtime stays pending until some later torch
    # call in the same thread reports it.

    def lock(self, address: int, size: int) -> bool:
        return self._call("cuMemHostRegister_v2", address, size, PORTABLE)

    def unlock(self, address: int) -> None:
        self._call("cuMemHostUnregister", address)

    def _call(self, function: str, address: int, *arguments: int) -> bool:
        """Call a function of the driver in the context that torch uses, and return whether it succeeded."""
        driver, context = self._driver, ctypes.c_void_p()
        if driver is None:
            return False
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


class _CudaStream:
    """A stream of a CUDA device: torch's calls only queue work."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def submit(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return _CudaEvent(event)


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: _CudaEvent) -> float:
        return float(earlier._event.elapsed_time(self._event)) / 1000
