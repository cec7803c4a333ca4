"""An admitted call: what is on its ticket while its message is received and its answer is read, and how it ends."""

from time import monotonic

import pytest

from poolrpc import InvalidArgumentError, LimitExceededError, UnavailableError
from poolrpc_server.calls.admission import (
    CONTROL_STALLED_SECONDS,
    STALLED_BYTES_PER_SECOND,
    STALLED_SECONDS,
    AdmissionControl,
)
from poolrpc_server.calls.admitted_call import (
    ANSWER_COPIES,
    MESSAGE_COPIES,
    MIN_BYTES_PER_SECOND,
    UNKNOWN_BYTES,
    AdmittedCall,
    Patience,
)
from poolrpc_server.calls.call import StatusError
from poolrpc_server.calls.method import MAX_CONTROL_BYTES, Method, Observers
from poolrpc_server.telemetry.metrics import CANCELLATION_STAGES, Metrics
from tests.unit.server.context import Context, error_of

METHOD = "/poolrpc.v1.PoolService/Pool"
SECONDS = 100.0
MIB = 2**20
BYTES = 1000 * MIB


class Log:
    """A call log that keeps the facts of the latest line."""

    facts = None

    def add(self, _, facts):
        """Keep the facts."""
        assert self.facts is None
        self.facts = facts


class Calls:
    """Makes admitted calls, all with the same admission control, and collects what is observed.

    Attributes:
        admission: Counts what they hold.
        log: The latest call's log line.

    """

    def __init__(self, nbytes=BYTES, max_message_bytes=10 * MIB):
        self.admission = AdmissionControl(nbytes)
        self.patience = Patience(max_message_bytes, SECONDS)
        self.metrics = Metrics()

    def admit(self, handler, context, announced=0, *, computes=True, stream=False):
        """Return a call of a handler."""
        method = Method(METHOD, **{"stream" if stream else "unary": handler}, computes=computes)
        self.log = Log()
        return AdmittedCall(method, context, Observers(self.log, self.metrics), self.patience, announced)

    def context(self, **options):
        """Return the context of a call."""
        return Context(admission=self.admission, **options)

    def cancelled(self):
        """Return the stages in which calls were cancelled."""
        shown = self.metrics.collect()
        counts = {
            stage: shown.get_sample_value("poolrpc_cancelled_total", {"stage": stage}) for stage in CANCELLATION_STAGES
        }
        return {stage: count for stage, count in counts.items() if count}


@pytest.fixture
def calls():
    """Return what makes calls."""
    return Calls()


def echo(message, _):
    """Answer with the message."""
    return message


def error(call, messages):
    """Make a call that fails; return the client's error."""
    with pytest.raises(StatusError) as raised:
        call.unary(iter(messages))
    return error_of(raised.value)


class Waiting:
    """Messages that note the state of the call's ticket when they are asked for: bytes, and seconds of patience."""

    def __init__(self, context, *messages):
        self.context, self.messages = context, list(messages)
        self.asked = []

    def __iter__(self):
        """Return itself."""
        return self

    def __next__(self):
        """Return the next message."""
        ticket, now = self.context.ticket, monotonic()
        left = [None if at is None else at - now for at in (ticket.expires, ticket.stalls_at)]
        self.asked.append((ticket.nbytes, *left))
        if not self.messages:
            raise StopIteration
        return self.messages.pop(0)


def within(actual, expected):
    """Return whether a number of seconds is at most what was set, and little of it has passed."""
    return expected - 60 <= actual <= expected


@pytest.mark.parametrize("announced", [1, 70, MIB, 100 * MIB])
def test_announced_bytes_are_reserved_before_the_message_is_read(calls, announced):
    """Both copies that gRPC has count while a message arrives, and its caller has time that depends on its size."""
    context = calls.context()
    messages = Waiting(context, b"request")
    assert calls.admit(echo, context, announced).unary(messages) == b"request"
    ((nbytes, expires, stalls),) = messages.asked
    assert nbytes == MESSAGE_COPIES * announced
    assert within(expires, SECONDS + announced / MIN_BYTES_PER_SECOND)
    assert within(stalls, STALLED_SECONDS + announced / STALLED_BYTES_PER_SECOND)


