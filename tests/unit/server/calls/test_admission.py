"""Admission: what fits under way, and what is counted when."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier, Lock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import UnavailableError
from poolrpc_server.calls.admission import AdmissionControl


def test_bytes_up_to_the_limit_are_under_way_together():
    """Requests fit until the limit, the last byte included; one byte more is refused with both figures and a delay."""
    admission = AdmissionControl(10)
    with admission.hold(6), admission.hold(4):
        with pytest.raises(UnavailableError) as raised, admission.hold(1):
            pytest.fail("one byte too many was admitted")
        error = raised.value
        assert (error.reason, error.metadata) == ("IN_FLIGHT_BYTES", {"limit": "10", "actual": "11"})
        assert error.retry_delay > 0


def test_bytes_are_given_back_however_a_request_ends():
    """What a request held is free again after it ended, well or by an error, and a refused one held nothing."""
    admission = AdmissionControl(10)
    with pytest.raises(ZeroDivisionError), admission.hold(10):
        raise ZeroDivisionError
    with admission.hold(10):
        for _ in range(3):
            with pytest.raises(UnavailableError), admission.hold(10):
                pytest.fail("twice the limit was admitted")
    with admission.hold(10):
        pass


def test_alone_a_request_of_any_size_fits():
    """A request over the limit is admitted while nothing else is under way, and nothing is beside it."""
    admission = AdmissionControl(10)
    with admission.hold(1000), pytest.raises(UnavailableError), admission.hold(1):
        pytest.fail("a second request was admitted")
    with admission.hold(9), pytest.raises(UnavailableError), admission.hold(1000):
        pytest.fail("a large request was admitted beside another")


@given(st.integers(1, 50), st.lists(st.integers(0, 60) | st.just(-1), max_size=30))
def test_the_count_is_that_of_what_is_under_way(limit, steps):
    """Over any order of coming and going (-1), a request is admitted if it is alone or fits."""
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
    """However eight threads' requests fall, no more than the limit is under way, and in the end nothing is."""
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
        pytest.fail("bytes of a thread that ended are still counted, or were given back twice")
