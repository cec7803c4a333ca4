"""Admission control: which bytes and calls fit, when they are counted, and whose calls give way."""

from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from threading import Barrier, Event, Lock, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import CancelledError, LimitExceededError, PoolError, UnavailableError
from poolrpc_server.calls import admission as admission_module
from poolrpc_server.calls.admission import MAX_WAITING, SMALL_BYTES, AdmissionControl, CallLimit, Ticket, share_of

PATIENCE = 60
FOREVER = 3600.0
MIB = 2**20


class Call:
    """A call with a ticket, which records why it was ended."""

    def __init__(self, admission, caller=""):
        self.ended = []
        self.ticket = Ticket(admission, self.ended.append)
        self.ticket.identify(caller)


def limit_of(maximum):
    """Return a limit on the number of calls."""
    return CallLimit("CALLS", "calls at a time", maximum)


def test_bytes_fit_up_to_the_limit():
    """Calls fit up to the limit, the last byte included; one more byte is rejected with both figures and a delay."""
    admission = AdmissionControl(10)
    Call(admission).ticket.reserve(6)
    Call(admission).ticket.reserve(4)
    with pytest.raises(UnavailableError) as raised:
        Call(admission).ticket.reserve(1)
    error = raised.value
    assert (error.reason, error.metadata) == ("IN_FLIGHT_BYTES", {"limit": "10", "actual": "11"})
    assert error.retry_delay > 0


def test_a_call_that_never_fits_is_rejected_for_good():
    """A call that is larger than the limit, also with what it holds already, gets a final error with both figures."""
    ticket = Call(AdmissionControl(10)).ticket
    for held, nbytes in ((0, 11), (5, 6)):
        ticket.reserve(held)
        with pytest.raises(LimitExceededError) as raised:
            ticket.reserve(nbytes)
        assert (raised.value.reason, raised.value.metadata) == ("IN_FLIGHT_BYTES", {"limit": "10", "actual": "11"})
    assert ticket.nbytes == 5


def test_everything_is_returned_once():
    """A released ticket holds nothing, however often it is released, and reserves nothing more."""
    admission, limit = AdmissionControl(10), limit_of(1)
    call = Call(admission, "alice")
    call.ticket.enter(limit)
    call.ticket.reserve(7)
    for _ in range(3):
        call.ticket.release()
    assert (admission.bytes_in_flight, limit.count, admission.tickets()) == (0, 0, [])
    assert not limit.callers
    with pytest.raises(CancelledError):
        call.ticket.reserve(1)
    with pytest.raises(CancelledError):
        call.ticket.enter(limit)
    call.ticket.shrink(0)
    call.ticket.leave(limit)
    assert (admission.bytes_in_flight, limit.count) == (0, 0)


def test_bytes_of_a_scope_are_returned_at_its_end():
    """What is reserved within a scope is returned however it ends; what was held before stays."""
    admission = AdmissionControl(10)
    ticket = Call(admission).ticket
    ticket.reserve(2)

    def fail():
        with ticket.scope():
            ticket.reserve(5)
            assert admission.bytes_in_flight == 7
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert admission.bytes_in_flight == ticket.nbytes == 2
    ticket.shrink(1)
    ticket.shrink(9)
    assert admission.bytes_in_flight == ticket.nbytes == 1


CALLERS = st.sampled_from(["", "alice", "bob"])
STEPS = st.one_of(
    st.tuples(st.just("enter"), CALLERS, st.just(0)),
    st.tuples(st.sampled_from(["reserve", "unknown", "shrink"]), st.integers(0, 9), st.integers(0, 12)),
    st.tuples(st.sampled_from(["stall", "end", "leave"]), st.integers(0, 9), st.just(0)),
)


@given(st.integers(1, 10), st.integers(1, 4), st.lists(STEPS, max_size=40))
def test_nothing_stays_reserved_when_every_call_has_ended(max_bytes, max_calls, steps):  # noqa: C901 - one step each
    """After any mixture of calls the limits were never exceeded, and with every caller gone every counter is 0."""
    admission, limit, calls = AdmissionControl(max_bytes), limit_of(max_calls), []
    for action, which, nbytes in steps:
        ticket = calls[which % len(calls)].ticket if calls and action != "enter" else None
        try:
            if action == "enter":
                calls.append(Call(admission, which))
                calls[-1].ticket.enter(limit)
            elif ticket is None:
                continue
            elif action == "reserve":
                ticket.reserve(nbytes)
            elif action == "unknown":
                admission.reserve(ticket, min(nbytes, max_bytes))
            elif action == "shrink":
                ticket.shrink(nbytes)
            elif action == "stall":
                ticket.wait(FOREVER, patience=0)
            elif action == "leave":
                ticket.leave(limit)
            else:
                ticket.end("TIMEOUT")
        except PoolError:
            continue
        assert admission.bytes_in_flight == sum(call.ticket.nbytes for call in calls) <= max_bytes
        assert limit.count <= max_calls
    for call in calls:
        call.ticket.release()
    assert (admission.bytes_in_flight, limit.count, admission.tickets()) == (0, 0, [])
    assert not limit.callers


