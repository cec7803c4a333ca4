"""The server's log: key-value events, as text or JSON; one line a call, never a tensor's contents."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from queue import SimpleQueue
from threading import Event, Thread
from typing import TextIO

import structlog

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
            self.stream.write("".join(texts))
            self.flush()


def _ended(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    # When it happened, which for a call is before it is written.
    event["timestamp"] = datetime.fromtimestamp(event["_record"].created, tz=UTC).isoformat()
    return event


def configure(log_format: str, level: str) -> None:
    """Send the log to stderr.

    Args:
        log_format: "text" or "json".
        level: The least level: "debug", "info", "warning" or "error".

    """
    final: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0, sort_keys=False)
    )
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
