"""Several workers in processes of their own: restarts, signals, exit statuses, sockets and the log."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

import poolrpc
from poolrpc import AdaptiveAvgPool2d, AsyncPoolClient, GlobalPool2d, MaxPool2d, PoolClient
from poolrpc_server.app import FAILED
from poolrpc_server.config import Config, ConfigError
from poolrpc_server.workers.supervisor import supervise
from scripts.server_process import serving
from tests.integration.injection import injected

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from scripts.server_process import ServerProcess

pytestmark = pytest.mark.slow  # several processes start in each test

SMALL = np.random.default_rng(5).standard_normal((2, 3, 16, 16), np.float32)
LARGE = np.random.default_rng(6).standard_normal((2, 8, 128, 128), np.float32)
"""Large enough for the arena."""

AT_ONCE = ("--drain-seconds", "0")
OWN_CONNECTION = {"grpc.use_local_subchannel_pool": 1}
"""By default the clients of a process share a connection, and so a worker."""


def halved(x: np.ndarray) -> np.ndarray:
    """Return MaxPool2d(2) of a tensor with even height and width."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))


class Load:
    """Calls without a break from several threads, with each result checked.

    Attributes:
        errors: The errors so far.
        transports: The transport of each thread's latest tensors.

    """

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.transports: dict[int, str] = {}
        self._counts: dict[int, int] = {}
        self._changed = threading.Condition()
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def add(self, client: PoolClient, x: np.ndarray, transport: str | None = None) -> None:
        """Start another thread of calls."""
        number, expected = len(self._threads), halved(x)

        def call() -> None:
            while not self._ending.is_set():
                used = ""
                try:
                    result = client.pool(x, MaxPool2d(2), transport=transport)
                    np.testing.assert_array_equal(result.output, expected)
                    used = result.transport
                except (poolrpc.PoolError, AssertionError) as error:
                    self.errors.append(error)
                with self._changed:
                    self.transports[number] = used
                    self._counts[number] += 1
                    self._changed.notify_all()

        self._counts[number] = 0
        self._threads.append(threading.Thread(target=call))
        self._threads[-1].start()

    def go_on(self, calls: int = 20) -> None:
        """Wait until every thread has made so many more calls."""
        with self._changed:
            goals = {number: count + calls for number, count in self._counts.items()}
            assert self._changed.wait_for(lambda: all(self._counts[number] >= goals[number] for number in goals), 60)

    def wait_for_transport(self, thread: int, transport: str) -> None:
        """Wait until a thread's tensors use a transport."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.transports.get(thread) == transport, 60)

    def end(self) -> None:
        """End every thread."""
        self._ending.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def load() -> Iterator[tuple[Load, ExitStack]]:
    """Return a load, and a stack that closes its clients afterwards."""
    with ExitStack() as clients:
        made = Load()
        try:
            yield made, clients
        finally:
            made.end()


def pids(server: ServerProcess) -> dict[int, int]:
    """Return the processes of the workers as the log has them, by number."""
    return {each["worker"]: each["pid"] for each in server.lines("worker serving")}


def wait_gone(processes: list[psutil.Process]) -> None:
    """Wait until processes have ended."""
    _, alive = psutil.wait_procs(processes, 60)
    assert not alive


def command(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run poolrpc-server to its end."""
    program = [sys.executable, "-m", "poolrpc_server", *flags]
    return subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)  # noqa: S603 - ours


def test_clients_do_not_notice_a_killed_worker(tmp_path: Path) -> None:
    """SIGKILL of one worker after the other, under load on every transport: no call fails, and both serve again."""
    listen = f"unix:{tmp_path / 'pool.sock'}"
    with serving("--workers", "2", "--listen", listen, *AT_ONCE) as server, load() as (calls, clients):
        assert server.start_line["addresses"][1] == listen
        assert server.start_line["workers"] == 2
        for _ in range(4):
            client = clients.enter_context(PoolClient(server.address, options=OWN_CONNECTION))
            calls.add(client, SMALL)
            calls.add(client, LARGE)
        calls.add(client, LARGE, "stream")
        local = clients.enter_context(PoolClient(listen))
        calls.add(local, LARGE)
        calls.add(local, SMALL)
        calls.go_on()
        calls.wait_for_transport(9, "local")
        for count, index in enumerate((0, 1), 1):
            os.kill(pids(server)[index], signal.SIGKILL)
            ended = server.wait_for("worker ended", count)[-1]
            assert (ended["worker"], ended["signal"], ended["restart_in"]) == (index, "SIGKILL", 0)
            assert len(server.wait_for("worker serving", 2 + count)) == 2 + count
            calls.go_on()
        calls.wait_for_transport(9, "local")
        calls.end()
        assert calls.errors == []
        assert {each["worker"] for each in server.lines("call")} == {0, 1}


@pytest.mark.slow
def test_clients_do_not_notice_a_server_that_stops() -> None:
    """SIGTERM of one of two servers behind one name, under load: no call fails.

    The name is gRPC's ipv4:a,b, which like dns:/// gives round_robin two addresses, because no DNS name has two ports.
    """
    with (
        serving("--drain-seconds", "1", "--shutdown-grace", "10") as first,
        serving() as second,
        load() as (calls, clients),
    ):
        client = clients.enter_context(PoolClient(f"ipv4:{first.address},{second.address}"))
        for x, transport in ((SMALL, None), (LARGE, None), (SMALL, None), (LARGE, "stream")):
            calls.add(client, x, transport)
        calls.go_on()
        assert first.wait_for("call")
        first.process.send_signal(signal.SIGTERM)
        assert first.wait() == 0
        calls.go_on()
        calls.end()
        assert calls.errors == []
        assert second.lines("call")
        assert {each["status"] for each in first.lines("call")} == {"OK"}


def test_calls_of_an_arena_go_to_its_worker(tmp_path: Path) -> None:
    """A client's connection and arena may be of two workers; the arena of a dead worker is replaced."""
    path = tmp_path / "pool.sock"
    with serving("--workers", "2", *AT_ONCE, listen=f"unix:{path}") as server, ExitStack() as clients:
        # The client connects while the path leads to one worker, and attaches its arena when it leads to the other one.
        client = clients.enter_context(PoolClient(f"unix:{path}"))
        client.pool(SMALL, MaxPool2d(2))
        connected = server.wait_for("call")[0]["worker"]
        made = 1
        while server.wait_for("call", made)[-1]["worker"] == connected:
            with PoolClient(f"unix:{path}", options=OWN_CONNECTION) as another:
                another.pool(SMALL, MaxPool2d(2))
            made += 1
        mine = client.empty(LARGE.shape)
        mine[...] = LARGE
        result = client.pool(mine, MaxPool2d(2))
        assert result.transport == "local"
        np.testing.assert_array_equal(result.output, halved(LARGE))
        assert server.wait_for("call", made + 1)[made]["worker"] == 1 - connected
        os.kill(pids(server)[1 - connected], signal.SIGKILL)
        server.wait_for("worker ended")
        with pytest.raises((poolrpc.UnavailableError, poolrpc.NotFoundError)):
            client.pool(mine, MaxPool2d(2), transport="arena")
        again = client.pool(mine, MaxPool2d(2))
        np.testing.assert_array_equal(again.output, halved(LARGE))
        assert client.pool(LARGE, MaxPool2d(2)).transport == "local"


def test_the_arena_of_a_dead_worker_is_replaced(tmp_path: Path) -> None:
    """A client sends bytes if its arena's worker died, and has another arena afterwards."""
    address = f"unix:{tmp_path / 'pool.sock'}"

    async def run(server: ServerProcess) -> None:
        async with AsyncPoolClient(address) as client:
            assert (await client.pool(LARGE, MaxPool2d(2))).transport == "local"
            worker = server.wait_for("call")[0]["worker"]
            os.kill(pids(server)[worker], signal.SIGKILL)
            server.wait_for("worker ended")
            result = await client.pool(LARGE, MaxPool2d(2))
            np.testing.assert_array_equal(result.output, halved(LARGE))
            assert (await client.pool(LARGE, MaxPool2d(2))).transport == "local"

    with serving("--workers", "2", *AT_ONCE, listen=address) as server:
        asyncio.run(run(server))


def test_sigterm_stops_every_worker(tmp_path: Path) -> None:
    """Every worker drains and stops, and logs it with its number; no file is left, and the status is 0."""
    with serving("--workers", "2", "--drain-seconds", "0.1", listen=f"unix:{tmp_path / 'pool.sock'}") as server:
        processes = [psutil.Process(pid) for pid in pids(server).values()]
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert not any(each.is_running() for each in processes)
    assert [each.get("worker") for each in server.lines("stopping")] in ([None, 0, 1], [None, 1, 0])
    assert [each.get("worker") for each in server.lines("stopped")] in ([0, 1, None], [1, 0, None])
    assert not server.lines("worker ended")
    assert list(tmp_path.iterdir()) == []