def test_threads_never_hold_more_than_the_limit():
    """Eight threads never hold more than the limit, and in the end nothing is held."""
    admission, lock, barrier, held, most = AdmissionControl(3), Lock(), Barrier(8), 0, 0

    def run(_):
        nonlocal held, most
        barrier.wait()
        for _ in range(500):
            ticket = Call(admission).ticket
            try:
                ticket.reserve(1)
            except UnavailableError:
                continue
            with lock:
                held += 1
                most = max(most, held)
            with lock:
                held -= 1
            ticket.release()

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(run, range(8)))
    assert 1 <= most <= 3
    assert admission.bytes_in_flight == 0


def test_calls_are_counted_until_they_end_or_leave():
    """One call too many is rejected with the figures, until another one has ended or has left the limit."""
    admission, limit = AdmissionControl(10), limit_of(2)
    first, second, third = (Call(admission) for _ in range(3))
    first.ticket.enter(limit)
    second.ticket.enter(limit)
    with pytest.raises(UnavailableError) as raised:
        third.ticket.enter(limit)
    assert (raised.value.reason, raised.value.metadata) == ("CALLS", {"limit": "2", "actual": "3"})
    first.ticket.release()
    third.ticket.enter(limit)
    second.ticket.leave(limit)
    Call(admission).ticket.enter(limit)


def test_one_caller_leaves_a_quarter_of_the_calls_to_others():
    """A caller's call over its share is rejected; another caller's, and those of callers that are unknown, are not."""
    admission, limit = AdmissionControl(10), limit_of(8)
    for _ in range(share_of(8)):
        Call(admission, "alice").ticket.enter(limit)
    excess = Call(admission, "alice")
    with pytest.raises(UnavailableError, match="of one caller"):
        excess.ticket.enter(limit)
    excess.ticket.release()
    late = Ticket(admission)  # the caller becomes known later, as with gRPC's connections
    late.enter(limit)
    with pytest.raises(UnavailableError, match="of one caller"):
        late.identify("alice")
    late.release()
    for caller in ("bob", ""):
        Call(admission, caller).ticket.enter(limit)
    assert limit.count == 8


def test_one_caller_leaves_a_quarter_of_the_bytes_to_others():
    """A caller's bytes over its share are rejected unless they are those of its only call."""
    admission = AdmissionControl(100)
    Call(admission, "alice").ticket.reserve(70)
    with pytest.raises(UnavailableError, match="of one caller"):
        Call(admission, "alice").ticket.reserve(10)
    Call(admission, "bob").ticket.reserve(30)
    alone = AdmissionControl(100)
    Call(alone, "alice").ticket.reserve(100)


def test_large_messages_leave_room_for_small_ones():
    """A quarter of the bytes is left for reservations up to SMALL_BYTES."""
    admission = AdmissionControl(100 * MIB)
    Call(admission, "alice").ticket.reserve(70 * MIB)
    with pytest.raises(UnavailableError):
        Call(admission, "bob").ticket.reserve(10 * MIB)
    for number in range(30):
        Call(admission, f"caller {number}").ticket.reserve(SMALL_BYTES)
    assert admission.bytes_in_flight == 100 * MIB


def test_a_call_says_before_it_waits_for_room():
    """Its transport learns that the call's thread is about to wait, and nothing if there is room at once."""
    admission, said = AdmissionControl(10), []
    holding = Ticket(admission, before_wait=lambda: said.append("holding"))
    holding.reserve(10, wait=FOREVER)
    assert said == []

    def make_room():
        said.append("waiting")
        Thread(target=holding.release).start()

    Ticket(admission, before_wait=make_room).reserve(5, wait=FOREVER)
    assert (said, admission.bytes_in_flight) == (["waiting"], 5)


