"""One worker process: `python -m poolrpc_server.workers.worker DESCRIPTOR`, started by the supervisor.

DESCRIPTOR is the number of a socket that the worker inherits. The supervisor sends the worker's number and its Config
through it, and then lines: "metrics" asks for the worker's metrics, "stop" lets it drain and end. The worker sends
lines of JSON: that it serves, or which setting is wrong, its metrics, and that it drains; an empty line says that it
has answered its watchdog. If the supervisor ends, the socket closes: the worker leaves its addresses at once.
"""

from __future__ import annotations

import json
import pickle
import socket
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO

from poolrpc_server.config import ConfigError
from poolrpc_server.process import ProcessControl
from poolrpc_server.telemetry import logs
from poolrpc_server.telemetry.logs import log
from poolrpc_server.telemetry.summed_metrics import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry


class WorkerControl(ProcessControl):
    """The worker's end of the control socket.

    Args:
        control: The socket.
        lines: Its reader, from which the Config has been read.

    """

    def __init__(self, control: socket.socket, lines: BinaryIO) -> None:
        super().__init__()
        self._control = control
        self._lines = lines
        self._sending = threading.Lock()
        self._collect: Callable[[], CollectorRegistry] | None = None
        threading.Thread(target=self._receive, name="poolrpc-control", daemon=True).start()

    def serving(self, facts: dict[str, Any], collect: Callable[[], CollectorRegistry]) -> None:
        """Report to the supervisor that this worker serves."""
        self._collect = collect
        self.report(serving=facts)

    def answered(self) -> None:
        """Report to the supervisor that the server answers, unless the supervisor does not read: this must not wait."""
        if self._sending.acquire(blocking=False):
            try:
                self._control.send(b"\n", socket.MSG_DONTWAIT)
            except OSError:
                pass  # the buffer is full, or the supervisor has ended
            finally:
                self._sending.release()

    def draining(self) -> None:
        """Report to the supervisor that this worker takes no new connections."""
        self.report(draining=True)

    def report(self, **message: object) -> None:
        """Send the supervisor a message."""
        with self._sending, suppress(OSError):  # the supervisor has ended
            self._control.sendall(json.dumps(message).encode() + b"\n")

    def report_metrics(self) -> None:
        """Send the supervisor the present metrics, once the worker serves."""
        if self._collect is not None:
            self.report(metrics=snapshot(self._collect().collect()))

    def _receive(self) -> None:
        with suppress(OSError):
            for line in self._lines:
                if line == b"metrics\n":
                    self.report_metrics()
                else:
                    log.info("stopping", reason="the supervisor stops")
                    self.stopping.set()
        log.warning("stopping at once", reason="the supervisor has ended")
        self.abandoned.set()
        self.stopping.set()


def run(descriptor: int) -> int:
    """Serve until the supervisor stops this worker or ends, and return the exit status."""
    control = socket.socket(fileno=descriptor)
    control.set_inheritable(False)
    lines = control.makefile("rb")
    index, config = pickle.load(lines)  # noqa: S301 - sent by the supervisor, whose process made the socket
    logs.configure(config.log_format, config.log_level, worker=index)
    logs.adopt_process()
    worker = WorkerControl(control, lines)
    from poolrpc_server.app import serve  # noqa: PLC0415 - imports torch, while the thread above already listens

    try:
        status = serve(config, control=worker)
    except ConfigError as error:
        worker.report(rejected=str(error))
        return 2
    worker.report_metrics()  # the last calls'
    return status


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1])))