def test_sigterm_to_every_process_is_one_stop() -> None:
    """SIGTERM to the supervisor and to each worker, as to a process group, drains them."""
    with serving("--workers", "2", "--drain-seconds", "0.5") as server:
        for pid in (*pids(server).values(), server.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert server.wait() == 0
    assert len(server.lines("stopped")) == 3


def test_a_second_signal_ends_all_at_once(tmp_path: Path) -> None:
    """A second signal does not wait for the drain: the workers are killed, and no file is left."""
    flags = ("--workers", "2", "--drain-seconds", "3600")
    with serving(*flags, listen=f"unix:{tmp_path / 'pool.sock'}") as server:
        processes = [psutil.Process(pid) for pid in pids(server).values()]
        server.process.send_signal(signal.SIGINT)
        server.wait_for("stopping", 3)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == -signal.SIGTERM
        wait_gone(processes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_sigint_stops_a_server_that_was_started_with_it_ignored(workers: str) -> None:
    """A shell ignores SIGINT for a script's background jobs; the server is stopped by it like any other."""
    with sigint_handled_by(signal.SIG_IGN), serving("--workers", workers, *AT_ONCE) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0


def test_workers_end_if_the_supervisor_is_killed(tmp_path: Path) -> None:
    """The workers finish their calls and end, without a drain; another server has their addresses at once."""
    flags = ("--workers", "2", "--drain-seconds", "3600", "--metrics", "127.0.0.1:0")
    path = f"unix:{tmp_path / 'pool.sock'}"
    with serving(*flags, "--listen", path) as first:
        processes = [psutil.Process(pid) for pid in pids(first).values()]
        listen = first.address
        first.process.kill()
        with serving(*flags, "--listen", path, listen=listen) as second:
            wait_gone(processes)
            first.wait()
            for address in (listen, path):
                with PoolClient(address) as client:
                    assert client.pool(LARGE, MaxPool2d(2)).shape == (2, 8, 64, 64)
            assert len(second.lines("worker serving")) == 2
    assert len(first.lines("stopped")) == 2
    assert {each["reason"] for each in first.lines("stopping at once")} == {"the supervisor has ended"}


def test_a_worker_that_receives_sigterm_is_replaced() -> None:
    """It drains and ends with 0, and another one takes its place."""
    with serving("--workers", "2", *AT_ONCE) as server:
        os.kill(pids(server)[1], signal.SIGTERM)
        ended = server.wait_for("worker ended")[0]
        assert (ended["worker"], ended["code"]) == (1, 0)
        assert len(server.wait_for("worker serving", 3)) == 3


def test_a_second_server_cannot_use_the_address_of_workers(tmp_path: Path) -> None:
    """Workers share their addresses with each other; another server ends with status 75, with workers or without."""
    path = f"unix:{tmp_path / 'pool.sock'}"
    with serving("--workers", "2", "--listen", path, *AT_ONCE) as server:
        for address in (server.address, path):
            for workers in ("1", "2"):
                rejected = command("--listen", address, "--workers", workers)
                assert rejected.returncode == 75
                assert "expected a free address" in rejected.stderr.splitlines()[-1]
            with PoolClient(address) as client:
                assert client.pool(SMALL, MaxPool2d(2)).shape == (2, 3, 8, 8)


def test_workers_cannot_use_the_address_of_another_server(tmp_path: Path) -> None:
    """Workers end with status 75 if a server of one process has the address, and that server keeps its sockets."""
    path = f"unix:{tmp_path / 'pool.sock'}"
    with serving("--listen", path) as server:
        for address in (server.address, path):
            rejected = command("--listen", address, "--workers", "2")
            assert (rejected.returncode, rejected.stderr.count("\n")) == (75, 1)
            assert "expected a free address" in rejected.stderr
            with PoolClient(address) as client:
                assert client.pool(LARGE, MaxPool2d(2)).shape == (2, 8, 64, 64)


def test_a_setting_that_only_a_worker_can_check() -> None:
    """A setting that a worker rejects is reported once, and the status is 2."""
    rejected = command("--workers", "3", "--device", "cuda:99", "--listen", "127.0.0.1:0")
    assert (rejected.returncode, rejected.stderr.count("poolrpc-server: ")) == (2, 1)
    assert "device: expected auto or a device of this machine" in rejected.stderr


def test_workers_that_cannot_start(tmp_path: Path) -> None:
    """Workers that die at each start end the server with status 1, after several attempts, each of which is logged."""
    env = injected(tmp_path, "    if 'poolrpc_server.workers.worker' in sys.orig_argv: import os; os._exit(3)\n")
    with (
        pytest.raises(RuntimeError, match=r"the server ended with 1: .*failed attempts") as caught,
        serving("--workers", "2", env=env),
    ):
        pass
    assert "'code': 3" in str(caught.value)
    assert "'restart_in': 1.0" in str(caught.value)


POISON = """
    if '--workers' not in sys.orig_argv or '1' in sys.orig_argv:
        import torch
        from poolrpc_server.compute.kernels import eager

        Lost = getattr(torch, "AcceleratorError", RuntimeError)
        def poisoned(*_):
            raise Lost("CUDA error: an illegal memory access was encountered")

        eager.OPERATIONS["global_pool, max"] = lambda *_: poisoned
"""


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_process_with_a_failed_device_ends(tmp_path: Path, workers: str) -> None:
    """A lost CUDA context ends the process with a status of its own, and a supervisor starts another."""
    with (
        serving("--workers", workers, env=injected(tmp_path, POISON)) as server,
        PoolClient(server.address, options={"grpc.enable_retries": 0}) as client,
    ):
        with pytest.raises(poolrpc.UnavailableError, match="the device failed") as caught:
            client.pool(SMALL, GlobalPool2d("max"))
        assert caught.value.reason == "DEVICE_FAILED"
        assert server.wait_for("failed")[0]["reason"] == "CUDA error: an illegal memory access was encountered"
        if workers == "1":
            assert server.wait() == FAILED
        else:
            assert server.wait_for("worker ended")[0]["code"] == FAILED
            assert len(server.wait_for("worker serving", 3)) == 3


def test_the_log_of_workers() -> None:
    """The start line follows when all workers listen; every line of a worker, or about one, has its number.

    A free port is chosen once for all workers, and each has its share of the threads.
    """
    with serving("--workers", "2", "--threads", "6", *AT_ONCE) as server, PoolClient(server.address) as client:
        assert len(server.lines("worker serving")) == 2
        assert server.start_line["threads"] == 3
        port = int(server.address.rpartition(":")[2])
        listening = [
            each.laddr.port
            for pid in pids(server).values()
            for each in psutil.Process(pid).net_connections("inet")
            if each.status == psutil.CONN_LISTEN
        ]
        assert listening == [port, port]
        client.pool(SMALL, MaxPool2d(2))
        with pytest.raises(poolrpc.LimitExceededError):
            client.pool(SMALL, AdaptiveAvgPool2d(65535))
        server.process.send_signal(signal.SIGTERM)
        server.wait()
    without = [each["event"] for each in server.log if "worker" not in each]
    assert without == ["starting", "serving", "stopping", "stopped"]
    assert len(server.lines("call")) == 2


class Events(logging.Handler):
    """A log whose events can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[logging.LogRecord] = []
        self._changed = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        with self._changed:
            self._seen.append(record)
            self._changed.notify_all()

    def wait_for(self, event: str, count: int = 1) -> list[logging.LogRecord]:
        """Wait for so many records of an event, and return them."""

        def found() -> list[logging.LogRecord]:
            return [each for each in self._seen if each.getMessage() == event]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= count, 60)
        return found()


@pytest.fixture
def events() -> Iterator[Events]:
    """Return the events of a supervisor in this process."""
    logger, handler = logging.getLogger("poolrpc_server"), Events()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


@contextmanager
def sigint_handled_by(handler: Any) -> Iterator[None]:  # signal's own types are private
    """Set this process's handler of SIGINT, as the shell that started it might have."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "handler",
    [
        pytest.param(signal.SIG_IGN, id="ignored"),
        pytest.param(signal.default_int_handler, id="default", marks=pytest.mark.slow),
    ],
)
def test_a_supervisor_in_this_process(tmp_path: Path, events: Events, handler: Any) -> None:
    """supervise() restarts a worker that dies, returns 0 after SIGTERM, and restores the signals' handlers."""
    config = Config(workers=2, listen=("127.0.0.1:0", f"unix:{tmp_path / 'pool.sock'}"), drain_seconds=0)

    def end() -> None:
        events.wait_for("serving")
        os.kill(events.wait_for("worker serving")[0].pid, signal.SIGKILL)
        assert events.wait_for("worker ended")[0].signal == "SIGKILL"
        events.wait_for("worker serving", 3)
        os.kill(os.getpid(), signal.SIGTERM)

    sigterm = signal.getsignal(signal.SIGTERM)
    with sigint_handled_by(handler), ThreadPoolExecutor(1) as threads:
        ending = threads.submit(end)
        assert supervise(config) == 0
        ending.result()
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == (sigterm, handler)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_a_supervisor_rejects() -> None:
    """An address and a device that cannot be used are a ConfigError, before and after workers start."""
    with pytest.raises(ConfigError, match=r"listen: expected a free address, got '192\.0\.2\.1:0'"):
        supervise(Config(workers=2, listen=("192.0.2.1:0",), insecure=True))
    with pytest.raises(ConfigError, match="device: expected auto or a device of this machine"):
        supervise(Config(workers=2, listen=("127.0.0.1:0",), device="cuda:99"))
