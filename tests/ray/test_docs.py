"""The commands of docs/ray.md, run unchanged."""

from __future__ import annotations

import re
import shlex
import subprocess
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import psutil
import pytest

from scripts.ray_cluster import IN_NAMESPACE, ray_folder
from tests.installing import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

TERMINAL = [*IN_NAMESPACE, "timeout", "--foreground", "350", "env", "--default-signal=INT", "script", "-qec"]
"""Runs a shell in a terminal, for 350 s at most, with SIGINT at its default: background jobs would ignore it else."""

SERVED = "(8, 64, 28, 28) SERVING"
"""What the commands' program prints."""

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def test_the_commands_do_what_they_say(ray_environment: dict[str, str]) -> None:
    """Pasted into a shell, the commands install Ray, serve, pool a tensor, and leave no processes."""
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs/ray.md").read_text(), re.MULTILINE | re.DOTALL)
    output, status = run(commands, ray_environment)
    if SERVED not in output:  # Ray itself may fail to start on a busy machine; twice would be our fault
        first = output
        output, status = run(commands, ray_environment)
        output = first + output
    assert SERVED in output, output
    assert "KeyboardInterrupt, shutting down" in output, output
    assert status == 0, output


def run(commands: str, environment: dict[str, str]) -> tuple[str, int]:
    """Run commands with a Ray of their own, check that they leave no process, and return their output and status."""
    with ray_folder() as folder, ended_processes(folder):
        done = subprocess.run(  # noqa: S603 - our own commands
            [*TERMINAL, shlex.join(["bash", "-mec", commands]), "/dev/null"],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env={**environment, "RAY_TMPDIR": folder},
            timeout=380,
        )
        psutil.wait_procs(processes_of(folder), timeout=60)
        # Not what wait_procs returns: it counts processes that have ended and whose parent does not ask.
        assert SERVED not in done.stdout or not processes_of(folder), done.stdout
    return done.stdout, done.returncode


@contextmanager
def ended_processes(folder: str) -> Iterator[None]:
    """Kill what is left of Ray at the end of the context, if its commands failed half way."""
    try:
        yield
    finally:
        for process in processes_of(folder):
            with suppress(psutil.Error):
                process.kill()


def processes_of(folder: str) -> list[psutil.Process]:
    """Return the processes of the Ray that uses a folder."""
    return [process for process in psutil.process_iter() if folder in " ".join(cmdline(process))]


def cmdline(process: psutil.Process) -> list[str]:
    """Return the command line of a process; empty if the process has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []
