"""The dispatcher: one call through validation, admission and the engine, whole, in blocks, or in an arena."""

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import poolrpc_server.compute.branch
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
from poolrpc_server.calls.admitted_call import ANSWER_COPIES
from poolrpc_server.calls.dispatch import BLOCKS_HELD, FREE_SCRATCH_BYTES, Dispatcher
from poolrpc_server.calls.queue import QueueLimits
from poolrpc_server.calls.validate import Limits
from poolrpc_server.compute.engine import Engine
from poolrpc_server.compute.planes import check_indices
from poolrpc_server.transports.local.arenas import Arena
from tests.unit.server.context import Context

INFO = ServerInfo("0", "0", "cpu", 1, {}, {})
LIMITS = Limits(2**20, 2**20, 64, 10**6)
X = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4)
INPUT, PAYLOAD = TensorSpec("float32", X.shape), X.tobytes()
HALVED = BranchResult(((1, 2, 2, 2),), TensorSpec("float32", (1, 2, 2, 2)))
CALLS = 1000
BYTES = 100_000
CALL = Context()
LATE = Context(remaining=0.0)


@pytest.fixture(scope="module")
def engine():
    """An engine of one thread on the CPU."""
    made = Engine("cpu", 1)
    yield made
    made.close()


@pytest.fixture
def admission():
    """Admission control of BYTES bytes."""
    return AdmissionControl(BYTES)


@pytest.fixture
def dispatcher(engine):
    """A dispatcher of that engine."""
    return Dispatcher(LIMITS, CALLS, engine, INFO)


def pool(dispatcher, *branches, spec=INPUT, payload=PAYLOAD, call=CALL):
    """Run a request; return it as checked, and copies of its outputs' bytes."""
    checked = dispatcher.check(Request(spec, branches))
    return checked, dispatcher.pool(checked, payload, call, copied)


def copied(outputs):
    """Return copies of the outputs' bytes."""
    return [bytes(each) for each in outputs]


def needed(checked):
    """Return the bytes that a request takes in addition to its message: its answer, and the memory to compute it."""
    return ANSWER_COPIES * checked.output_bytes + max(0, checked.schedule.scratch_bytes - FREE_SCRATCH_BYTES)


@contextmanager
def held(admission, nbytes):
    """Hold bytes for another call."""
    other = Context(admission=admission)
    other.ticket.reserve(nbytes)
    yield
    other.ticket.release()


@contextmanager
def rejected(admission):
    """Check that there are too few bytes in flight for what is run within the context, for now."""
    before = admission.bytes_in_flight
    with pytest.raises(UnavailableError) as raised:
        yield
    assert (raised.value.reason, raised.value.metadata["limit"]) == ("IN_FLIGHT_BYTES", str(BYTES))
    assert raised.value.retry_delay > 0
    assert admission.bytes_in_flight == before


def test_a_call_is_answered_with_specs_and_bytes_in_order(dispatcher):
    """Each branch has its shapes, its output and its indices, and the bytes follow in that order."""
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
    """A call whose time is up before it is computed fails with DEADLINE_EXCEEDED."""
    with pytest.raises(DeadlineExceededError, match="before the call was computed"):
        pool(dispatcher, (MaxPool2d(2),), call=Context(remaining=left))


def test_a_cancelled_call_is_not_computed(dispatcher):
    """A call that was cancelled before it is computed fails with CANCELLED."""
    call = Context()
    call.cancel()
    with pytest.raises(CancelledError, match="before it was computed"):
        pool(dispatcher, (MaxPool2d(2),), call=call)


@pytest.mark.parametrize(
    ("layer", "bad", "error"),
    [
        (MaxPool2d(5), {}, InvalidArgumentError),
        (AvgPool2d(2), {"spec": TensorSpec("int8", (1, 2, 4, 4))}, UnsupportedError),
        (MaxPool2d(2), {"payload": b""}, InvalidArgumentError),
        (MaxPool2d(2), {"remaining": 0.0}, DeadlineExceededError),
    ],
    ids=["layer", "dtype", "payload", "deadline"],
)
def test_a_failed_call_holds_nothing_after_its_end(dispatcher, admission, layer, bad, error):
    """Nothing is reserved for an invalid request; what a call that fails later has reserved is on its ticket."""
    bad = dict(bad)
    call = Context(remaining=bad.pop("remaining", None), admission=admission)
    with pytest.raises(error):
        pool(dispatcher, (layer,), call=call, **bad)
    assert (call.ticket.nbytes > 0) == (layer == MaxPool2d(2))
    assert admission.bytes_in_flight == call.ticket.nbytes
    call.ticket.release()
    assert admission.bytes_in_flight == 0


