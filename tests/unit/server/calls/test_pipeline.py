"""The pipeline of a call: token, admission, the status of each error, the log line, the counts."""

import logging
from hashlib import sha256
from itertools import count

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
from poolrpc_server.calls.admission import AdmissionControl, CallLimit
from poolrpc_server.calls.call import StatusError
from poolrpc_server.calls.method import Method, Observers
from poolrpc_server.calls.pipeline import CONTROL_CALLS, CallPipeline
from poolrpc_server.calls.tokens import TokenFile
from poolrpc_server.telemetry.metrics import Metrics
from poolrpc_server.telemetry.stage_times import DEVICE_STAGES, DeviceStage
from tests.unit.server.context import Context, error_of

METHOD = "/poolrpc.v1.PoolService/Pool"
PROBE = "/grpc.health.v1.Health/Check"
UNEXPECTED = KeyError("a secret")
PATIENCE = 3600.0


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


def pipeline(log, *methods, admission=None, admit=None, tokens=None, metrics=None, **observers):
    """Return a pipeline of these methods, which admits every call."""
    made = CallPipeline(
        admission or AdmissionControl(10**6),
        admit or (lambda *_: None),
        Observers(log, metrics or Metrics(enabled=False), **observers),
        tokens,
        max_message_bytes=1000,
        receive_seconds=PATIENCE,
    )
    made.add(methods)
    return made


def unary(log, handler, *, context=None, name=METHOD, probe=False, **options):
    """Make a call of a unary method; return the answer, or the StatusError."""
    context = context or Context(name)
    call = pipeline(log, Method(name, unary=handler, probe=probe), **options).admit(context)
    try:
        return call.unary(iter([b"request"]))
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


@pytest.mark.parametrize(
    ("peer", "shown"),
    [
        ("ipv4:127.0.0.1:50051", "127.0.0.1:50051"),
        ("ipv6:%5B::1%5D:50051", "[::1]:50051"),
        ("ipv6:%5Bfe80::1%25eth0%5D:50051", "[fe80::1%eth0]:50051"),
        ("unix:", "unix"),
        ("unix:/run/pool.sock", "unix"),
        ("", None),
    ],
)
def test_the_line_has_the_callers_address(log, peer, shown):
    """The address is as people write it, of answered and of rejected calls; a call whose peer is unknown has none."""

    class Remote(Context):
        peer = ""

    def reject(*_):
        raise UnavailableError("full")

    Remote.peer = peer
    unary(log, lambda message, _: message, context=Remote())
    call = pipeline(log, Method(METHOD, unary=raising(KeyError), computes=True), admit=reject).admit(Remote())
    with pytest.raises(StatusError):
        call.reject()
    assert [facts["status"] for _, facts in log.lines] == ["OK", "UNAVAILABLE"]
    assert [facts.get("peer") for _, facts in log.lines] == [shown, shown]


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


def test_the_stages_on_a_device_are_logged(log):
    """The line of a call on a device has the milliseconds of each stage there, over all executions."""

    def handler(message, call):
        for _ in range(2):
            times = call.record.begin_execution(4, 1)
            times.compute_started(1, 4)
            times.device = tuple(DeviceStage(name, 0, 9, 10**6 * len(name)) for name in DEVICE_STAGES)
            call.record.end_execution(times)
        return message

    unary(log, handler)
    ((_, facts),) = log.lines
    assert list(facts)[4:] == ["compute_ms", "upload_ms", "kernel_ms", "download_ms"]
    assert [facts[f"{name}_ms"] for name in DEVICE_STAGES] == [12, 12, 16]


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
    """The caller gets the error with its details, and the line has the status, the reason and the message."""
    status = unary(log, raising(error))
    got = error_of(status)
    assert (type(got), str(got), got.reason, got.metadata) == (type(error), str(error), error.reason, error.metadata)
    ((level, facts),) = log.lines
    assert level == logging.INFO
    assert (facts["status"], facts["reason"], facts["error"]) == (error.code, error.reason, error.message)


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
    assert made.admit(Context("/a.B/C")).unary(iter([b"request"])) == b"request"
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

    def admit(call, announced):
        seen.append((call.priority, announced))

    made = pipeline(log, Method(METHOD, unary=lambda _, call: bytes([call.priority]), computes=True), admit=admit)
    call = made.admit(Context(metadata=metadata))
    assert call.unary(iter([b""])) == bytes([admitted[0]])
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


