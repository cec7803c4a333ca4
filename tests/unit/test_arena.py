"""The arenas of both sides: what is given out, what is refused, what memory lives how long, and who may do harm."""

import fcntl
import gc
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolrpc._transport import arena_memory
from poolrpc._transport.arena_memory import Arenas
from poolrpc._wire.arena_packets import SUFFIX
from poolrpc.errors import LimitExceededError, NotFoundError, PoolError, UnavailableError
from poolrpc.tensors import ALIGNMENT
from poolrpc.v1 import pool_pb2
from poolrpc_server.transports.local.arenas import ArenaListener

if sys.platform != "linux":
    pytest.skip("arenas need Linux", allow_module_level=True)

MIB = 2**20
FLOAT32 = np.dtype("float32")
PATIENCE = 30  # seconds that nothing here takes unless it hangs
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def folder():
    """Give a new folder that other users may enter; pytest's own is closed to them."""
    made = Path(tempfile.mkdtemp(prefix="arena-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@contextmanager
def listening(path, *, max_bytes=64 * MIB, max_arenas=8, **options):
    """Listen beside `path` for as long as the context lasts."""
    with closing(ArenaListener(path, max_bytes=max_bytes, max_arenas=max_arenas, **options)) as listener:
        yield listener


@pytest.fixture
def path(folder):
    """Give the path of the server's own socket, which needs no file for these tests."""
    return str(folder / "pool.sock")


@pytest.fixture
def listener(path):
    """Give a listener beside `path` with room for 64 MiB in 8 arenas."""
    with listening(path) as made:
        yield made


@pytest.fixture
def arenas(listener, path):
    """Give a client's arenas of 1 MiB from `listener`."""
    assert listener.live == 0
    with closing(Arenas(path, arena_bytes=MIB)) as made:
        yield made


@contextmanager
def another(program, *arguments, **options):
    """Run a program in a second process, with pipes to and from it."""
    command = [sys.executable, "-c", PRELUDE + program, *map(str, arguments)]
    with subprocess.Popen(  # noqa: S603 - ours
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    ) as process:
        try:
            yield process
        finally:
            process.kill()


PRELUDE = """
import array, errno, os, socket, sys
from poolrpc._transport.arena_memory import Arenas
from poolrpc.v1 import pool_pb2

def say(*words):
    print(*words, flush=True)

def attach(path, size):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(path + ".arena")
    connection.send(pool_pb2.AttachRequest(size=size).SerializeToString())
    packet, ancillary, _, _ = connection.recvmsg(8192, socket.CMSG_SPACE(4))
    descriptor, = array.array("i", ancillary[0][2][:4])
    return connection, pool_pb2.AttachResponse.FromString(packet), descriptor
"""


# The client


def test_a_span_is_memory_of_the_servers(arenas, listener):
    """An array on a span is written by the client and read by the server, at the span's offset."""
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


def test_an_array_larger_than_its_span_is_refused(arenas):
    """No array reaches out of its span, which is followed by another's bytes."""
    span = arenas.allocate(16)
    with pytest.raises(TypeError, match="too small"):
        span.array(FLOAT32, (5,))
    with pytest.raises(TypeError, match="too small"):
        span.array(FLOAT32, (4,), 4)
    assert span.array(FLOAT32, (4,)).shape == (4,)


def test_a_span_of_no_bytes_holds_an_empty_array(arenas):
    """N = 0 is a shape like another."""
    span = arenas.allocate(0)
    assert span.nbytes == 0
    assert span.array(FLOAT32, (0, 3)).shape == (0, 3)


def test_bfloat16_arrays_lie_in_arenas(arenas):
    """NumPy's protocol for foreign memory has no bfloat16, the array has it all the same."""
    bfloat16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    array = arenas.allocate(8).array(bfloat16, (2, 2))
    array[:] = 1.5
    assert array.dtype == bfloat16
    assert arenas.find(array) is not None


@pytest.fixture(scope="module")
def shared_path():
    """Give the path of a listener for all examples of the property tests."""
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
def test_spans_never_overlap_and_their_ends_leave_the_arena_whole(shared_path, steps, order):
    """Whatever is allocated and freed in whatever order: aligned, apart, unharmed; and all of it one piece after."""
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


def test_freed_bytes_are_used_again(arenas):
    """The first part that is large enough is taken, so a loop of calls stays on the same pages."""
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
    """As long as anything on a span lives, no other gets its bytes; then another does."""
    view = derive(arenas.allocate(4096).array(FLOAT32, (32, 32)))
    gc.collect()
    other = arenas.allocate(64)
    assert other.offset == 4096
    del view
    gc.collect()
    assert arenas.allocate(64).offset == 0


def test_a_span_alone_keeps_its_bytes_reserved(arenas):
    """A span may be held before and after its arrays."""
    span = arenas.allocate(64)
    span.array(FLOAT32, (1,))
    assert arenas.allocate(64).offset == 64
    assert span.offset == 0


def test_an_array_outlives_its_client(path):
    """After close(), after the client, the listener and all else are gone, the array's memory is there."""
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


def test_a_further_arena_is_attached_where_none_has_room(arenas, listener):
    """The arenas grow with what is in use, and not for what may not grow them."""
    first = arenas.allocate(MIB)
    assert arenas.allocate(1, attach=False) is None
    second = arenas.allocate(1)
    assert second.arena_id != first.arena_id
    assert listener.live == 2
    assert arenas.allocate(1, attach=False).arena_id == second.arena_id
    del first
    assert arenas.allocate(1).offset == 0
    assert listener.live == 2


def test_an_arena_is_as_large_as_it_must_be(arenas):
    """More than the usual size is had in whole steps; an arena that was too small, with nothing in it, goes."""
    assert arenas.allocate(1) is not None
    assert arenas.allocate(MIB + 1) is not None
    assert arenas.nbytes == 2 * MIB
    small = arenas.allocate(MIB)
    assert arenas.allocate(3 * MIB) is not None
    assert arenas.nbytes == 5 * MIB
    assert arenas.find(small.array(FLOAT32, (4,))) is not None


def test_over_the_quota_there_is_none(path, monkeypatch):
    """The refusal is kept for display and not repeated for a while, except for what is smaller; then it is."""
    with listening(path, max_bytes=4 * MIB) as listener, closing(Arenas(path, arena_bytes=MIB)) as arenas:
        assert arenas.allocate(5 * MIB) is None
        assert type(arenas.refused) is LimitExceededError
        assert arenas.refused.metadata["limit"] == str(4 * MIB)
        held = arenas.allocate(4 * MIB)
        assert held is not None
        assert arenas.refused is None
        assert arenas.allocate(1) is None
        del held
        assert arenas.allocate(MIB) is not None
        held = arenas.allocate(4 * MIB)
        monkeypatch.setattr(arena_memory, "REFUSED_SECONDS", 0)
        with closing(Arenas(path, arena_bytes=MIB)) as others:
            assert others.allocate(1) is None
            arenas.retire(held)
            assert listener.wait_for(0, PATIENCE)
            assert others.allocate(1) is not None


def test_without_a_listener_there_is_none(path):
    """No socket, no arena: it isn't looked for again for a while, unless the server is known to be another."""
    with closing(Arenas(path)) as arenas:
        assert arenas.allocate(1) is None
        assert type(arenas.refused) is UnavailableError
        assert str(arenas.refused) == f"{path}{SUFFIX}: No such file or directory"
        with listening(path) as listener:
            assert arenas.allocate(1) is None
            assert listener.live == 0
            arenas.forget()
            assert arenas.allocate(1) is not None
            assert arenas.refused is None


def test_a_refusal_costs_the_next_call_nothing(path):
    """In the time after a refusal, the server isn't even asked."""
    asked_by = []
    with hostile(path, asked_by.append), closing(Arenas(path)) as arenas:
        for _ in range(50):
            assert arenas.allocate(1) is None
    assert len(asked_by) == 1


def test_a_retired_arena_takes_nothing_new(arenas, listener):
    """The server may still write to it: it is dropped there, its arrays stay, and the next is in another arena."""
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


def test_a_forgotten_server_is_attached_anew(path):
    """After the server's restart, forget() leads to arenas of the new one; arrays of the old stay valid."""
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
    """An arena says to which socket its calls go; the arenas of one process are let go, those of others stay."""
    Path(path).touch()
    with listening(path, call_socket=Path(path).name) as listener, closing(Arenas(path, arena_bytes=MIB)) as arenas:
        first = arenas.allocate(MIB)
        assert first.region.socket == Path(path).name
        arenas.forget("another")
        assert arenas.find(first.array(FLOAT32, (16,))) is not None
        arenas.forget(first.region.socket)
        assert arenas.find(first.array(FLOAT32, (16,))) is None
        assert listener.wait_for(0, PATIENCE)


def test_threads_allocate_at_once(arenas):
    """Eight threads that allocate, write, check and free: no two ever have the same bytes, and all come back."""
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
    """Of threads that find no room at the same time, one attaches, and the others find room in that."""
    together = threading.Barrier(8)

    def work(_):
        together.wait(PATIENCE)
        return arenas.allocate(64)

    with ThreadPoolExecutor(8) as threads:
        spans = list(threads.map(work, range(8)))
    assert len({span.offset for span in spans}) == 8
    assert listener.live == 1


def test_a_span_may_end_amid_an_allocation(arenas):
    """The garbage collector ends spans wherever it runs, inside the allocator too: nothing hangs or is lost."""
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
    """At the interpreter's exit, arrays, spans and threads that hold them end quietly."""
    program = """
import numpy as np, threading
arenas = Arenas(sys.argv[1])
span = arenas.allocate(100)
array = arenas.allocate(100).array(np.dtype("uint8"), (100,))
cycle = [array, arenas.allocate(5)]
cycle.append(cycle)
threading.Thread(target=lambda held: threading.Event().wait(), args=(span,), daemon=True).start()
arenas.close()
say("ready")
"""
    with another(program, path) as process:
        said, errors = process.communicate(timeout=PATIENCE)
    assert (said, errors, process.returncode) == ("ready\n", "", 0)
    assert listener.wait_for(0, PATIENCE)


def test_an_array_in_an_arena_is_found(arenas):
    """Whatever the view, it is found by where its bytes are, with its distance from the arena's start."""
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


def test_an_array_that_the_server_could_not_read_in_place_is_not_found(arenas, path):
    """Strided, misaligned, empty, foreign, or another client's: such an array is sent as bytes."""
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


class Hostile:
    """A server that answers as a test has it do."""

    def __init__(self, path, answer):
        self.failure = None
        self._answer = answer
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(path + SUFFIX)
        self._socket.listen(100)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while True:
            connection, _ = self._socket.accept()
            with connection:
                if connection.recv(100) == b"end":
                    return
                try:
                    self._answer(connection)
                except Exception as error:  # noqa: BLE001 - raised by close() in the test's thread
                    self.failure = error

    def close(self):
        """Stop."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(self._socket.getsockname())
            connection.send(b"end")
            self._thread.join(PATIENCE)
        self._socket.close()
        if self.failure:
            raise self.failure


@contextmanager
def hostile(path, answer):
    """Run a server that answers each request by answer(connection)."""
    with closing(Hostile(path, answer)) as server:
        yield server


SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def giving(  # noqa: PLR0913 - one argument a fault
    *, size=MIB, claim=MIB, seals=SEALED, count=1, arena_id=bytes(16), file=None, calls=""
):
    """Give an answer with `count` descriptors of a memfd that is not quite as it should be."""

    def answer(connection):
        with ExitStack() as stack:
            descriptor = (
                os.memfd_create("hostile", os.MFD_ALLOW_SEALING) if file is None else os.open(file, os.O_RDONLY)
            )
            stack.callback(os.close, descriptor)
            if file is None:
                os.ftruncate(descriptor, size)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            packet = pool_pb2.AttachResponse(arena_id=arena_id, size=claim, socket=calls).SerializeToString()
            socket.send_fds(connection, [packet], [descriptor] * count)

    return answer


HOSTILE = {
    "no seals": (giving(seals=0), "memory without seals"),
    "may shrink": (giving(seals=fcntl.F_SEAL_GROW), "memory without seals"),
    "may grow": (giving(seals=fcntl.F_SEAL_SHRINK), "memory without seals"),
    "shorter than it says": (
        giving(size=MIB - 4096),
        f"expected {MIB} bytes, got {MIB}, of which {MIB - 4096} are there",
    ),
    "shorter than was asked": (giving(claim=4096), f"expected {MIB} bytes, got 4096"),
    "a size of 2^64 - 1": (giving(claim=2**64 - 1), f"expected {MIB} bytes, got {2**64 - 1}"),
    "two descriptors": (giving(count=2), "2 descriptors"),
    "many descriptors": (giving(count=200), "2 descriptors"),
    "no descriptor": (giving(count=0), "0 descriptors"),
    "no id": (giving(arena_id=b""), "1 descriptors"),
    "a socket elsewhere": (giving(calls="../x.sock"), "expected the name of a socket beside"),
    "a socket that isn't there": (giving(calls="x.sock"), "expected the name of a socket beside"),
    "a device": (giving(file="/dev/zero"), "Invalid argument"),
    "a file": (giving(file=sys.executable), "Invalid argument"),
    "garbage": (lambda connection: connection.send(b"\xff" * 50), "expected an AttachResponse, got another packet"),
    "too much": (lambda connection: connection.send(bytes(10_000)), "expected an AttachResponse, got another packet"),
    "an empty packet": (lambda connection: connection.send(b""), "got 0 bytes and 0 descriptors"),
    "the end": (lambda connection: connection.close(), "got 0 bytes and 0 descriptors"),
    "an odd refusal": (
        lambda connection: connection.send(
            pool_pb2.AttachResponse(error=pool_pb2.AttachResponse().error).SerializeToString()
        ),
        "UNKNOWN: ",
    ),
    "a refusal with a descriptor": (
        lambda connection: socket.send_fds(
            connection,
            [pool_pb2.AttachResponse(error=pool_pb2.AttachResponse().error).SerializeToString()],
            [connection.fileno()],
        ),
        "UNKNOWN: ",
    ),
}


@pytest.mark.parametrize(("answer", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_a_server_that_gives_something_else_is_not_trusted(path, answer, expected):
    """Memory that could shrink under the client is never mapped; no descriptor of such an answer is left open."""
    before = psutil.Process().num_fds()
    with hostile(path, answer), closing(Arenas(path, arena_bytes=MIB)) as arenas:
        assert arenas.allocate(1) is None
        assert isinstance(arenas.refused, PoolError)
        assert expected in str(arenas.refused)
        assert arenas.nbytes == 0
    assert psutil.Process().num_fds() == before


def test_a_server_that_is_as_it_should_be_is_trusted(path):
    """The hostile server's answer without a fault is taken: so it is the fault that is refused."""
    with hostile(path, giving()), closing(Arenas(path, arena_bytes=MIB)) as arenas:
        assert arenas.allocate(1).arena_id == bytes(16)


def test_a_server_that_says_nothing_costs_its_time_once(path, monkeypatch):
    """A server that hangs is waited for as long as ATTACH_SECONDS says."""
    monkeypatch.setattr(arena_memory, "ATTACH_SECONDS", 0.05)
    gone = threading.Event()
    with hostile(path, lambda _: gone.wait(PATIENCE)), closing(Arenas(path)) as arenas:
        started = time.monotonic()
        assert arenas.allocate(1) is None
        assert arenas.allocate(1) is None
        assert 0.05 <= time.monotonic() - started < PATIENCE
        assert str(arenas.refused).endswith("timed out")
        gone.set()


@as_root
def test_a_server_of_another_user_is_not_trusted(path, folder):
    """A socket that another user has put at the path gets no request."""
    os.chown(folder, NOBODY, NOBODY)
    program = """
os.setuid(65534)
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.bind(sys.argv[1] + ".arena")
server.listen(1)
say("ready")
say(server.accept()[0].recv(100))
"""
    with another(program, path) as process, closing(Arenas(path)) as arenas:
        assert process.stdout.readline() == "ready\n"
        assert arenas.allocate(1) is None
        assert str(arenas.refused) == "arena: expected a server of user 0 or 0, got one of user 65534"
        assert process.stdout.readline() == "b''\n"


def test_closing_while_an_arena_is_attached_leaves_none(path):
    """An arena that comes after close() is let go."""
    with ExitStack() as stack:
        arenas = Arenas(path, arena_bytes=MIB)

        def answer(connection):
            arenas.close()
            giving()(connection)

        stack.enter_context(hostile(path, answer))
        assert arenas.allocate(1) is None
        assert arenas.nbytes == 0


def test_the_module_is_there_on_every_system():
    """Where the system isn't Linux, the module imports and there are no arenas."""
    program = """
import sys, grpc, numpy, google.protobuf.json_format, socket, mmap
sys.platform, sys.modules["fcntl"] = "darwin", None
from poolrpc._transport.arena_memory import Arenas
arenas = Arenas("/nowhere")
print(arenas.allocate(1), arenas.refused)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603 - ours
    assert ended.stdout == "None arenas need Linux, which alone has memfd\n"
    assert ended.stderr == ""