def test_equal_requests_share_what_is_learned_about_them(dispatcher):
    """A request in an arena, or of another protocol, has the estimate of the ones before; long chains are forgotten."""
    first, again = (dispatcher.check(Request(INPUT, ((MaxPool2d(2),),))) for _ in range(2))
    first.schedule.record_duration(100.0)
    assert again.schedule.seconds == first.schedule.seconds > 1
    long = Request(INPUT, ((MaxPool2d(1),) * 17,))
    assert dispatcher.check(long) is not dispatcher.check(long)


@pytest.mark.parametrize("scratch", [None, 0, FREE_SCRATCH_BYTES, FREE_SCRATCH_BYTES + 1000])
def test_outputs_and_scratch_count_with_those_of_other_calls(dispatcher, admission, monkeypatch, scratch):
    """A call needs room for its answer and for what computes it, to the byte; otherwise it may be tried again."""
    checked = dispatcher.check(Request(INPUT, ((MaxPool2d(2),),)))
    if scratch is not None:
        monkeypatch.setattr(checked.schedule, "scratch_bytes", scratch)
    assert checked.output_bytes == 32
    call = Context(admission=admission)
    with held(admission, BYTES - needed(checked) + 1), rejected(admission):
        dispatcher.pool(checked, PAYLOAD, call, copied)
    with held(admission, BYTES - needed(checked)):
        dispatcher.pool(checked, PAYLOAD, call, copied)
        assert call.ticket.nbytes == needed(checked)


def test_bytes_of_a_message_that_is_read_later_count_too(dispatcher, admission):
    """A payload that is not read yet is counted, before it is read, with what the call needs."""
    checked = dispatcher.check(Request(INPUT, ((MaxPool2d(2),),)))
    size, call, read = len(PAYLOAD) + needed(checked), Context(admission=admission), []

    def payload():
        read.append(call.ticket.nbytes)
        return PAYLOAD

    with held(admission, BYTES - size + 1), rejected(admission):
        dispatcher.pool_from(checked, payload, call, copied)
    assert read == []
    with held(admission, BYTES - size):
        (output,) = dispatcher.pool_from(checked, payload, call, copied)
    assert (read, len(output)) == ([size], 32)


def test_a_payload_that_is_read_later_is_limited(engine):
    """It is not in a message, so its size is checked by itself, before anything is reserved or read."""
    dispatcher, call = Dispatcher(Limits(127, 2**20, 64, 10**6), CALLS, engine, INFO), Context()
    checked = dispatcher.check(Request(INPUT, ((MaxPool2d(2),),)))
    with pytest.raises(LimitExceededError) as raised:
        dispatcher.pool_from(checked, lambda: pytest.fail("it was read"), call, copied)
    assert (raised.value.reason, raised.value.metadata) == ("TENSOR_TOO_LARGE", {"limit": "127", "actual": "128"})
    assert call.ticket.nbytes == 0


def test_bytes_count_until_the_call_has_ended(dispatcher, admission):
    """A call's bytes are returned neither when its outputs are computed nor when they are read, but at its end."""
    call, checked = Context(admission=admission), dispatcher.check(Request(INPUT, ((MaxPool2d(2),),)))
    during = []
    dispatcher.pool(checked, PAYLOAD, call, lambda _: during.append(admission.bytes_in_flight))
    assert during == [needed(checked)] == [admission.bytes_in_flight]
    call.ticket.release()
    assert admission.bytes_in_flight == 0


