"""Memory for outputs: aligned, used again, never twice at a time, and not kept without end."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier

import numpy as np
import pytest

from poolrpc.tensors import ALIGNMENT, TensorSpec
from poolrpc_server.compute.buffers import MIN_BUFFER_BYTES, Buffers, aligned

MIB = 2**20


def of(*sizes):
    """Describe tensors of so many bytes."""
    return [TensorSpec("uint8", (size,)) for size in sizes]


def place(buffer):
    """Give where memory starts."""
    return np.frombuffer(buffer, np.uint8).ctypes.data


@pytest.fixture
def buffers():
    """A store that keeps 4 MiB."""
    return Buffers(4 * MIB)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 100_000])
def test_memory_is_aligned(size):
    """New memory starts at a multiple of the alignment, and has the size."""
    buffer = aligned(size)
    assert (len(buffer), place(buffer) % ALIGNMENT) == (size, 0)
    assert not buffer.readonly


def test_no_bytes_are_given_too():
    """A tensor without elements has memory of none."""
    assert len(aligned(0)) == 0


@pytest.mark.parametrize("sizes", [(1,), (100, 1, 64, 65), (MIB, 3, MIB)])
def test_each_tensor_has_a_place_of_its_own(buffers, sizes):
    """Several tensors have memory of their size each, aligned and apart."""
    for _ in range(2):
        with buffers.borrow(of(*sizes)) as lent:
            assert [len(each) for each in lent] == list(sizes)
            assert all(place(each) % ALIGNMENT == 0 for each in lent)
            starts = [place(each) for each in lent]
            assert all(start + size <= other for start, size, other in zip(starts, sizes, starts[1:], strict=False))


def test_memory_is_used_again(buffers):
    """What was lent before, and is large enough, is lent again; what was lent last comes first."""
    with buffers.borrow(of(MIB)) as lent:
        first = place(lent[0])
    assert buffers.idle_bytes == MIB
    with buffers.borrow(of(MIB - 1000)) as lent:
        assert place(lent[0]) == first
        assert buffers.idle_bytes == 0
    with buffers.borrow(of(MIB)) as one, buffers.borrow(of(MIB)) as two:
        inner, outer = place(two[0]), place(one[0])
    assert outer == first
    with buffers.borrow(of(MIB)) as one, buffers.borrow(of(MIB)) as two:
        assert [place(one[0]), place(two[0])] == [outer, inner]


def test_memory_comes_back_from_a_failure(buffers):
    """What a call fails with leaves its memory to the next one."""

    def fail():
        with buffers.borrow(of(MIB)):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert buffers.idle_bytes == MIB


def test_far_larger_memory_is_not_taken(buffers):
    """Memory of more than four times the size is left to those who need it."""
    with buffers.borrow(of(3 * MIB)) as lent:
        large = place(lent[0])
    quarter = 3 * MIB // 4
    with buffers.borrow(of(quarter - ALIGNMENT)) as lent:
        assert place(lent[0]) != large
        assert buffers.idle_bytes == 3 * MIB
    for size in (3 * MIB - 5, quarter):
        with buffers.borrow(of(size)) as lent:
            assert place(lent[0]) == large


def test_smaller_memory_is_not_taken(buffers):
    """Memory of a byte less than is needed is none."""
    with buffers.borrow(of(MIB)):
        pass
    with buffers.borrow(of(MIB + 1)) as lent:
        assert len(lent[0]) == MIB + 1
        assert buffers.idle_bytes == MIB


def test_so_much_is_kept_and_no_more(buffers):
    """Of what is lent at a time the store keeps up to its bytes; what was used longest ago goes first."""
    with ExitStack() as stack:
        for _ in range(7):
            stack.enter_context(buffers.borrow(of(MIB)))
    assert buffers.idle_bytes == 4 * MIB
    with buffers.borrow(of(3 * MIB)):
        pass
    assert buffers.idle_bytes == 4 * MIB
    with buffers.borrow(of(5 * MIB)):
        pass
    assert buffers.idle_bytes <= 4 * MIB


def test_small_memory_is_not_kept(buffers):
    """The C library uses small pieces again by itself."""
    with buffers.borrow(of(MIN_BUFFER_BYTES - ALIGNMENT)):
        pass
    assert buffers.idle_bytes == 0


def test_nothing_is_lent_twice_at_a_time(buffers):
    """Threads that hold memory at the same moment hold different memory, whatever is idle."""
    with buffers.borrow(of(MIB)), buffers.borrow(of(MIB)):
        pass
    there = Barrier(8)

    def hold(number):
        for _ in range(20):
            with buffers.borrow(of(MIB)) as lent:
                lent[0][:1] = bytes([number])
                there.wait()
                kept = lent[0][0] == number
                there.wait()
            if not kept:
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(hold, range(8)))
