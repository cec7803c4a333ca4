"""Open streams: reading ahead, the end of the reader, the one done callback of a stream."""

import threading
import weakref
from itertools import count
from queue import Queue

import pytest

from poolrpc import DeadlineExceededError, UnavailableError
from poolrpc_server.calls.streams import OpenStreams, ReadAhead, StreamContext
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
    stream, block = StreamContext(call), Block()
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
    stream = StreamContext(call)
    assert not stream.add_done_callback(list)
    assert not stream.add_done_callback(list)


def test_only_so_many_streams_are_open():
    """One stream too many is rejected temporarily, and the place of one that ended is free."""
    streams = OpenStreams(1, PATIENCE)
    with streams.open(iter([b"a"]), 1, Context()) as (reader, _, context):
        assert (streams.count, list(reader), context.priority) == (1, [b"a"], 1)
        with pytest.raises(UnavailableError) as raised, streams.open(iter(()), 1, Context()):
            pytest.fail("a second stream was let in")
        assert raised.value.reason == "STREAMS"
    with streams.open(iter(()), 1, Context()):
        pass
    assert streams.count == 0


def test_a_stream_in_which_nothing_moves_is_cancelled():
    """A call whose answers are not read is ended after twice the idle time."""
    call, cancelled = Context(), threading.Event()
    call.add_done_callback(cancelled.set)
    with OpenStreams(1, 0.01).open(iter(()), 1, call):
        assert cancelled.wait(PATIENCE)
    assert not call.is_active()
