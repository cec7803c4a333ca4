"""The supervisor: starts the worker processes, restarts those that end, and stops them.

A worker is an interpreter of its own (worker.py), connected to the supervisor by a socket. The supervisor stops a
worker by closing that socket. So workers also end if the supervisor is killed, and a worker that a service manager has
stopped with a signal is not stopped a second time, which would end it without draining.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import socket
import sys
import tempfile
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from poolrpc_server.config import Config, ConfigError
from poolrpc_server.signals import STOP_SIGNALS, preserved_handlers
from poolrpc_server.telemetry.logs import log
from poolrpc_server.workers.addresses import reserve

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from poolrpc_server.workers.addresses import SharedAddress

WORKERS_FAILED = 1
"""The exit status if the workers do not start, or if one had to be killed at the end."""


class WorkersError(RuntimeError):
    """The workers do not start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """The rule for when a worker that has ended is started again.

    Attributes:
        first_delay: Seconds before the second restart in a row; the first restart is immediate.
        max_delay: The limit of the delay, which doubles from one failure to the next, in seconds.
        steady_seconds: If a worker served for this long, its next failure counts as the first in a row.
        max_attempts: Failed starts of a worker in a row after which the supervisor gives up, if no worker serves.

    """

    first_delay: float = 0.25
    max_delay: float = 10.0
    steady_seconds: float = 10.0
    max_attempts: int = 5

    def delay(self, failures: int) -> float:
        """Return the seconds to wait before a worker is started again after `failures` failures in a row."""
        return 0.0 if failures <= 1 else float(min(self.first_delay * 2 ** (failures - 2), self.max_delay))


def describe_status(status: int) -> dict[str, str | int]:
    """Return an exit status as fields of a log line: the signal that ended the process, or its exit code."""
    if status >= 0:
        return {"code": status}
    name = str(-status)
    with suppress(ValueError):  # a real-time signal, which has no name
        name = signal.Signals(-status).name
    return {"signal": name}


def worker_config(config: Config, index: int, addresses: Iterable[SharedAddress]) -> Config:
    """Return the Config of worker `index`: its own addresses, and its share of the limits that apply to all workers."""
    return replace(
        config,
        listen=tuple(address.worker_address(index) for address in addresses),
        threads=max(1, config.threads // config.workers),
        max_inflight_bytes=max(1, config.max_inflight_bytes // config.workers),
        max_arena_bytes=config.max_arena_bytes // config.workers,
        max_arenas=max(1, config.max_arenas // config.workers),
    )


@preserved_handlers()
def supervise(config: Config) -> int:
    """Run workers until SIGTERM or SIGINT, then let them drain and stop; a second signal kills them.

    The handlers of both signals are afterwards what they were before.

    Returns:
        The exit status: 0 after a clean stop, else WORKERS_FAILED.

    Raises:
        ConfigError: A setting is wrong.
        WorkersError: The workers do not start.

    """
    with ExitStack() as resources:
        try:
            addresses = [resources.enter_context(closing(reserve(address))) for address in config.listen]
        except ValueError as error:
            raise ConfigError(f"listen: {error}") from None
        supervisor = Supervisor(config, addresses)
        metrics = None
        if config.metrics:
            folder = resources.enter_context(tempfile.TemporaryDirectory(prefix="poolrpc-metrics-"))
            try:
                metrics = _SharedMetrics(folder, config.metrics, supervisor)
            except (OSError, UnicodeError) as error:
                raise ConfigError(f"metrics: expected a free address, got {config.metrics!r}: {error}") from None
            resources.enter_context(closing(metrics))
        status = asyncio.run(supervisor.run(metrics))
    if supervisor.ended_by:
        signal.signal(supervisor.ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), supervisor.ended_by)
    return status


class _SharedMetrics:
    """The metrics of all workers: the folder into which they count, and the address that serves the sums."""

    def __init__(self, folder: str, address: str, supervisor: Supervisor) -> None:
        from poolrpc_server.telemetry import metrics  # noqa: PLC0415 - not needed by a supervisor without metrics

        self.environment = {**os.environ, metrics.FOLDER_VARIABLE: folder}
        self.forget = partial(metrics.forget, folder)
        registry = metrics.summed(folder, lambda: supervisor.restarts)
        self._server = metrics.MetricsServer(address, lambda: registry, supervisor.is_ready)
        self.address, self.close = self._server.address, self._server.close


@dataclass(eq=False)
class _Worker:
    """A worker process, and the socket that connects it to the supervisor."""

    index: int
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    serving: bool = False

    @classmethod
    async def start(cls, index: int, config: Config, environment: Mapping[str, str]) -> _Worker:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "poolrpc_server.workers.worker", str(theirs.fileno())),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    process_group=0,  # so that Ctrl-C in a terminal reaches the supervisor alone
                    env=environment,
                )
        except BaseException:
            ours.close()
            raise
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(pickle.dumps((index, config)))
        return cls(index, process, reader, writer)

    async def report(self) -> dict[str, Any]:
        """Wait for the worker's report and return it; empty if the worker ended without one."""
        with suppress(ConnectionError):
            return dict(json.loads(await self.reader.readline() or b"{}"))
        return {}

    def stop(self) -> None:
        self.writer.close()
        if not self.serving:  # there are no calls to finish
            with suppress(ProcessLookupError):
                self.process.terminate()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()


