"""What surrounds every call: the status of whatever is raised, and the line in the log."""

import contextvars
import logging
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2

from poolrpc import (
    InternalError,
    InvalidArgumentError,
    LimitExceededError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from poolrpc._wire.status import DETAILS_KEY, decode_error
from poolrpc_server.telemetry.metrics import Metrics
from poolrpc_server.transports.grpc.interceptor import CallInterceptor, Room, name_caller, note, priority

METRICS = Metrics(enabled=False)
METHOD = "/poolrpc.v1.PoolService/Pool"
Details = namedtuple("Details", "method invocation_metadata", defaults=[()])  # noqa: PYI024 - as gRPC's
UNEXPECTED = KeyError("a secret")


class Lines:
    """A log that keeps what it is given."""

    def __init__(self):
        self.kept = []

    def add(self, level, facts):
        """Keep a line."""
        self.kept.append((level, facts))


class Aborted(Exception):  # noqa: N818 - as gRPC's own, it isn't an error
    """What gRPC's context raises to end a call."""


class Context:
    """A call, as gRPC gives it to a servicer."""

    def __init__(self):
        self.trailing, self.ended, self.active, self.told = (), None, True, None

    def is_active(self):
        """Tell whether the caller is there."""
        return self.active

    def add_callback(self, ended):
        """Take what is to be called at the end, which these calls don't come to."""

    def time_remaining(self):
        """Give no limit."""

    def code(self):
        """Give the status that the servicer has set."""
        return self.told

    def set_trailing_metadata(self, metadata):
        """Keep what goes with the status."""
        self.trailing = metadata

    def abort(self, code, text):
        """End the call with a status."""
        self.ended = code, text
        raise Aborted

    def error(self):
        """Give what a client of ours makes of the status."""
        code, text = self.ended
        return decode_error(code.name, text, dict(self.trailing)[DETAILS_KEY])


@pytest.fixture
def lines():
    """Give the log's lines, as (level, facts)."""
    return Lines()


def handler(lines, behaviour, *, method=METHOD, kind="unary_unary", **options):
    """Give what the interceptor makes of a method."""
    inner = getattr(grpc, f"{kind}_rpc_method_handler")(behaviour, None, None)
    return CallInterceptor(lines, options.pop("metrics", METRICS), **options).intercept_service(
        lambda _: inner, Details(method)
    )


def call(lines, behaviour, **options):
    """Make a unary call; give the answer, None where it was aborted, and the context."""
    context = Context()
    try:
        return handler(lines, behaviour, **options).unary_unary("request", context), context
    except Aborted:
        return None, context


def stream(lines, behaviour, **options):
    """Begin a stream; give its answers and the context."""
    context = Context()
    return handler(lines, behaviour, kind="stream_stream", **options).stream_stream(iter(["a", "b"]), context), context


def raising(error):
    """Give a unary servicer that raises."""

    def behaviour(*_):
        raise error

    return behaviour


def test_a_call_that_is_answered_is_a_line(lines):
    """The line has the method, the status, the milliseconds that it took, and what the servicer noted, in order."""

    def behaviour(request, _):
        note({"layers": "MaxPool2d(2)"})
        note({"shape": "(1, 1, 2, 2)"})
        return request.upper()

    answer, _ = call(lines, behaviour)
    assert answer == "REQUEST"
    ((level, facts),) = lines.kept
    assert list(facts) == ["method", "status", "ms", "layers", "shape"]
    assert (level, facts["method"], facts["status"], facts["layers"]) == (logging.INFO, METHOD, "OK", "MaxPool2d(2)")
    assert 0 <= facts["ms"] < 60_000
    assert facts["ms"] == round(facts["ms"], 3)


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("expected 1, got 2", field="payload"),
        LimitExceededError("too much", reason="WORK_BUDGET", metadata={"limit": "1", "actual": "2"}),
        UnavailableError("full", reason="IN_FLIGHT_BYTES", retry_delay=0.25),
    ],
    ids=lambda error: error.code,
)
def test_an_error_of_ours_is_its_status_and_its_reason(lines, error):
    """The caller gets the error with its details, and the line has the status, the reason and the message, quoted."""
    answer, context = call(lines, raising(error))
    assert answer is None
    got = context.error()
    assert (type(got), str(got), got.reason, got.metadata) == (type(error), str(error), error.reason, error.metadata)
    ((level, facts),) = lines.kept
    assert level == logging.INFO
    assert (facts["status"], facts["reason"], facts["error"]) == (error.code, error.reason, repr(error.message))


