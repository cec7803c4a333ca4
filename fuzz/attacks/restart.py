"""The end of a supervisor by SIGKILL, and a full disk for the metrics of workers; each with a server of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from fuzz.attacks.attack import Target, attack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from threading import Event

GONE_SECONDS = 3.0
"""Seconds within which workers must have ended when their supervisor has."""

START_SECONDS = 60.0
SLOWER = 2.0
"""A start after a kill may take so many times as long as the first one, and a second."""

RESTART_SECONDS = 8.0
"""Seconds within which a killed worker must serve again."""

FOLDERS = "poolrpc-metrics-*"


@contextmanager
def _workers(
    folder: Path, port: int, temporary: Path, *command: str
) -> Iterator[tuple[subprocess.Popen[bytes], Path, float]]:
    """Start a server of two workers; yield its process, its log and the seconds until it served; kill it afterwards.

    Args:
        folder: For its socket and its log.
        port: Its port.
        temporary: The folder for its temporary files.
        command: What runs it.

    """
    log = folder / f"log-{time.monotonic_ns()}"
    flags = ["--listen", f"127.0.0.1:{port}", "--listen", f"unix:{folder / 'pool.sock'}", "--metrics", "127.0.0.1:0"]
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own command
            [*command, sys.executable, "-m", "poolrpc_server", *flags, "--workers", "2", "--log-format", "json"],
            stderr=output,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
    workers: list[psutil.Process] = []
    try:
        while '"serving"' not in log.read_text():
            if process.poll() is not None or time.monotonic() > started + START_SECONDS:
                raise ChildProcessError(f"status {process.poll()}: {log.read_text()[-400:]}")
            time.sleep(0.05)
        seconds = time.monotonic() - started
        workers = psutil.Process(process.pid).children(recursive=True)
        yield process, log, seconds
    finally:
        with suppress(psutil.NoSuchProcess):
            workers += psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as made:
        return int(made.getsockname()[1])


@attack(variants=("tcp",), alone=True)
def killed_supervisor(_target: Target, until: Event) -> list[str]:
    """Kill a supervisor and start it again (row L: folders stayed, and a restart failed for 5 s).

    Sent: SIGKILL to the supervisor of a second server, then the same command again, on the same addresses.
    Aims at: the addresses that its workers still have, and its files.
    """
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="poolrpc-restart-") as name:
        folder, port = Path(name), _free_port()
        with _workers(folder, port, folder) as (process, _, first):
            workers = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            # A service manager starts it again at once.
            try:
                with _workers(folder, port, folder) as (_, _, second):
                    if second > SLOWER * first + 1:
                        faults.append(f"expected a restart within {SLOWER * first + 1:.1f} s, got {second:.1f} s")
                    left = [each for each in workers if each.is_running()]
                    left = psutil.wait_procs(left, GONE_SECONDS)[1]
                    if left:
                        faults.append(f"expected the workers to end with their supervisor, got {len(left)} that stay")
                    folders = list(folder.glob(FOLDERS))
                    if len(folders) > 1:
                        faults.append(f"expected one folder of metrics after the next start, got {len(folders)}")
            except ChildProcessError as error:
                faults.append(f"expected the restart to be served, got {error}")
    until.wait()
    return faults


@attack(variants=("tcp",), alone=True)
def full_metrics_disk(_target: Target, until: Event) -> list[str]:
    """Fill the disk of the workers' metrics, and kill a worker (row M4: restarted workers died by SIGBUS in a loop).

    Sent: a TMPDIR of its own, in a mount namespace, filled to its last page; SIGKILL to a worker.
    Aims at: the files into which workers count, which are mapped into memory.
    """
    enter = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--mount"]
    with tempfile.TemporaryDirectory(prefix="poolrpc-disk-") as name:
        folder, temporary = Path(name), Path(name) / "full"
        temporary.mkdir()
        mount = f'mount -t tmpfs -o size=8m poolrpc "{temporary}" && '
        if not shutil.which("unshare") or subprocess.run([*enter, "sh", "-c", f"{mount} true"], check=False).returncode:  # noqa: S603 - our own command
            return ["skipped: this machine permits no mount namespace"]
        command = [*enter, "sh", "-c", f'{mount} exec "$@"', "sh"]
        with _workers(folder, _free_port(), temporary, *command) as (process, log, _):
            supervisor = psutil.Process(process.pid)
            # The folder as the server sees it: here the mount does not exist.
            _fill(Path(f"/proc/{process.pid}/root{temporary}") / "fill")
            os.kill(supervisor.children()[0].pid, signal.SIGKILL)
            time.sleep(RESTART_SECONDS)
            faults = []
            if died := log.read_text().count("SIGBUS"):
                faults.append(f"expected workers that serve without room for metrics, got {died} that died by SIGBUS")
            if (serving := len(supervisor.children())) < 2:
                faults.append(f"expected two workers, got {serving}")
    until.wait()
    return faults


def _fill(file: Path) -> None:
    with suppress(OSError), file.open("wb", buffering=0) as filling:
        while True:
            filling.write(bytes(4096))
