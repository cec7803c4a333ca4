"""The device: its name, memory that it copies from and to, and its lanes. All that is CUDA's own stands here."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch

from poolrpc.errors import LimitExceededError
from poolrpc_server.compute.buffers import aligned

if TYPE_CHECKING:
    from collections.abc import Iterator

PINNED_AT = 512
"""What pinned memory is rounded up to: the blocks that torch's own cache has."""


def resolve_device(name: str) -> torch.device:
    """Give the device of that name; "auto" is the first of cuda, mps and cpu that there is.

    Raises:
        ValueError: There is no such device here.

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


def settle(device: torch.device) -> None:
    """Wait until what this thread has begun on a device is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


class DeviceStreams:
    """The ways to a device: on CUDA as many streams, so that one's copies overlap with another's kernel.

    Attributes:
        device: The device.

    """

    def __init__(self, device: torch.device, count: int) -> None:
        """Make so many lanes."""
        self.device = device
        self._cuda = device.type == "cuda"
        self._lanes: SimpleQueue[torch.cuda.Stream | None] = SimpleQueue()
        for _ in range(count):
            self._lanes.put(torch.cuda.Stream(device) if self._cuda else None)  # type: ignore[no-untyped-call]

    def memory(self, size: int) -> memoryview:
        """Give new memory on the host: on CUDA pinned, so that copies from and to it don't hold up the host."""
        if not self._cuda:
            return aligned(size)
        pinned = torch.empty(-(-size // PINNED_AT) * PINNED_AT, dtype=torch.uint8, pin_memory=True)
        return pinned.numpy().data[:size]

    @contextmanager
    def lane(self) -> Iterator[None]:
        """Compute on a lane of one's own.

        Raises:
            LimitExceededError: The device has no memory for this.

        """
        stream = self._lanes.get()
        try:
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                yield
        except torch.OutOfMemoryError:
            # What the failed call had is free again; what torch keeps for itself would be in the way of the next.
            if self._cuda:
                torch.cuda.empty_cache()
            msg = f"expected a request that fits into the memory of {self.device} beside the others, got a larger one"
            raise LimitExceededError(msg, reason="DEVICE_MEMORY") from None
        finally:
            self._lanes.put(stream)