def test_a_call_that_never_fits_is_rejected_for_good(dispatcher):
    """A call that needs more than all bytes in flight gets a final error with both figures."""
    checked = dispatcher.check(Request(INPUT, ((MaxPool2d(2),),)))
    size = needed(checked)
    with pytest.raises(LimitExceededError) as raised:
        dispatcher.pool(checked, PAYLOAD, Context(admission=AdmissionControl(size - 1)), copied)
    assert raised.value.reason == "IN_FLIGHT_BYTES"
    assert raised.value.metadata == {"limit": str(size - 1), "actual": str(size)}
    assert dispatcher.pool(checked, PAYLOAD, Context(admission=AdmissionControl(size)), copied)


class WatchedEngine(Engine):
    """An engine whose last run the test sees."""

    last = None

    def run(self, *arguments):
        """Return a run, and keep it."""
        self.last = super().run(*arguments)
        return self.last


@pytest.fixture
def watched():
    """An engine whose last run is kept."""
    made = WatchedEngine("cpu", 1)
    yield made
    made.close()


def test_a_request_is_computed_for_a_limited_time(watched):
    """The check of an execution raises a final error once the time is used up; time in the queue does not count."""
    dispatcher, call = Dispatcher(LIMITS, CALLS, watched, INFO, max_compute_seconds=0.0), Context()
    with pytest.raises(LimitExceededError, match="computed within 0 seconds, got one that takes longer") as raised:
        # Whether the engine has asked before or not, it is asked again when the outputs are complete.
        pool_checked(dispatcher, call, lambda _: watched.last.check())
    assert (raised.value.reason, raised.value.metadata["limit"]) == ("COMPUTE_SECONDS", "0")
    assert float(raised.value.metadata["actual"]) > 0
    assert call.record.latest.error == "LimitExceededError"
    # An execution that has not begun has used no time.
    call.record.latest.started = 0
    watched.last.check()


def test_an_execution_ends_with_its_call(watched):
    """The check raises nothing within the limit, and the call's own error once no caller waits for the answer."""
    dispatcher, call = Dispatcher(LIMITS, CALLS, watched, INFO, max_compute_seconds=3600.0), Context()
    assert pool_checked(dispatcher, call, lambda _: watched.last.check()) is None

    def leave(_):
        call.cancel()
        watched.last.check()

    with pytest.raises(CancelledError):
        pool_checked(dispatcher, call, leave)


def pool_checked(dispatcher, call, finish):
    """Run a request with another `finish`."""
    return dispatcher.pool(dispatcher.check(Request(INPUT, ((MaxPool2d(2),),))), PAYLOAD, call, finish)


def test_shapes_are_answered_without_a_payload(dispatcher):
    """Shapes follow the same rules as a call, and nothing is computed."""
    assert dispatcher.shapes((1, 2, 4, 4), [(MaxPool2d(2), AvgPool2d(2))], "NCHW") == [((1, 2, 2, 2), (1, 2, 1, 1))]
    with pytest.raises(InvalidArgumentError, match=r"^branches\[0\]\.layers\[0\]\.max_pool\.kernel_size: "):
        dispatcher.shapes((1, 2, 4, 4), [(MaxPool2d(5),)], "NCHW")


def test_a_stream_gives_what_a_call_gives_block_by_block(dispatcher):
    """A tensor in blocks has the outputs of the whole one, and its shapes are known before the first block."""
    request = Request(INPUT, ((MaxPool2d(2, return_indices=True),),))
    _, whole = pool(dispatcher, *request.branches)
    values, places = [], []
    stream = dispatcher.stream(request, CALL)
    assert stream.results == request.results()
    for start in (0, 64):
        value, place = dispatcher.pool_block(stream, PAYLOAD[start : start + 64], CALL, copied)
        values.append(value)
        places.append(place)
    stream.finish()
    assert [b"".join(values), b"".join(places)] == whole


def test_a_stream_reserves_its_blocks_until_its_call_has_ended(dispatcher, admission):
    """The blocks that a stream has in memory, and what computes one, are reserved when it begins, and only then."""
    request = Request(INPUT, ((MaxPool2d(2),),))
    size = BLOCKS_HELD * 128 + needed(dispatcher.check(request))
    call = Context(admission=admission)
    with held(admission, BYTES - size):
        stream = dispatcher.stream(request, call)
        for start in (0, 64):
            dispatcher.pool_block(stream, PAYLOAD[start : start + 64], call, copied)
        stream.finish()
        assert call.ticket.nbytes == size
    call.ticket.release()
    assert admission.bytes_in_flight == 0


