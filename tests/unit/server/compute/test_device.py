"""The device, as far as it is the same without CUDA: lanes, memory, and what running out of memory is."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from poolrpc import LimitExceededError
from poolrpc_server.compute.device import DeviceStreams, is_device_lost, resolve_device, synchronize

CPU = torch.device("cpu")


def test_auto_is_the_first_device_that_there_is():
    """CUDA, else Apple's GPU, else the CPU; always one that works."""
    device = resolve_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    assert torch.zeros(1, device=device).cpu().item() == 0


def test_the_cpu_has_nothing_to_wait_for():
    """What was computed there is there."""
    synchronize(CPU)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 100_000])
def test_memory_is_of_the_size_asked_for_and_writable(size):
    """Aligned for whatever is copied there."""
    memory = DeviceStreams(CPU, 1).allocate(size)
    assert len(memory) == size
    assert np.asarray(memory).ctypes.data % 64 == 0
    memory[:] = bytes(size)


def test_so_many_lanes_are_used_at_a_time():
    """A lane is one's own; who comes when all are taken has the next that is left, also after a failure."""
    lanes, inside = DeviceStreams(CPU, 2), threading.Barrier(3)
    left = threading.Event()

    def use():
        with lanes.stream():
            inside.wait(60)
            assert left.wait(60)

    def fail():
        with lanes.stream():
            raise KeyError

    with ThreadPoolExecutor(3) as threads:
        two = [threads.submit(use) for _ in range(2)]
        inside.wait(60)
        third = threads.submit(fail)
        assert not third.done()
        left.set()
        assert isinstance(third.exception(60), KeyError)
        assert [each.result(60) for each in two] == [None, None]
    with lanes.stream(), lanes.stream():
        pass


def test_no_memory_is_a_limit_and_the_lane_is_free_again():
    """What torch raises where a device is full is final for the caller, typed, and without torch's words."""
    lanes = DeviceStreams(CPU, 1)
    for _ in range(3):
        with (
            pytest.raises(LimitExceededError, match="fits into the memory of cpu") as raised,
            lanes.stream(),
        ):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a secret")
        assert raised.value.reason == "DEVICE_MEMORY"
        assert "secret" not in str(raised.value)


def test_only_an_accelerator_error_means_that_the_device_is_lost():
    """What CUDA reports of a failed kernel is permanent; running out of memory and a failed check are not."""
    assert is_device_lost(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error"), ValueError()):
        assert not is_device_lost(error)
