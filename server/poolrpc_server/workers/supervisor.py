"""The supervisor: starts the worker processes, restarts those that end, and stops them.

A worker is an interpreter of its own (worker.py), connected to the supervisor by a socket. The supervisor stops a
worker through that socket, so a worker that a service manager has stopped with a signal is not stopped a second time,
which would end it without draining. Workers also end if the supervisor is killed, which closes the socket. A worker
says through it that it answers calls; one that no longer does is killed and replaced.
"""

from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from poolrpc_server.config import Config, ConfigError
from poolrpc_server.process import log_starting, raise_descriptor_limit
from poolrpc_server.signals import STOP_SIGNALS, preserved_handlers
from poolrpc_server.telemetry.logs import log, log_serving
from poolrpc_server.workers.addresses import reserve
from poolrpc_server.workers.worker_process import WorkerProcess, describe_status

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prometheus_client import CollectorRegistry

    from poolrpc_server.telemetry.summed_metrics import SummedMetrics
    from poolrpc_server.workers.addresses import SharedAddress

WORKERS_FAILED = 1
"""The exit status if the workers do not start, or if one had to be killed at the end."""


SCRAPE_SECONDS = 0.5
"""Seconds in which workers may send their metrics before the latest known ones are shown."""


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


def worker_config(config: Config, index: int, addresses: Iterable[SharedAddress]) -> Config:
    """Return the Config of worker `index`: its own addresses, and its share of the limits that apply to all workers."""
    return replace(
        config,
        listen=tuple(address.worker_address(index) for address in addresses),
        threads=max(1, config.threads // config.workers),
        max_inflight_bytes=max(1, config.max_inflight_bytes // config.workers),
        max_arena_bytes=config.max_arena_bytes // config.workers,
        max_arenas=max(1, config.max_arenas // config.workers),
        # A negative one stands for all arenas.
        max_page_locked_bytes=locked if (locked := config.max_page_locked_bytes) < 0 else locked // config.workers,
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
    raise_descriptor_limit()
    with ExitStack() as resources:
        try:
            addresses = [resources.enter_context(closing(reserve(address))) for address in config.listen]
        except ValueError as error:
            raise ConfigError(f"listen: {error}") from None
        if config.explorer:
            config = replace(config, explorer=_reserve_explorer(config.explorer, resources))
        supervisor = Supervisor(config, addresses)
        if config.metrics or config.probes:
            from poolrpc_server.telemetry.monitoring_server import open_monitoring  # noqa: PLC0415 - not needed without
            from poolrpc_server.telemetry.summed_metrics import SummedMetrics  # noqa: PLC0415 - the same

            if config.metrics:
                supervisor.metrics = SummedMetrics(lambda: supervisor.restarts, supervisor.silent_seconds)
            try:
                servers = open_monitoring(config.metrics, config.probes, supervisor.collect, supervisor.is_ready)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            for name, server in servers.items():
                resources.enter_context(closing(server))
                supervisor.monitoring[name] = server.address
        log_starting(config.listen, config.workers)
        status = asyncio.run(supervisor.run())
    if supervisor.ended_by:
        signal.signal(supervisor.ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), supervisor.ended_by)
    return status


def _reserve_explorer(address: str, resources: ExitStack) -> str:
    """Return the explorer's address, which the workers share as they share those of gRPC."""
    try:
        return resources.enter_context(closing(reserve(address))).address
    except ValueError as error:
        raise ConfigError(f"explorer: {error}") from None


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
        metrics: The sums of the workers' metrics; None if no one reads them.
        monitoring: The addresses of metrics and probes, for the log.

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
        self.metrics: SummedMetrics | None = None
        self.monitoring: dict[str, str] = {}
        self._config = config
        self._addresses = addresses
        self._policy = policy or RestartPolicy()
        self._rotation_seconds = rotation_seconds
        self._kill_seconds = kill_seconds
        self._workers: dict[int, WorkerProcess] = {}
        self._directed_to = -1
        self._started = False
        self._stopping = asyncio.Event()
        self._failure: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> int:
        """Run the workers until they have stopped, and return the exit status."""
        self._loop = loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        keepers = [asyncio.create_task(self._keep_running(index)) for index in range(self._config.workers)]
        for keeper in keepers:
            keeper.add_done_callback(lambda _: self._stopping.set())  # a keeper that ends early has failed
        tasks = [asyncio.create_task(self._rotate_forever()), asyncio.create_task(self._watch_silence())]
        await self._stopping.wait()
        for task in tasks:
            task.cancel()
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
        return not self._stopping.is_set() and bool(self._serving())

    def silent_seconds(self) -> float:
        """Return for how long the most silent worker has not answered its watchdog; safe in any thread."""
        watched = [each for each in [*self._workers.values()] if each.watched and not each.draining]
        return max((each.silent_seconds for each in watched), default=0.0)

    def collect(self) -> CollectorRegistry:
        """Return the sums of the workers' metrics, after asking for them; for another thread than that of `run`."""
        assert self.metrics is not None  # noqa: S101 - the caller set it
        if self._loop is not None:
            with suppress(
                CancelledError, RuntimeError, TimeoutError
            ):  # the loop is ending, or a worker does not answer
                asyncio.run_coroutine_threadsafe(self._refresh_metrics(), self._loop).result(2 * SCRAPE_SECONDS)
        return self.metrics.registry

    async def _refresh_metrics(self) -> None:
        asked = self._serving()
        for worker in asked:
            worker.ask_metrics()
        with suppress(TimeoutError):
            async with asyncio.timeout(SCRAPE_SECONDS):
                for worker in asked:
                    await worker.metrics_received.wait()

    def _serving(self) -> list[WorkerProcess]:
        """Return the workers that should get calls."""
        silent = self._config.watchdog_seconds / 3
        return [
            worker
            for worker in sorted(self._workers.values(), key=lambda worker: worker.index)
            if worker.serving and not worker.draining and worker.silent_seconds <= silent
        ]

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
                worker = await WorkerProcess.start(index, config)
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

    async def _watch(self, worker: WorkerProcess) -> dict[str, Any]:
        """Wait until a worker has ended, and return why it did."""
        self._workers[worker.index] = worker
        if self._stopping.is_set():  # the stop came while the worker was being started
            worker.stop()
        error = {}
        async for message in worker.messages():
            match message:
                case {"serving": facts}:
                    worker.serving, worker.watched = True, facts["watchdog"] == "on"
                    self._on_serving(worker, facts)
                case {"rejected": str(reason)}:
                    error = {"error": reason}
                    if not self._started:
                        self._fail(ConfigError(reason))
                case {"metrics": values} if self.metrics:
                    self.metrics.update(worker.index, values)
                    worker.metrics_received.set()
                case {"draining": True}:
                    worker.draining = True
                    self._rotate()
                case _:
                    worker.silent_seconds = 0.0
        status = await worker.process.wait()
        del self._workers[worker.index]
        worker.writer.close()
        if self.metrics:
            self.metrics.forget(worker.index)
        if self._directed_to == worker.index:
            self._rotate()
        return {"pid": worker.process.pid, **describe_status(status), **error}

    def _on_serving(self, worker: WorkerProcess, facts: dict[str, Any]) -> None:
        log.info("worker serving", worker=worker.index, pid=worker.process.pid)
        serving = len(self._serving())
        if serving == 1:
            self._rotate()
        if not self._started and serving == self._config.workers:
            self._started = True
            addresses = [address.address for address in self._addresses]
            log_serving(facts | {"addresses": addresses, **self.monitoring, "workers": serving})

    async def _rotate_forever(self) -> None:
        while True:
            await asyncio.sleep(self._rotation_seconds)
            self._rotate()
            if self.metrics:  # so that a worker that is killed takes few counts along
                for worker in self._serving():
                    worker.ask_metrics()

    async def _watch_silence(self) -> None:
        allowed = self._config.watchdog_seconds
        step = allowed / 10
        while allowed:
            # Steps are counted, not the clock's seconds: while the supervisor itself is suspended, it hears no worker.
            await asyncio.sleep(step)
            for worker in self._workers.values():
                if not worker.watched or worker.draining:
                    continue
                worker.silent_seconds += step
                # A worker has the first quarter more: it says itself why it ends, unless all of it hangs.
                if worker.silent_seconds >= 1.25 * allowed:
                    seconds = round(worker.silent_seconds, 1)
                    log.error("worker killed: it does not answer", worker=worker.index, seconds=seconds)
                    worker.kill()

    def _rotate(self) -> None:
        """Direct new connections through a unix socket's path to the next worker that serves."""
        serving = [worker.index for worker in self._serving()]
        following = next((index for index in serving if index > self._directed_to), next(iter(serving), None))
        if following is None or following == self._directed_to:
            return
        self._directed_to = following
        for address in self._addresses:
            try:
                address.direct_to(following)
            except OSError as error:
                log.error("link not updated", address=address.address, worker=following, error=str(error))
