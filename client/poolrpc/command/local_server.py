"""A poolrpc-server process on this machine, which `poolrpc tune` measures."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

from poolrpc.errors import PoolError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VARIABLES = "POOLRPC_"
"""What the names of environment variables of the server and the client start with."""

STOPPING = ("--drain-seconds", "0", "--shutdown-grace", "0")
"""Flags with which a server ends at once when it is stopped."""

STOP_SECONDS = 20.0


@contextmanager
def without_settings() -> Iterator[None]:
    """Remove the settings of server and client from the environment in the block: they may be for another address."""
    removed = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith(VARIABLES)}
    try:
        yield
    finally:
        os.environ.update(removed)


@contextmanager
def local_server(flags: Sequence[str], *, unix: bool) -> Iterator[str]:
    """Start a server, yield its address when it serves, and stop it at the end of the block.

    Args:
        flags: The flags, except its address.
        unix: Whether it listens on a unix socket in a temporary folder, and not on 127.0.0.1.

    Raises:
        PoolError: There is no server on this machine, or it ended before it served; the message has its last words.

    """
    if importlib.util.find_spec("poolrpc_server") is None:
        msg = "expected the server on this machine, got the client only; pip install 'poolrpc[server]'"
        raise PoolError(msg, reason="SERVER")
    with tempfile.TemporaryDirectory(prefix="poolrpc-") as folder:
        listen = f"unix:{folder}/pool.sock" if unix else "127.0.0.1:0"
        process = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "poolrpc_server", "--listen", listen, "--log-format", "json", *STOPPING, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,  # Ctrl-C ends it when this process has ended the load
        )
        reading: threading.Thread | None = None
        try:
            address = _address(process, flags)
            # A log that nothing reads would stop the server.
            reading = threading.Thread(target=_read_on, args=(process,), daemon=True)
            reading.start()
            yield address
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if reading:
                reading.join()
            if process.stderr:
                process.stderr.close()


def _address(process: subprocess.Popen[str], flags: Sequence[str]) -> str:
    """Return the address of a server that starts, from its log."""
    last: deque[str] = deque(maxlen=1)
    for line in process.stderr or ():
        last.append(line.strip())
        if line.startswith("{") and (entry := json.loads(line))["event"] == "serving":
            return str(entry["addresses"][0])
    status = process.wait()
    words = "".join(last).removeprefix("poolrpc-server: ")
    msg = f"expected a server that starts with {' '.join(flags) or 'its defaults'}, got status {status}: {words}"
    raise PoolError(msg, reason="SERVER")


def _read_on(process: subprocess.Popen[str]) -> None:
    for _ in process.stderr or ():
        pass
