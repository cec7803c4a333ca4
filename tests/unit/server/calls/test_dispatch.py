"""One call through validation, admission and the engine, as a door hands it over: whole, in blocks, or in an arena."""

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import poolrpc_server.compute.workspace
from poolrpc import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    CancelledError,
    DeadlineExceededError,
    InvalidArgumentError,
    LimitExceededError,
    MaxPool2d,
    MaxUnpool2d,
    NotFoundError,
    ServerInfo,
    UnavailableError,
    UnsupportedError,
)
from poolrpc._wire.codec import ArenaRanges, BranchResult, Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.admission import AdmissionControl
from poolrpc_server.calls.dispatch import BLOCKS_HELD, Caller, Dispatcher
from poolrpc_server.calls.queue import QueueLimits
from poolrpc_server.calls.validate import Limits
from poolrpc_server.compute.engine import Engine
from poolrpc_server.compute.planes import check_indices
from poolrpc_server.transports.local.arenas import Arena

INFO = ServerInfo("0", "0", "cpu", 1, {}, {})
LIMITS = Limits(2**20, 2**20, 64, 10**6)
X = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4)
INPUT, PAYLOAD = TensorSpec("float32", X.shape), X.tobytes()
HALVED = BranchResult(((1, 2, 2, 2),), TensorSpec("float32", (1, 2, 2, 2)))
WAITING = Caller(time_remaining=lambda: None, active=lambda: True)


@pytest.fixture(scope="module")
def engine():
    """An engine of one thread on the CPU."""
    made = Engine("cpu", 1)
    yield made
    made.close()


@pytest.fixture
def admission():
    """An admission of 1000 bytes."""
    return AdmissionControl(1000)


@pytest.fixture
def dispatcher(admission, engine):
    """A dispatcher with both."""
    return Dispatcher(LIMITS, admission, engine, INFO)


def pool(dispatcher, *branches, spec=INPUT, payload=PAYLOAD, caller=WAITING):
    """Run a request; give what was found of it, and copies of its outputs' bytes."""
    checked = dispatcher.check(Request(spec, branches))
    return checked, dispatcher.pool(checked, payload, caller, copied)


def copied(outputs):
    """Give copies of outputs' bytes."""
    return [bytes(each) for each in outputs]


def test_a_call_is_answered_with_specs_and_bytes_in_order(dispatcher):
    """Each branch has its shapes, its output and its indices; the bytes follow each other in that order."""
    checked, parts = pool(dispatcher, (MaxPool2d(2, return_indices=True),), (AvgPool2d(2), AvgPool2d(2)))
    indices = TensorSpec("int64", (1, 2, 2, 2))
    assert checked.results == (
        BranchResult(HALVED.shapes, HALVED.output, indices),
        BranchResult(((1, 2, 2, 2), (1, 2, 1, 1)), TensorSpec("float32", (1, 2, 1, 1))),
    )
    x = torch.from_numpy(X)
    values, places = torch.nn.MaxPool2d(2, return_indices=True)(x)
    means = torch.nn.AvgPool2d(2)(torch.nn.AvgPool2d(2)(x))
    assert parts == [part.numpy().tobytes() for part in (values, places, means)]
    assert checked.output_bytes == sum(map(len, parts))


def test_a_channels_last_call_is_answered_in_its_layout(dispatcher):
    """The specs and the bytes of the answer have the layout of the input."""
    last = np.ascontiguousarray(np.moveaxis(X, 1, -1))
    spec = TensorSpec("float32", last.shape, "NHWC")
    checked, parts = pool(dispatcher, (MaxPool2d(2),), spec=spec, payload=last.tobytes())
    assert checked.results == (BranchResult(((1, 2, 2, 2),), TensorSpec("float32", (1, 2, 2, 2), "NHWC")),)
    expected = np.moveaxis(torch.nn.MaxPool2d(2)(torch.from_numpy(X)).numpy(), 1, -1)
    assert parts == [expected.tobytes()]


@pytest.mark.parametrize("left", [0.0, -1.0])
def test_a_call_past_its_deadline_is_not_computed(dispatcher, left):
    """A call whose time is up in its turn ends with its deadline."""
    with pytest.raises(DeadlineExceededError, match="before the call was computed"):
        pool(dispatcher, (MaxPool2d(2),), caller=Caller(lambda: left, lambda: True))


