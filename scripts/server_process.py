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


class ServerProcess:
    """A server process whose log is read.

    Attributes:
        process: The process.
        start_line: The fields of the log line that says that it serves; empty until then.
        started: An event that is set when the server serves, or has ended.
        reader: The thread that reads the log until the process ends.

    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.start_line: dict[str, Any] = {}
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self.started = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)

    @property
    def address(self) -> str:
        """The first address on which it listens."""
        return str(self.start_line["addresses"][0])

    @property
    def log(self) -> list[dict[str, Any]]:
        """The log lines so far; a line that is not JSON has the event "text"."""
        return [
            json.loads(line) if line.startswith("{") else {"event": "text", "text": line} for line in [*self._lines]
        ]

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Return the log lines of one event so far."""
        return [line for line in self.log if line["event"] == event]

    def wait_for(self, event: str, count: int = 1, timeout: float = 60) -> list[dict[str, Any]]:
        """Wait for `count` log lines of one event, and return them.

        There are fewer if `timeout` seconds have passed or the process has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self.lines(event)) >= count or not self.reader.is_alive(), timeout)
        return self.lines(event)

    def wait(self, timeout: float = 60) -> int:
        """Wait for the end of the process and of its log, and return the exit status."""
        status = self.process.wait(timeout)
        self.reader.join(timeout)
        return status

    def _read(self) -> None:
        with self.process.stderr or nullcontext(()) as lines:
            for line in lines:
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
                if not self.start_line and self.log[-1]["event"] == "serving":
                    self.start_line = self.log[-1]
                    self.started.set()
        self.started.set()


@contextmanager
def serving(*flags: str, listen: str = "127.0.0.1:0", env: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """Start a server, wait until it serves, and kill it at the end of the block.

    Args:
        flags: The flags of poolrpc-server.
        listen: The address.
        env: Environment variables in addition to those of this process.

    Raises:
        RuntimeError: The server ended before it served; the message contains its log.

    """
    process = subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", "poolrpc_server", "--listen", listen, "--log-format", "json", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    server = ServerProcess(process)
    server.reader.start()
    try:
        server.started.wait(120)
        if not server.start_line:
            raise RuntimeError(f"the server ended with {process.wait()}: {server.log}")
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        server.wait()