@pytest.mark.parametrize(
    ("limit", "nbytes", "reserved"),
    [
        (10 * MIB, BYTES, MESSAGE_COPIES * 10 * MIB),
        (513 * MIB, BYTES, MESSAGE_COPIES * UNKNOWN_BYTES),
        (10 * MIB, 20 * MIB, 15 * MIB),  # a caller's share
    ],
)
def test_a_message_of_unknown_size_reserves_what_it_may_need(limit, nbytes, reserved):
    """The largest message is assumed, up to a maximum, and never more than one caller may have."""
    calls = Calls(nbytes, limit)
    context = calls.context()
    messages = Waiting(context, b"request")
    calls.admit(echo, context).unary(messages)
    ((got, expires, _),) = messages.asked
    assert got == reserved
    assert within(expires, SECONDS)


def test_a_method_that_does_not_compute_reserves_nothing(calls):
    """Its messages are small; but it soon gives way to other calls while it waits for one."""
    context = calls.context()
    messages = Waiting(context, b"request")
    assert calls.admit(echo, context, computes=False).unary(messages) == b"request"
    ((nbytes, expires, stalls),) = messages.asked
    assert nbytes == 0
    assert within(expires, SECONDS)
    assert stalls <= CONTROL_STALLED_SECONDS


@pytest.mark.parametrize("announced", [0, 7, 70])
def test_a_call_that_computes_holds_its_message(calls, announced):
    """Once the message is there, its actual size counts, and the call does not wait for its caller any more."""
    seen = []

    def handler(message, call):
        seen.append((call.ticket.nbytes, call.ticket.expires, call.ticket.stalls_at))
        return message

    calls.admit(handler, calls.context(), announced).unary(iter([b"request"]))
    assert seen == [(7, None, None)]


def test_a_message_that_is_larger_than_announced_is_counted(calls):
    """What was not announced is reserved when it is there; the caller should try again if it does not fit."""
    context = calls.context()
    assert calls.admit(lambda _, call: bytes(call.ticket.nbytes), context, 10).unary(iter([bytes(1000)])) == bytes(1000)
    context.ticket.release()
    other = calls.context()
    other.ticket.reserve(BYTES - 999)
    failed = calls.context()
    got = error(calls.admit(echo, failed, 10), [bytes(1000)])
    assert (type(got), got.reason) == (UnavailableError, "IN_FLIGHT_BYTES")
    failed.ticket.release()
    assert calls.admission.bytes_in_flight == BYTES - 999


@pytest.mark.parametrize(
    ("announced", "held", "expected"),
    [(60, 900, UnavailableError), (50, 900, None), (501, 0, LimitExceededError), (500, 0, None)],
)
def test_a_message_without_room_is_not_read(announced, held, expected):
    """A message without room is rejected unread: temporarily, or permanently if there could never be room for it."""
    calls = Calls(1000)
    calls.context().ticket.reserve(held)
    context = calls.context()
    messages = Waiting(context, b"request")
    call = calls.admit(echo, context, announced)
    if expected is None:
        assert call.unary(messages) == b"request"
        return
    got = error(call, messages)
    assert (type(got), got.reason, messages.asked) == (expected, "IN_FLIGHT_BYTES", [])
    assert calls.admission.bytes_in_flight == held
    assert calls.log.facts["reason"] == "IN_FLIGHT_BYTES"


@pytest.mark.parametrize("stream", [False, True])
def test_the_messages_of_a_method_that_does_not_compute_are_small(calls, stream):
    """A message over the limit fails with both sizes, wherever it is in a stream; one that computes has no such."""

    def answers(messages, _):
        yield from messages

    def call(last, *, computes=False):
        made = calls.admit(answers if stream else echo, calls.context(), computes=computes, stream=stream)
        return list(made.stream(iter([b"first", last])))[-1] if stream else made.unary(iter([last]))

    largest = bytes(MAX_CONTROL_BYTES)
    assert call(largest) == largest
    with pytest.raises(StatusError) as raised:
        call(largest + b"x")
    got = error_of(raised.value)
    assert (type(got), got.reason) == (LimitExceededError, "MESSAGE_TOO_LARGE")
    assert got.metadata == {"limit": str(MAX_CONTROL_BYTES), "actual": str(MAX_CONTROL_BYTES + 1)}
    assert call(largest + b"x", computes=True) == largest + b"x"


@pytest.mark.parametrize("computes", [False, True])
def test_a_call_without_a_message_is_the_callers_fault(calls, computes):
    """A caller that ends its messages before the first gets an error that says so."""
    got = error(calls.admit(echo, calls.context(), computes=computes), [])
    assert (type(got), got.message) == (InvalidArgumentError, "expected a message, got the end of the call")
    assert calls.cancelled() == {}


class Reset(Context):
    """A call that is reset: the end of its messages is reported before the reset."""

    def add_done_callback(self, callback):
        """Register the callback, and report the reset."""
        super().add_done_callback(callback)
        self.cancel()
        return True


def test_a_call_that_is_reset_before_its_message_is_cancelled(calls):
    """It is CANCELLED, in the stage in which its message was received, and not the caller's fault."""
    assert error(calls.admit(echo, Reset(admission=calls.admission)), []).code == "CANCELLED"
    assert calls.log.facts["status"] == "CANCELLED"
    assert calls.cancelled() == {"receive": 1}


@pytest.mark.parametrize(("remaining", "status"), [(None, "CANCELLED"), (0.0, "DEADLINE_EXCEEDED")])
def test_a_call_that_ends_while_its_message_arrives_is_cancelled(calls, remaining, status):
    """The error that a transport raises then is a consequence, and the handler is not called."""
    context = calls.context()

    def messages():
        context.cancel()
        context.remaining = remaining
        raise KeyError("what a transport raises")
        yield

    got = error(calls.admit(lambda *_: pytest.fail("it was answered"), context, 70), messages())
    assert got.code == calls.log.facts["status"] == status
    assert calls.cancelled() == {"receive": 1}
    assert calls.admission.bytes_in_flight == 0


def test_an_error_of_the_transport_is_unexpected(calls):
    """An error while the message arrives, of a call that has not ended, is INTERNAL."""

    def messages():
        raise KeyError("a secret")
        yield

    got = error(calls.admit(echo, calls.context()), messages())
    assert (got.code, "secret" in got.message, calls.cancelled()) == ("INTERNAL", False, {})


def test_a_call_that_ends_while_it_is_answered_has_no_stage_of_its_own(calls):
    """The batcher counts what is cancelled in the queue or in the computation; the call does not count it again."""

    def handler(_, call):
        call.cancel()
        call.raise_if_cancelled()

    assert error(calls.admit(handler, calls.context()), [b"request"]).code == "CANCELLED"
    assert (calls.log.facts["status"], calls.cancelled()) == ("CANCELLED", {})


def test_a_call_that_ends_before_its_answer_is_sent_is_counted(calls):
    """The answer is made in vain."""
    assert calls.admit(lambda message, call: call.cancel() or message, calls.context()).unary(iter([b"request"]))
    assert (calls.log.facts["status"], calls.cancelled()) == ("CANCELLED", {"send": 1})


@pytest.mark.parametrize("size", [0, 10, 5 * MIB])
def test_an_answer_is_counted_until_the_call_has_ended(calls, size):
    """Both copies of the answer count while the caller reads it, for which it has time that depends on the size."""
    context = calls.context()

    def handler(_, call):
        call.ticket.reserve(ANSWER_COPIES * size + 1000)  # and the memory that computed it
        return bytes(size)

    calls.admit(handler, context, 70).unary(iter([b"request"]))
    ticket, now = context.ticket, monotonic()
    assert calls.admission.bytes_in_flight == ticket.nbytes == ANSWER_COPIES * size
    assert within(ticket.expires - now, SECONDS + size / MIN_BYTES_PER_SECOND)
    assert within(ticket.stalls_at - now, STALLED_SECONDS + size / STALLED_BYTES_PER_SECOND)
    ticket.release()
    assert calls.admission.bytes_in_flight == 0


@pytest.mark.parametrize("computes", [False, True])
def test_a_control_stream_gives_way_from_its_first_message_on(calls, computes):
    """A stream that does not compute may be ended at any time; for one that computes, OpenStreams decides."""
    context = calls.context()
    messages, during = Waiting(context, b"a", b"b"), []

    def handler(messages, call):
        for message in messages:
            during.append(call.ticket.stalls_at)
            yield message

    assert list(calls.admit(handler, context, computes=computes, stream=True).stream(messages)) == [b"a", b"b"]
    assert len(messages.asked) == 3
    for nbytes, expires, stalls in messages.asked:
        assert nbytes == 0
        assert stalls is None if computes else stalls <= CONTROL_STALLED_SECONDS
        assert expires is None if computes else within(expires, SECONDS)
    assert [each is None for each in during] == [computes] * 2