def never(_):
    """Be a call that is admitted, but whose handler is never entered."""


def answered(call):
    """Read and answer a call."""
    call.unary(iter([b"request"]))


def failed(call):
    """Fail with a message that is too large for the bytes in flight."""
    with pytest.raises(StatusError):
        call.unary(iter([bytes(200)]))


def unsent(call):
    """Fail for want of a message."""
    with pytest.raises(StatusError):
        call.unary(iter([]))


@pytest.mark.parametrize("path", [never, answered, failed, unsent])
def test_a_call_holds_nothing_after_its_end(log, path):
    """Whatever happens to a call, everything that it holds is returned when its transport releases its ticket."""
    admission, limit = AdmissionControl(100), CallLimit("CALLS", "calls at a time", 1)
    method = Method(METHOD, unary=lambda message, _: message, computes=True)
    made = pipeline(log, method, admission=admission, admit=lambda call, _: call.ticket.enter(limit))
    for _ in range(3):
        context = Context(metadata=(("poolrpc-message-bytes", "30"),))
        call = made.admit(context)
        assert (call.error, limit.count) == (None, 1)
        rejected = Context()
        assert made.admit(rejected).error.reason == "CALLS"
        assert rejected.ticket.released
        path(call)
        assert limit.count == 1
        context.ticket.release()
        assert (limit.count, admission.bytes_in_flight, admission.tickets()) == (0, 0, [])


@pytest.mark.parametrize("probe", [False, True])
def test_only_so_many_calls_do_not_compute(log, probe):
    """One call too many of such methods is rejected, unless another one waits too long for its caller and is ended.

    Probes and the other ones do not take each other's places.
    """
    metrics, name, number = Metrics(), "/a.B/C", CONTROL_CALLS // 2
    methods = [
        Method(each, unary=lambda message, _: message, probe=of) for each, of in ((name, probe), ("/a.B/D", not probe))
    ]
    made = pipeline(log, *methods, metrics=metrics)
    contexts = [Context(name) for _ in range(number)]
    assert [made.admit(context).error for context in contexts] == [None] * number
    assert made.admit(Context(name)).error.metadata == {"limit": str(number), "actual": str(number + 1)}
    assert made.admit(Context("/a.B/D")).error is None
    contexts[7].ticket.wait(PATIENCE, patience=0.0)
    assert made.admit(Context(name)).error is None
    assert [context.is_active() for context in contexts] == [each != 7 for each in range(number)]
    assert metrics.collect().get_sample_value("poolrpc_ended_total", {"reason": "STALLED"}) == 1


@pytest.mark.parametrize("reason", ["TIMEOUT", "STALLED", "MEMORY"])
def test_a_call_that_the_server_ends_is_counted_and_explained(log, reason):
    """A call that is ended while its message is awaited returns everything, and its log line says why it was ended."""
    metrics, admission, context = Metrics(), AdmissionControl(100), Context(metadata=(("poolrpc-message-bytes", "30"),))
    method = Method(METHOD, unary=lambda *_: pytest.fail("it was answered"), computes=True)

    def messages():
        assert admission.bytes_in_flight > 0
        context.ticket.end(reason)
        assert (admission.bytes_in_flight, context.is_active()) == (0, False)
        raise KeyError("what a transport raises then")
        yield

    call = pipeline(log, method, admission=admission, metrics=metrics).admit(context)
    with pytest.raises(StatusError) as raised:
        call.unary(messages())
    assert raised.value.code == "CANCELLED"
    shown = metrics.collect()
    assert shown.get_sample_value("poolrpc_ended_total", {"reason": reason}) == 1
    assert shown.get_sample_value("poolrpc_cancelled_total", {"stage": "receive"}) == 1
    ((_, facts),) = log.lines
    assert facts["status"] == "CANCELLED"
    assert reason in facts.values()


