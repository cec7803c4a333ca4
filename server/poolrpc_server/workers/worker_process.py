"""A worker process, as the supervisor sees it."""

from __future__ import annotations

import asyncio
import json
import pickle
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from poolrpc_server.config import Config

MAX_MESSAGE_BYTES = 2**24
"""Maximum size of a worker's message; its metrics have about 30 KiB."""


def describe_status(status: int) -> dict[str, str | int]:
    """Return an exit status as fields of a log line: the signal that ended the process, or its exit code."""
    if status >= 0:
        return {"code": status}
    name = str(-status)
    with suppress(ValueError):  # a real-time signal, which has no name
        name = signal.Signals(-status).name
    return {"signal": name}


@dataclass(eq=False)
class WorkerProcess:
    """A worker process, and the socket that connects it to the supervisor.

    Attributes:
        serving: Whether it has begun to serve.
        watched: Whether it says when it answers its watchdog: it has none if there was no place for the socket.
        draining: Whether it takes no new connections.
        silent_seconds: Seconds since it last answered, of those in which the supervisor itself ran.
        metrics_received: Set when it has sent its metrics since they were last asked for.

    """

    index: int
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    serving: bool = False
    watched: bool = False
    draining: bool = False
    silent_seconds: float = 0.0
    metrics_received: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    async def start(cls, index: int, config: Config) -> WorkerProcess:
        """Start worker `index`."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "poolrpc_server.workers.worker", str(theirs.fileno())),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    process_group=0,  # so that Ctrl-C in a terminal reaches the supervisor alone
                )
        except BaseException:
            ours.close()
            raise
        reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_MESSAGE_BYTES)
        writer.write(pickle.dumps((index, config)))
        return cls(index, process, reader, writer)

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the worker's messages until it ends; an empty one says that it answers."""
        with suppress(ConnectionError):
            async for line in self.reader:
                if line.endswith(b"\n"):  # not the rest of a message, whose worker was killed
                    yield json.loads(line.strip() or b"{}")

    def ask_metrics(self) -> None:
        """Ask the worker for its metrics."""
        self.metrics_received.clear()
        self.writer.write(b"metrics\n")

    def stop(self) -> None:
        """Let the worker drain and end."""
        self.writer.write(b"stop\n")
        if not self.serving:  # there are no calls to finish
            with suppress(ProcessLookupError):
                self.process.terminate()

    def kill(self) -> None:
        """End the worker at once."""
        with suppress(ProcessLookupError):
            self.process.kill()
