"""The log: call lines, written by their own thread, in order, with the time at which each call ended."""

import fcntl
import io
import json
import logging
import os
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from datetime import datetime
from threading import Event, Thread

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from poolrpc_server.telemetry import logs
from poolrpc_server.telemetry.logs import CallLog, configure, log, log_serving, pieces, text_renderer

LOGGER = logging.getLogger("poolrpc_server")
MINUTE = 60.0


class Records(logging.Handler):
    """A handler that keeps its records."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def emit(self, record):
        """Keep a record."""
        self.kept.append(record)


@pytest.fixture
def records(monkeypatch):
    """Return the records that the logger writes at INFO; a call line would wait a minute for others."""
    monkeypatch.setattr(logs, "LINE_DELAY_SECONDS", MINUTE)
    handler = Records()
    LOGGER.handlers[:], LOGGER.propagate = [handler], False
    LOGGER.setLevel(logging.INFO)
    return handler.kept


def test_lines_are_written_in_order_when_the_log_closes(records):
    """Closing writes every line at once, in the order in which the calls ended."""
    with closing(CallLog()) as calls:
        for i in range(200):
            calls.add(logging.INFO, {"number": i})
    assert [each.number for each in records] == list(range(200))
    assert {(each.getMessage(), each.levelno) for each in records} == {("call", logging.INFO)}


def test_a_line_has_the_time_at_which_the_call_ended(records):
    """The time is when the line was added, not when it was written."""
    between = []
    with closing(CallLog()) as calls:
        for i in range(3):
            before = time.time()
            calls.add(logging.INFO, {"number": i})
            between.append((before, time.time()))
    for record, (before, after) in zip(records, between, strict=True):
        assert before <= record.created <= after


def test_lines_of_any_thread_are_written(records):
    """Calls that end at the same time have a line each, and the lines of a thread come in order."""
    with closing(CallLog()) as calls:
        threads = [
            Thread(target=lambda who=who: [calls.add(logging.INFO, {"who": who, "number": i}) for i in range(50)])
            for who in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for who in range(4):
        assert [each.number for each in records if each.who == who] == list(range(50))


def test_a_line_is_written_without_a_close(records, monkeypatch):
    """A line is written after the flush interval, also without a close."""
    monkeypatch.setattr(logs, "LINE_DELAY_SECONDS", 0)
    written = Event()
    LOGGER.handlers[0].addFilter(lambda _: written.set() or True)
    with closing(CallLog()) as calls:
        calls.add(logging.INFO, {"number": 1})
        assert written.wait(MINUTE)
    assert [each.number for each in records] == [1]


def test_a_line_below_the_level_is_dropped(records):
    """A line below the log's level is not kept."""
    with closing(CallLog()) as calls:
        calls.add(logging.DEBUG, {"number": 1})
        calls.add(logging.INFO, {"number": 2})
    assert [each.number for each in records] == [2]


def test_lines_over_the_limit_are_dropped(records):
    """Lines that come faster than they are written are dropped, and a warning says how many."""
    with closing(CallLog(max_lines=5)) as calls:
        for i in range(50):
            calls.add(logging.INFO, {"number": i})
    *written, warning = records
    assert (warning.levelno, warning.getMessage()) == (logging.WARNING, "log lines dropped")
    assert 5 <= len(written) <= 6  # one may have been taken to be written
    assert [each.number for each in written][:5] == list(range(5))
    assert warning.lines == 50 - len(written)