def test_a_long_message_is_cut_in_the_log(lines):
    """What a caller put into a message can't fill the log."""
    call(lines, raising(InvalidArgumentError("x" * 10_000)))
    assert len(lines.kept[0][1]["error"]) <= 300


def test_an_unexpected_error_is_explained_in_the_log_alone(lines, caplog, monkeypatch):
    """The caller gets INTERNAL with an id and no word of what happened; the log has the id and the traceback."""
    monkeypatch.setattr(logging.getLogger("poolrpc_server"), "propagate", True)
    _, context = call(lines, raising(UNEXPECTED))
    error_id = context.error().error_id
    assert (context.ended[0], len(error_id)) == (grpc.StatusCode.INTERNAL, 12)
    assert error_id in context.ended[1]
    assert "secret" not in context.ended[1]
    ((_, facts),) = lines.kept
    assert (facts["status"], facts["error_id"], facts["error"]) == ("INTERNAL", error_id, "KeyError")
    (record,) = [each for each in caplog.records if each.message == "unexpected error"]
    assert (record.error_id, record.method) == (error_id, METHOD)
    assert record.exc_info[1] is UNEXPECTED


def test_a_method_without_a_servicer_is_unimplemented(lines):
    """What a servicer's generated base class raises is UNIMPLEMENTED, and the same of torch's is unexpected."""

    def missing(_, context):
        context.told = grpc.StatusCode.UNIMPLEMENTED
        raise NotImplementedError("Method not implemented!")

    _, context = call(lines, missing)
    assert type(context.error()) is UnsupportedError
    _, context = call(lines, raising(NotImplementedError("no such kernel")))
    assert type(context.error()) is InternalError
    assert [facts["status"] for _, facts in lines.kept] == ["UNIMPLEMENTED", "INTERNAL"]


def test_what_one_call_noted_is_not_in_the_next_line(lines):
    """Facts are a call's own, whatever became of it."""

    def behaviour(*_):
        note({"shape": "(1,)"})
        raise InvalidArgumentError("bad")

    call(lines, behaviour)
    call(lines, lambda *_: "answer")
    assert lines.kept[0][1]["shape"] == "(1,)"
    assert list(lines.kept[1][1]) == ["method", "status", "ms"]


@pytest.mark.parametrize("method", ["/grpc.health.v1.Health/Check", "/grpc.reflection.v1.ServerReflection/X"])
def test_what_probes_call_is_quiet(lines, method):
    """Health checks and reflection are logged at DEBUG."""
    call(lines, lambda *_: "answer", method=method)
    assert lines.kept[0][0] == logging.DEBUG


def test_a_stream_is_a_line_when_it_ends(lines):
    """Answers go on as they come, and the line is written after the last."""

    def behaviour(requests, _):
        note({"shape": "(1,)"})
        for each in requests:
            yield each.upper()

    answers, _ = stream(lines, behaviour)
    assert next(answers) == "A"
    assert lines.kept == []
    assert list(answers) == ["B"]
    ((level, facts),) = lines.kept
    assert (level, facts["status"], facts["shape"]) == (logging.INFO, "OK", "(1,)")


def test_a_stream_that_fails_is_its_status_and_its_reason(lines):
    """An error amid a stream ends it with the error's status; the answers before it have gone."""

    def behaviour(*_):
        yield "first"
        raise InvalidArgumentError("cut plane", field="payload")

    answers, context = stream(lines, behaviour)
    assert next(answers) == "first"
    with pytest.raises(Aborted):
        next(answers)
    assert str(context.error()) == "payload: cut plane"
    ((_, facts),) = lines.kept
    assert (facts["status"], facts["reason"]) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")


def test_an_unexpected_error_amid_a_stream_has_an_id(lines):
    """A stream fails as a call does."""

    def behaviour(*_):
        yield "first"
        raise UNEXPECTED

    answers, context = stream(lines, behaviour)
    next(answers)
    with pytest.raises(Aborted):
        next(answers)
    assert lines.kept[0][1]["error_id"] == context.error().error_id


def test_a_stream_that_the_caller_leaves_is_cancelled(lines):
    """Where gRPC wants no more answers the servicer ends, and the line says so; there is nobody to send a status to."""
    ended = []

    def behaviour(*_):
        try:
            yield "first"
            yield "second"
        finally:
            ended.append(True)

    answers, context = stream(lines, behaviour)
    next(answers)
    answers.close()
    assert ended == [True]
    assert context.ended is None
    ((_, facts),) = lines.kept
    assert facts["status"] == "CANCELLED"


