"""The command `poolrpc-server`, and the package run as a module."""

import subprocess
import sys

import poolrpc


def test_the_package_runs_as_a_module():
    """`python -m poolrpc_server` is the command: it has its help, and its exit status for a wrong setting."""
    command = [sys.executable, "-m", "poolrpc_server"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)  # noqa: S603 - ours
    assert done.stdout.startswith("usage: poolrpc-server ")
    done = subprocess.run([*command, "--threads", "-1"], capture_output=True, text=True, check=False)  # noqa: S603 - ours
    assert done.returncode == 2
    assert done.stderr == "poolrpc-server: threads: expected at least 0 threads, got -1\n"


def test_the_version():
    """--version prints the version of the package, and needs no torch."""
    program = (
        "import sys; from poolrpc_server.cli import main\n"
        "try: main(['--version'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603 - ours
    assert done.stdout == f"poolrpc-server {poolrpc.__version__}\n"
