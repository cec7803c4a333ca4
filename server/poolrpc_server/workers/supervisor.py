"""Several server processes on the same addresses, the workers, and the process that looks after them, the supervisor.

The supervisor starts each worker as an interpreter of its own and tells it its number and its Config by a socket. The
worker answers there once it serves. The socket's end is the word to stop, so workers end with a supervisor that is
killed, and a worker that a service manager has told by a signal as well isn't told twice.
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
import threading
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from poolrpc_server.config import Config, ConfigError
from poolrpc_server.signals import SignalEvent
from poolrpc_server.telemetry import logs
from poolrpc_server.telemetry.logs import log
from poolrpc_server.workers.addresses import share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from poolrpc_server.workers.addresses import Shared

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
"""Seconds before a worker is started again: none at first, then these, doubled from one failure to the next."""

STEADY_SECONDS = 10.0
"""A worker that served for this long has failed for the first time when it fails."""

MOST_STARTS = 5
"""Starts of a worker, one after the other, that may fail while there is no service."""

TURN_SECONDS = 1.0
"""How long the path of a unix socket leads to the same worker, while there are others."""

LATE_SECONDS = 10.0
"""How long workers may take to end beyond what they were given."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)

ENDED = 1
"""The exit status where the workers can't be started, or one had to be killed at the end."""


class WorkersError(RuntimeError):
    """The workers can't be started."""


def pause(failures: int) -> float:
    """Give the seconds to wait before a worker is started again after so many failures in a row."""
    return 0.0 if failures <= 1 else float(min(FIRST_PAUSE * 2 ** (failures - 2), LONGEST_PAUSE))


def ending(status: int) -> dict[str, str | int]:
    """Give an exit status in words: the signal that ended the process, or its code."""
    if status >= 0:
        return {"code": status}
    name = str(-status)
    with suppress(ValueError):  # one of those that have no name
        name = signal.Signals(-status).name
    return {"signal": name}


def part_of(config: Config, index: int, places: Iterable[Shared]) -> Config:
    """Give the Config of one worker: its addresses, and its part of what is limited for all of them together."""
    return replace(
        config,
        listen=tuple(place.of(index) for place in places),
        threads=max(1, config.threads // config.workers),
        max_inflight_bytes=max(1, config.max_inflight_bytes // config.workers),
        max_arena_bytes=config.max_arena_bytes // config.workers,
        max_arenas=max(1, config.max_arenas // config.workers),
    )


def supervise(config: Config) -> int:
    """Run workers until SIGTERM or SIGINT, then have them drain and stop; a second signal ends all at once.

    Gives the exit status.

    Raises:
        ConfigError: The server can't be made as told.
        WorkersError: The workers can't be started.

    """
    with ExitStack() as held:
        try:
            places = [held.enter_context(closing(share(address))) for address in config.listen]
        except ValueError as error:
            raise ConfigError(f"listen: {error}") from None
        counted = held.enter_context(_counting(config.metrics)) if config.metrics else None
        supervisor = Supervisor(config, places, counted)
        status = asyncio.run(supervisor.run())
    if supervisor.ended_by:
        signal.signal(supervisor.ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), supervisor.ended_by)
    return status


class _Counted:
    """Where the workers count, and the address where the sums are read."""

    def __init__(self, folder: str, address: str) -> None:
        from poolrpc_server.telemetry import metrics  # noqa: PLC0415 - many run without

        self.restarts: Callable[[], int] = lambda: 0
        self.ready: Callable[[], bool] = lambda: False
        self.environment = {**os.environ, metrics.FOLDER_VARIABLE: folder}
        self.forget = partial(metrics.forget, folder)
        # The supervisor, of which both tell, is made after this.
        registry = metrics.summed(folder, lambda: self.restarts())  # noqa: PLW0108 - replaced later
        self._server = metrics.MetricsServer(address, lambda: registry, lambda: self.ready())  # noqa: PLW0108 - as well
        self.address, self.close = self._server.address, self._server.close


@contextmanager
def _counting(address: str) -> Iterator[_Counted]:
    with tempfile.TemporaryDirectory(prefix="poolrpc-metrics-") as folder:
        try:
            counted = _Counted(folder, address)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"metrics: {address!r} can't be had: {error}") from None
        with closing(counted):
            yield counted


@dataclass(eq=False)
class _Worker:
    """A worker's process, and the socket to it."""

    index: int
    process: asyncio.subprocess.Process
    answers: asyncio.StreamReader
    control: asyncio.StreamWriter
    serving: bool = False

    @classmethod
    async def start(cls, index: int, config: Config, environment: Mapping[str, str]) -> _Worker:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", __spec__.name, str(theirs.fileno())),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    process_group=0,  # a terminal's Ctrl-C is for the supervisor
                    env=environment,
                )
        except BaseException:
            ours.close()
            raise
        answers, control = await asyncio.open_connection(sock=ours)
        control.write(pickle.dumps((index, config)))
        return cls(index, process, answers, control)

    async def answer(self) -> dict[str, Any]:
        """Give what it says when it serves or can't; nothing where it ended."""
        with suppress(ConnectionError):
            return dict(json.loads(await self.answers.readline() or b"{}"))
        return {}

    def stop(self) -> None:
        self.control.close()
        if not self.serving:  # it has nothing to finish
            with suppress(ProcessLookupError):
                self.process.terminate()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()


