"""One worker process: `python -m poolrpc_server.workers.worker DESCRIPTOR`, started by the supervisor.

DESCRIPTOR is the number of a socket that the worker inherits. The supervisor sends the worker's number and its Config
through it, and the worker sends one line of JSON back: that it serves, or which setting is wrong.
"""

from __future__ import annotations

import json
import pickle
import socket
import sys
import threading
from contextlib import suppress

from poolrpc_server.config import ConfigError
from poolrpc_server.signals import SignalEvent
from poolrpc_server.telemetry import logs
from poolrpc_server.telemetry.logs import log


def run(descriptor: int) -> int:
    """Serve as the supervisor says until it closes its end of the socket, and return the exit status."""
    control = socket.socket(fileno=descriptor)
    control.set_inheritable(False)
    with control.makefile("rb") as received:
        index, config = pickle.load(received)  # noqa: S301 - sent by the supervisor, whose process made the socket
    logs.configure(config.log_format, config.log_level, worker=index)
    stopping = SignalEvent()

    def wait_for_close() -> None:
        with suppress(OSError):
            control.recv(1)
        log.info("stopping", reason="supervisor closed the control socket")
        stopping.set()

    def report(**message: object) -> None:
        with suppress(OSError):  # the supervisor has ended
            control.sendall(json.dumps(message).encode() + b"\n")

    threading.Thread(target=wait_for_close, name="poolrpc-control", daemon=True).start()
    from poolrpc_server.app import serve  # noqa: PLC0415 - imports torch, while the thread above already listens

    try:
        return serve(config, stopping=stopping, started=lambda facts: report(serving=facts))
    except ConfigError as error:
        report(rejected=str(error))
        return 2


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1])))
