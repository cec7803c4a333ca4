"""The log: call lines, written by their own thread, in order, with the time at which each call ended."""

import io
import json
import logging
import sys
import time
from contextlib import closing
from datetime import datetime
from threading import Event, Thread

import pytest

from poolrpc_server.telemetry import logs
from poolrpc_server.telemetry.logs import CallLog, configure, log, pieces

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
    assert (warning.levelno, warning.getMessage()) == (logging.WARNING, "call lines dropped")
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
