"""A poolrpc-server process on a free port, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


class Serving:
    """A server process.

    Attributes:
        process: The process.
        start: Its start line, as the log has it; empty until it serves.
        started: Set when it serves, or has ended.
        reader: The thread that reads the log, to the process's end.

    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.start: dict[str, Any] = {}
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self.started = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)

    @property
    def address(self) -> str:
        """Where it listens."""
        return str(self.start["addresses"].split()[0])

    @property
    def log(self) -> list[dict[str, Any]]:
        """Its log lines so far; text that is no JSON is the event "text"."""
        return [
            json.loads(each) if each.startswith("{") else {"event": "text", "text": each} for each in [*self._lines]
        ]

    def of(self, event: str) -> list[dict[str, Any]]:
        """Its log lines of one event so far."""
        return [each for each in self.log if each["event"] == event]

    def wait_for(self, event: str, count: int = 1, timeout: float = 60) -> list[dict[str, Any]]:
        """Wait for that many log lines of one event, and give them: fewer after `timeout` seconds, or at the end."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.of(event)) >= count or not self.reader.is_alive(), timeout)
        return self.of(event)

    def wait(self, timeout: float = 60) -> int:
        """Wait for the process and the last line of its log; give the exit status."""
        status = self.process.wait(timeout)
        self.reader.join(timeout)
        return status

    def _read(self) -> None:
        with self.process.stderr or nullcontext(()) as lines:
            for line in lines:
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
                if not self.start and self.log[-1]["event"] == "serving":
                    self.start = self.log[-1]
                    self.started.set()
        self.started.set()


@contextmanager
def serving(*flags: str, listen: str = "127.0.0.1:0", env: dict[str, str] | None = None) -> Iterator[Serving]:
    """Start a server, wait until it serves, and end it.

    Args:
        flags: Of poolrpc-server.
        listen: The address.
        env: Environment variables beside those of this process.

    Raises:
        RuntimeError: The server ended before it served; says its last words.

    """
    command = [sys.executable, "-m", "poolrpc_server"]
    process = subprocess.Popen(  # noqa: S603 - our own command
        [*command, "--listen", listen, "--log-format", "json", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    made = Serving(process)
    made.reader.start()
    try:
        made.started.wait(120)
        if not made.start:
            raise RuntimeError(f"the server ended with {process.wait()}: {made.log}")
        yield made
    finally:
        if process.poll() is None:
            process.kill()
        made.wait()
