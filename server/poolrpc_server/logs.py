"""The server's log: key-value events, as text or JSON; one line a call, never a tensor's contents."""

from __future__ import annotations

import logging
import sys
import time
from datetime import UTC, datetime
from queue import SimpleQueue
from threading import Event, Thread

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


FLUSH_SECONDS = 0.05
"""How long a call's line may wait for others: one thread then writes them, while no call waits for it."""

MOST_LINES = 10_000
"""Lines that may wait; more are dropped, with a warning."""


class CallLog:
    """The lines of calls, written behind their backs: rendering one takes as long as pooling a small tensor."""

    def __init__(self) -> None:
        """Begin; close it when no more calls come."""
        self._lines: SimpleQueue[tuple[int, float, dict[str, object]] | None] = SimpleQueue()
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
                self._emit(*line)
                time.sleep(0)  # Whoever answers a call goes first.
                if self._lines.empty():
                    break
                line = self._lines.get()
            if self._dropped:
                log.warning("lines of calls were dropped", lines=self._dropped)
                self._dropped = 0
            if line is None:
                return

    @staticmethod
    def _emit(level: int, ended: float, facts: dict[str, object]) -> None:
        record = _LOGGER.makeRecord(_LOGGER.name, level, __file__, 0, "call", (), None, extra=facts)
        record.created, record.msecs = ended, int(ended % 1 * 1000)
        _LOGGER.handle(record)


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
    handler = logging.StreamHandler(sys.stderr)
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