def test_a_caller_has_only_a_share_of_the_calls(log):
    """Of four calls at a time a caller may have three; its next one is rejected before its message is read."""
    limit, answered = CallLimit("CALLS", "calls at a time", 4), []
    made = pipeline(
        log,
        Method(METHOD, unary=lambda message, call: answered.append(call.caller) or message, computes=True),
        admit=lambda call, _: call.ticket.enter(limit),
    )

    def call_of(token):
        context = Context(metadata=(("poolrpc-message-bytes", "1"),))
        context.token = token
        asked = []
        call = made.admit(context)
        try:
            call.unary(asked.append(1) or b"x" for _ in count())
        except StatusError as status:
            context.ticket.release()
            assert asked == []
            return error_of(status).message
        return ""

    assert [call_of("alice") for _ in range(3)] == [""] * 3
    assert call_of("alice") == "expected at most 3 calls at a time of one caller, got 4; try again"
    assert call_of("bob") == ""
    assert answered == ["alice"] * 3 + ["bob"]


def tokens(folder):
    """Return a file of tokens: alice's is good for Pool and Check, and bob's for all methods, with any priority."""
    file = folder / "tokens"
    file.write_text(
        f"alice {sha256(b'secret').hexdigest()} {METHOD[1:]} {PROBE[1:]}\n"
        f"bob {sha256(b'urgent').hexdigest()} priority-0\n"
    )
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
        call.unary(iter([b""]))
    else:
        with pytest.raises(StatusError):
            call.reject()
    ((_, facts),) = log.lines
    assert facts.get("caller") == ("alice" if error in (None, PermissionDeniedError) and token else None)
    # Nor is there a span of a name that a caller made up.
    assert facts["method"] == context.record.method == (name if name != "/no.Such/Method" else "/unknown/Unknown")


@pytest.mark.parametrize("token", ["wrong", None])
def test_nothing_is_reserved_without_a_token(log, tmp_path, token):
    """Whatever a call without a valid token announces, it is counted nowhere, whether its rejection is sent or not."""
    admission, computed = AdmissionControl(100), Method(METHOD, unary=lambda message, _: message, computes=True)
    made = pipeline(
        log,
        computed,
        Method(PROBE, unary=lambda message, _: message),
        admission=admission,
        admit=lambda *_: pytest.fail("it was admitted"),
        tokens=tokens(tmp_path),
    )
    credentials = () if token is None else (("authorization", f"Bearer {token}"),)
    for name in (METHOD, PROBE, "/no.Such/Method") * 10:
        context = Context(name, (("poolrpc-message-bytes", "530000000"), ("priority", "0"), *credentials))
        assert isinstance(made.admit(context).error, UnauthenticatedError)
        assert (context.ticket.released, context.ticket.nbytes) == (True, 0)
    assert (admission.tickets(), admission.bytes_in_flight) == ([], 0)


@pytest.mark.parametrize("priority", ["0", "1", "2"])
@pytest.mark.parametrize("token", ["secret", "urgent", None])
def test_priority_0_needs_the_tokens_word(log, tmp_path, token, priority):
    """A token without the word is denied priority 0, and nothing is admitted; without tokens, anyone may have it."""
    seen = []
    made = pipeline(
        log,
        Method(METHOD, unary=lambda message, _: message, computes=True),
        admit=lambda call, _: seen.append(call.priority),
        tokens=tokens(tmp_path) if token else None,
    )
    credentials = (("authorization", f"Bearer {token}"),) if token else ()
    context = Context(metadata=(*credentials, ("priority", priority)))
    call = made.admit(context)
    if (token, priority) == ("secret", "0"):
        assert isinstance(call.error, PermissionDeniedError)
        assert call.error.message == "the token does not allow priority 0"
        assert (seen, context.ticket.released) == ([], True)
        return
    assert (call.error, seen) == (None, [int(priority)])


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