def test_a_call_whose_caller_left_is_not_computed(dispatcher):
    """A caller that went away before the call's turn is not computed for."""
    caller = Caller(lambda: None, lambda: False)
    with pytest.raises(CancelledError, match="before the call was computed"):
        pool(dispatcher, (MaxPool2d(2),), caller=caller)


@pytest.mark.parametrize(
    ("layer", "bad", "error"),
    [
        (MaxPool2d(5), {}, InvalidArgumentError),
        (MaxPool2d(2), {"payload": b""}, InvalidArgumentError),
        (AvgPool2d(2), {"spec": TensorSpec("int8", (1, 2, 4, 4))}, UnsupportedError),
        (MaxPool2d(2), {"caller": Caller(lambda: 0.0, lambda: True)}, DeadlineExceededError),
    ],
    ids=["layer", "payload", "dtype", "deadline"],
)
def test_what_fails_holds_no_bytes(dispatcher, admission, layer, bad, error):
    """A call that was refused or not computed leaves room for the next."""
    with pytest.raises(error):
        pool(dispatcher, (layer,), **bad)
    with admission.hold(1000), pytest.raises(UnavailableError), admission.hold(1):
        pytest.fail("more bytes than the limit were admitted")


@pytest.mark.parametrize(("held", "room"), [(872, False), (841, False), (840, True)])
def test_inputs_and_outputs_count_beside_other_calls(dispatcher, admission, held, room):
    """A call of 128 bytes with 32 bytes of output needs 160 beside what is under way; without, it may come again."""
    with admission.hold(held):
        if room:
            pool(dispatcher, (MaxPool2d(2),))
            return
        with pytest.raises(UnavailableError) as raised:
            pool(dispatcher, (MaxPool2d(2),))
    assert raised.value.reason == "IN_FLIGHT_BYTES"
    assert raised.value.retry_delay > 0


def test_bytes_count_until_the_answer_is_written(dispatcher, admission):
    """What a call holds is let go of when its outputs are no longer read, not when they are computed."""

    def read(_):
        with pytest.raises(UnavailableError), admission.hold(841):
            pytest.fail("the outputs were no longer counted")
        with admission.hold(840):
            pass

    dispatcher.pool(dispatcher.check(Request(INPUT, ((MaxPool2d(2),),))), PAYLOAD, WAITING, read)
    with admission.hold(1000):
        pass


@pytest.mark.parametrize("limit", [1, 100, 128, 159])
def test_alone_a_call_of_any_size_is_served(engine, limit):
    """A call that is over the limit by itself, or with its output, is served where nothing else is under way."""
    dispatcher = Dispatcher(LIMITS, AdmissionControl(limit), engine, INFO)
    assert pool(dispatcher, (MaxPool2d(2),))[0].results == (HALVED,)


def test_shapes_are_answered_without_a_payload(dispatcher):
    """A question about shapes is answered by the same rules, and computes nothing."""
    assert dispatcher.shapes((1, 2, 4, 4), [(MaxPool2d(2), AvgPool2d(2))], "NCHW") == [((1, 2, 2, 2), (1, 2, 1, 1))]
    with pytest.raises(InvalidArgumentError, match=r"^branches\[0\]\.layers\[0\]\.max_pool\.kernel_size: "):
        dispatcher.shapes((1, 2, 4, 4), [(MaxPool2d(5),)], "NCHW")


def test_a_stream_gives_what_a_call_gives_block_by_block(dispatcher):
    """A tensor in blocks has the outputs of the whole one, and the stream says its shapes before any block came."""
    request = Request(INPUT, ((MaxPool2d(2, return_indices=True),),))
    _, whole = pool(dispatcher, *request.branches)
    values, places = [], []
    with dispatcher.stream(request, WAITING) as stream:
        assert stream.results == request.results()
        for start in (0, 64):
            value, place = dispatcher.pool_block(stream, PAYLOAD[start : start + 64], WAITING, copied)
            values.append(value)
            places.append(place)
        stream.finish()
    assert [b"".join(values), b"".join(places)] == whole


def test_a_stream_holds_its_blocks_for_as_long_as_it_lasts(dispatcher, admission):
    """The blocks that a stream has in memory at a time are counted at its begin: 128 bytes each, with 32 of output."""
    size = BLOCKS_HELD * 128 + 32
    with dispatcher.stream(Request(INPUT, ((MaxPool2d(2),),)), WAITING):
        with pytest.raises(UnavailableError), admission.hold(1001 - size):
            pytest.fail("more bytes than the limit were admitted")
        with admission.hold(1000 - size):
            pass
    with admission.hold(1000):
        pass


def test_a_stream_finds_no_room_at_its_begin_or_not_at_all(dispatcher, admission):
    """A stream for which there is no room is refused before a block has come."""
    with (
        admission.hold(1000),
        pytest.raises(UnavailableError),
        dispatcher.stream(Request(INPUT, ((MaxPool2d(2),),)), WAITING),
    ):
        pytest.fail("a stream was begun")


def test_a_stream_past_its_deadline_computes_nothing_more(dispatcher):
    """Time is looked at when a stream begins and before each of its blocks."""
    request = Request(INPUT, ((MaxPool2d(2),),))
    late = Caller(lambda: 0.0, lambda: True)
    with pytest.raises(DeadlineExceededError), dispatcher.stream(request, late):
        pytest.fail("a stream was begun")
    with dispatcher.stream(request, WAITING) as stream:
        dispatcher.pool_block(stream, PAYLOAD[:64], WAITING, copied)
        with pytest.raises(DeadlineExceededError):
            dispatcher.pool_block(stream, PAYLOAD[64:], late, copied)


def test_a_stream_is_held_to_the_limits_of_a_block(engine):
    """A tensor over every limit of a call passes in blocks; one plane that is over a limit doesn't."""
    # 64 planes of 64 bytes of input and 16 of output.
    limits = Limits(64, 64, 64, 10**6)
    request = Request(TensorSpec("float32", (1, 64, 4, 4)), ((AdaptiveAvgPool2d(2),),))
    dispatcher = Dispatcher(limits, AdmissionControl(10**6), engine, INFO)
    with pytest.raises(LimitExceededError):
        dispatcher.check(request)
    with (
        pytest.raises(LimitExceededError) as raised,
        dispatcher.stream(Request(TensorSpec("float32", (1, 64, 4, 5)), request.branches), WAITING),
    ):
        pytest.fail("a plane over the limit was taken")
    assert raised.value.metadata == {"limit": "64", "actual": "80"}


