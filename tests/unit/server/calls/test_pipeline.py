"""The pipeline of a call: admission, the status of each error, the log line, the counts."""

import logging
from hashlib import sha256

import pytest

from poolrpc import (
    InternalError,
    InvalidArgumentError,
    LimitExceededError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from poolrpc._wire.status import DETAILS_KEY
from poolrpc_server.calls.admission import AdmissionControl
from poolrpc_server.calls.call import StatusError
from poolrpc_server.calls.pipeline import CallPipeline, Method, Observers
from poolrpc_server.calls.tokens import TokenFile
from poolrpc_server.telemetry.metrics import Metrics
from tests.unit.server.context import Context, error_of

METHOD = "/poolrpc.v1.PoolService/Pool"
PROBE = "/grpc.health.v1.Health/Check"
UNEXPECTED = KeyError("a secret")


class Log:
    """A call log that keeps its lines."""

    def __init__(self):
        self.lines = []

    def add(self, level, facts):
        """Keep a line."""
        self.lines.append((level, facts))


@pytest.fixture
def log():
    """Return the log's lines as (level, facts)."""
    return Log()


def pipeline(log, *methods, admit=None, tokens=None, metrics=None, **observers):
    """Return a pipeline of these methods."""
    made = CallPipeline(
        admit or (lambda *_: AdmissionControl(100).admit()),
        Observers(log, metrics or Metrics(enabled=False), **observers),
        tokens,
    )
    made.add(methods)
    return made


def unary(log, handler, *, context=None, name=METHOD, probe=False, **options):
    """Make a call of a unary method; return the answer, or the StatusError."""
    context = context or Context(name)
    call = pipeline(log, Method(name, unary=handler, probe=probe), **options).admit(context)
    try:
        return call.unary(b"request")
    except StatusError as status:
        return status


def stream(log, handler, context=None, **options):
    """Begin a call of a stream and return its answers."""
    made = pipeline(log, Method(METHOD, stream=handler), **options)
    return made.admit(context or Context()).stream(iter([b"a", b"b"]))


def raising(error):
    """Return a handler that raises."""

    def handler(*_):
        raise error

    return handler


def test_an_answered_call_is_logged(log):
    """The line has the method, the status, the milliseconds and what the handler noted, in order."""

    def handler(message, call):
        call.record.note({"layers": "MaxPool2d(2)"})
        call.record.note({"shape": "(1, 1, 2, 2)"})
        return message.upper()

    assert unary(log, handler) == b"REQUEST"
    ((level, facts),) = log.lines
    assert list(facts) == ["method", "status", "ms", "layers", "shape"]
    assert (level, facts["method"], facts["status"], facts["layers"]) == (logging.INFO, METHOD, "OK", "MaxPool2d(2)")
    assert 0 <= facts["ms"] == round(facts["ms"], 3)


def test_a_computed_call_is_logged_with_its_stages(log):
    """The line of an executed call has the milliseconds in the queue and of computation, over all executions."""

    def handler(message, call):
        for _ in range(2):
            times = call.record.begin_execution(4, 1)
            times.compute_started(1, 4)
            times.compute_ended()
            call.record.end_execution(times)
        return message

    unary(log, handler)
    ((_, facts),) = log.lines
    assert list(facts) == ["method", "status", "ms", "queue_ms", "compute_ms"]
    assert 0 <= facts["queue_ms"] + facts["compute_ms"] <= facts["ms"] + 0.002


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("expected 1, got 2", field="payload"),
        LimitExceededError("too much", reason="WORK_BUDGET", metadata={"limit": "1", "actual": "2"}),
        UnavailableError("full", reason="IN_FLIGHT_BYTES", retry_delay=0.25),
    ],
    ids=lambda error: error.code,
)
def test_a_pool_error_becomes_its_status(log, error):
    """The caller gets the error with its details, and the line has the status, the reason and the message, quoted."""
    status = unary(log, raising(error))
    got = error_of(status)
    assert (type(got), str(got), got.reason, got.metadata) == (type(error), str(error), error.reason, error.metadata)
    ((level, facts),) = log.lines
    assert level == logging.INFO
    assert (facts["status"], facts["reason"], facts["error"]) == (error.code, error.reason, repr(error.message))