def shown(log_format, monkeypatch, **options):
    """Return the lines of a call and an event on stderr."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure(log_format, "info", **options)
    with closing(CallLog()) as calls:
        calls.add(logging.INFO, {"method": "/x/Y", "status": "OK", "ms": 1.5})
    log.warning("something", about="it")
    log.debug("nothing")
    return stderr.getvalue().splitlines()


def test_json_has_one_line_per_event(monkeypatch):
    """Each event is a JSON object with its time in UTC, its level, its name and its facts."""
    call, event = map(json.loads, shown("json", monkeypatch))
    assert {"event": "call", "level": "info", "method": "/x/Y", "status": "OK", "ms": 1.5}.items() <= call.items()
    assert {"event": "something", "level": "warning", "about": "it"}.items() <= event.items()
    for each in (call, event):
        assert abs(datetime.fromisoformat(each["timestamp"]).timestamp() - time.time()) < MINUTE


@given(
    facts=st.dictionaries(
        st.text("abc_", min_size=1), st.none() | st.integers() | st.floats() | st.text() | st.lists(st.integers())
    ),
    level=st.sampled_from(["debug", "info", "warning", "error", "critical"]),
    error=st.none() | st.just(ValueError("expected another")),
)
def test_text_is_what_structlog_writes(facts, level, error):
    """A line of text without colours is what structlog's renderer writes for it, and so is an exception's traceback."""
    event = {"event": "call", **facts, "level": level, "timestamp": "2026-01-02T03:04:05+00:00", "exc_info": error}
    expected = structlog.dev.ConsoleRenderer(
        colors=False, pad_event_to=0, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
    )
    assert text_renderer(colors=False)(None, "", {**event}) == expected(None, "", {**event})


FACTS = {"addresses": ["127.0.0.1:1", "unix:/x"], "metrics": "", "threads": 2, "models": ["pool"], "max_work": 5}


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("info", ["serving addresses='127.0.0.1:1, unix:/x' threads=2"]),
        (
            "debug",
            [
                "serving addresses='127.0.0.1:1, unix:/x' threads=2",
                "settings addresses='127.0.0.1:1, unix:/x' metrics= threads=2 models=pool max_work=5",
            ],
        ),
    ],
)
def test_the_start_line_as_text(level, expected, monkeypatch):
    """As text the start line has what a person looks for; a line at level debug has all facts."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure("text", level)
    log_serving(FACTS)
    assert [line.partition("] ")[2] for line in stderr.getvalue().splitlines()] == expected


def test_the_start_line_in_json(monkeypatch):
    """In JSON the start line has all facts, with numbers and lists as such."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure("json", "debug")
    log_serving(FACTS)
    (line,) = map(json.loads, stderr.getvalue().splitlines())
    assert line.items() >= {"event": "serving", **FACTS}.items()


def test_the_start_line_in_the_log_of_another_program(records):
    """Another program's log gets one record with all facts."""
    log_serving(FACTS)
    (record,) = records
    assert {name: getattr(record, name) for name in FACTS} == FACTS


def test_a_worker_is_named_in_every_line(monkeypatch):
    """The worker's number is in the lines of calls and of events, of any thread, in both formats."""
    for log_format, words in (("json", '"worker": 3'), ("text", "worker=3")):
        lines = shown(log_format, monkeypatch, worker=3)
        assert len(lines) == 2
        assert all(words in each for each in lines)
    assert "worker" not in "".join(shown("text", monkeypatch))


def test_lines_are_written_in_pieces_that_a_pipe_takes_whole():
    """Lines stay whole and in order; a piece is as large as allowed, or one line that is larger by itself."""
    lines = ["a\n", "bb\n", "ä\n", "c" * 9 + "\n", "d\n"]
    assert list(pieces(lines, 5)) == ["a\nbb\n", "ä\n", "c" * 9 + "\n", "d\n"]
    assert list(pieces([], 5)) == []


def test_text_has_one_line_per_event(monkeypatch):
    """In text, the same is name=value pairs, without colours unless stderr is a terminal."""
    call, event = shown("text", monkeypatch)
    assert "call method=/x/Y status=OK ms=1.5" in call
    assert "something about=it" in event
    assert "\x1b" not in call + event


# Logs 100 calls and an event, reads a line, and logs as many again; it prints how many lines were dropped each time.
WRITING = """
import logging
from poolrpc_server.telemetry import logs
from poolrpc_server.telemetry.metrics import Metrics
logs.configure("json", "info")
for again in range(2):
    calls = logs.CallLog()
    for number in range(100):
        calls.add(logging.INFO, {"number": number, "again": again})
    if not again:
        logs.log.info("event")
    calls.close()
    print(int(Metrics().collect().get_sample_value("poolrpc_log_lines_dropped_total")), flush=True)
    again or input()
"""