def test_a_stalled_call_gives_way():
    """A call that waits for its caller too long is ended for another one's sake; one that proceeds is not."""
    admission, limit = AdmissionControl(10), limit_of(1)
    stalled = Call(admission)
    stalled.ticket.enter(limit)
    stalled.ticket.wait(FOREVER, patience=0)
    working = Call(admission)
    working.ticket.enter(limit)
    assert (stalled.ended, stalled.ticket.released, limit.count) == (["STALLED"], True, 1)
    working.ticket.wait(FOREVER, patience=0)
    working.ticket.proceed()
    with pytest.raises(UnavailableError):
        Call(admission).ticket.enter(limit)
    working.ticket.wait(FOREVER, patience=PATIENCE)
    with pytest.raises(UnavailableError):
        Call(admission).ticket.enter(limit)
    assert working.ended == []


def test_bytes_of_stalled_calls_give_way():
    """As many stalled calls are ended as are needed for another one's bytes."""
    admission = AdmissionControl(10)
    stalled = [Call(admission) for _ in range(5)]
    for call in stalled:
        call.ticket.reserve(2)
        call.ticket.wait(FOREVER, patience=0)
    Call(admission).ticket.reserve(3)
    assert [call.ended for call in stalled] == [["STALLED"]] * 2 + [[]] * 3
    assert admission.bytes_in_flight == 9


def test_stalled_calls_give_way_to_a_call_that_needs_everything():
    """A call of more than a caller's share is admitted once the calls that stall, which are all others, are ended."""
    admission = AdmissionControl(100 * MIB)
    stalled = Call(admission, "alice")
    stalled.ticket.reserve(10 * MIB)
    stalled.ticket.wait(FOREVER, patience=0)
    Call(admission, "bob").ticket.reserve(95 * MIB)
    assert (stalled.ended, admission.bytes_in_flight) == (["STALLED"], 95 * MIB)


def test_the_caller_with_the_most_stalled_calls_gives_way_first():
    """Among stalled calls, the oldest one of the caller that has the most is ended."""
    admission, limit = AdmissionControl(10), limit_of(4)
    calls = [Call(admission, caller) for caller in ("bob", "alice", "alice", "")]
    for call in calls:
        call.ticket.enter(limit)
        call.ticket.wait(FOREVER, patience=0)
    Call(admission, "carol").ticket.enter(limit)
    assert [call.ended for call in calls] == [[], ["STALLED"], [], []]


def test_a_caller_at_its_share_ends_only_its_own_calls():
    """Stalled calls of other callers stay: ending them would not make room within the share."""
    admission = AdmissionControl(100)
    stalled, active = Call(admission, "bob"), Call(admission, "alice")
    stalled.ticket.reserve(10)
    stalled.ticket.wait(FOREVER, patience=0)
    active.ticket.reserve(75)
    with pytest.raises(UnavailableError, match="of one caller"):
        Call(admission, "alice").ticket.reserve(10)
    assert stalled.ended == []


def test_room_goes_to_the_caller_that_holds_least():
    """Of the calls that wait, the first one is of the caller with the fewest bytes, then one whose size is known."""
    size = SMALL_BYTES + 1
    admission = AdmissionControl(8 * size)
    holders = [Call(admission, "alice") for _ in range(6)]
    for each in holders:
        each.ticket.reserve(size)
    order, waiting = Queue(), []
    for caller, known in (("alice", True), ("bob", False), ("carol", True)):
        ticket = Call(admission, caller).ticket

        def reserve(ticket=ticket, caller=caller, known=known):
            admission.reserve(ticket, size, wait=PATIENCE, known=known)
            order.put(caller)

        waiting.append(Thread(target=reserve))
        waiting[-1].start()
        while admission.waiting < len(waiting):
            pass
    for each, expected in zip(holders, ("carol", "bob", "alice"), strict=False):
        each.ticket.release()
        assert order.get(timeout=PATIENCE) == expected
    for thread in waiting:
        thread.join(PATIENCE)


def test_only_so_many_calls_wait_for_room():
    """Of one too many, the last one in order is rejected: not the newest, if its caller holds less than others."""
    size = SMALL_BYTES + 1
    admission = AdmissionControl(8 * size)
    Call(admission, "alice").ticket.reserve(6 * size)
    rejected = Queue()

    def reserve(number, caller):
        ticket = Call(admission, caller).ticket
        try:
            admission.reserve(ticket, 2 * size, wait=PATIENCE)
        except UnavailableError:
            rejected.put(number)
        ticket.release()

    threads = []
    for number in range(MAX_WAITING + 1):
        threads.append(Thread(target=reserve, args=(number, "bob" if number == MAX_WAITING else "alice")))
        threads[-1].start()
        while number < MAX_WAITING and admission.waiting <= number:
            pass
    assert rejected.get(timeout=PATIENCE) == MAX_WAITING - 1
    for each in admission.tickets():
        each.release()
    for thread in threads:
        thread.join(PATIENCE)
    assert rejected.empty()
    assert (admission.waiting, admission.bytes_in_flight) == (0, 0)


