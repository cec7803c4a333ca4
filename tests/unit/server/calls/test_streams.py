"""Reading ahead: order, the end and what it came by, how far ahead, that the reader ends; who is told of leaving."""

import threading
import weakref
from itertools import count
from queue import Queue

import pytest

from poolrpc import DeadlineExceededError
from poolrpc_server.calls.streams import Leaving, ReadAhead

PATIENCE = 30  # seconds that nothing here takes unless it hangs


@pytest.fixture(autouse=True)
def ended():
    """Give what waits for the readers' threads to end, and see that each test leaves none."""

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
    """Every item comes once, in order, and then the end, to whoever asks again too."""
    with ReadAhead(iter(range(items)), ahead, PATIENCE) as reader:
        assert list(reader) == list(range(items))
        assert list(reader) == []
        assert next(reader, "none") == "none"


def test_an_error_of_the_source_is_raised_where_it_is_waited_for():
    """The items before it come first; who asks again has the error again."""

    def source():
        yield 1
        yield 2
        raise KeyError("the stream broke")

    with ReadAhead(source(), 1, PATIENCE) as reader:
        assert [next(reader), next(reader)] == [1, 2]
        for _ in range(2):
            with pytest.raises(KeyError, match="the stream broke"):
                next(reader)


def test_reading_goes_so_far_ahead_and_no_farther():
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


def test_a_source_that_sends_nothing_is_waited_for_so_long():
    """An item that doesn't come in time is an error with the time in it; one that comes after all is given."""
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
    """A reader that holds items which nobody wants any more ends, although its source has more of them."""
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
    """A source that ends, as gRPC's do once nobody wants them, ends the reader, by whatever it ends."""
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
    """Whatever ends the context ends the reader."""

    def fail():
        with ReadAhead(count(), 1, PATIENCE) as reader:
            next(reader)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    ended()


class Held:
    """What a callback may hold."""

    def called(self):
        """Be called."""


def test_of_leaving_only_the_last_is_told_and_held():
    """A stream of any number of blocks has one callback with gRPC, and what it held for a block goes with the block."""
    kept, told = [], []

    def keep(callback):
        kept.append(callback)
        return True

    leaving, first = Leaving(keep), Held()
    gone = weakref.ref(first)
    assert leaving.tell(first.called)
    for number in range(100):
        assert leaving.tell(lambda number=number: told.append(number))
    del first
    assert gone() is None
    (callback,) = kept
    callback()
    assert told == [99]
    assert not leaving.tell(lambda: told.append("late"))
    assert told == [99]


def test_one_that_left_before_anybody_asked_is_seen():
    """Where there is nobody left to tell of, the first who asks learns it."""
    leaving = Leaving(lambda _: False)
    assert not leaving.tell(lambda: None)
    assert not leaving.tell(lambda: None)
