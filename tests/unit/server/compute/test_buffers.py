"""Buffers: aligned, reused, never shared by two users, limited in bytes."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier

import numpy as np
import pytest

from poolrpc.tensors import ALIGNMENT, TensorSpec
from poolrpc_server.compute.buffers import MIN_BUFFER_BYTES, Buffers, aligned

MIB = 2**20


def specs(*sizes):
    """Return the specs of tensors of these sizes."""
    return [TensorSpec("uint8", (size,)) for size in sizes]


def address(buffer):
    """Return the address of a buffer."""
    return np.frombuffer(buffer, np.uint8).ctypes.data


@pytest.fixture
def buffers():
    """A store that keeps 4 MiB of idle buffers."""
    return Buffers(4 * MIB)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 100_000])
def test_memory_is_aligned(size):
    """New memory starts at a multiple of the alignment and has the given size."""
    buffer = aligned(size)
    assert (len(buffer), address(buffer) % ALIGNMENT) == (size, 0)
    assert not buffer.readonly


def test_a_buffer_may_be_empty():
    """The memory of a tensor without elements has no bytes."""
    assert len(aligned(0)) == 0


@pytest.mark.parametrize("sizes", [(1,), (100, 1, 64, 65), (MIB, 3, MIB)])
def test_tensors_do_not_overlap(buffers, sizes):
    """Several tensors have memory of their own, each aligned."""
    for _ in range(2):
        with buffers.borrow(specs(*sizes)) as borrowed:
            assert [len(each) for each in borrowed] == list(sizes)
            assert all(address(each) % ALIGNMENT == 0 for each in borrowed)
            starts = [address(each) for each in borrowed]
            assert all(start + size <= other for start, size, other in zip(starts, sizes, starts[1:], strict=False))


def test_memory_is_reused(buffers):
    """A buffer that was returned and is large enough is borrowed again; the last one returned comes first."""
    with buffers.borrow(specs(MIB)) as borrowed:
        first = address(borrowed[0])
    assert buffers.idle_bytes == MIB
    with buffers.borrow(specs(MIB - 1000)) as borrowed:
        assert address(borrowed[0]) == first
        assert buffers.idle_bytes == 0
    with buffers.borrow(specs(MIB)) as one, buffers.borrow(specs(MIB)) as two:
        inner, outer = address(two[0]), address(one[0])
    assert outer == first
    with buffers.borrow(specs(MIB)) as one, buffers.borrow(specs(MIB)) as two:
        assert [address(one[0]), address(two[0])] == [outer, inner]


def test_memory_is_returned_after_a_failure(buffers):
    """A context that ends with an exception returns its memory."""

    def fail():
        with buffers.borrow(specs(MIB)):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert buffers.idle_bytes == MIB


def test_far_larger_memory_is_not_taken(buffers):
    """A buffer of more than four times the size is left for larger tensors."""
    with buffers.borrow(specs(3 * MIB)) as borrowed:
        large = address(borrowed[0])
    quarter = 3 * MIB // 4
    with buffers.borrow(specs(quarter - ALIGNMENT)) as borrowed:
        assert address(borrowed[0]) != large
        assert buffers.idle_bytes == 3 * MIB
    for size in (3 * MIB - 5, quarter):
        with buffers.borrow(specs(size)) as borrowed:
            assert address(borrowed[0]) == large


def test_smaller_memory_is_not_taken(buffers):
    """A buffer that is one byte too small is not borrowed."""
    with buffers.borrow(specs(MIB)):
        pass
    with buffers.borrow(specs(MIB + 1)) as borrowed:
        assert len(borrowed[0]) == MIB + 1
        assert buffers.idle_bytes == MIB


def test_idle_buffers_are_limited(buffers):
    """The store keeps returned buffers up to its limit, and drops the least recently used first."""
    with ExitStack() as stack:
        for _ in range(7):
            stack.enter_context(buffers.borrow(specs(MIB)))
    assert buffers.idle_bytes == 4 * MIB
    with buffers.borrow(specs(3 * MIB)):
        pass
    assert buffers.idle_bytes == 4 * MIB
    with buffers.borrow(specs(5 * MIB)):
        pass
    assert buffers.idle_bytes <= 4 * MIB


def test_small_buffers_are_not_kept(buffers):
    """Small buffers are left to the C library's allocator."""
    with buffers.borrow(specs(MIN_BUFFER_BYTES - ALIGNMENT)):
        pass
    assert buffers.idle_bytes == 0


def test_a_buffer_has_one_user_at_a_time(buffers):
    """Threads that borrow memory at the same time have different memory."""
    with buffers.borrow(specs(MIB)), buffers.borrow(specs(MIB)):
        pass
    barrier = Barrier(8)

    def hold(number):
        for _ in range(20):
            with buffers.borrow(specs(MIB)) as borrowed:
                borrowed[0][:1] = bytes([number])
                barrier.wait()
                kept = borrowed[0][0] == number
                barrier.wait()
            if not kept:
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(hold, range(8)))
