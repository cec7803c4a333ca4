"""docs/ray.md's commands run as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess

import psutil
import pytest

from scripts.ray_cluster import IN_NAMESPACE, ray_folder
from tests.installing import ROOT

TERMINAL = [*IN_NAMESPACE, "env", "--default-signal=INT", "script", "-qec"]
"""Elsewhere a shell has no jobs, and what runs in its background doesn't hear an interrupt."""

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_the_commands_do_what_they_say(rays_environment: dict[str, str]) -> None:
    """Pasted into a shell they install, serve, pool a tensor, and leave nothing behind."""
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs/ray.md").read_text(), re.MULTILINE | re.DOTALL)
    with ray_folder() as made:
        done = subprocess.run(  # noqa: S603 - our own commands
            [*TERMINAL, shlex.join(["bash", "-mec", commands]), "/dev/null"],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env={**rays_environment, "RAY_TMPDIR": made},
            timeout=500,
        )
        assert "(8, 64, 28, 28) SERVING" in done.stdout, done.stdout + done.stderr
        assert "KeyboardInterrupt, shutting down" in done.stdout, done.stdout + done.stderr
        assert done.returncode == 0
        of_ray = [each for each in psutil.process_iter() if made in " ".join(cmdline(each))]
        _, left = psutil.wait_procs(of_ray, timeout=60)
        assert not left


def cmdline(process: psutil.Process) -> list[str]:
    """Give a process's command line; empty where it has gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []
