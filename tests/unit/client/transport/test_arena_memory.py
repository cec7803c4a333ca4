"""Arenas from the client's side: what is reserved, for how long, and when an arena is attached."""

import gc
import random
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import LimitExceededError, NotFoundError, UnavailableError
from poolrpc._transport.arena_memory import Arenas
from poolrpc._wire.arena_packets import SUFFIX
from poolrpc.tensors import ALIGNMENT
from tests.unit.client.transport.hostile import hostile
from tests.unit.server.transports.local.raw_client import MIB, PATIENCE, client_process, listening

FLOAT32 = np.dtype("float32")


def test_a_span_is_shared_with_the_server(arenas, listener):
    """What the client writes to an array in a span, the server reads at the span's offset."""
    first, second = arenas.allocate(100), arenas.allocate(24)
    assert (first.offset, first.nbytes) == (0, 100)
    assert (second.offset, second.nbytes) == (2 * ALIGNMENT, 24)
    array = second.array(FLOAT32, (2, 2), 8)
    array[:] = [[1, 2], [3, 4]]
    assert array.flags.c_contiguous
    assert array.flags.writeable
    part = listener.find(second.arena_id).slice((second.offset, 24), "")
    assert np.frombuffer(part, np.float32)[2:].tolist() == [1, 2, 3, 4]
    assert arenas.nbytes == MIB


def test_an_array_larger_than_its_span_is_rejected(arenas):
    """No array extends beyond its span, after which there are other tensors."""
    span = arenas.allocate(16)
    with pytest.raises(TypeError, match="too small"):
        span.array(FLOAT32, (5,))
    with pytest.raises(TypeError, match="too small"):
        span.array(FLOAT32, (4,), 4)
    assert span.array(FLOAT32, (4,)).shape == (4,)


def test_a_span_of_no_bytes_holds_an_empty_array(arenas):
    """N = 0 is a valid shape."""
    span = arenas.allocate(0)
    assert span.nbytes == 0
    assert span.array(FLOAT32, (0, 3)).shape == (0, 3)


def test_arenas_hold_bfloat16_arrays(arenas):
    """The array has the dtype, although NumPy's array interface has no bfloat16."""
    bfloat16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    array = arenas.allocate(8).array(bfloat16, (2, 2))
    array[:] = 1.5
    assert array.dtype == bfloat16
    assert arenas.find(array) is not None


@pytest.fixture(scope="module")
def shared_path():
    """Return the path of a listener for all examples of the property tests."""
    with tempfile.TemporaryDirectory(prefix="arena-") as folder:
        path = str(Path(folder) / "pool.sock")
        with listening(path, max_arenas=100, max_bytes=2**30):
            yield path


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.one_of(st.integers(0, 300), st.integers(0, 300_000))),
        st.tuples(st.just("free"), st.integers(0, 2**20)),
    ),
    max_size=60,
)


@given(steps=STEPS, order=st.randoms(use_true_random=False))
def test_spans_never_overlap_and_leave_the_arena_whole(shared_path, steps, order):
    """In any order of allocations, spans are aligned and disjoint; when all have ended, the arena is one free part."""
    with closing(Arenas(shared_path, arena_bytes=MIB)) as arenas:
        assert arenas.allocate(MIB) is not None
        live, span, array = [], None, None
        for step, number in steps:
            if step == "allocate":
                span = arenas.allocate(number, attach=False)
                if span is None:
                    continue
                assert span.offset % ALIGNMENT == 0
                assert span.offset + span.nbytes <= MIB
                assert all(
                    span.offset + max(span.nbytes, 1) <= other.offset
                    or other.offset + max(other.nbytes, 1) <= span.offset
                    for other, _, _ in live
                )
                array = span.array(np.dtype("uint8"), (number,))
                array[:] = mark = order.randrange(256)
                live.append((span, array, mark))
            elif live:
                span, array, mark = live.pop(number % len(live))
                assert (array == mark).all()
        del array, span
        order.shuffle(live)
        while live:
            live.pop()
        whole = arenas.allocate(MIB, attach=False)
        assert whole is not None
        assert whole.offset == 0