def test_a_call_that_ends_waits_for_no_room():
    """A call that has ended, whatever its place among those that wait, gets an error at once and frees its place."""
    size = SMALL_BYTES + 1
    admission = AdmissionControl(8 * size)
    Call(admission, "alice").ticket.reserve(6 * size)
    outcomes, waiting = Queue(), [Call(admission, "bob").ticket for _ in range(3)]

    def reserve(number):
        try:
            waiting[number].reserve(2 * size, wait=FOREVER)
        except CancelledError:
            outcomes.put(number)

    threads = []
    for number in range(3):
        threads.append(Thread(target=reserve, args=(number,)))
        threads[-1].start()
        while admission.waiting <= number:
            pass
    for number in (2, 1, 0):
        waiting[number].release()
        assert outcomes.get(timeout=PATIENCE) == number
    for thread in threads:
        thread.join(PATIENCE)
    assert admission.waiting == 0


def test_a_small_message_does_not_wait_for_large_ones():
    """It takes the room that is left for small ones at once."""
    admission = AdmissionControl(8 * SMALL_BYTES)
    Call(admission, "alice").ticket.reserve(6 * SMALL_BYTES)
    large = Call(admission, "bob").ticket
    thread = Thread(target=lambda: large.reserve(2 * SMALL_BYTES, wait=PATIENCE))
    thread.start()
    while not admission.waiting:
        pass
    small = Call(admission, "carol").ticket
    small.reserve(SMALL_BYTES, wait=PATIENCE)
    assert (small.nbytes, large.nbytes) == (SMALL_BYTES, 0)
    for each in admission.tickets():
        each.release()
    thread.join(PATIENCE)
    assert large.nbytes == 2 * SMALL_BYTES


def test_new_messages_have_no_room_while_the_process_has_more_memory_than_what_is_counted():
    """Small ones have, and one alone, and so has what a call needs when its message has come."""
    admission = AdmissionControl(100 * SMALL_BYTES)
    admission.set_excess(74 * SMALL_BYTES)
    alone, other = Call(admission, "alice").ticket, Call(admission, "bob").ticket
    alone.reserve(3 * SMALL_BYTES, wait=PATIENCE)
    with pytest.raises(UnavailableError, match="bytes in flight"):
        other.reserve(2 * SMALL_BYTES, wait=0.01)
    other.reserve(SMALL_BYTES, wait=0.01)
    other.reserve(2 * SMALL_BYTES)
    admission.set_excess(0)
    other.reserve(2 * SMALL_BYTES, wait=0.01)
    assert admission.bytes_in_flight == 8 * SMALL_BYTES


def test_a_message_of_unknown_size_waits_for_room():
    """It reserves as many bytes as it may have, as soon as another call returns them."""
    admission, begun = AdmissionControl(100), Event()
    holder = Call(admission, "alice")
    holder.ticket.reserve(60)
    waited = Call(admission, "bob")

    def reserve():
        begun.set()
        waited.ticket.reserve_unknown(1000)

    thread = Thread(target=reserve)
    thread.start()
    assert begun.wait(PATIENCE)
    holder.ticket.release()
    thread.join(PATIENCE)
    assert (waited.ticket.nbytes, admission.bytes_in_flight) == (75, 75)


def test_a_message_of_unknown_size_is_rejected_if_no_room_comes(monkeypatch):
    """The wait has a limit, after which the call is UNAVAILABLE."""
    monkeypatch.setattr(admission_module, "UNKNOWN_ROOM_SECONDS", 0.01)
    admission = AdmissionControl(100)
    Call(admission).ticket.reserve(90)
    with pytest.raises(UnavailableError):
        Call(admission).ticket.reserve_unknown(50)


class Idle:
    """Memory that is kept between calls."""

    def __init__(self, nbytes):
        self.idle_bytes = self.idle_limit = nbytes

    def drop_idle(self):
        """Keep nothing."""
        self.idle_bytes = 0


def test_idle_memory_gives_way_to_calls():
    """Memory kept between calls is dropped as soon as it does not fit with what is in flight, and rejects nothing."""
    idle = Idle(4)
    admission = AdmissionControl(10, idle=idle)
    ticket = Call(admission).ticket
    ticket.reserve(6)
    assert idle.idle_bytes == 4
    ticket.reserve(1)
    assert idle.idle_bytes == 0