def test_a_stream_is_rejected_at_its_beginning_or_never(dispatcher, admission):
    """A stream whose blocks do not fit is rejected before the first block."""
    request = Request(INPUT, ((MaxPool2d(2),),))
    size = BLOCKS_HELD * 128 + needed(dispatcher.check(request))
    with held(admission, BYTES - size + 1), rejected(admission):
        dispatcher.stream(request, Context(admission=admission))


def test_a_stream_past_its_deadline_computes_nothing_more(dispatcher):
    """The deadline is checked when a stream begins and before each of its blocks."""
    request = Request(INPUT, ((MaxPool2d(2),),))
    with pytest.raises(DeadlineExceededError):
        dispatcher.stream(request, LATE)
    stream = dispatcher.stream(request, CALL)
    dispatcher.pool_block(stream, PAYLOAD[:64], CALL, copied)
    with pytest.raises(DeadlineExceededError):
        dispatcher.pool_block(stream, PAYLOAD[64:], LATE, copied)


def test_the_limits_of_a_stream_are_those_of_a_block(engine):
    """A tensor over every limit of a call passes in blocks; a plane over a limit does not."""
    # 64 planes of 64 bytes of input and 16 of output.
    limits = Limits(64, 64, 64, 10**6)
    request = Request(TensorSpec("float32", (1, 64, 4, 4)), ((AdaptiveAvgPool2d(2),),))
    dispatcher = Dispatcher(limits, CALLS, engine, INFO)
    with pytest.raises(LimitExceededError):
        dispatcher.check(request)
    with pytest.raises(LimitExceededError) as raised:
        dispatcher.stream(Request(TensorSpec("float32", (1, 64, 4, 5)), request.branches), CALL)
    assert raised.value.metadata == {"limit": "64", "actual": "80"}


class InArena:
    """A request whose tensors are in an arena of four pages, with its outputs behind them, and its dispatcher."""

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
        """Run the request with its own or other ranges; return the arena's bytes from the output range on."""
        ranges = ArenaRanges(b"it", other.get("input", self.input), other.get("output", self.output))
        self.dispatcher.pool_in_arena(self.checked, ranges, other.get("call", CALL))
        return bytes(self.memory[ranges.output[0] :])


BRANCHES = ((MaxPool2d(2, return_indices=True),), (AvgPool2d(2),))


@pytest.fixture
def shared(engine):
    """A request for the max of X, its indices and its mean in an arena: 32, 64 and 32 bytes."""
    return InArena(engine, Request(INPUT, BRANCHES), X)


def test_a_repeated_call_in_an_arena_reads_what_is_there_now(shared, dispatcher):
    """A call in the same ranges as earlier ones has the outputs of its own input, whatever the client wrote since."""
    for seed in range(4):
        x = np.random.default_rng(seed).standard_normal(INPUT.shape).astype(np.float32)
        shared.memory[: x.nbytes] = x.reshape(-1).view(np.uint8)
        expected = dispatcher.pool(shared.checked, x.tobytes(), CALL, copied)
        left = shared.run()
        assert [left[:32], left[64:128], left[128:160]] == list(expected)


def test_a_call_in_an_arena_has_the_outputs_of_any_call(shared, dispatcher):
    """Outputs and indices are written to the output range, each at a multiple of 64; inputs are left alone."""
    _, (values, places, means) = pool(dispatcher, *BRANCHES)
    left = shared.run()
    assert (left[:32], left[64:128], left[128:160]) == (values, places, means)
    assert bytes(shared.memory[:128]) == PAYLOAD
    assert shared.asked == [b"it"]


