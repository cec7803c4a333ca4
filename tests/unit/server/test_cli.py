"""The command `poolrpc-server`, and the package run as a module."""

import subprocess
import sys


def test_the_package_runs_as_a_module():
    """`python -m poolrpc_server` is the command: it has its help, and its exit status for a wrong setting."""
    command = [sys.executable, "-m", "poolrpc_server"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)  # noqa: S603 - ours
    assert done.stdout.startswith("usage: poolrpc-server ")
    done = subprocess.run([*command, "--threads", "-1"], capture_output=True, text=True, check=False)  # noqa: S603 - ours
    assert done.returncode == 2
    assert done.stderr == "poolrpc-server: threads: expected at least 0 threads, got -1\n"
