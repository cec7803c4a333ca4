"""The server's log: key-value events as text or JSON, with one line for each call and never a tensor's contents."""

from __future__ import annotations

import logging
import os
import re
import select
import sys
import threading
import time
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from io import UnsupportedOperation
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

import structlog

from poolrpc_server.standard_streams import open_standard_streams

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import TracebackType

_LOGGER = logging.getLogger("poolrpc_server")

# Through the standard library, so that a server embedded in another program logs as that program does.
log: structlog.stdlib.BoundLogger = structlog.wrap_logger(
    _LOGGER,
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.render_to_log_kwargs,
    ],
    wrapper_class=structlog.stdlib.BoundLogger,
)


START_FACTS = ("addresses", "metrics", "probes", "device", "threads", "workers", "tls", "tokens", "version", "torch")
"""Facts of the start line that are shown as text: what an operator looks for first."""

Line = tuple[int, float, dict[str, object]]
"""The line of a call: the log level, when it ended in seconds since 1970, and its facts."""

BATCH = 32
"""Maximum number of lines that are written together; calls wait for the interpreter meanwhile."""

WRITE_MS = 1000
"""Milliseconds that a write waits until the reader of a pipe has made room. After one in vain, further ones do not wait
until one succeeds."""

LINE_DELAY_SECONDS = 0.05
"""Seconds that a line waits for others, so that the writing thread wakes once for many calls."""


class _Dropped:
    """The number of lines that were dropped, for any thread."""

    def __init__(self) -> None:
        self.lines = 0
        self._lock = Lock()

    def add(self, lines: int) -> None:
        with self._lock:
            self.lines += lines


_DROPPED = _Dropped()


def dropped_lines() -> int:
    """Return how many lines of this process's log were dropped so far."""
    return _DROPPED.lines


class CallLog:
    """The log lines of calls, written by a separate thread: rendering one takes as long as pooling a small tensor.

    This is what logging's QueueHandler and QueueListener do, at a fifth of the cost: they make a record in the call's
    thread and wake the listener for each line, which was measured at 60 to 70 microseconds of CPU time a call, 20 to 40
    of them in the call's own thread. This takes 13, of which 2 are the call's.
    """

    def __init__(self, max_lines: int = 10_000) -> None:
        """Start the thread; `close` ends it.

        Args:
            max_lines: Lines that may wait to be written; further ones are dropped, with a warning.

        """
        self._max_lines = max_lines
        self._lines: SimpleQueue[Line | None] = SimpleQueue()
        self._closing = Event()
        self._reported = dropped_lines()
        self._writer = Thread(target=self._write, name="poolrpc-log", daemon=True)
        self._writer.start()

    def add(self, level: int, facts: dict[str, object]) -> None:
        """Add the line of a call that ends now; for any thread."""
        if not _LOGGER.isEnabledFor(level):
            return
        if self._lines.qsize() < self._max_lines:
            self._lines.put((level, time.time(), facts))
        else:
            _DROPPED.add(1)

    def close(self) -> None:
        """Write the lines that wait, and end the thread."""
        self._closing.set()
        self._lines.put(None)
        self._writer.join()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            # Each wake-up takes the interpreter from a call.
            self._closing.wait(LINE_DELAY_SECONDS)
            while line is not None:
                batch = [line]
                while not self._lines.empty() and len(batch) < BATCH and (line := self._lines.get()) is not None:
                    batch.append(line)
                self._emit_guarded(batch)
                time.sleep(0)  # lets threads that answer calls go first
                if line is None or self._lines.empty():
                    break
                line = self._lines.get()
            if (dropped := dropped_lines()) != self._reported:
                # If this line fails too, it is counted, and the next batch has another one.
                log.warning("log lines dropped", lines=dropped - self._reported)
                self._reported = dropped
            if line is None:
                return

    def _emit_guarded(self, batch: list[Line]) -> None:
        try:
            self._emit(batch)
        except Exception:  # noqa: BLE001 - whatever the log of another program raises, later lines must be written
            _DROPPED.add(len(batch))

    @staticmethod
    def _emit(batch: list[Line]) -> None:
        if len(_LOGGER.handlers) == 1 and isinstance(_LOGGER.handlers[0], _Stderr) and not _LOGGER.propagate:
            _LOGGER.handlers[0].write_calls(batch)
            return
        # The log of another program, which has to get a record of each line.
        for level, ended, facts in batch:
            record = _LOGGER.makeRecord(_LOGGER.name, level, __file__, 0, "call", (), None, extra=facts)
            record.created, record.msecs = ended, int(ended % 1 * 1000)
            _LOGGER.handle(record)