def test_a_range_of_exactly_the_needed_size_is_enough(shared, dispatcher):
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
def test_a_range_that_is_not_aligned_or_not_in_the_arena_is_rejected(shared, ranges, field):
    """Ranges begin at a multiple of 64 and end inside the arena; no number that a caller sends wraps around."""
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
def test_a_range_that_is_too_small_or_overlaps_is_rejected(shared, ranges, field, expected):
    """The error says what is needed, and nothing is written."""
    before = bytes(shared.memory)
    with pytest.raises(InvalidArgumentError, match=rf"^{field}: expected .*{expected}") as raised:
        shared.run(**ranges)
    assert [each.field for each in raised.value.violations] == [field]
    assert bytes(shared.memory) == before


def test_a_call_in_an_arena_counts_only_what_computes_it(shared, admission, monkeypatch):
    """Its inputs and outputs are in the arena, whose bytes are counted elsewhere."""
    monkeypatch.setattr(shared.checked.schedule, "scratch_bytes", FREE_SCRATCH_BYTES + 1000)
    call = Context(admission=admission)
    with held(admission, BYTES - 999), rejected(admission):
        shared.run(call=call)
    assert not shared.memory[mmap.PAGESIZE :].any()
    with held(admission, BYTES - 1000):
        shared.run(call=call)
        assert call.ticket.nbytes == 1000


def test_a_larger_range_for_inputs_is_accepted(shared, dispatcher):
    """The bytes behind the tensors in their range are ignored."""
    assert shared.run(input=(0, 1000))[:32] == pool(dispatcher, *BRANCHES)[1][0]


def unpool(engine, indices):
    """Return a call in an arena that unpools four ones."""
    spec = TensorSpec("float32", (1, 1, 2, 2))
    request = Request(spec, ((MaxUnpool2d(2),),), TensorSpec("int64", spec.shape))
    return InArena(engine, request, np.ones(spec.shape, np.float32), np.array(indices))


def test_indices_that_change_after_the_check_change_nothing(engine, monkeypatch):
    """A client that writes to its arena during a call cannot have other indices used than those that were checked."""
    call = unpool(engine, [0, 5, 10, 15])

    def check_then_change(*arguments):
        check_indices(*arguments)
        call.memory[64:96] = 0xFF

    monkeypatch.setattr(poolrpc_server.compute.branch, "check_indices", check_then_change)
    output = np.frombuffer(call.run()[:64], np.float32)
    assert np.flatnonzero(output).tolist() == [0, 5, 10, 15]
    assert bytes(call.memory[64:96]) == b"\xff" * 32


@pytest.mark.parametrize("bad", [-1, 16, 2**40])
def test_an_index_out_of_its_plane_is_rejected_in_an_arena(engine, bad):
    """The error names the indices and their range, and nothing is written."""
    call = unpool(engine, [0, 5, 10, bad])
    with pytest.raises(InvalidArgumentError, match=r"^indices: expected indices in 0\.\.15"):
        call.run()
    assert not call.memory[mmap.PAGESIZE :].any()


def test_a_call_in_an_arena_past_its_deadline_is_not_computed(shared):
    """The deadline is checked as for any call, and nothing is written."""
    with pytest.raises(DeadlineExceededError):
        shared.run(call=LATE)
    assert not shared.memory[mmap.PAGESIZE :].any()


def test_a_server_without_arenas_finds_none(dispatcher):
    """The error is that of an unknown arena, after which a client sends its bytes."""
    checked = dispatcher.check(Request(INPUT, BRANCHES))
    with pytest.raises(NotFoundError) as raised:
        dispatcher.pool_in_arena(checked, ArenaRanges(b"", (0, 128), (128, 160)), CALL)
    assert raised.value.reason == "ARENA"


