"""The reaper: which calls it ends, and that it sleeps without calls."""

from threading import Event, Semaphore, Thread
from time import monotonic

import pytest

from poolrpc_server.calls.admission import SMALL_BYTES, AdmissionControl, CallLimit, Ticket
from poolrpc_server.calls.reaper import Reaper
from poolrpc_server.calls.streams import StreamContext
from tests.unit.server.context import Context

PATIENCE = 60
FOREVER = 3600.0
MAX_BYTES = 2**30
MAX_RESIDENT = MAX_BYTES + 100


class Call:
    """A call in flight, and the reason for which it was ended."""

    def __init__(self, admission, limit, caller=""):
        self.reason, self.ended = "", Event()
        self.ticket = Ticket(admission, self._end)
        self.ticket.enter(limit)
        self.ticket.identify(caller)

    def _end(self, reason):
        self.reason, self.ended_at = reason, monotonic()
        self.ended.set()


class Memory:
    """The memory of a process, as a test sets it; dropping what is idle may free some of it."""

    def __init__(self, resident, idle=0):
        self.resident, self.idle, self.dropped = resident, idle, Semaphore(0)

    def __call__(self):
        """Return the memory."""
        return self.resident

    def drop_idle(self):
        """Free what is idle."""
        self.resident -= self.idle
        self.dropped.release()


@pytest.fixture
def admission():
    """Return admission control without calls."""
    return AdmissionControl(MAX_BYTES)


@pytest.fixture
def limit():
    """Return a limit that is not reached."""
    return CallLimit("CALLS", "calls at a time", 100)


def reaper_of(admission, memory):
    """Return a reaper that allows 100 bytes of memory besides what is counted."""
    reaper = Reaper(admission, memory, MAX_RESIDENT, memory.drop_idle)
    admission.on_enter = reaper.wake
    return reaper


def test_calls_whose_time_is_over_are_ended(admission, limit):
    """A call that waits for its caller longer than it may is ended; what it held is returned."""
    reaper = reaper_of(admission, Memory(0))
    late, waiting = Call(admission, limit), Call(admission, limit)
    waiting.ticket.wait(FOREVER)
    late.ticket.wait(0.01)
    assert late.ended.wait(PATIENCE)
    assert (late.reason, waiting.reason, limit.count) == ("TIMEOUT", "", 1)
    reaper.close()


def test_calls_that_wait_for_messages_are_ended_when_memory_runs_out(admission, limit):
    """Above the limit, the calls of the caller that has kept the server waiting the longest are ended first.

    Others follow only while there is still too much. The wait is the sum over the caller's calls. A call whose message
    has been waited for only now is not ended.
    """
    memory = Memory(0)
    reaper = reaper_of(admission, memory)
    computing = Call(admission, limit, "alice")
    calls = [Call(admission, limit, "alice") for _ in range(2)]
    for call in calls:
        call.ticket.wait(FOREVER)
    other, recent = Call(admission, limit, "bob"), Call(admission, limit, "carol")
    for call in (other, recent):
        call.ticket.wait(FOREVER)
    recent.ticket.waits_since += FOREVER
    memory.resident = MAX_RESIDENT + 1
    assert all(call.ended.wait(PATIENCE) for call in calls)
    assert {call.reason for call in calls} == {"MEMORY"}
    assert other.ended.wait(PATIENCE)
    reaper.close()
    assert max(call.ended_at for call in calls) < other.ended_at
    assert (computing.reason, recent.reason) == ("", "")


def test_a_stream_waits_only_for_its_messages(admission, limit):
    """A stream that computes a block is not ended for its memory; one that waits counts from its latest block on."""
    memory = Memory(0)
    reaper = reaper_of(admission, memory)
    computing, receiving, waiting = (Call(admission, limit, caller) for caller in ("alice", "bob", "carol"))
    waiting.ticket.wait(FOREVER)
    contexts = [Context(), Context()]
    for context, call in zip(contexts, (computing, receiving), strict=True):
        context.ticket = call.ticket
    streams = [StreamContext(context, FOREVER) for context in contexts]
    arrive = Event()

    def messages():
        yield "the first"
        arrive.wait(PATIENCE)

    assert next(streams[0].received(iter(["a block"]))) == "a block"
    received = streams[1].received(messages())
    assert next(received) == "the first"
    thread = Thread(target=lambda: next(received, None))
    thread.start()
    while receiving.ticket.stalls_at is None:
        pass
    memory.resident = MAX_RESIDENT + 1
    assert receiving.ended.wait(PATIENCE)
    reaper.close()
    arrive.set()
    thread.join(PATIENCE)
    assert waiting.ended_at < receiving.ended_at
    assert computing.reason == ""


def test_memory_is_returned_when_the_calls_of_a_shortage_have_ended(admission, limit):
    """What is idle, and what the C library keeps, is returned once more when the last call has ended."""
    memory = Memory(MAX_RESIDENT + 50)
    reaper = reaper_of(admission, memory)
    call = Call(admission, limit)
    call.ticket.wait(FOREVER)
    assert memory.dropped.acquire(timeout=PATIENCE)
    assert call.ended.wait(PATIENCE)
    assert memory.dropped.acquire(timeout=PATIENCE)
    reaper.close()


def test_memory_that_nothing_counts_is_returned_when_messages_wait_for_it(admission, limit):
    """A message that waits because of it has room after that, and no call is ended."""
    memory = Memory(MAX_RESIDENT, idle=MAX_BYTES)
    admission.set_excess(MAX_BYTES)
    holds, waits = Call(admission, limit), Call(admission, limit)
    holds.ticket.reserve(1)
    reaper = reaper_of(admission, memory)
    reaper.wake()
    waits.ticket.reserve(2 * SMALL_BYTES, wait=PATIENCE)
    reaper.close()
    assert (holds.reason, waits.reason, waits.ticket.nbytes) == ("", "", 2 * SMALL_BYTES)
    assert memory.resident == MAX_RESIDENT - MAX_BYTES


def test_idle_memory_is_dropped_before_calls_are_ended(admission, limit):
    """If memory that is kept for later calls is enough, no call is ended."""
    memory = Memory(MAX_RESIDENT + 50, idle=60)
    reaper = reaper_of(admission, memory)
    call = Call(admission, limit)
    call.ticket.wait(FOREVER)
    assert memory.dropped.acquire(timeout=PATIENCE)
    reaper.close()
    assert (call.reason, memory.resident) == ("", MAX_RESIDENT - 10)


def test_calls_that_compute_are_not_ended_for_their_memory(admission, limit):
    """What calls that do not wait for a message take is counted; only what arrives is not."""
    memory = Memory(2 * MAX_RESIDENT)
    reaper = reaper_of(admission, memory)
    computing, waiting = Call(admission, limit), Call(admission, limit)
    waiting.ticket.wait(FOREVER)
    assert waiting.ended.wait(PATIENCE)
    reaper.close()
    assert (computing.reason, waiting.reason) == ("", "MEMORY")