class Supervisor:
    """The parent of the workers: it starts them, restarts those that end, and stops them.

    Args:
        config: The settings of the whole server.
        addresses: The addresses that the workers share.
        policy: When workers are restarted.
        rotation_seconds: Interval after which the path of a unix socket leads to the next worker.
        kill_seconds: Time that workers may take to end in addition to their drain and grace, before they are killed.

    Attributes:
        restarts: The number of times that a worker was started again.
        ended_by: The signal that killed the workers, which is to end this process too; 0 if there was none.

    """

    def __init__(
        self,
        config: Config,
        addresses: Sequence[SharedAddress],
        policy: RestartPolicy | None = None,
        *,
        rotation_seconds: float = 1.0,
        kill_seconds: float = 10.0,
    ) -> None:
        self.restarts = 0
        self.ended_by = 0
        self._config = config
        self._addresses = addresses
        self._policy = policy or RestartPolicy()
        self._rotation_seconds = rotation_seconds
        self._kill_seconds = kill_seconds
        self._workers: dict[int, _Worker] = {}
        self._directed_to = -1
        self._started = False
        self._stopping = asyncio.Event()
        self._failure: Exception | None = None
        self._metrics: _SharedMetrics | None = None

    async def run(self, metrics: _SharedMetrics | None = None) -> int:
        """Run the workers until they have stopped, and return the exit status."""
        self._metrics = metrics
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        keepers = [asyncio.create_task(self._keep_running(index)) for index in range(self._config.workers)]
        for keeper in keepers:
            keeper.add_done_callback(lambda _: self._stopping.set())  # a keeper that ends early has failed
        rotation = asyncio.create_task(self._rotate_forever())
        await self._stopping.wait()
        rotation.cancel()
        for worker in self._workers.values():
            worker.stop()
        allowed = self._config.drain_seconds + self._config.shutdown_grace + self._kill_seconds
        _, late = await asyncio.wait(keepers, timeout=allowed)
        for worker in self._workers.values():
            log.error("worker killed: it did not end in time", worker=worker.index, seconds=allowed)
            worker.kill()
        await asyncio.gather(*keepers)
        if self._failure is not None:
            raise self._failure
        if not self.ended_by:
            log.info("stopped")
        return WORKERS_FAILED if late else 0

    def is_ready(self) -> bool:
        """Return whether a worker serves and the server is not stopping; safe in any thread."""
        return not self._stopping.is_set() and any(worker.serving for worker in list(self._workers.values()))

    def _on_signal(self, number: int) -> None:
        if not self._stopping.is_set():
            log.info("stopping", signal=signal.Signals(number).name)
            self._stopping.set()
            return
        # The second signal kills the workers. This process only waits until they have ended, so that it can remove
        # their sockets. A third signal ends it by the default action.
        self.ended_by = number
        for each in STOP_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        for worker in self._workers.values():
            worker.kill()

    def _fail(self, failure: Exception) -> None:
        self._failure = self._failure or failure
        self._stopping.set()

    async def _keep_running(self, index: int) -> None:
        failures = failed_starts = 0
        loop = asyncio.get_running_loop()
        config = worker_config(self._config, index, self._addresses)
        while not self._stopping.is_set():
            try:
                worker = await _Worker.start(index, config, self._metrics.environment if self._metrics else os.environ)
            except OSError as error:  # out of memory or processes, which may pass
                served, facts = 0.0, {"error": str(error)}
            else:
                begun = loop.time()
                facts = await self._watch(worker)
                served = loop.time() - begun if worker.serving else 0.0
            if self._stopping.is_set():
                return
            self.restarts += 1
            failures = 1 if served >= self._policy.steady_seconds else failures + 1
            failed_starts = 0 if served else failed_starts + 1
            delay = self._policy.delay(failures)
            log.warning("worker ended", worker=index, **facts, restart_in=delay)
            if failed_starts >= self._policy.max_attempts and not (self._started and self.is_ready()):
                self._fail(WorkersError(f"expected worker {index} to start, got {failed_starts} failed attempts"))
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    async def _watch(self, worker: _Worker) -> dict[str, Any]:
        """Wait until a worker has ended, and return why it did."""
        self._workers[worker.index] = worker
        if self._stopping.is_set():  # the stop came while the worker was being started
            worker.stop()
        report = await worker.report()
        if "serving" in report:
            worker.serving = True
            self._on_serving(worker, report["serving"])
        elif "rejected" in report and not self._started:
            self._fail(ConfigError(report["rejected"]))
        status = await worker.process.wait()
        del self._workers[worker.index]
        worker.writer.close()
        if self._metrics:
            self._metrics.forget(worker.process.pid)
        if self._directed_to == worker.index:
            self._rotate()
        error = {"error": report["rejected"]} if "rejected" in report else {}
        return {"pid": worker.process.pid, **describe_status(status), **error}

    def _on_serving(self, worker: _Worker, facts: dict[str, Any]) -> None:
        log.info("worker serving", worker=worker.index, pid=worker.process.pid)
        serving = sum(each.serving for each in self._workers.values())
        if serving == 1:
            self._rotate()
        if not self._started and serving == self._config.workers:
            self._started = True
            addresses = " ".join(address.address for address in self._addresses)
            metrics = self._metrics.address if self._metrics else ""
            log.info("serving", **facts | {"addresses": addresses, "metrics": metrics, "workers": serving})

    async def _rotate_forever(self) -> None:
        while True:
            await asyncio.sleep(self._rotation_seconds)
            self._rotate()

    def _rotate(self) -> None:
        """Direct new connections through a unix socket's path to the next worker that serves."""
        serving = sorted(worker.index for worker in self._workers.values() if worker.serving)
        following = next((index for index in serving if index > self._directed_to), next(iter(serving), None))
        if following is None or following == self._directed_to:
            return
        self._directed_to = following
        for address in self._addresses:
            try:
                address.direct_to(following)
            except OSError as error:
                log.error("link not updated", address=address.address, worker=following, error=str(error))
