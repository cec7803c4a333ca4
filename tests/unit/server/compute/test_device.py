"""The device without CUDA: its name, streams, host memory, and errors."""

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from poolrpc import LimitExceededError
from poolrpc_server.compute.device import DeviceStreams, PageLocks, backend_of, resolve_device
from tests.late_device import late_backend

CPU = torch.device("cpu")


def test_auto_is_the_first_available_device():
    """It is CUDA, else Apple's GPU, else the CPU, and it works."""
    device = resolve_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    assert torch.zeros(1, device=device).cpu().item() == 0


@pytest.mark.parametrize("size", [0, 1, 511, 512, 100_000])
def test_host_memory_has_its_size_and_is_aligned_and_writable(size):
    """Host memory is aligned to 64 bytes."""
    memory = backend_of(CPU).allocate(size)
    assert len(memory) == size
    assert np.asarray(memory).ctypes.data % 64 == 0
    memory[:] = bytes(size)


def test_streams_have_one_user_at_a_time():
    """A thread that finds all streams in use waits for some; a failure returns its streams."""
    streams, inside = DeviceStreams(CPU, backend_of(CPU), 2), threading.Barrier(3)
    left = threading.Event()

    def use():
        with streams.borrow():
            inside.wait(60)
            assert left.wait(60)

    def fail():
        with streams.borrow():
            raise KeyError

    with ThreadPoolExecutor(3) as threads:
        two = [threads.submit(use) for _ in range(2)]
        inside.wait(60)
        third = threads.submit(fail)
        assert not third.done()
        left.set()
        assert isinstance(third.exception(60), KeyError)
        assert [each.result(60) for each in two] == [None, None]
    with streams.borrow() as one, streams.borrow() as two:
        assert one is not two


def test_out_of_memory_is_a_limit_and_leaves_the_stream_idle():
    """Torch's out-of-memory error becomes a LimitExceededError without torch's text."""
    streams = DeviceStreams(CPU, backend_of(CPU), 1)
    for _ in range(3):
        with (
            pytest.raises(LimitExceededError, match="fits into the memory of cpu") as raised,
            streams.borrow(),
        ):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a secret")
        assert raised.value.reason == "DEVICE_MEMORY"
        assert "secret" not in str(raised.value)


def test_nothing_is_page_locked_for_the_cpu():
    """Without a CUDA device, memory stays as it is, and nothing is counted."""
    locks = PageLocks(backend_of(CPU), 2**30)
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        locks.lock(memory)()
    assert (locks.nbytes, locks.failures) == (0, 0)


def test_memory_is_page_locked_up_to_the_limit():
    """Memory over the limit stays as it is, and counts again when the memory before it is unlocked."""
    with late_backend() as backend, mmap.mmap(-1, 3 * mmap.PAGESIZE) as one, mmap.mmap(-1, 2 * mmap.PAGESIZE) as two:
        locks = PageLocks(backend, 4 * mmap.PAGESIZE)
        unlock = locks.lock(one)
        assert list(backend.locked.values()) == [3 * mmap.PAGESIZE]
        locks.lock(two)()
        assert (locks.nbytes, locks.failures) == (3 * mmap.PAGESIZE, 0)
        unlock()
        assert (locks.nbytes, backend.locked) == (0, {})
        unlock = locks.lock(two)
        assert list(backend.locked.values()) == [2 * mmap.PAGESIZE]
        unlock()


def test_memory_that_cannot_be_page_locked_is_counted():
    """Memory that the device rejects stays as it is: nothing is locked, and nothing is unlocked at its end."""
    with late_backend(lockable=False) as backend, mmap.mmap(-1, mmap.PAGESIZE) as memory:
        locks = PageLocks(backend, 2**30)
        for _ in range(2):
            locks.lock(memory)()
        assert (locks.nbytes, locks.failures, backend.locked) == (0, 2, {})


def test_only_an_accelerator_error_means_that_the_device_is_lost():
    """What CUDA reports of a failed kernel is permanent; running out of memory and a failed check are not."""
    raised = getattr(torch, "AcceleratorError", RuntimeError)  # torch before 2.8 has no class of its own for it
    is_lost = backend_of(CPU).is_lost
    assert is_lost(raised("CUDA error: an illegal memory access was encountered"))
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error"), ValueError()):
        assert not is_lost(error)
