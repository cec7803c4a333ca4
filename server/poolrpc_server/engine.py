"""Where tensors are: the device, the compute threads, and the way from a request's bytes to its outputs' bytes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from math import prod
from threading import Semaphore
from typing import TYPE_CHECKING

# Apple's GPUs lack some pooling kernels; torch computes these on the CPU where it was told so before it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import numpy as np
import torch

from poolrpc.chains import channels_first
from poolrpc.layers import INTEGERS
from poolrpc_server import kernels
from poolrpc_server.validate import check_indices

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc.layers import Layer
    from poolrpc.tensors import TensorSpec
    from poolrpc_server.validate import Checked


SHARED_BYTES = 8 * 2**20
"""A step that writes at least this is shared among threads: below it, meeting at Python's lock costs what it saves."""


class Engine:
    """A device and the threads that compute on it, each with torch at one thread of its own."""

    def __init__(self, device: str, threads: int) -> None:
        """Make an engine.

        Args:
            device: "auto", or torch's name for one.
            threads: Requests computed at a time.

        Raises:
            ValueError: There is no such device here.

        """
        self.device = resolve_device(device)
        self.threads = threads
        # Two OpenMP threads on a busy two-core box were seen to stall a hundredfold; requests run side by side instead.
        self._executor = ThreadPoolExecutor(threads, "poolrpc-compute", torch.set_num_threads, (1,))
        # A large call is shared with threads that have nothing to do: whoever computes has a seat, and there are as
        # many as threads. Helpers wait for nobody, so that calls can't wait for each other in a ring.
        self._seats = Semaphore(threads)
        self._helpers = ThreadPoolExecutor(max(1, threads - 1), "poolrpc-helper", torch.set_num_threads, (1,))

    def run(self, checked: Checked, check_wanted: Callable[[], None]) -> list[memoryview]:
        """Run a request when a thread is free, and give its outputs' bytes, each followed by its indices'.

        Args:
            checked: The request.
            check_wanted: Called when its turn comes; raises where nobody waits any more.

        Raises:
            InvalidArgumentError: MaxUnpool's indices are out of range.
            PoolError: What check_wanted raised.

        """
        return self._executor.submit(self._compute, checked, check_wanted).result()

    def work(self, layer: Layer, spec: TensorSpec, spatial_dims: int) -> int:
        """Count the cells that a layer visits on a tensor, by the kernel that would compute it."""
        if not spec.numel:
            return 0
        plane = channels_first(spec.shape, spatial_dims, spec.layout)[-spatial_dims:]
        channels = spec.shape[-1] if spec.layout == "NHWC" else None
        device = self._device_for(spec.dtype).type
        plan = kernels.plan(layer, getattr(torch, spec.dtype), plane, channels, device)
        return plan.work(spec.numel // prod(plan.memory))

    def close(self) -> None:
        """Finish what was submitted and end the threads."""
        self._executor.shutdown()
        self._helpers.shutdown()

    def _compute(self, checked: Checked, check_wanted: Callable[[], None]) -> list[memoryview]:
        check_wanted()
        spec = checked.request.input
        if not spec.numel:
            # No planes: nothing to compute, and axes that no tensor of torch's could have.
            return [memoryview(b"")] * sum(1 + chain[-1].gives_indices for chain in checked.request.branches)
        pieces: list[memoryview] = []
        with self._seats, torch.inference_mode():
            device = self._device_for(spec.dtype)
            x = _batched(_tensor(checked.input, spec), checked).to(device)
            indices = None if checked.indices is None else _batched(_indices(checked), checked).to(device)
            channels = x.shape[-1] if spec.layout == "NHWC" else None
            for chain in checked.request.branches:
                output, places = x, indices
                for layer in chain:
                    plane = tuple(output.shape[1:-1] if channels else output.shape[2:])
                    plan = kernels.plan(layer, x.dtype, plane, channels, device.type)
                    output, places = plan.compute(output, places, self._share)
                pieces.append(_raw(output))
                if places is not None:
                    pieces.append(_raw(places))
        return pieces

    def _share(self, part: Callable[[int, int], None], planes: int, nbytes: int) -> None:
        free = 0
        while nbytes >= SHARED_BYTES and free + 1 < min(self.threads, planes) and self._seats.acquire(blocking=False):
            free += 1
        try:
            ends = [planes * i // (free + 1) for i in range(free + 2)]
            futures = [self._helpers.submit(_infer, part, start, stop) for start, stop in pairwise(ends[1:])]
            try:
                part(ends[0], ends[1])
            finally:
                wait(futures)
            for future in futures:
                future.result()
        finally:
            for _ in range(free):
                self._seats.release()

    def _device_for(self, dtype: str) -> torch.device:
        # CUDA has no max of integers, and Metal no float64: these are computed beside it, so that dtypes don't depend
        # on the device.
        if dtype in INTEGERS or (dtype == "float64" and self.device.type == "mps"):
            return torch.device("cpu")
        return self.device


def _infer(part: Callable[[int, int], None], start: int, stop: int) -> None:
    with torch.inference_mode():  # a thread's own
        part(start, stop)


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


class _Memory:
    """A read-only buffer, offered to NumPy as writable: torch asks for that, and the engine never writes to inputs."""

    def __init__(self, data: memoryview) -> None:
        address = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        self._data = data  # Kept for as long as an array looks at it.
        self.__array_interface__ = {"version": 3, "shape": (data.nbytes,), "typestr": "|u1", "data": (address, False)}


def _tensor(data: memoryview, spec: TensorSpec) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if not spec.numel:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(np.asarray(_Memory(data)), dtype=dtype).reshape(spec.shape)


def _indices(checked: Checked) -> torch.Tensor:
    # A copy, so that what is checked is what is used, and aligned, whatever lies before it in the payload.
    indices = np.frombuffer(checked.indices or b"", "<i8").copy()
    check_indices(indices, checked)
    return torch.from_numpy(indices).reshape(checked.request.input.shape)


def _batched(x: torch.Tensor, checked: Checked) -> torch.Tensor:
    return x.unsqueeze(0) if x.ndim == checked.spatial_dims + 1 else x


def _raw(x: torch.Tensor) -> memoryview:
    return x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