def test_freed_bytes_are_reused(arenas):
    """The first part that is large enough is reserved, so a loop of calls stays on the same pages."""
    assert {arenas.allocate(1000).offset for _ in range(100)} == {0}


@pytest.mark.parametrize(
    "derive",
    [
        lambda array: array,
        lambda array: array[1:],
        lambda array: array[1:][::2].T,
        lambda array: array.reshape(-1).view(np.uint8)[5:].view(),
        lambda array: memoryview(array)[1:],
        lambda array: np.frombuffer(array.data, np.int32),
        lambda array: np.lib.stride_tricks.sliding_window_view(array, (2, 2)),
    ],
    ids=["array", "slice", "strides", "view of a view", "memoryview", "frombuffer", "windows"],
)
def test_a_view_keeps_its_span_reserved(arenas, derive):
    """The bytes are reserved while any view exists, and free after the last."""
    view = derive(arenas.allocate(4096).array(FLOAT32, (32, 32)))
    gc.collect()
    other = arenas.allocate(64)
    assert other.offset == 4096
    del view
    gc.collect()
    assert arenas.allocate(64).offset == 0


def test_a_span_alone_keeps_its_bytes_reserved(arenas):
    """A span may exist before and after its arrays."""
    span = arenas.allocate(64)
    span.array(FLOAT32, (1,))
    assert arenas.allocate(64).offset == 64
    assert span.offset == 0


