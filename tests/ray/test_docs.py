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

TERMINAL = [*IN_NAMESPACE, "env", "--default-signal=INT", "script", "-qec"]
"""Runs a shell in a terminal with SIGINT at its default: without job control, background jobs would ignore SIGINT."""

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_the_commands_do_what_they_say(ray_environment: dict[str, str]) -> None:
    """Pasted into a shell, the commands install Ray, serve, pool a tensor, and leave no processes."""
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs/ray.md").read_text(), re.MULTILINE | re.DOTALL)
    with ray_folder() as folder, ended_processes(folder):
        done = subprocess.run(  # noqa: S603 - our own commands
            [*TERMINAL, shlex.join(["bash", "-mec", commands]), "/dev/null"],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env={**ray_environment, "RAY_TMPDIR": folder},
            timeout=500,
        )
        assert "(8, 64, 28, 28) SERVING" in done.stdout, done.stdout + done.stderr
        assert "KeyboardInterrupt, shutting down" in done.stdout, done.stdout + done.stderr
        assert done.returncode == 0
        _, remaining = psutil.wait_procs(processes_of(folder), timeout=60)
        assert not remaining


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