class _Stderr(logging.Handler):
    """The handler of the server's own log, which writes call lines without making records of them.

    What cannot be written is dropped and counted: the disk is full, the reader of the pipe has ended or is slow.
    """

    def __init__(self, final: structlog.typing.Processor, *, text: bool) -> None:
        super().__init__()
        self.text = text
        self._stream = sys.stderr
        self._final = final
        self._torn = self._unread = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line of an event."""
        try:
            self._write(self.format(record) + "\n", 1)
        except Exception:  # noqa: BLE001 - logging's own way with a record that cannot be formatted
            self.handleError(record)

    def write_calls(self, batch: list[Line]) -> None:
        """Write lines in pieces that a pipe takes as a whole: several processes may write to the same one."""
        texts = []
        for level, ended, facts in batch:
            event = {
                "event": "call",
                **facts,
                "level": logging.getLevelName(level).lower(),
                "timestamp": datetime.fromtimestamp(ended, tz=UTC).isoformat(),
            }
            texts.append(str(self._final(None, "", event)) + "\n")
        with self.lock or nullcontext():
            for piece in pieces(texts, select.PIPE_BUF):
                self._write(piece, piece.count("\n"))

    def _write(self, text: str, lines: int) -> None:
        try:
            self._write_all(text)
        except OSError:
            _DROPPED.add(lines)

    def _write_all(self, text: str) -> None:
        try:
            descriptor = self._stream.fileno()
        except UnsupportedOperation:  # a stream in memory
            self._stream.write(text)
            return
        # Not through the stream: its buffer would keep a line that failed, and fail again.
        data = text.encode(errors="backslashreplace")
        if self._torn:
            data = b"\n" + data
        left = data
        room = select.poll()
        room.register(descriptor, select.POLLOUT)
        try:
            while left:
                # A write of more than a pipe has room for would wait for as long as no one reads it.
                if not room.poll(0 if self._unread else WRITE_MS):
                    raise TimeoutError("expected the log to be read")
                left = left[os.write(descriptor, left[: select.PIPE_BUF]) :]
        finally:
            self._torn = 0 < len(left) < len(data) or (self._torn and bool(left))
            self._unread = bool(left)


def pieces(lines: Iterable[str], limit: int) -> Iterator[str]:
    """Join lines, in order, into pieces of at most `limit` bytes; a longer line is a piece of its own."""
    piece: list[str] = []
    size = 0
    for line in lines:
        nbytes = len(line.encode(errors="replace"))
        if piece and size + nbytes > limit:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += nbytes
    if piece:
        yield "".join(piece)


def _is_text() -> bool:
    return any(isinstance(handler, _Stderr) and handler.text for handler in _LOGGER.handlers)


def log_stacks(stacks: str) -> None:
    """Write the stacks of the process's threads: as they are, or as a line of JSON."""
    if not _is_text():
        log.critical("stacks", stacks=stacks)
        return
    with suppress(OSError):
        sys.stderr.write(stacks)
        sys.stderr.flush()


def log_serving(facts: Mapping[str, Any]) -> None:
    """Log the start line: as text, the facts that a person needs, and all of them in a second line at level debug."""
    if _is_text():
        log.info("serving", **{name: facts[name] for name in START_FACTS if facts.get(name)})
        log.debug("settings", **facts)
    else:
        log.info("serving", **facts)


def adopt(name: str) -> None:
    """Send another package's log to where this log goes."""
    other = logging.getLogger(name)
    other.handlers[:], other.propagate = _LOGGER.handlers, _LOGGER.propagate


def _add_timestamp(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    # When the event happened, which for a call is before its line is written.
    event["timestamp"] = datetime.fromtimestamp(event["_record"].created, tz=UTC).isoformat()
    return event


def text_renderer(*, colors: bool) -> structlog.dev.ConsoleRenderer:
    """Return what renders an event as a line of text, with colours or without."""
    if colors:
        return structlog.dev.ConsoleRenderer(pad_event_to=0, sort_keys=False)
    # The same line without colours. structlog's own columns take three times as long, and calls wait meanwhile.
    columns = {
        "": lambda key, value: f"{key}={_quoted(value)}",
        "timestamp": lambda _, value: value,
        "level": lambda _, value: f"[{value:<9}]",
        "event": lambda _, value: value,
    }
    return structlog.dev.ConsoleRenderer(
        columns=[structlog.dev.Column(*each) for each in columns.items()],
        sort_keys=False,
        exception_formatter=structlog.dev.plain_traceback,
    )


_NEEDS_QUOTES = re.compile(r"""[ \t\r\n="']""").search


def _quoted(value: object) -> str:
    """Return a value as it is shown in a line of text: a string in quotes only if it could be misread without."""
    return value if isinstance(value, str) and not _NEEDS_QUOTES(value) else repr(value)


def _as_text(value: object) -> object:
    """Return a list of names as one text, and anything else as it is."""
    names = isinstance(value, list | tuple) and value and all(isinstance(each, str) for each in value)
    return ", ".join(value) if names else value  # type: ignore[arg-type]  # they are text


def configure(log_format: str, level: str, *, worker: int | None = None) -> None:
    """Send the log to stderr.

    Args:
        log_format: "text" or "json".
        level: The lowest level that is logged: "debug", "info", "warning" or "error".
        worker: Number of this process among several, added to every line. None: there is only one.

    """
    open_standard_streams()
    text = log_format == "text"
    render: structlog.typing.Processor = (
        text_renderer(colors=sys.stderr.isatty()) if text else structlog.processors.JSONRenderer()
    )

    def final(logger: object, name: str, event: structlog.typing.EventDict) -> Any:  # noqa: ANN401 - text in either format
        # Every line passes here, those of calls included.
        if text:
            event = {key: _as_text(value) for key, value in event.items()}
        return render(logger, name, event if worker is None else {**event, "worker": worker})

    tail: list[structlog.typing.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if not text:
        tail.append(structlog.processors.format_exc_info)
    handler = _Stderr(final, text=text)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.ExtraAdder(),
                structlog.stdlib.add_log_level,
                _add_timestamp,
            ],
            processors=[*tail, final],
        )
    )
    _LOGGER.handlers[:] = [handler]
    _LOGGER.setLevel(level.upper())
    _LOGGER.propagate = False


def adopt_process() -> None:
    """Send what else this process writes to where this log goes: for a process that has nothing but a server.

    These are the warnings of other packages and, in JSON, exceptions that no one catches.
    """
    adopt("")
    logging.captureWarnings(capture=True)
    if not _is_text():
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_uncaught_in_thread


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    log.critical("unexpected error", exc_info=(kind, error, traceback))


def _log_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None:
        found = (arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
        log.error("unexpected error", thread_name=arguments.thread and arguments.thread.name, exc_info=found)
