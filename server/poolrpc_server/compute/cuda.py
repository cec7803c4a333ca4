"""CUDA: its streams and events, page-locked memory, and what a device reports. Only this module calls CUDA."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from poolrpc_server.compute.buffers import aligned
from poolrpc_server.telemetry.logs import log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc_server.compute.device import Backend, Event, Stream

STREAMS = 3
"""The streams of an execution: while one uploads, another computes and the third downloads."""

PORTABLE = 1
"""The driver's CU_MEMHOSTREGISTER_PORTABLE: the memory is page-locked for every context."""

DRIVER_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_int),
    "cuCtxPushCurrent_v2": (ctypes.c_void_p,),
    "cuCtxPopCurrent_v2": (ctypes.POINTER(ctypes.c_void_p),),
    "cuMemHostRegister_v2": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint),
    "cuMemHostUnregister": (ctypes.c_void_p,),
}
"""The types of the arguments of the driver's functions, as cuda.h declares them; each returns a CUresult, an int."""

_ACCELERATOR_ERROR: type[Exception] | None = getattr(torch, "AcceleratorError", None)
"""The class of a device's errors, since torch 2.8."""


def is_accelerator_error(error: BaseException) -> bool:
    """Return whether an error is one that the device reported; running out of memory is not such an error."""
    if _ACCELERATOR_ERROR is None:
        return type(error) is RuntimeError and str(error).startswith("CUDA error: ")
    return isinstance(error, _ACCELERATOR_ERROR)


def cuda_backend(device: torch.device) -> Backend:
    """Return the backend of a CUDA device."""
    return _CudaBackend(device)


class _CudaBackend:
    overlapped = asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.memory_bytes = int(torch.cuda.get_device_properties(device).total_memory)  # of a MIG slice: the slice's
        self._driver: _Driver | None = None
        try:
            self._driver = _Driver(device.index or 0)
        except (OSError, AttributeError) as error:  # torch's build for AMD's devices, too, names them "cuda"
            log.warning("page-locking is not available", error=str(error))

    def streams(self) -> Sequence[Stream]:
        return [_CudaStream(self._device) for _ in range(STREAMS)]

    def allocate(self, size: int) -> memoryview:
        # torch page-locks the next power of two in any case.
        rounded = 1 << max(0, size - 1).bit_length()
        try:
            return torch.empty(rounded, dtype=torch.uint8, pin_memory=True).numpy().data
        except RuntimeError as error:
            if self.is_lost(error):
                raise
            log.warning("page-locked memory could not be allocated", bytes=rounded, error=str(error).partition("\n")[0])
            return aligned(size)

    def lock(self, address: int, size: int) -> bool:
        return self._driver is not None and self._driver.call("cuMemHostRegister_v2", address, size, PORTABLE)

    def unlock(self, address: int) -> None:
        if self._driver is not None:
            self._driver.call("cuMemHostUnregister", address)

    def reserved_bytes(self) -> int:
        return int(torch.cuda.memory_reserved(self._device))

    def free_cached(self) -> None:
        torch.cuda.empty_cache()

    def is_lost(self, error: BaseException) -> bool:
        if not is_accelerator_error(error):
            return False
        # The class does not tell an error of one call, such as a kernel that the device rejects to launch, from one
        # that leaves the context unusable. Only the latter is returned again by whatever is called next.
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return True
        return False


class _Driver:
    """The driver's functions, called in the context that torch uses.

    The driver is called instead of the runtime, because a failure of the runtime stays pending until some later torch
    call in the same thread reports it.
    """

    def __init__(self, index: int) -> None:
        """Retain the context.

        It is never released: if torch did not hold it yet, that would destroy it, with all that is page-locked in it.

        Args:
            index: The number of the device, as torch and the driver count the visible ones.

        Raises:
            OSError: There is no driver, or it does not accept the device.
            AttributeError: It lacks a function.

        """
        library = ctypes.CDLL("libcuda.so.1")
        self._functions = {name: getattr(library, name) for name in DRIVER_ARGUMENTS}
        for name, function in self._functions.items():
            function.argtypes, function.restype = DRIVER_ARGUMENTS[name], ctypes.c_int
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        status = self._functions["cuDeviceGet"](ctypes.byref(device), index)
        status = status or self._functions["cuDevicePrimaryCtxRetain"](ctypes.byref(self._context), device)
        if status:
            raise OSError(f"expected a context of device {index}, got the driver's error {status}")

    def call(self, name: str, *arguments: int) -> bool:
        """Call a function, and return whether it succeeded."""
        status = self._functions["cuCtxPushCurrent_v2"](self._context)
        if not status:
            status = self._functions[name](*arguments)
            self._functions["cuCtxPopCurrent_v2"](ctypes.byref(ctypes.c_void_p()))
        if status:
            log.warning("page-locking failed", function=name, status=status)
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
