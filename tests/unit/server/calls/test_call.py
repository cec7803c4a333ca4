"""The context of one call."""

import pytest

from poolrpc import CancelledError, DeadlineExceededError
from poolrpc_server.calls.call import DerivedContext
from tests.unit.server.context import Context


@pytest.mark.parametrize(
    ("remaining", "ended", "error"),
    [
        (None, False, None),
        (1.0, False, None),
        (0.0, False, DeadlineExceededError),
        (0.0, True, DeadlineExceededError),
        (None, True, CancelledError),
    ],
)
def test_a_call_is_wanted_until_its_end_or_deadline(remaining, ended, error):
    """`raise_if_cancelled` raises the deadline's error first, then that of a call that has ended."""
    context = Context(remaining=remaining)
    context.ended = ended
    if error is None:
        context.raise_if_cancelled()
        return
    with pytest.raises(error):
        context.raise_if_cancelled()


@pytest.mark.parametrize(
    ("whole", "own", "expected"),
    [(None, None, None), (5.0, None, 5.0), (None, 9.0, 9.0), (5.0, 9.0, 5.0), (9.0, 5.0, 5.0)],
)
def test_a_derived_context_has_the_earlier_deadline(whole, own, expected):
    """A part of a call has its own deadline, and never more time than the call."""
    left = DerivedContext(Context(remaining=whole), timeout=own).time_remaining()
    assert left == expected if expected is None else 0 <= expected - left < 1


def test_a_derived_context_shares_everything_else():
    """Its record, end and callbacks are the call's; its priority may be its own."""
    call, called = Context(), []
    derived = DerivedContext(call, priority=2)
    assert (derived.priority, DerivedContext(call).priority, derived.record) == (2, 1, call.record)
    assert derived.add_done_callback(lambda: called.append(True))
    derived.cancel()
    assert (derived.is_active(), call.is_active(), called) == (False, False, [True])
    assert not derived.add_done_callback(list)
