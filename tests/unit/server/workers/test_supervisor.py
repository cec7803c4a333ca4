"""The supervisor: its calculations, and its reaction to workers that do not start or do not stop."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from poolrpc_server.config import Config
from poolrpc_server.signals import preserved_handlers
from poolrpc_server.workers.supervisor import (
    WORKERS_FAILED,
    RestartPolicy,
    Supervisor,
    WorkersError,
    describe_status,
    worker_config,
)


class Address:
    """An address under which every worker has a number of its own."""

    address = "unix:/run/x"

    def worker_address(self, index):
        """Return the address of one worker."""
        return f"{self.address}.{index}"


def test_the_first_restart_is_immediate_and_the_next_ones_wait():
    """The delay doubles from one failure to the next, up to a limit."""
    policy = RestartPolicy()
    assert [policy.delay(failures) for failures in range(6)] == [0, 0, 0.25, 0.5, 1, 2]
    assert policy.delay(50) == policy.max_delay
    assert RestartPolicy(first_delay=1, max_delay=3).delay(4) == 3


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, {"code": 0}), (70, {"code": 70}), (-9, {"signal": "SIGKILL"}), (-33, {"signal": "33"})],
)
def test_an_exit_status_in_words(status, words):
    """A process that a signal ended has the signal's name, or its number if it has no name; another has its code."""
    assert describe_status(status) == words


def test_each_worker_has_its_share():
    """Threads, bytes and arenas are divided; the addresses are the worker's own; other settings are unchanged."""
    limits = {"max_inflight_bytes": 4000, "max_arena_bytes": 800, "max_arenas": 2, "max_page_locked_bytes": 80}
    config = Config(workers=4, threads=10, max_streams=7, **limits)
    share = worker_config(config, 3, [Address(), Address()])
    assert share.listen == ("unix:/run/x.3",) * 2
    assert (share.threads, share.max_inflight_bytes, share.max_arena_bytes, share.max_arenas) == (2, 1000, 200, 1)
    assert (share.max_streams, share.workers, share.max_page_locked_bytes) == (7, 4, 20)
    assert (
        worker_config(Config(workers=4), 0, [Address()]).max_page_locked_bytes == Config().max_page_locked_bytes == -1
    )


def test_a_worker_has_at_least_one_thread():
    """If there are more workers than threads, each worker has one thread and at least one byte in flight."""
    share = worker_config(Config(workers=3, threads=1, max_inflight_bytes=2, max_arena_bytes=0), 0, [Address()])
    assert (share.threads, share.max_inflight_bytes, share.max_arena_bytes) == (1, 1, 0)


def test_the_supervisor_does_not_import_torch():
    """A supervisor process has imported neither torch nor the service."""
    program = (
        "import sys\n"
        "from poolrpc_server.workers import supervisor\n"
        "from poolrpc_server.cli import main\n"
        "supervisor.supervise = lambda config: print(config.workers)\n"
        "main(['--workers', '2'])\n"
        "print({'torch', 'poolrpc_server.app', 'poolrpc_server.compute.engine'} & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603 - ours
    assert done.stdout.splitlines() == ["2", "set()"]


@pytest.fixture
def _worker_program(request, tmp_path, monkeypatch):
    """Make every worker run the program of the test's parameter instead of a server."""
    lines = "".join(f"    {line}\n" for line in request.param)
    text = f"import sys\nif 'poolrpc_server.workers.worker' in sys.orig_argv:\n{lines}"
    (tmp_path / "sitecustomize.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("FOLDER", str(tmp_path))


@pytest.mark.parametrize("_worker_program", [["import os; os._exit(3)"]], indirect=True)
@pytest.mark.usefixtures("_worker_program")
def test_the_supervisor_gives_up_if_a_worker_does_not_start():
    """After max_attempts failed starts in a row, the supervisor ends with an error."""
    supervisor = Supervisor(Config(), [Address()], RestartPolicy(first_delay=0.01, max_attempts=3))
    with preserved_handlers(), pytest.raises(WorkersError, match="expected worker 0 to start, got 3 failed attempts"):
        asyncio.run(supervisor.run())
    assert supervisor.restarts == 3


IGNORE_SIGTERM = [
    "import os, signal, time",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "open(os.environ['FOLDER'] + '/ready', 'w').close()",
    "time.sleep(3600)",
]


@pytest.mark.parametrize("_worker_program", [IGNORE_SIGTERM], indirect=True)
@pytest.mark.usefixtures("_worker_program")
def test_a_worker_that_does_not_stop_is_killed(tmp_path):
    """A worker that still runs after the drain, the grace and kill_seconds is killed, and the exit status says so."""
    os.mkfifo(tmp_path / "ready")
    supervisor = Supervisor(Config(drain_seconds=0, shutdown_grace=0), [Address()], kill_seconds=0.1)

    async def run():
        running = asyncio.create_task(supervisor.run())
        await asyncio.to_thread((tmp_path / "ready").read_bytes)  # blocks until the worker has written
        os.kill(os.getpid(), signal.SIGTERM)
        return await running

    with preserved_handlers():
        assert asyncio.run(run()) == WORKERS_FAILED