@pytest.mark.parametrize("culprit", range(8))
def test_one_bad_call_of_a_batch_fails_alone(engine, culprit):
    """Of eight unpoolings that are computed together one has an index out of its plane, which fails alone."""
    dispatcher = Dispatcher(LIMITS, CALLS, engine, INFO)
    begun, let_go, waits = threading.Event(), threading.Event(), threading.Semaphore(0)

    def hold(_):
        begun.set()
        assert let_go.wait(60)

    class Queued(Context):
        def add_done_callback(self, _):
            waits.release()
            return True

    spec = TensorSpec("float32", (1, 1, 2, 2))
    checked = dispatcher.check(Request(spec, ((MaxUnpool2d(2),),), TensorSpec("int64", spec.shape)))
    busy = dispatcher.check(Request(INPUT, ((MaxPool2d(2),),)))
    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(dispatcher.pool, busy, PAYLOAD, CALL, hold)
        assert begun.wait(60)
        futures = []
        for number in range(8):
            indices = np.array([0, 5, 10, 16 if number == culprit else 15])
            payload = np.full(4, number, np.float32).tobytes() + indices.tobytes()
            futures.append(threads.submit(dispatcher.pool, checked, payload, Queued(), copied))
            assert waits.acquire(timeout=60)
        let_go.set()
        assert first.result(60) is None
        for number, future in enumerate(futures):
            if number == culprit:
                assert isinstance(future.exception(60), InvalidArgumentError)
                continue
            (output,) = future.result(60)
            assert np.frombuffer(output, np.float32)[[0, 5, 10, 15]].tolist() == [number] * 4


def test_a_full_queue_rejects_temporarily(engine):
    """The error has the limit, the count, and the time to wait before the next try."""
    dispatcher = Dispatcher(LIMITS, CALLS, engine, INFO, queue_limits=QueueLimits(max_queue=0))
    for priority in range(3):
        call = Context()
        call.set_priority(priority)
        with pytest.raises(UnavailableError, match="at most 0 calls in the queue, got 1; try again") as raised:
            dispatcher.admit(call)
        assert (raised.value.reason, raised.value.metadata) == ("QUEUE", {"limit": "0", "actual": "1"})
        assert raised.value.retry_delay > 0


def test_a_stopped_dispatcher_rejects_temporarily(dispatcher):
    """A call that comes after the stop may be tried again."""
    dispatcher.stop()
    with pytest.raises(UnavailableError) as raised:
        pool(dispatcher, (MaxPool2d(2),))
    assert raised.value.reason == "STOPPING"
    assert raised.value.retry_delay > 0


def test_only_so_many_calls_are_admitted(engine):
    """One call too many is rejected temporarily, until one of the others has ended."""
    dispatcher, admission = Dispatcher(LIMITS, 2, engine, INFO), AdmissionControl(BYTES)
    calls = [Context(admission=admission) for _ in range(3)]
    for call in calls[:2]:
        dispatcher.admit(call)
    with pytest.raises(UnavailableError, match="at most 2 calls at a time, got 3; try again") as raised:
        dispatcher.admit(calls[2])
    assert (raised.value.reason, raised.value.metadata) == ("CALLS", {"limit": "2", "actual": "3"})
    calls[0].ticket.release()
    dispatcher.admit(calls[2])


def test_a_message_over_the_limit_is_rejected_as_soon_as_it_is_announced(engine):
    """The error is final and has both sizes, and the call is not counted."""
    dispatcher = Dispatcher(Limits(1000, 2**20, 64, 10**6), 1, engine, INFO)
    admission = AdmissionControl(BYTES)
    with pytest.raises(LimitExceededError) as raised:
        dispatcher.admit(Context(admission=admission), 1001)
    assert (raised.value.reason, raised.value.metadata) == ("MESSAGE_TOO_LARGE", {"limit": "1000", "actual": "1001"})
    assert admission.tickets() == []
    dispatcher.admit(Context(admission=admission), 1000)


def test_an_executed_call_has_its_stage_times(dispatcher):
    """A call's record has the planes, the batch and the durations of its execution, and the error if it failed."""
    call = Context()
    pool(dispatcher, (MaxPool2d(2),), call=call)
    (times,) = call.record.executions
    stages = [times.queued, times.started, times.computed, times.encoded, times.ended]
    assert stages == sorted(stages)
    assert (times.planes, times.batch_requests, times.batch_planes, times.error) == (2, 1, 2, "")
    assert call.record.compute_ns == times.computed - times.started
    late = Context(remaining=0.0)
    with pytest.raises(DeadlineExceededError):
        pool(dispatcher, (MaxPool2d(2),), call=late)
    assert (late.record.latest.error, late.record.compute_ns) == ("DeadlineExceededError", 0)
