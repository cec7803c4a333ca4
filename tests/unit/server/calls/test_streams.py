"""Open streams: reading ahead, the end of the reader, the one done callback of a stream."""

import threading
import weakref
from itertools import count
from queue import Queue
from time import monotonic

import pytest

from poolrpc import DeadlineExceededError, UnavailableError
from poolrpc_server.calls import streams as streams_module
from poolrpc_server.calls.admission import AdmissionControl, CallLimit
from poolrpc_server.calls.method import Method, Observers
from poolrpc_server.calls.pipeline import CallPipeline
from poolrpc_server.calls.reaper import Reaper
from poolrpc_server.calls.streams import OpenStreams, ReadAhead, StreamContext
from poolrpc_server.telemetry.logs import CallLog
from poolrpc_server.telemetry.metrics import Metrics
from tests.unit.server.context import Context

PATIENCE = 30  # seconds that nothing here takes unless it hangs


@pytest.fixture(autouse=True)
def ended():
    """Return a function that waits for the readers' threads to end; no test leaves one behind."""

    def join():
        for thread in threading.enumerate():
            if thread.name == "poolrpc-reader":
                thread.join(PATIENCE)
                assert not thread.is_alive()

    yield join
    join()


@pytest.mark.parametrize("ahead", [1, 2, 100])
@pytest.mark.parametrize("items", [0, 1, 2, 50])
def test_items_come_in_order_to_their_end(ahead, items):
    """Every item comes once, in order, and then the end, however often it is asked for."""
    with ReadAhead(iter(range(items)), ahead, PATIENCE) as reader:
        assert list(reader) == list(range(items))
        assert list(reader) == []
        assert next(reader, "none") == "none"


def test_an_error_of_the_source_is_raised_by_next():
    """The items before it come first, and every further call raises it again."""

    def source():
        yield 1
        yield 2
        raise KeyError("the stream broke")

    with ReadAhead(source(), 1, PATIENCE) as reader:
        assert [next(reader), next(reader)] == [1, 2]
        for _ in range(2):
            with pytest.raises(KeyError, match="the stream broke"):
                next(reader)


def test_reading_goes_only_so_far_ahead():
    """With room for one item, the second is read before the first is asked for, and the third is not."""
    asked = Queue()

    def source():
        for i in count():
            asked.put(i)
            yield i

    with ReadAhead(source(), 1, PATIENCE) as reader:
        # One is held and one waits for room; the next is asked for when one is taken.
        assert [asked.get(timeout=PATIENCE), asked.get(timeout=PATIENCE)] == [0, 1]
        assert next(reader) == 0
        assert asked.get(timeout=PATIENCE) == 2
        assert asked.empty()


def test_an_item_has_to_come_in_time():
    """An item that is late is an error that names the time."""
    going_on = threading.Event()

    def source():
        yield 1
        going_on.wait(PATIENCE)
        yield 2

    with ReadAhead(source(), 1, 0.01) as reader:
        assert next(reader) == 1
        with pytest.raises(DeadlineExceededError, match=r"within 0\.01 seconds, got none") as raised:
            next(reader)
        assert raised.value.reason == "STREAM_IDLE"
        going_on.set()


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_reader_that_waits_for_room_ends_with_the_context(ended, taken):
    """A reader that waits for room ends although its source has more items."""
    held, given = threading.Semaphore(0), []

    def source():
        for i in count():
            given.append(i)
            held.release()
            yield i

    with ReadAhead(source(), 1, PATIENCE) as reader:
        for i in range(taken):
            assert next(reader) == i
        for _ in range(taken + 2):  # those taken, one that is held, one that waits for room
            assert held.acquire(timeout=PATIENCE)
    ended()
    assert len(given) == taken + 2


def test_a_reader_that_waits_for_its_source_ends_when_that_does(ended):
    """A source that ends, as gRPC's do when the call ends, ends the reader, with an error or without."""
    for error in (None, KeyError):
        going_on, asked = threading.Event(), threading.Event()

        def source(error=error, going_on=going_on, asked=asked):
            asked.set()
            going_on.wait(PATIENCE)
            if error:
                raise error
            yield from ()

        with ReadAhead(source(), 1, PATIENCE):
            assert asked.wait(PATIENCE)
        going_on.set()
        ended()


def test_a_reader_ends_with_a_context_that_fails(ended):
    """An exception that leaves the context ends the reader."""

    def fail():
        with ReadAhead(count(), 1, PATIENCE) as reader:
            next(reader)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    ended()


class Block:
    """What a callback may hold."""

    def done(self):
        """Be called at the end."""


def test_a_stream_keeps_only_its_latest_callback():
    """A stream of any number of blocks has one callback with its transport, and holds that of one block."""
    call, called = Context(), []
    stream, block = StreamContext(call, PATIENCE), Block()
    reference = weakref.ref(block)
    assert stream.add_done_callback(block.done)
    for number in range(100):
        assert stream.add_done_callback(lambda number=number: called.append(number))
    del block
    assert reference() is None
    assert len(call.callbacks) == 1
    call.cancel()
    assert called == [99]
    assert not stream.add_done_callback(lambda: called.append("late"))
    assert called == [99]


def test_a_stream_that_has_ended_takes_no_callback():
    """A call that ended before the first callback says so at once."""
    call = Context()
    call.cancel()
    stream = StreamContext(call, PATIENCE)
    assert not stream.add_done_callback(list)
    assert not stream.add_done_callback(list)


def test_a_stream_expires_unless_it_makes_progress():
    """Its call is to be ended after some seconds without progress; each progress starts them again."""
    call = Context()
    before = monotonic()
    stream = StreamContext(call, PATIENCE)
    first = call.ticket.expires
    assert before + PATIENCE <= first <= monotonic() + PATIENCE
    while monotonic() + PATIENCE <= first:  # the clock may be coarse
        pass
    stream.progressed()
    assert first < call.ticket.expires <= monotonic() + PATIENCE


def test_only_so_many_streams_are_open():
    """One stream too many is rejected temporarily, and the place of one is free when its call has ended."""
    streams, admission = OpenStreams(1, PATIENCE), AdmissionControl(100)
    first = Context(admission=admission)
    with streams.open(iter([b"a"]), 1, first) as (reader, context):
        assert (streams.count, list(reader), context.priority) == (1, [b"a"], 1)
        with (
            pytest.raises(UnavailableError, match="at most 1 streams at a time, got 2") as raised,
            streams.open(iter(()), 1, Context(admission=admission)),
        ):
            pytest.fail("a second stream was let in")
        assert (raised.value.reason, raised.value.metadata) == ("STREAMS", {"limit": "1", "actual": "2"})
    # The last answers may not have been sent yet.
    assert streams.count == 1
    first.ticket.release()
    assert streams.count == 0
    last = Context(admission=admission)
    with streams.open(iter(()), 1, last):
        assert streams.count == 1
        last.cancel()
        assert streams.count == 0


def test_an_open_stream_has_twice_the_idle_time_for_its_answers():
    """A client that sends nothing gets an error after the idle time, one that reads nothing is ended after twice."""
    call = Context()
    before = monotonic()
    with OpenStreams(1, PATIENCE).open(iter(()), 1, call) as (_, context):
        assert before + 2 * PATIENCE <= call.ticket.expires <= monotonic() + 2 * PATIENCE
        assert context.ticket is call.ticket


def test_a_stream_in_which_nothing_moves_is_ended():
    """The reaper ends the call of a stream without progress, and its place is free."""
    admission = AdmissionControl(100)
    call, ended, streams = Context(admission=admission), threading.Event(), OpenStreams(1, 0.01)
    call.add_done_callback(ended.set)
    reaper = Reaper(admission, lambda: 0, 2**63)
    admission.on_enter = reaper.wake
    try:
        with streams.open(iter(()), 1, call):
            assert ended.wait(PATIENCE)
        assert (call.is_active(), streams.count) == (False, 0)
    finally:
        reaper.close()


def test_a_stream_does_not_give_way_while_its_message_is_computed(monkeypatch):
    """A client that waits for an answer before it sends more is not stalled, however long the answer takes.

    The next message is read ahead meanwhile, which is the server's own decision.
    """
    monkeypatch.setattr(streams_module, "STALLED_SECONDS", 0.0)
    admission, limit = AdmissionControl(100), CallLimit("CALLS", "calls at a time", 1)
    streams, asked, answered = OpenStreams(1, PATIENCE), threading.Event(), threading.Event()

    def messages():
        yield b"first"
        asked.set()
        answered.wait(PATIENCE)

    def handler(sent, call):
        with streams.open(sent, 1, call) as (reader, _):
            for message in reader:
                assert asked.wait(PATIENCE)
                # Now the message is computed, while the reader waits for the next one.
                with pytest.raises(UnavailableError):
                    Context(admission=admission).ticket.enter(limit)
                yield message

    log = CallLog()
    observers = Observers(log, Metrics(enabled=False))
    made = CallPipeline(
        admission,
        lambda call, _: call.ticket.enter(limit),
        observers,
        max_message_bytes=100,
        receive_seconds=PATIENCE,
    )
    made.add([Method("/a.B/C", stream=handler, computes=True)])
    context = Context("/a.B/C")
    answers = made.admit(context).stream(messages())
    try:
        assert next(answers) == b"first"
        assert context.is_active()
    finally:
        answered.set()
        answers.close()
        log.close()