@pytest.mark.parametrize(("delay", "pushback"), [(0.25, {"grpc-retry-pushback-ms": "250"}), (None, {})])
def test_only_an_error_with_a_delay_has_a_pushback(log, delay, pushback):
    """What may be tried again says when, in the details and for gRPC's own retries."""
    status = unary(log, raising(UnavailableError("full", reason="QUEUE", retry_delay=delay)))
    assert error_of(status).retry_delay == delay
    assert {key: value for key, value in status.trailing if key != DETAILS_KEY} == pushback


def test_a_long_message_is_cut_in_the_log(log):
    """A caller cannot fill the log with an error's message."""
    unary(log, raising(InvalidArgumentError("x" * 10_000)))
    assert len(log.lines[0][1]["error"]) <= 300


def test_an_unexpected_error_is_explained_in_the_log_alone(log, caplog, monkeypatch):
    """The caller gets INTERNAL with an id and no word of the error; the log has the id and the traceback."""
    monkeypatch.setattr(logging.getLogger("poolrpc_server"), "propagate", True)
    status = unary(log, raising(UNEXPECTED))
    error_id = error_of(status).error_id
    assert (status.code, len(error_id)) == ("INTERNAL", 12)
    assert error_id in status.message
    assert "secret" not in status.message
    ((_, facts),) = log.lines
    assert (facts["status"], facts["error_id"], facts["error"]) == ("INTERNAL", error_id, "KeyError")
    (record,) = [record for record in caplog.records if record.message == "unexpected error"]
    assert (record.error_id, record.method) == (error_id, METHOD)
    assert record.exc_info[1] is UNEXPECTED


def test_an_unexpected_error_may_be_translated(log):
    """The translation replaces InternalError; it is not asked about this project's own errors."""
    asked = []

    def translate(error):
        asked.append(type(error))
        return UnavailableError("gone", reason="GONE") if isinstance(error, OSError) else None

    errors = [
        error_of(unary(log, raising(error), translate=translate))
        for error in (OSError("lost"), KeyError("odd"), InvalidArgumentError("odd", field="x"))
    ]
    assert [type(error) for error in errors] == [UnavailableError, InternalError, InvalidArgumentError]
    assert asked == [OSError, KeyError]


def test_probes_are_logged_at_debug_unless_rejected(log, tmp_path):
    """A health check is logged at DEBUG, but one without the token that it needs at INFO."""
    unary(log, lambda *_: b"", name=PROBE, probe=True)
    assert log.lines.pop()[0] == logging.DEBUG
    made = pipeline(log, Method(PROBE, unary=lambda *_: b"", probe=True), tokens=tokens(tmp_path))
    with pytest.raises(StatusError):
        made.admit(Context(PROBE)).reject()
    assert log.lines.pop()[0] == logging.INFO


def test_a_call_that_nobody_waits_for_is_cancelled(log):
    """A call that ended while it was answered is CANCELLED, or DEADLINE_EXCEEDED if its time was up, and counted."""
    metrics = Metrics()
    for remaining, status in ((None, "CANCELLED"), (0.0, "DEADLINE_EXCEEDED")):
        context = Context(remaining=remaining)
        unary(log, lambda message, call: call.cancel() or message, context=context, metrics=metrics)
        assert log.lines.pop()[1]["status"] == status
    assert metrics.collect().get_sample_value("poolrpc_cancelled_total", {"stage": "send"}) == 2


def test_a_stream_is_logged_when_it_ends(log):
    """Answers go out as they are made, and the line is written after the last."""

    def handler(messages, call):
        call.record.note({"shape": "(1,)"})
        for message in messages:
            yield message.upper()

    answers = stream(log, handler)
    assert next(answers) == b"A"
    assert log.lines == []
    assert list(answers) == [b"B"]
    ((level, facts),) = log.lines
    assert (level, facts["status"], facts["shape"]) == (logging.INFO, "OK", "(1,)")


def test_a_stream_fails_with_its_status(log):
    """An error in the middle of a stream ends it with the error's status; earlier answers have been sent."""

    def handler(*_):
        yield b"first"
        raise LimitExceededError("too much", reason="WORK_BUDGET")

    answers = stream(log, handler)
    assert next(answers) == b"first"
    with pytest.raises(StatusError) as raised:
        next(answers)
    assert str(error_of(raised.value)) == "too much"
    ((_, facts),) = log.lines
    assert (facts["status"], facts["reason"]) == ("RESOURCE_EXHAUSTED", "WORK_BUDGET")


