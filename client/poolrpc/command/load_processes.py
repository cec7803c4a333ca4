"""Processes that make the calls of a load together."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from poolrpc.command.load import LoadResult
from poolrpc.command.load_run import LoadRun
from poolrpc.errors import PoolError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from poolrpc.command.load import Load
    from poolrpc.command.load_run import LoadPart


class LoadInterrupted(KeyboardInterrupt):
    """A load was interrupted.

    Attributes:
        result: What became of the calls until then.

    """

    def __init__(self, result: LoadResult) -> None:
        super().__init__()
        self.result = result


class LoadProcesses:
    """Processes that make the calls of one load after the other: a context manager, at whose end they end.

    A process runs Python code for one call at a time, which limits its calls per second.

    Args:
        count: The number of processes.

    """

    def __init__(self, count: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        with _ignored_interrupts():
            for _ in range(count):
                ours, theirs = spawn.Pipe()
                process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)

    def __enter__(self) -> Self:
        """Return the processes."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes, also in the middle of a load."""
        for process in self._processes:
            process.terminate()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()

    def run(self, address: str, load: Load) -> LoadResult:
        """Make the calls of a load, each process a part of them.

        Args:
            address: The address of the server.
            load: The load; it has at least as many connections, and calls at a time, as there are processes.

        Raises:
            PoolError: The first call of a connection failed.
            LoadInterrupted: KeyboardInterrupt. The calls in flight are cancelled and not counted. A second one is
                raised as it is.

        """
        for pipe, part in zip(self._pipes, load.split(len(self._pipes)), strict=True):
            pipe.send((address, part))
        # All have connected, or some have failed.
        failures = [each for each in map(_receive, self._pipes) if each is not None]
        begin = None if failures else time.monotonic() + load.warmup + 0.01
        self._send(begin)
        if failures:
            raise failures[0]
        parts: list[Any] = []
        interrupted = False
        while len(parts) < len(self._pipes):
            try:
                parts.append(_receive(self._pipes[len(parts)]))
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                self._send(None)
        if not interrupted:
            self._send(None)
        for part in parts:
            if isinstance(part, Exception):
                raise part
        result = _merged(parts, begin or 0.0)
        if interrupted:
            raise LoadInterrupted(result)
        return result

    def _send(self, message: float | None) -> None:
        for pipe in self._pipes:
            with suppress(BrokenPipeError):  # _receive says so
                pipe.send(message)


def _receive(pipe: Connection) -> Any:  # noqa: ANN401 - what a process sends
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        return PoolError("expected an answer of a process that makes calls, got its end", reason="PROCESS")


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Ignore SIGINT, which a terminal sends to all processes, in those that are started in the block."""
    # To block it is not enough: multiprocessing unblocks it when it starts its first process.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _merged(parts: list[LoadPart], begin: float) -> LoadResult:
    kinds = list(dict.fromkeys(kind for part in parts for kind in part.messages))
    for part in parts:
        numbers = np.array([0, *(kinds.index(kind) + 1 for kind in part.messages)])
        part.calls[:, -1] = numbers[part.calls[:, -1].astype(int)]
    calls = np.concatenate([part.calls for part in parts])
    due, sent, ended, request, status = calls[calls[:, 0].argsort(kind="stable")].T
    last = max(part.ended for part in parts)
    return LoadResult(
        due=due - begin,
        late=sent - due,
        latency=ended - due,
        request=request.astype(int),
        failed=status > 0,
        errors={kind: count for number, kind in enumerate(kinds, 1) if (count := int((status == number).sum()))},
        messages={kind: message for part in parts for kind, message in part.messages.items()},
        unsent=sum(part.unsent for part in parts),
        seconds=max(last - begin, 1e-9),
        cpus=sum(part.cpu for part in parts),
        busiest=max(part.cpu for part in parts),
    )


def _serve(pipe: Connection) -> None:
    """Make the calls of loads, in a process of its own, until the pipe is closed."""
    with suppress(EOFError, ConnectionError):
        while True:
            address, load = pipe.recv()
            with ExitStack() as stack:
                try:
                    run = LoadRun(stack, address, load)
                except Exception as error:  # noqa: BLE001 - for the process that started this one
                    pipe.send(error)
                    pipe.recv()
                    continue
                pipe.send(None)
                begin = pipe.recv()
                if begin is None:  # another process has failed
                    continue
                # The next message stops the load, or follows its result.
                waiting = threading.Thread(target=_wait, args=(pipe, run), daemon=True)
                waiting.start()
                try:
                    result: object = run.make_calls(begin)
                except Exception as error:  # noqa: BLE001 - the same
                    result = error
                pipe.send(result)
                waiting.join()


def _wait(pipe: Connection, run: LoadRun) -> None:
    with suppress(EOFError, ConnectionError):
        pipe.recv()
    run.stop()