class Supervisor:
    """Starts workers, starts those again that die, and passes signals on.

    Attributes:
        restarts: How many workers were started again.
        ended_by: The second signal, by which this process is to end too; 0 where none came.

    """

    def __init__(self, config: Config, places: Sequence[Shared], counted: _Counted | None = None) -> None:
        """Make one; `places` are where it listens, `counted` where its metrics are."""
        self.restarts = 0
        self.ended_by = 0
        self._config = config
        self._places = places
        self._workers: dict[int, _Worker] = {}
        self._led_to = -1
        self._said = False
        self._stopping = asyncio.Event()
        self._failure: Exception | None = None
        self._counted = counted
        if counted is not None:
            counted.restarts, counted.ready = lambda: self.restarts, self._ready

    async def run(self) -> int:
        """Run the workers to their end, and give the exit status."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._signalled, number)
        keepers = [asyncio.create_task(self._keep(index)) for index in range(self._config.workers)]
        for keeper in keepers:
            keeper.add_done_callback(lambda _: self._stopping.set())  # only a fault of its own ends it before
        turns = asyncio.create_task(self._take_turns())
        await self._stopping.wait()
        turns.cancel()
        for worker in self._workers.values():
            worker.stop()
        allowed = self._config.drain_seconds + self._config.shutdown_grace + LATE_SECONDS
        _, late = await asyncio.wait(keepers, timeout=allowed)
        for worker in self._workers.values():
            log.error("worker killed: it didn't end in time", worker=worker.index, seconds=allowed)
            worker.kill()
        await asyncio.gather(*keepers)
        if self._failure is not None:
            raise self._failure
        if not self.ended_by:
            log.info("stopped")
        return ENDED if late else 0

    def _signalled(self, number: int) -> None:
        if not self._stopping.is_set():
            log.info("stopping", signal=signal.Signals(number).name)
            self._stopping.set()
            return
        # Nothing of the workers is waited for but that they are gone, so that their sockets can be removed; a third
        # signal finds the default.
        self.ended_by = number
        for each in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        for worker in self._workers.values():
            worker.kill()

    def _fail(self, failure: Exception) -> None:
        self._failure = self._failure or failure
        self._stopping.set()

    async def _keep(self, index: int) -> None:
        failures = starts = 0
        loop = asyncio.get_running_loop()
        config = part_of(self._config, index, self._places)
        while not self._stopping.is_set():
            try:
                worker = await _Worker.start(index, config, self._counted.environment if self._counted else os.environ)
            except OSError as error:  # no memory or no process left, perhaps for now
                served, facts = 0.0, {"error": str(error)}
            else:
                begun = loop.time()
                facts = await self._attend(worker)
                served = loop.time() - begun if worker.serving else 0.0
            if self._stopping.is_set():
                return
            self.restarts += 1
            failures = 1 if served >= STEADY_SECONDS else failures + 1
            starts = 0 if served else starts + 1
            log.warning("worker ended", worker=index, **facts, restart_in=pause(failures))
            if starts >= MOST_STARTS and not (self._said and any(each.serving for each in self._workers.values())):
                self._fail(WorkersError(f"worker {index} can't be started: {starts} attempts failed"))
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause(failures))

    async def _attend(self, worker: _Worker) -> dict[str, Any]:
        self._workers[worker.index] = worker
        if self._stopping.is_set():  # while it was started
            worker.stop()
        answer = await worker.answer()
        if "serving" in answer:
            worker.serving = True
            self._serves(worker, answer["serving"])
        elif "refused" in answer and not self._said:
            self._fail(ConfigError(answer["refused"]))
        status = await worker.process.wait()
        del self._workers[worker.index]
        worker.control.close()
        if self._counted:
            self._counted.forget(worker.process.pid)
        if self._led_to == worker.index:
            self._turn()
        refused = {"error": answer["refused"]} if "refused" in answer else {}
        return {"pid": worker.process.pid, **ending(status), **refused}

    def _serves(self, worker: _Worker, facts: dict[str, Any]) -> None:
        log.info("worker serving", worker=worker.index, pid=worker.process.pid)
        serving = [each for each in self._workers.values() if each.serving]
        if len(serving) == 1:
            self._turn()
        if not self._said and len(serving) == self._config.workers:
            self._said = True
            addresses = " ".join(place.address for place in self._places)
            metrics = self._counted.address if self._counted else ""
            log.info("serving", **facts | {"addresses": addresses, "metrics": metrics, "workers": len(serving)})

    def _ready(self) -> bool:
        return not self._stopping.is_set() and any(each.serving for each in self._workers.values())

    async def _take_turns(self) -> None:
        while True:
            await asyncio.sleep(TURN_SECONDS)
            self._turn()

    def _turn(self) -> None:
        """Lead new connections to the next worker that serves, where there is one."""
        serving = sorted(each.index for each in self._workers.values() if each.serving)
        following = next((index for index in serving if index > self._led_to), next(iter(serving), None))
        if following is None or following == self._led_to:
            return
        self._led_to = following
        for place in self._places:
            try:
                place.lead_to(following)
            except OSError as error:
                log.error("socket can't be led to a worker", address=place.address, worker=following, error=str(error))


def work(descriptor: int) -> int:
    """Be a worker: take number and Config from that socket, serve until it ends, and give the exit status."""
    control = socket.socket(fileno=descriptor)
    control.set_inheritable(False)
    with control.makefile("rb") as told:
        index, config = pickle.load(told)  # noqa: S301 - of the supervisor, whose process made the socket
    logs.configure(config.log_format, config.log_level, worker=index)
    stopping = SignalEvent()

    def watch() -> None:
        with suppress(OSError):
            control.recv(1)
        log.info("stopping", told_by="supervisor")
        stopping.ring()

    def tell(**answer: object) -> None:
        with suppress(OSError):  # the supervisor is gone
            control.sendall(json.dumps(answer).encode() + b"\n")

    threading.Thread(target=watch, name="poolrpc-watch", daemon=True).start()
    from poolrpc_server.app import serve  # noqa: PLC0415 - the supervisor doesn't wait for torch

    try:
        return serve(config, stopping=stopping, started=lambda facts: tell(serving=facts))
    except ConfigError as error:
        tell(refused=str(error))
        return 2


if __name__ == "__main__":
    sys.exit(work(int(sys.argv[1])))