def test_a_stream_whose_client_resets_it_is_cancelled(log):
    """Messages that end early are not the client's fault if the call ends at the same time: it was reset."""
    context = Context()

    def handler(messages, call):
        list(messages)
        call.cancel()
        raise InvalidArgumentError("expected more", field="payload")
        yield

    assert list(stream(log, handler, context)) == []
    ((_, facts),) = log.lines
    assert facts["status"] == "CANCELLED"


def test_a_closed_stream_is_cancelled(log):
    """When the transport wants no more answers, the handler ends and the line says CANCELLED."""
    ended = []

    def handler(*_):
        try:
            yield b"first"
            yield b"second"
        finally:
            ended.append(True)

    answers = stream(log, handler)
    next(answers)
    answers.close()
    assert ended == [True]
    assert log.lines[0][1]["status"] == "CANCELLED"


def rejecting(*_):
    """Reject every call."""
    raise UnavailableError("full", reason="QUEUE", retry_delay=0.25)


def test_a_rejected_call_is_not_answered(log):
    """A method that computes is rejected before its message is read; others are answered while the server is full."""
    answered = []
    made = pipeline(
        log,
        Method(METHOD, unary=lambda message, _: answered.append(message), computes=True),
        Method("/a.B/C", unary=lambda message, _: message),
        admit=rejecting,
    )
    call = made.admit(Context())
    with pytest.raises(StatusError) as raised:
        call.reject()
    assert error_of(raised.value).reason == call.error.reason == "QUEUE"
    ((_, facts),) = log.lines
    assert (facts["method"], facts["status"], facts["reason"]) == (METHOD, "UNAVAILABLE", "QUEUE")
    assert made.admit(Context("/a.B/C")).unary(b"request") == b"request"
    assert answered == []


@pytest.mark.parametrize(
    ("metadata", "admitted"),
    [
        ((), (1, 0)),
        ((("x", "0"),), (1, 0)),
        ((("priority", "0"),), (0, 0)),
        ((("poolrpc-message-bytes", "70"), ("priority", "2")), (2, 70)),
    ],
)
def test_admission_gets_what_the_metadata_says(log, metadata, admitted):
    """Priority and announced size come from the metadata; the handler sees the same priority."""
    seen = []

    def admit(*arguments):
        seen.append(arguments)
        return AdmissionControl(100).admit()

    made = pipeline(log, Method(METHOD, unary=lambda _, call: bytes([call.priority]), computes=True), admit=admit)
    call = made.admit(Context(metadata=metadata))
    assert call.unary(b"") == bytes([admitted[0]])
    assert seen == [admitted]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("priority", value) for value in ("3", "", b"0", "high")),
        *(("poolrpc-message-bytes", value) for value in ("-1", "", "1e3", "9" * 20, b"1")),
    ],
)
def test_invalid_metadata_is_the_callers_fault(log, key, value):
    """It is INVALID_ARGUMENT with the key, before admission is asked."""
    made = pipeline(log, Method(METHOD, unary=lambda *_: b"", computes=True), admit=rejecting)
    call = made.admit(Context(metadata=((key, value),)))
    assert isinstance(call.error, InvalidArgumentError)
    assert [violation.field for violation in call.error.violations] == [f"metadata.{key}"]


def test_a_ticket_is_returned_whatever_happens(log):
    """Announced bytes count until the message has arrived, and the call until it is released, answered or not."""
    admission = AdmissionControl(100, 1)
    made = pipeline(
        log,
        Method(METHOD, unary=lambda *_: str(admission.bytes_in_flight).encode(), computes=True),
        admit=lambda _, announced: admission.admit(announced),
    )
    metadata = (("poolrpc-message-bytes", "70"),)
    call = made.admit(Context(metadata=metadata))
    assert admission.bytes_in_flight == 70
    assert made.admit(Context()).error.reason == "CALLS"
    assert call.unary(b"") == b"0"
    for _ in range(2):
        call.release()
    abandoned = made.admit(Context(metadata=metadata))
    assert abandoned.error is None
    abandoned.release()
    assert admission.bytes_in_flight == 0
    assert made.admit(Context()).error is None