class InArena:
    """A request whose tensors lie in an arena of four pages, outputs behind them, and who runs it there."""

    def __init__(self, engine, request, *inputs):
        self.mapping = mmap.mmap(-1, 4 * mmap.PAGESIZE)
        self.memory = np.frombuffer(self.mapping, np.uint8)
        arena = Arena(self.mapping)
        self.asked = []
        self.dispatcher = Dispatcher(
            LIMITS, AdmissionControl(1000), engine, INFO, lambda id_: (self.asked.append(id_), arena)[1]
        )
        self.checked = self.dispatcher.check(request)
        end = 0
        for each in inputs:
            start = -(-end // 64) * 64
            end = start + each.nbytes
            self.memory[start:end] = each.reshape(-1).view(np.uint8)
        self.input, self.output = (0, end), (mmap.PAGESIZE, mmap.PAGESIZE)

    def run(self, **other):
        """Run the request, the ranges those that fit or others; give the arena's bytes from the output range on."""
        ranges = ArenaRanges(b"it", other.get("input", self.input), other.get("output", self.output))
        self.dispatcher.pool_in_arena(self.checked, ranges, other.get("caller", WAITING))
        return bytes(self.memory[ranges.output[0] :])


BRANCHES = ((MaxPool2d(2, return_indices=True),), (AvgPool2d(2),))


@pytest.fixture
def shared(engine):
    """X in an arena, with its max, the indices of that and its mean asked for: 32, 64 and 32 bytes."""
    return InArena(engine, Request(INPUT, BRANCHES), X)


def test_a_call_in_an_arena_gives_what_any_call_gives(shared, dispatcher):
    """Outputs and indices come to lie at the range for outputs, each at a multiple of 64; inputs stay as they are."""
    _, (values, places, means) = pool(dispatcher, *BRANCHES)
    left = shared.run()
    assert (left[:32], left[64:128], left[128:160]) == (values, places, means)
    assert bytes(shared.memory[:128]) == PAYLOAD
    assert shared.asked == [b"it"]


def test_a_range_of_just_the_size_needed_is_enough(shared, dispatcher):
    """The last output may end where the range does, and where the arena does."""
    _, (values, _, means) = pool(dispatcher, *BRANCHES)
    left = shared.run(output=(4 * mmap.PAGESIZE - 192, 160))
    assert (left[:32], left[128:160]) == (values, means)
    assert shared.run(output=(128, 160))[:32] == values


@pytest.mark.parametrize(
    ("ranges", "field"),
    [
        ({"input": (1, 128)}, "arena.input.offset"),
        ({"input": (32, 128)}, "arena.input.offset"),
        ({"input": (2**64 - 64, 128)}, "arena.input.offset"),
        ({"input": (4 * mmap.PAGESIZE - 64, 128)}, "arena.input.length"),
        ({"input": (0, 2**64 - 1)}, "arena.input.length"),
        ({"output": (mmap.PAGESIZE + 8, 160)}, "arena.output.offset"),
        ({"output": (2**63, 160)}, "arena.output.offset"),
        ({"output": (4 * mmap.PAGESIZE - 128, 160)}, "arena.output.length"),
        ({"output": (mmap.PAGESIZE, 2**64 - 1)}, "arena.output.length"),
    ],
    ids=repr,
)
def test_a_range_that_is_not_aligned_or_not_in_the_arena_is_refused(shared, ranges, field):
    """Ranges begin at a multiple of 64 and end inside the arena; the numbers that a caller sends can't wrap."""
    before = bytes(shared.memory)
    with pytest.raises(InvalidArgumentError) as raised:
        shared.run(**ranges)
    assert [each.field for each in raised.value.violations] == [field]
    assert bytes(shared.memory) == before


@pytest.mark.parametrize(
    ("ranges", "field", "expected"),
    [
        ({"input": (0, 127)}, "arena.input", "at least 128 bytes"),
        ({"output": (1024, 159)}, "arena.output", "at least 160 bytes"),
        ({"output": (1024, 0)}, "arena.output", "at least 160 bytes"),
        ({"output": (0, 160)}, "arena.output", "apart from the input's"),
        ({"output": (64, 4096)}, "arena.output", "apart from the input's"),
        ({"input": (256, 128), "output": (128, 192)}, "arena.output", "apart from the input's"),
    ],
    ids=repr,
)
def test_a_range_that_is_too_small_or_overlaps_is_refused(shared, ranges, field, expected):
    """What is needed is said; nothing is written where a tensor could be read."""
    before = bytes(shared.memory)
    with pytest.raises(InvalidArgumentError, match=rf"^{field}: expected .*{expected}") as raised:
        shared.run(**ranges)
    assert [each.field for each in raised.value.violations] == [field]
    assert bytes(shared.memory) == before


def test_a_larger_range_for_inputs_is_taken(shared, dispatcher):
    """What lies behind a tensor in its range is not looked at."""
    assert shared.run(input=(0, 1000))[:32] == pool(dispatcher, *BRANCHES)[1][0]


def unpool(engine, indices):
    """Give a call in an arena that unpools four ones."""
    spec = TensorSpec("float32", (1, 1, 2, 2))
    request = Request(spec, ((MaxUnpool2d(2),),), TensorSpec("int64", spec.shape))
    return InArena(engine, request, np.ones(spec.shape, np.float32), np.array(indices))


def test_indices_that_change_after_they_were_checked_change_nothing(engine, monkeypatch):
    """A client that writes to its arena during a call can't have other indices used than were checked."""
    call = unpool(engine, [0, 5, 10, 15])

    def check_then_change(*arguments):
        check_indices(*arguments)
        call.memory[64:96] = 0xFF

    monkeypatch.setattr(poolrpc_server.compute.workspace, "check_indices", check_then_change)
    output = np.frombuffer(call.run()[:64], np.float32)
    assert np.flatnonzero(output).tolist() == [0, 5, 10, 15]
    assert bytes(call.memory[64:96]) == b"\xff" * 32


@pytest.mark.parametrize("bad", [-1, 16, 2**40])
def test_an_index_out_of_its_plane_is_refused_in_an_arena_too(engine, bad):
    """An index that no output plane has is the indices' fault, and nothing is written."""
    call = unpool(engine, [0, 5, 10, bad])
    with pytest.raises(InvalidArgumentError, match=r"^indices: expected indices in 0\.\.15"):
        call.run()
    assert not call.memory[mmap.PAGESIZE :].any()


def test_a_call_in_an_arena_that_nobody_waits_for_is_not_computed(shared):
    """Time is looked at in its turn, as for any call."""
    with pytest.raises(DeadlineExceededError):
        shared.run(caller=Caller(lambda: 0.0, lambda: True))
    assert not shared.memory[mmap.PAGESIZE :].any()


def test_without_arenas_none_is_found(dispatcher):
    """A server that has none answers as for one that it doesn't know, and the client sends its bytes."""
    checked = dispatcher.check(Request(INPUT, BRANCHES))
    with pytest.raises(NotFoundError) as raised:
        dispatcher.pool_in_arena(checked, ArenaRanges(b"", (0, 128), (128, 160)), WAITING)
    assert raised.value.reason == "ARENA"


@pytest.mark.parametrize("culprit", range(8))
def test_one_bad_call_of_a_batch_fails_alone(engine, culprit):
    """P14: of eight unpoolings that are computed together one has an index out of its plane, which fails alone."""
    dispatcher = Dispatcher(LIMITS, AdmissionControl(10**6), engine, INFO)
    begun, let_go, waits = threading.Event(), threading.Event(), threading.Semaphore(0)

    def hold(_):
        begun.set()
        assert let_go.wait(60)

    def wait(_):
        waits.release()
        return True

    spec = TensorSpec("float32", (1, 1, 2, 2))
    checked = dispatcher.check(Request(spec, ((MaxUnpool2d(2),),), TensorSpec("int64", spec.shape)))
    busy = dispatcher.check(Request(INPUT, ((MaxPool2d(2),),)))
    caller = Caller(lambda: None, lambda: True, wait)
    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(dispatcher.pool, busy, PAYLOAD, WAITING, hold)
        assert begun.wait(60)
        futures = []
        for number in range(8):
            indices = np.array([0, 5, 10, 16 if number == culprit else 15])
            payload = np.full(4, number, np.float32).tobytes() + indices.tobytes()
            futures.append(threads.submit(dispatcher.pool, checked, payload, caller, copied))
            assert waits.acquire(timeout=60)
        let_go.set()
        assert first.result(60) is None
        for number, future in enumerate(futures):
            if number == culprit:
                assert isinstance(future.exception(60), InvalidArgumentError)
                continue
            (output,) = future.result(60)
            assert np.frombuffer(output, np.float32)[[0, 5, 10, 15]].tolist() == [number] * 4


def test_a_full_queue_is_a_call_that_may_come_again(engine):
    """What there is too much of is said with its limit, and the time to wait is at least a moment."""
    dispatcher = Dispatcher(LIMITS, AdmissionControl(10**6), engine, INFO, bounds=QueueLimits(max_queue=0))
    for priority in range(3):
        with pytest.raises(UnavailableError, match="at most 0 calls that wait, got 1; try again") as raised:
            dispatcher.check_room(priority)
        assert (raised.value.reason, raised.value.metadata) == ("QUEUE", {"limit": "0", "actual": "1"})
        assert raised.value.retry_delay > 0


def test_after_a_stop_a_call_is_told_to_go_elsewhere(engine):
    """The server stops: what comes may be tried again, and nothing is held for it."""
    admission = AdmissionControl(1000)
    dispatcher = Dispatcher(LIMITS, admission, engine, INFO)
    dispatcher.stop()
    with pytest.raises(UnavailableError) as raised:
        pool(dispatcher, (MaxPool2d(2),))
    assert raised.value.reason == "STOPPING"
    assert raised.value.retry_delay > 0
    assert admission.held == 0


def test_without_room_for_bytes_nothing_is_read(admission, dispatcher):
    """Where the bytes under way are all there may be, it is known before a call's message is."""
    dispatcher.check_room(1)
    with admission.hold(1000), pytest.raises(UnavailableError) as raised:
        dispatcher.check_room(1)
    assert raised.value.reason == "IN_FLIGHT_BYTES"