def test_an_array_outlives_its_client(path):
    """The memory of an array is valid after the client and the listener are closed."""
    with listening(path) as listener:
        arenas = Arenas(path)
        array = arenas.allocate(MIB).array(FLOAT32, (MIB // 4,))
        array[:] = 7
        arenas.close()
        arenas.close()
        assert listener.wait_for(0, PATIENCE)
        assert arenas.allocate(1) is None
        assert arenas.find(array) is None
        del arenas
    gc.collect()
    array += 1
    assert (array == 8).all()


def test_a_further_arena_is_attached_if_none_has_room(arenas, listener):
    """An arena is only attached for an allocation that may attach one."""
    first = arenas.allocate(MIB)
    assert arenas.allocate(1, attach=False) is None
    second = arenas.allocate(1)
    assert second.arena_id != first.arena_id
    assert listener.live == 2
    assert arenas.allocate(1, attach=False).arena_id == second.arena_id
    del first
    assert arenas.allocate(1).offset == 0
    assert listener.live == 2


def test_a_large_allocation_gets_an_arena_of_its_size(arenas):
    """Its size is rounded up to whole steps, and an arena that is empty and too small is detached."""
    assert arenas.allocate(1) is not None
    assert arenas.allocate(MIB + 1) is not None
    assert arenas.nbytes == 2 * MIB
    small = arenas.allocate(MIB)
    assert arenas.allocate(3 * MIB) is not None
    assert arenas.nbytes == 5 * MIB
    assert arenas.find(small.array(FLOAT32, (4,))) is not None


def test_an_allocation_with_room_leaves_as_much_again_in_its_arena(path):
    """An arena in which only the memory itself fits is not used, unless the server allows no other."""
    with listening(path, max_bytes=8 * MIB), closing(Arenas(path, arena_bytes=MIB)) as arenas:
        span = arenas.allocate_with_room(600_000)
        assert len(span.arena.memory) == 2 * MIB
        assert arenas.allocate(600_000, same_arena_as=span) is not None
        assert arenas.allocate_with_room(0) is not None
        held = arenas.allocate_with_room(5 * MIB)
        assert held is not None
        assert len(held.arena.memory) == 5 * MIB
        assert arenas.allocate(MIB, same_arena_as=held) is None
        assert arenas.allocate_with_room(5 * MIB) is None


def test_over_the_quota_there_is_no_arena(path):
    """A smaller arena is requested at once, one of the rejected size after a while."""
    with listening(path, max_bytes=4 * MIB), closing(Arenas(path, arena_bytes=MIB)) as arenas:
        assert arenas.allocate(5 * MIB) is None
        assert type(arenas.rejection) is LimitExceededError
        assert arenas.rejection.metadata["limit"] == str(4 * MIB)
        held = arenas.allocate(4 * MIB)
        assert held is not None
        assert arenas.rejection is None
        assert arenas.allocate(1) is None
        del held
        assert arenas.allocate(MIB) is not None


def test_a_rejected_request_is_repeated_after_a_while(path):
    """When another client has detached its arena, there is room in the quota."""
    with (
        listening(path, max_bytes=4 * MIB) as listener,
        closing(Arenas(path, arena_bytes=4 * MIB)) as first,
        closing(Arenas(path, arena_bytes=MIB, retry_seconds=0)) as second,
    ):
        span = first.allocate(1)
        assert second.allocate(1) is None
        first.retire(span)
        assert listener.wait_for(0, PATIENCE)
        assert second.allocate(1) is not None


def test_without_a_listener_there_is_no_arena(path):
    """Without a socket there is no further attempt for a while, unless the server was replaced."""
    with closing(Arenas(path)) as arenas:
        assert arenas.allocate(1) is None
        assert type(arenas.rejection) is UnavailableError
        assert str(arenas.rejection) == f"{path}{SUFFIX}: No such file or directory"
        with listening(path) as listener:
            assert arenas.allocate(1) is None
            assert listener.live == 0
            arenas.forget()
            assert arenas.allocate(1) is not None
            assert arenas.rejection is None


def test_no_arena_is_requested_after_a_rejection(path):
    """For a while after a rejection, the server gets no request."""
    requests = []
    with hostile(path, requests.append), closing(Arenas(path)) as arenas:
        for _ in range(50):
            assert arenas.allocate(1) is None
    assert len(requests) == 1


def test_a_retired_arena_is_not_used_again(arenas, listener):
    """The server frees it, its arrays stay valid, and the next span is in another arena."""
    span, neighbour = arenas.allocate(64), arenas.allocate(64).array(FLOAT32, (16,))
    neighbour[:] = 3
    arenas.retire(span)
    assert listener.wait_for(0, PATIENCE)
    assert arenas.find(neighbour) is None
    assert arenas.nbytes == 0
    assert arenas.allocate(1).arena_id != span.arena_id
    assert (neighbour == 3).all()
    arenas.retire(span)
    assert listener.live == 1


def test_after_a_restart_arenas_of_the_new_server_are_attached(path):
    """After forget(), arenas are those of the new server; arrays in the old ones stay valid."""
    with closing(Arenas(path)) as arenas:
        with listening(path):
            span = arenas.allocate(64)
            array = span.array(FLOAT32, (16,))
            array[:] = 5
        with listening(path) as listener:
            with pytest.raises(NotFoundError):
                listener.find(arenas.allocate(64).arena_id)
            arenas.forget()
            assert listener.find(arenas.allocate(64).arena_id)
            assert (array == 5).all()


def test_one_of_several_processes_is_forgotten(path):
    """An arena has the socket of its process; forgetting one detaches its arenas, and no others."""
    Path(path).touch()
    with listening(path, call_socket=Path(path).name) as listener, closing(Arenas(path, arena_bytes=MIB)) as arenas:
        first = arenas.allocate(MIB)
        assert first.arena.socket == Path(path).name
        arenas.forget("another")
        assert arenas.find(first.array(FLOAT32, (16,))) is not None
        arenas.forget(first.arena.socket)
        assert arenas.find(first.array(FLOAT32, (16,))) is None
        assert listener.wait_for(0, PATIENCE)


def test_threads_never_share_bytes(arenas):
    """Eight threads allocate, write, check and free: no two have the same bytes, and all bytes are freed."""
    assert arenas.allocate(MIB) is not None
    together = threading.Barrier(8)

    def work(number):
        chance, held = random.Random(number), []  # noqa: S311 - a test's sizes
        together.wait(PATIENCE)
        for _ in range(1500):
            nbytes = chance.randrange(1, 12_000)
            span = arenas.allocate(nbytes)
            array = span.array(np.dtype("uint8"), (nbytes,))
            del span
            array[:] = number
            held.append(array)
            if len(held) > 4:
                assert (held.pop(chance.randrange(5)) == number).all()
        return all((each == number).all() for each in held)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))
    assert arenas.allocate(MIB, attach=False).offset == 0