def tokens(folder):
    """Return the file of one token of alice's, which is good for Pool and Check."""
    file = folder / "tokens"
    file.write_text(f"alice {sha256(b'secret').hexdigest()} {METHOD[1:]} {PROBE[1:]}\n")
    return TokenFile(str(file))


@pytest.mark.parametrize(
    ("name", "token", "error"),
    [
        (METHOD, "secret", None),
        (METHOD, "wrong", UnauthenticatedError),
        (METHOD, None, UnauthenticatedError),
        ("/a.B/C", "secret", PermissionDeniedError),
        ("/no.Such/Method", "wrong", UnauthenticatedError),
        ("/a.B/Public", None, None),
    ],
)
def test_each_call_needs_a_token(log, tmp_path, name, token, error):
    """A call without a valid token is rejected before admission; the log line has the token's name."""
    made = pipeline(
        log,
        Method(METHOD, unary=lambda message, _: message, computes=True),
        Method("/a.B/C", unary=lambda message, _: message),
        Method("/a.B/Public", unary=lambda message, _: message, public=True),
        tokens=tokens(tmp_path),
    )
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    context = Context(name, metadata)
    call = made.admit(context)
    assert (None if call.error is None else type(call.error)) is error
    if error is None:
        call.unary(b"")
    else:
        with pytest.raises(StatusError):
            call.reject()
    ((_, facts),) = log.lines
    assert facts.get("caller") == ("alice" if error in (None, PermissionDeniedError) and token else None)
    # Nor is there a span of a name that a caller made up.
    assert facts["method"] == context.record.method == (name if name != "/no.Such/Method" else "/unknown/Unknown")


@pytest.mark.parametrize("public", [True, False])
def test_a_method_that_the_transport_answers_needs_a_token(log, tmp_path, public):
    """The pipeline rejects a call without a token under the method's own name, unless the method is public."""
    made, watch = pipeline(log, tokens=tokens(tmp_path)), Method(METHOD, probe=True, public=public)
    assert made.admit(Context(watch.name, (("authorization", "Bearer secret"),)), watch) is None
    call = made.admit(Context(watch.name), watch)
    if public:
        assert call is None
        return
    with pytest.raises(StatusError):
        call.reject()
    ((_, facts),) = log.lines
    assert facts["method"] == watch.name


def test_a_method_that_does_not_exist_is_left_to_the_transport(log):
    """It is not logged: callers make up any number of names."""
    assert pipeline(log).admit(Context("/no.Such/Method")) is None
    assert log.lines == []


def test_a_stopped_pipeline_rejects(log):
    """Calls that come after the stop are UNAVAILABLE."""
    made = pipeline(log, Method(METHOD, unary=lambda *_: b""))
    made.stop()
    assert made.admit(Context()).error.reason == "STOPPING"


@pytest.mark.parametrize(
    ("error", "probe", "metric", "labels"),
    [
        (UnavailableError("full", reason="IN_FLIGHT_BYTES"), False, "rejects", {"reason": "IN_FLIGHT_BYTES"}),
        (UNEXPECTED, False, "validator_escapes", {}),
        (UNEXPECTED, True, "validator_escapes", None),
        (InvalidArgumentError("bad"), False, "validator_escapes", None),
    ],
    ids=["a rejection", "an escape", "a probe's failure", "an invalid call"],
)
def test_failures_are_counted(log, error, probe, metric, labels):
    """An unavailable call is a rejection with its reason; an unexpected error an escape, unless a probe's."""
    metrics = Metrics()
    unary(log, raising(error), probe=probe, metrics=metrics)
    counted = metrics.collect().get_sample_value(f"poolrpc_{metric}_total", labels or {})
    assert counted == (0 if labels is None else 1)


def test_calls_are_counted_by_method_and_status(log):
    """Each call begins and ends once, with its kind, service, method and status."""
    metrics = Metrics()
    unary(log, raising(InvalidArgumentError("bad")), metrics=metrics)
    labels = {"grpc_type": "unary", "grpc_service": "poolrpc.v1.PoolService", "grpc_method": "Pool"}
    registry = metrics.collect()
    assert registry.get_sample_value("grpc_server_started_total", labels) == 1
    handled = registry.get_sample_value("grpc_server_handled_total", labels | {"grpc_code": "InvalidArgument"})
    assert handled == 1
