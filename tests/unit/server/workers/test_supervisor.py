"""The supervisor's calculations: delays of restarts, exit statuses in words, each worker's share of the settings."""

import subprocess
import sys

import pytest

from poolrpc_server.config import Config
from poolrpc_server.workers.supervisor import RestartPolicy, describe_status, worker_config


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
    config = Config(workers=4, threads=10, max_inflight_bytes=4000, max_arena_bytes=800, max_arenas=2, max_streams=7)
    share = worker_config(config, 3, [Address(), Address()])
    assert share.listen == ("unix:/run/x.3",) * 2
    assert (share.threads, share.max_inflight_bytes, share.max_arena_bytes, share.max_arenas) == (2, 1000, 200, 1)
    assert (share.max_streams, share.workers) == (7, 4)


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
