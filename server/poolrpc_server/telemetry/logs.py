"""The server's log: key-value events, as text or JSON; one line a call, never a tensor's contents."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from queue import SimpleQueue
from select import PIPE_BUF
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TextIO

import structlog

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LOGGER = logging.getLogger("poolrpc_server")

# By way of the standard library, so that a server embedded in another program logs as that program does.
log: structlog.stdlib.BoundLogger = structlog.wrap_logger(
    _LOGGER,
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.render_to_log_kwargs,
    ],
    wrapper_class=structlog.stdlib.BoundLogger,
)


Line = tuple[int, float, dict[str, object]]
"""A call's: its level, when it ended, and what is to be said of it."""

BATCH = 32
"""Lines that are written at a time: meanwhile calls wait for the interpreter."""

FLUSH_SECONDS = 0.05
"""How long a call's line may wait for others: one thread then writes them, while no call waits for it."""

MOST_LINES = 10_000
"""Lines that may wait; more are dropped, with a warning."""


class CallLog:
    """The lines of calls, written behind their backs: rendering one takes as long as pooling a small tensor."""

    def __init__(self) -> None:
        """Begin; close it when no more calls come."""
        self._lines: SimpleQueue[Line | None] = SimpleQueue()
        self._closing = Event()
        self._dropped = 0
        self._writer = Thread(target=self._write, name="poolrpc-log", daemon=True)
        self._writer.start()

    def add(self, level: int, facts: dict[str, object]) -> None:
        """Add the line of a call that ends now."""
        if not _LOGGER.isEnabledFor(level):
            return
        if self._lines.qsize() < MOST_LINES:
            self._lines.put((level, time.time(), facts))
        else:
            self._dropped += 1

    def close(self) -> None:
        """Write what waits, and end."""
        self._closing.set()
        self._lines.put(None)
        self._writer.join()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            # Each wake-up takes the interpreter from a call: once for many lines, not once for each.
            self._closing.wait(FLUSH_SECONDS)
            while line is not None:
                batch = [line]
                while not self._lines.empty() and len(batch) < BATCH and (line := self._lines.get()) is not None:
                    batch.append(line)
                self._emit(batch)
                time.sleep(0)  # Whoever answers a call goes first.
                if line is None or self._lines.empty():
                    break
                line = self._lines.get()
            if self._dropped:
                log.warning("lines of calls were dropped", lines=self._dropped)
                self._dropped = 0
            if line is None:
                return

    @staticmethod
    def _emit(batch: list[Line]) -> None:
        if len(_LOGGER.handlers) == 1 and isinstance(_LOGGER.handlers[0], _Stderr) and not _LOGGER.propagate:
            _LOGGER.handlers[0].calls(batch)
            return
        # Another program's log, which is to have a record of each.
        for level, ended, facts in batch:
            record = _LOGGER.makeRecord(_LOGGER.name, level, __file__, 0, "call", (), None, extra=facts)
            record.created, record.msecs = ended, int(ended % 1 * 1000)
            _LOGGER.handle(record)


class _Stderr(logging.StreamHandler[TextIO]):
    """Our own log, which writes the lines of calls without the records that they would else be."""

    def __init__(self, final: structlog.typing.Processor) -> None:
        super().__init__(sys.stderr)
        self._final = final

    def calls(self, batch: list[Line]) -> None:
        """Write them by steps that a pipe takes whole: several processes may write to the same one."""
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
            for piece in pieces(texts, PIPE_BUF):
                self.stream.write(piece)
                self.flush()


def pieces(lines: Iterable[str], most: int) -> Iterator[str]:
    """Put lines together, in order, into pieces of at most `most` bytes; a longer line is a piece of its own."""
    piece: list[str] = []
    size = 0
    for line in lines:
        nbytes = len(line.encode(errors="replace"))
        if piece and size + nbytes > most:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += nbytes
    if piece:
        yield "".join(piece)


def adopt(name: str) -> None:
    """Send what another package logs where this log goes."""
    other = logging.getLogger(name)
    other.handlers[:], other.propagate = _LOGGER.handlers, _LOGGER.propagate


def _ended(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    # When it happened, which for a call is before it is written.
    event["timestamp"] = datetime.fromtimestamp(event["_record"].created, tz=UTC).isoformat()
    return event


def configure(log_format: str, level: str, *, worker: int | None = None) -> None:
    """Send the log to stderr.

    Args:
        log_format: "text" or "json".
        level: The least level: "debug", "info", "warning" or "error".
        worker: The number of this process among several, which every line then says.

    """
    render: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0, sort_keys=False)
    )

    def final(logger: object, name: str, event: structlog.typing.EventDict) -> Any:  # noqa: ANN401 - text, of either kind
        # Here pass the lines of all threads, those of calls too.
        return render(logger, name, event if worker is None else {**event, "worker": worker})

    tail: list[structlog.typing.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if log_format == "json":
        tail.append(structlog.processors.format_exc_info)
    handler = _Stderr(final)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.ExtraAdder(),
                structlog.stdlib.add_log_level,
                _ended,
            ],
            processors=[*tail, final],
        )
    )
    _LOGGER.handlers[:] = [handler]
    _LOGGER.setLevel(level.upper())
    _LOGGER.propagate = False
