"""The context of one call."""

import pytest

from poolrpc import CancelledError, DeadlineExceededError, PermissionDeniedError
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
    assert (derived.priority, DerivedContext(call).priority) == (2, 1)
    assert (derived.record, derived.ticket) == (call.record, call.ticket)
    assert derived.add_done_callback(lambda: called.append(True))
    derived.cancel()
    assert (derived.is_active(), call.is_active(), called) == (False, False, [True])
    assert not derived.add_done_callback(list)


class FromPeer(Context):
    """A call from the address that the test sets."""

    peer = ""


@pytest.mark.parametrize(
    ("token", "peer", "caller"),
    [
        ("", "", ""),
        ("", "ipv4:127.0.0.1:50051", "ipv4:127.0.0.1:50051"),
        ("", "unix:", ""),
        ("alice", "ipv4:127.0.0.1:50051", "alice"),
        ("alice", "unix:", "alice"),
    ],
)
def test_a_caller_is_a_token_or_a_connection(token, peer, caller):
    """Calls with a token are one caller's whatever their connection; connections of unix sockets are all alike."""
    call = FromPeer()
    call.token, call.peer = token, peer
    assert (call.caller, DerivedContext(call).caller, DerivedContext(call).peer) == (caller, caller, peer)


@pytest.mark.parametrize("priority", [0, 1, 2])
@pytest.mark.parametrize("urgent", [True, False])
def test_priority_0_may_be_forbidden(urgent, priority):
    """Without the token's word a call has priority 1 or 2, and so has each part of it."""
    call = Context()
    call.urgent = urgent
    if urgent or priority:
        call.set_priority(priority)
        derived = DerivedContext(Context(), priority=priority)
        assert (call.priority, DerivedContext(call).priority, derived.priority) == (priority, priority, priority)
        return
    with pytest.raises(PermissionDeniedError, match=r"^the token does not allow priority 0$"):
        call.set_priority(priority)
    # Nor may a part of the call, or a part of a part, have it.
    for whole in (call, DerivedContext(call)):
        with pytest.raises(PermissionDeniedError):
            DerivedContext(whole, priority=priority)
    assert (call.priority, DerivedContext(call).priority) == (1, 1)


def test_a_deadline_that_passes_during_the_check_is_no_cancellation():
    """A transport may call a call inactive once its deadline has passed: the error is the deadline's."""

    class Passing(Context):
        """A call whose deadline passes after the first look at it."""

        def time_remaining(self):
            self.remaining -= 1.0
            return self.remaining

        def is_active(self):
            return self.time_remaining() > 0

    for remaining in (1.5, 2.5):
        context = Passing(remaining=remaining)
        try:
            context.raise_if_cancelled()
        except DeadlineExceededError:
            continue
        assert context.remaining > 0