def test_threads_that_need_an_arena_attach_one(arenas, listener):
    """Of threads that find no room at the same time, one attaches an arena, and the others use it."""
    together = threading.Barrier(8)

    def work(_):
        together.wait(PATIENCE)
        return arenas.allocate(64)

    with ThreadPoolExecutor(8) as threads:
        spans = list(threads.map(work, range(8)))
    assert len({span.offset for span in spans}) == 8
    assert listener.live == 1


def test_a_span_may_end_during_an_allocation(arenas):
    """The garbage collector may free spans inside the allocator: nothing hangs or is lost."""
    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(300):
            cycle = [arenas.allocate(256), arenas.allocate(256).array(FLOAT32, (64,))]
            cycle.append(cycle)
            del cycle
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert arenas.allocate(MIB, attach=False).offset == 0


def test_a_process_may_end_with_arrays_in_use(listener, path):
    """At the interpreter's exit, arrays, spans and threads that hold them cause no error."""
    program = """
import numpy as np, threading
from poolrpc._transport.arena_memory import Arenas
arenas = Arenas(sys.argv[1])
span = arenas.allocate(100)
array = arenas.allocate(100).array(np.dtype("uint8"), (100,))
cycle = [array, arenas.allocate(5)]
cycle.append(cycle)
threading.Thread(target=lambda held: threading.Event().wait(), args=(span,), daemon=True).start()
arenas.close()
say("ready")
"""
    with client_process(program, path) as process:
        said, errors = process.communicate(timeout=PATIENCE)
    assert (said, errors, process.returncode) == ("ready\n", "", 0)
    assert listener.wait_for(0, PATIENCE)


def test_an_array_in_an_arena_is_found(arenas):
    """A view is found by the address of its bytes, with its offset in the arena."""
    arenas.allocate(1)
    keep = arenas.allocate(64)
    span = arenas.allocate(4096)
    array = span.array(FLOAT32, (4, 16, 16))
    assert arenas.find(array) == (span, 64)
    assert arenas.find(array[1]) == (span, 64 + 1024)
    assert arenas.find(array.reshape(-1)[16:].view(np.uint8)) == (span, 128)
    assert arenas.find(array[1:2, ...].view()[0]) == (span, 64 + 1024)
    array.flags.writeable = False
    assert arenas.find(array) == (span, 64)
    assert keep.offset == 0


def test_an_array_that_the_server_could_not_read_is_not_found(arenas, path):
    """An array that is strided, misaligned, empty, not in an arena, or in another client's is not found."""
    span = arenas.allocate(4096)
    array = span.array(FLOAT32, (4, 16, 16))
    beyond = np.lib.stride_tricks.as_strided(array, (4096,), (4,))
    for other in (
        array[:, ::2],
        array.T,
        array[1:, 1:],
        array.reshape(-1)[1:],
        array[4:],
        array[:0],
        beyond,
        np.broadcast_to(array[0], (2, 16, 16)),
        array.copy(),
        array + 1,
        np.zeros(4),
        np.float32(1) + np.zeros(()),
        np.frombuffer(bytes(64), np.uint8),
    ):
        assert arenas.find(other) is None
    with closing(Arenas(path, arena_bytes=MIB)) as others:
        assert others.find(array) is None
        others.retire(span)
    assert arenas.find(array) == (span, 0)