def test_a_method_is_wrapped_once(lines):
    """A method that there is has one handler, although gRPC asks about each call."""
    interceptor, asked = CallInterceptor(lines, METRICS), []

    def continuation(details):
        asked.append(details.method)
        return grpc.unary_unary_rpc_method_handler(lambda *_: "answer")

    first = interceptor.intercept_service(continuation, Details(METHOD))
    assert interceptor.intercept_service(continuation, Details(METHOD)) is first
    assert interceptor.intercept_service(continuation, Details("/other/Method")) is not first
    assert asked == [METHOD, "/other/Method"]


def test_a_method_that_is_not_there_stays_so(lines):
    """Such calls are gRPC's to answer, and not remembered, for callers make up any number."""
    interceptor, asked = CallInterceptor(lines, METRICS), []
    for _ in range(2):
        assert interceptor.intercept_service(asked.append, Details("/no/Such")) is None
    assert len(asked) == 2


def test_a_method_of_another_kind_is_left_as_it_is(lines):
    """No service of ours has such methods; what others have is passed on."""
    inner = grpc.stream_unary_rpc_method_handler(lambda *_: "answer")
    assert CallInterceptor(lines, METRICS).intercept_service(lambda _: inner, Details("/x/Y")) is inner


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_stream"])
def test_grpc_reads_no_message(lines, kind):
    """Of any method the interceptor itself reads the messages; of bytes that are none it makes INTERNAL, told why."""
    behaviours = {
        "unary_unary": lambda asked, _: asked.service,
        "unary_stream": lambda asked, _: iter([asked.service]),
        "stream_stream": lambda asked, _: (each.service for each in asked),
    }
    inner = getattr(grpc, f"{kind}_rpc_method_handler")(behaviours[kind], health_pb2.HealthCheckRequest.FromString)
    handler = CallInterceptor(lines, METRICS).intercept_service(lambda _: inner, Details("/x/Y"))
    assert handler.request_deserializer is None
    context = Context()

    def answers(data):
        answer = getattr(handler, kind)(iter([data]) if kind == "stream_stream" else data, context)
        return [answer] if kind == "unary_unary" else list(answer)

    assert answers(health_pb2.HealthCheckRequest(service="x").SerializeToString()) == ["x"]
    with pytest.raises(Aborted):
        answers(b"\xff")
    assert (type(context.error()), context.error().reason) == (InternalError, "NO_MESSAGE")


def test_a_refusal_reads_no_message(lines):
    """A call that is refused ends with the error before a message of it is read, and is a line even for probes."""
    context, asked = Context(), []
    requests = map(asked.append, ["request"])
    refusal = CallInterceptor(lines, METRICS).refusal("/grpc.health.v1.Health/Check", UnauthenticatedError("no"))
    with pytest.raises(Aborted):
        refusal.stream_stream(requests, context)
    assert asked == []
    assert type(context.error()) is UnauthenticatedError
    ((level, facts),) = lines.kept
    assert (level, facts["status"], facts["reason"]) == (logging.INFO, "UNAUTHENTICATED", "UNAUTHENTICATED")


def test_whose_call_it_is_is_in_its_line(lines):
    """The name that was said before the call began is in its line, first of what is noted."""

    def named():
        name_caller("alice")
        call(lines, lambda *_: note({"shape": "(1,)"}))

    contextvars.copy_context().run(named)
    call(lines, lambda *_: "answer")
    assert list(lines.kept[0][1]) == ["method", "status", "ms", "caller", "shape"]
    assert lines.kept[0][1]["caller"] == "alice"
    assert "caller" not in lines.kept[1][1]


@pytest.mark.parametrize(
    ("error", "method", "name", "labels"),
    [
        (UnavailableError("full", reason="IN_FLIGHT_BYTES"), METHOD, "rejects", {"reason": "IN_FLIGHT_BYTES"}),
        (UNEXPECTED, METHOD, "validator_escapes", {}),
        (UNEXPECTED, "/grpc.health.v1.Health/Check", "validator_escapes", None),
        (InvalidArgumentError("bad"), METHOD, "validator_escapes", None),
    ],
    ids=["a reject", "an escape", "a probe's failure", "a bad call"],
)
def test_what_fails_is_counted(lines, error, method, name, labels):
    """A call refused for now is a reject with its reason; one that fails unexpectedly an escape, unless a probe's."""
    metrics = Metrics()
    wrapped = handler(lines, raising(error), method=method, metrics=metrics)
    with pytest.raises(Aborted):
        wrapped.unary_unary("request", Context())
    counted = metrics.collect().get_sample_value(f"poolrpc_{name}_total", labels or {})
    assert counted == (0 if labels is None else 1)


