"""Admission control: which bytes and calls fit, and when they are counted."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier, Lock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import UnavailableError
from poolrpc_server.calls.admission import AdmissionControl


def test_bytes_fit_up_to_the_limit():
    """Requests fit up to the limit, the last byte included; one more byte is rejected with both figures and a delay."""
    admission = AdmissionControl(10)
    with admission.hold(6), admission.hold(4):
        with pytest.raises(UnavailableError) as raised, admission.hold(1):
            pytest.fail("one byte too many was admitted")
        error = raised.value
        assert (error.reason, error.metadata) == ("IN_FLIGHT_BYTES", {"limit": "10", "actual": "11"})
        assert error.retry_delay > 0


def test_bytes_are_released_however_a_request_ends():
    """A request's bytes are released when it ends or fails, and a rejected request holds none."""
    admission = AdmissionControl(10)
    with pytest.raises(ZeroDivisionError), admission.hold(10):
        raise ZeroDivisionError
    with admission.hold(10):
        for _ in range(3):
            with pytest.raises(UnavailableError), admission.hold(10):
                pytest.fail("twice the limit was admitted")
    with admission.hold(10):
        pass


def test_a_request_of_any_size_fits_alone():
    """A request over the limit is admitted when it is alone, and nothing is admitted with it."""
    admission = AdmissionControl(10)
    with admission.hold(1000), pytest.raises(UnavailableError), admission.hold(1):
        pytest.fail("a second request was admitted")
    with admission.hold(9), pytest.raises(UnavailableError), admission.hold(1000):
        pytest.fail("a large request was admitted together with another")


@given(st.integers(1, 50), st.lists(st.integers(0, 60) | st.just(-1), max_size=30))
def test_the_count_is_that_of_the_bytes_in_flight(limit, steps):
    """In any order of requests that begin and end (-1), a request is admitted if it is alone or fits."""
    admission, held = AdmissionControl(limit), []
    with ExitStack() as stack:
        for step in steps:
            if step < 0:
                if held:
                    held.pop()[1].close()
                continue
            total = sum(nbytes for nbytes, _ in held)
            own = stack.enter_context(ExitStack())
            if total and total + step > limit:
                with pytest.raises(UnavailableError):
                    own.enter_context(admission.hold(step))
            else:
                own.enter_context(admission.hold(step))
                held.append((step, own))
    with admission.hold(limit):
        pass


def test_threads_never_hold_more_than_the_limit():
    """Eight threads never hold more than the limit, and in the end nothing is held."""
    admission, lock, barrier, held, most = AdmissionControl(3), Lock(), Barrier(8), 0, 0

    def run(_):
        nonlocal held, most
        barrier.wait()
        for _ in range(500):
            try:
                with admission.hold(1):
                    with lock:
                        held += 1
                        most = max(most, held)
                    with lock:
                        held -= 1
            except UnavailableError:
                continue

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(run, range(8)))
    assert 1 <= most <= 3
    with admission.hold(3), pytest.raises(UnavailableError), admission.hold(1):
        pytest.fail("bytes of a thread that ended are still counted, or were released twice")


def test_calls_are_counted_until_their_tickets_are_released():
    """One call too many is rejected; a ticket's place and announced bytes are returned once."""
    admission = AdmissionControl(10, 2)
    first, second = admission.admit(6), admission.admit()
    with pytest.raises(UnavailableError) as raised:
        admission.admit()
    assert (raised.value.reason, raised.value.metadata) == ("CALLS", {"limit": "2", "actual": "3"})
    first.message_arrived()
    assert admission.bytes_in_flight == 0
    for _ in range(3):
        first.release()
    assert admission.bytes_in_flight == 0
    admission.admit(9).release()
    second.release()
    tickets = [admission.admit(), admission.admit()]
    with pytest.raises(UnavailableError):
        admission.admit()
    for ticket in tickets:
        ticket.release()


def test_announced_bytes_are_rejected_like_any_others():
    """A message that does not fit together with what is in flight is rejected, and takes no place among the calls."""
    admission = AdmissionControl(10, 1)
    with admission.hold(6), pytest.raises(UnavailableError):
        admission.admit(5)
    with admission.hold(10), pytest.raises(UnavailableError):
        admission.admit()
    admission.admit(5).release()


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
    with admission.hold(6):
        assert idle.idle_bytes == 4
        with admission.hold(1):
            assert idle.idle_bytes == 0
