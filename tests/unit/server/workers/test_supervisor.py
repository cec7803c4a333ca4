"""What the supervisor works out: pauses, statuses in words, each worker's part of the settings."""

import subprocess
import sys

import pytest

from poolrpc_server.config import Config
from poolrpc_server.workers.supervisor import LONGEST_PAUSE, ending, part_of, pause


class Place:
    """An address whose processes have numbers of their own."""

    address = "unix:/run/x"

    def of(self, index):
        """Give that of one."""
        return f"{self.address}.{index}"


def test_the_first_restart_is_at_once_and_the_next_ones_wait():
    """The pause doubles from failure to failure, to a bound."""
    assert [pause(failures) for failures in range(6)] == [0, 0, 0.25, 0.5, 1, 2]
    assert pause(50) == LONGEST_PAUSE


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, {"code": 0}), (70, {"code": 70}), (-9, {"signal": "SIGKILL"}), (-33, {"signal": "33"})],
)
def test_a_status_in_words(status, words):
    """A process ended by a signal has its name, or its number where it has none; any other has its code."""
    assert ending(status) == words


def test_each_worker_has_its_part():
    """Threads, bytes and arenas are divided; the addresses are the worker's own; all else is as it was."""
    config = Config(workers=4, threads=10, max_inflight_bytes=4000, max_arena_bytes=800, max_arenas=2, max_streams=7)
    part = part_of(config, 3, [Place(), Place()])
    assert part.listen == ("unix:/run/x.3",) * 2
    assert (part.threads, part.max_inflight_bytes, part.max_arena_bytes, part.max_arenas) == (2, 1000, 200, 1)
    assert (part.max_streams, part.workers) == (7, 4)


def test_a_worker_computes_with_at_least_one_thread():
    """More workers than threads have one each, and none is without bytes."""
    part = part_of(Config(workers=3, threads=1, max_inflight_bytes=2, max_arena_bytes=0), 0, [Place()])
    assert (part.threads, part.max_inflight_bytes, part.max_arena_bytes) == (1, 1, 0)


def test_the_supervisor_does_without_torch():
    """A supervisor at work has imported neither torch nor the service."""
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