@pytest.mark.parametrize("kind", ["unary", "stream"])
def test_an_unexpected_error_may_be_judged(lines, kind):
    """Who is asked may give an error of ours for what is none; he isn't asked of ours, and need not have an answer."""
    asked = []

    def judge(error):
        asked.append(error)
        return UnavailableError("gone", reason="GONE") if isinstance(error, OSError) else None

    def status(error):
        if kind == "unary":
            return call(lines, raising(error), judge=judge)[1].error()
        answers, context = stream(lines, raising(error), judge=judge)
        with pytest.raises(Aborted):
            next(answers)
        return context.error()

    assert status(OSError("lost")).reason == "GONE"
    assert type(status(KeyError("odd"))) is InternalError
    assert type(status(InvalidArgumentError("odd", field="x"))) is InvalidArgumentError
    assert [type(each) for each in asked] == [OSError, KeyError]


def refusing(lines, *, metadata=(), threads=None, method=METHOD):
    """Give what the interceptor makes of a method that needs room where there is none, and the priorities asked for."""
    asked = []

    class Full(Room):
        def check_room(self, level, _):
            asked.append(level)
            raise UnavailableError("full", reason="QUEUE", retry_delay=0.25)

    interceptor = CallInterceptor(lines, METRICS, Full(), [METHOD], threads)
    inner = grpc.unary_unary_rpc_method_handler(lambda *_: "answer")
    return interceptor.intercept_service(lambda _: inner, Details(method, metadata)), asked


def test_where_there_is_no_room_a_call_is_refused_unread(lines):
    """Its status goes without a message having been asked for, with both ways to say when to come again."""
    made, asked = refusing(lines)
    context = Context()
    with pytest.raises(Aborted):
        made.stream_stream(None, context)  # a stream isn't read unless its servicer does so
    assert asked == [1]
    assert (context.error().reason, context.error().retry_delay) == ("QUEUE", 0.25)
    assert dict(context.trailing)["grpc-retry-pushback-ms"] == "250"
    ((_, facts),) = lines.kept
    assert (facts["method"], facts["status"], facts["reason"]) == (METHOD, "UNAVAILABLE", "QUEUE")


def test_a_method_that_needs_no_room_is_not_refused(lines):
    """What isn't named as one that needs it is answered while the server is full."""
    made, asked = refusing(lines, method="/other/Method")
    assert made.unary_unary("request", Context()) == "answer"
    assert asked == []


def test_an_error_that_is_final_says_nothing_of_coming_again(lines):
    """Only what may be tried again has a pushback."""
    _, context = call(lines, raising(LimitExceededError("too much", reason="WORK_BUDGET")))
    assert [key for key, _ in context.trailing] == [DETAILS_KEY]


@pytest.mark.parametrize(("metadata", "level"), [((), 1), ((("x", "0"),), 1), ((("priority", "0"),), 0)])
def test_the_priority_is_what_the_metadata_says(lines, metadata, level):
    """The servicer has it, and room is looked for at that level."""
    seen, asked = [], []

    class Free(Room):
        def check_room(self, level, _):
            asked.append(level)

    interceptor = CallInterceptor(lines, METRICS, Free(), [METHOD])
    inner = grpc.unary_unary_rpc_method_handler(lambda *_: seen.append(priority()))
    interceptor.intercept_service(lambda _: inner, Details(METHOD, metadata)).unary_unary("request", Context())
    assert seen == asked == [level]


@pytest.mark.parametrize("bad", ["3", "", b"0", "high"])
def test_a_bad_priority_is_the_callers_fault(lines, bad):
    """It is refused before room is looked for."""
    made, asked = refusing(lines, metadata=(("priority", bad),))
    context = Context()
    with pytest.raises(Aborted):
        made.stream_stream(None, context)
    assert context.ended[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert [each.field for each in context.error().violations] == ["metadata.priority"]
    assert asked == []


def test_who_looks_after_the_server_has_threads_of_his_own(lines):
    """GRPC is told of them by an attribute of what answers; other methods have the server's; who refuses has none."""
    looking = ThreadPoolExecutor(1)
    threads = {"/look/": looking}
    made, _ = refusing(lines, threads=threads)
    seen = made.stream_stream.experimental_thread_pool.submit(threading.get_ident)
    assert seen.result() == threading.get_ident()
    made, _ = refusing(lines, threads=threads, method="/look/After")
    assert made.unary_unary.experimental_thread_pool is looking
    made, _ = refusing(lines, threads=threads, method="/other/Method")
    assert not hasattr(made.unary_unary, "experimental_thread_pool")
