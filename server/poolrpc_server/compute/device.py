"""The device: its name, its streams, its host memory and its errors. All code that is specific to CUDA is here."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch

from poolrpc.errors import LimitExceededError
from poolrpc_server.compute.buffers import aligned

if TYPE_CHECKING:
    from collections.abc import Iterator

PINNED_BLOCK_BYTES = 512
"""Pinned memory is allocated in multiples of this, the block size of torch's own cache."""

TORCH_VERSION = str(torch.__version__)
"""The version of torch that the kernels run with."""

_LOST_DEVICE: type[Exception] | tuple[()] = getattr(torch, "AcceleratorError", ())


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


def synchronize(device: torch.device) -> None:
    """Wait until all work that this thread has queued on a device is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def is_device_lost(error: BaseException) -> bool:
    """Return whether an error means that the device's context is lost, so that every later call would fail too.

    Running out of memory is not such an error.
    """
    return isinstance(error, _LOST_DEVICE)


class DeviceStreams:
    """A fixed number of CUDA streams, so that one request's copies overlap another's kernels; a no-op elsewhere.

    Attributes:
        device: The device.

    """

    def __init__(self, device: torch.device, count: int) -> None:
        """Create `count` streams on a device."""
        self.device = device
        self._cuda = device.type == "cuda"
        self._idle: SimpleQueue[torch.cuda.Stream | None] = SimpleQueue()
        for _ in range(count):
            self._idle.put(torch.cuda.Stream(device) if self._cuda else None)  # type: ignore[no-untyped-call]

    def allocate(self, size: int) -> memoryview:
        """Return new host memory; on CUDA it is pinned, so that copies from and to it are asynchronous."""
        if not self._cuda:
            return aligned(size)
        rounded = -(-size // PINNED_BLOCK_BYTES) * PINNED_BLOCK_BYTES
        return torch.empty(rounded, dtype=torch.uint8, pin_memory=True).numpy().data[:size]

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Compute on a stream that no other thread uses, waiting for one to become idle.

        Raises:
            LimitExceededError: The device is out of memory.

        """
        stream = self._idle.get()
        try:
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                yield
        except torch.OutOfMemoryError:
            # The failed call's memory is free again, but torch's cache may hold it in blocks of the wrong size.
            if self._cuda:
                torch.cuda.empty_cache()
            msg = f"expected a request that fits into the memory of {self.device} with the others, got a larger one"
            raise LimitExceededError(msg, reason="DEVICE_MEMORY") from None
        finally:
            self._idle.put(stream)