@contextmanager
def writing(stderr):
    """Run the program of WRITING with a stderr, which is closed here."""
    process = subprocess.Popen(  # noqa: S603 - ours
        [sys.executable, "-c", WRITING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
    )
    os.close(stderr)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def lines_of(text):
    """Return the lines of a log that are complete, and the number of others."""
    lines = text.splitlines()
    whole = [json.loads(each) for each in lines if each.startswith("{") and each.endswith("}")]
    return whole, len(lines) - len(whole)


def assert_lines_are_dropped(descriptor):
    """Write a log that takes no line; each is counted, and the process goes on."""
    with writing(descriptor) as process:
        assert int(process.stdout.readline()) >= 101
        print(file=process.stdin, flush=True)
        assert int(process.stdout.readline()) >= 201
        assert process.wait(60) == 0


def test_lines_that_a_full_disk_does_not_take_are_dropped():
    """Each is counted, and the process goes on."""
    assert_lines_are_dropped(os.open("/dev/full", os.O_WRONLY))


def test_lines_for_a_closed_pipe_are_dropped():
    """The reader of the log has ended: lines are counted, and the process goes on."""
    reader, writer = os.pipe()
    os.close(reader)
    assert_lines_are_dropped(writer)


@pytest.mark.parametrize("blocking", [False, True])
def test_lines_for_a_full_pipe_are_dropped(blocking):
    """No thread waits for its reader. Whole lines are written, and when it is read again, the next ones are."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as log:
        os.set_blocking(writer, blocking)
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 8192)
        with writing(writer) as process:
            dropped = int(process.stdout.readline())
            assert 30 < dropped < 101
            os.set_blocking(reader, False)
            first, torn = lines_of(log.read())
            assert (len(first), torn) == (102 - dropped, 0)  # with the warning that lines were dropped
            fcntl.fcntl(log.fileno(), fcntl.F_SETPIPE_SZ, 2**20)
            print(file=process.stdin, flush=True)
            assert int(process.stdout.readline()) == dropped
            assert process.wait(60) == 0
            second, torn = lines_of(log.read())
    assert [each["number"] for each in second if each["event"] == "call"] == list(range(100))
    assert torn == 0


def test_a_torn_line_does_not_reach_into_the_next(tmp_path):
    """If only a part of a line is written, the next line begins on its own line."""
    program = """
import resource, signal
from poolrpc_server.telemetry import logs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
logs.configure("json", "info")
resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
logs.log.info("torn")
logs.log.info("lost")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
logs.log.info("whole")
print(logs.dropped_lines())
"""
    with (tmp_path / "log").open("w") as file:
        done = subprocess.run(  # noqa: S603 - ours
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=file, text=True, check=True
        )
    assert done.stdout == "2\n"
    (whole,), torn = lines_of((tmp_path / "log").read_text())
    assert (whole["event"], torn) == ("whole", 1)


def test_a_process_without_stderr_logs_nothing():
    """A closed stderr is no error, and no other file of its number gets the lines."""
    program = WRITING.replace("again or input()", "")
    done = subprocess.run(  # noqa: S603 - ours
        ["/bin/sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0\n0\n"


def test_a_handler_that_fails_does_not_end_the_thread(records, monkeypatch):
    """The log of another program may raise: the batch is counted as dropped, and later lines are written."""
    monkeypatch.setattr(logs, "LINE_DELAY_SECONDS", 0)
    before, failed, written = logs.dropped_lines(), Event(), Event()

    def filtered(record):
        if getattr(record, "number", 0) == 1:
            failed.set()
            raise KeyError
        written.set()
        return True

    LOGGER.handlers[0].addFilter(filtered)
    with closing(CallLog()) as calls:
        calls.add(logging.INFO, {"number": 1})
        assert failed.wait(MINUTE)
        calls.add(logging.INFO, {"number": 2})
        assert written.wait(MINUTE)
    assert logs.dropped_lines() - before == 1
    assert 2 in [getattr(each, "number", 0) for each in records]
