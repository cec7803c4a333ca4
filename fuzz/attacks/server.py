"""The server that is attacked: a process with its default flags but for a few, on TCP and on a unix socket."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self
from urllib.request import urlopen

import psutil
from prometheus_client.parser import text_string_to_metric_families

import poolrpc
from fuzz.attacks.attack import MIB, Target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fuzz.attacks.attack import Attack

KEPT_MIB = 64
"""Freed memory that the C library keeps; see keep_freed_memory of poolrpc.tensors."""

INFLIGHT_BYTES = 512 * MIB
"""The default is up to 4 GiB: an attack would need as much memory to show that the limit holds."""

DRAIN_SECONDS, GRACE_SECONDS = 0.5, 10.0
EXIT_SECONDS = 3.0
"""Seconds that the interpreter may take to end after the grace, on a busy machine."""

START_SECONDS = 120.0
GOOD_TOKEN, ATTACKER_TOKEN = "the-token-of-the-good-client", "the-token-of-an-attacker"
AT_REST = ("poolrpc_inflight_bytes", "poolrpc_queue_length", "poolrpc_streams", "poolrpc_arenas", "poolrpc_arena_bytes")
"""Gauges that must be 0 when there are no calls. Every other gauge must be what it was before the first call."""

MEASURED = ("poolrpc_memory_bytes", "poolrpc_watchdog_silent_seconds")
"""Gauges that change all the time."""


@dataclass(frozen=True, slots=True)
class Variant:
    """How the server is run, and how the attack reaches it.

    Attributes:
        summary: The description.
        unix: Whether the attack comes through the unix socket.
        tokens: Whether every call needs a token.
        insider: Whether the attacker has one.
        workers: The number of serving processes.

    """

    summary: str
    unix: bool = False
    tokens: bool = False
    insider: bool = False
    workers: int = 1


VARIANTS = {
    "tcp": Variant("one process, attacked through TCP"),
    "unix": Variant("one process, attacked through its unix socket", unix=True),
    "local": Variant("one process, attacked through local calls", unix=True),
    "tokens": Variant("one process that requires tokens, attacked without one", tokens=True),
    "insider": Variant("one process that requires tokens, attacked with a valid one", tokens=True, insider=True),
    "workers": Variant("two workers, attacked through TCP", workers=2),
}


class AttackedServer:
    """A server process, in a folder of its own.

    Args:
        folder: For the socket, the tokens and the log.
        variant: How it is run.
        attack: Whose limits and log it has. None: several, whose memory is compared in time.

    Attributes:
        process: The process: the server, or the supervisor of its workers.
        target: What an attack needs to know of it.

    """

    def __init__(self, folder: Path, variant: Variant, attack: Attack | None = None) -> None:
        self._variant = variant
        self._log = folder / "log"
        self._path = folder / "pool.sock"
        flags = ["--listen", "127.0.0.1:0", "--listen", f"unix:{self._path}", "--metrics", "127.0.0.1:0"]
        flags += ["--explorer", "127.0.0.1:0"]
        flags += ["--max-inflight-bytes", str(INFLIGHT_BYTES), "--log-format", "json"]
        flags += ["--drain-seconds", str(DRAIN_SECONDS), "--shutdown-grace", str(GRACE_SECONDS)]
        if variant.tokens:
            names = {"good": GOOD_TOKEN, "attacker": ATTACKER_TOKEN}
            lines = [f"{name} {hashlib.sha256(token.encode()).hexdigest()}\n" for name, token in names.items()]
            (folder / "tokens").write_text("".join(lines))
            flags += ["--token-file", str(folder / "tokens")]
        if attack:
            flags += ["--watchdog-seconds", str(attack.watchdog_seconds)]
        if variant.workers > 1:
            flags += ["--workers", str(variant.workers)]
        command = [sys.executable, "-m", "poolrpc_server", *flags]
        if attack and attack.descriptors:
            command = ["sh", "-c", f'ulimit -n {attack.descriptors}; exec "$@"', "sh", *command]
        self._log_reader: subprocess.Popen[bytes] | None = None
        with self._log.open("ab") as log:
            if attack and attack.log == "pipe":
                self._log_reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)  # noqa: S607 - any cat
            output = self._log_reader.stdin if self._log_reader else log
            # With several of glibc's heaps the memory of many threads would take long to settle.
            env = os.environ if attack else {**os.environ, "MALLOC_ARENA_MAX": "1"}
            self.process = subprocess.Popen(command, stderr=output, env=env)  # noqa: S603 - our own command
        if self._log_reader and self._log_reader.stdin:
            self._log_reader.stdin.close()
        try:
            self._start_line = self._wait_until_serving()
        except BaseException:
            self.kill()
            raise
        self.tcp = str(self._start_line["addresses"][0])
        self._gauges = self._read_gauges()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def good_settings(self) -> dict[str, str]:
        """The settings of the good client and of the probes."""
        token = GOOD_TOKEN if self._variant.tokens else ""
        return {"address": self.tcp, "path": str(self._path), "metrics": self._start_line["metrics"], "token": token}

    @property
    def target(self) -> dict[str, Any]:
        """The fields of the Target of an attack."""
        target = Target(
            address=f"unix:{self._path}" if self._variant.unix else self.tcp,
            path=str(self._path),
            metrics=self._start_line["metrics"],
            explorer=self._start_line["explorer"],
            token=ATTACKER_TOKEN if self._variant.insider else "",
            pids=tuple(process.pid for process in self.serving()),
            log_pid=self._log_reader.pid if self._log_reader else 0,
        )
        return asdict(target)

    def max_rss_mib(self, calm_mib: int) -> int:
        """Return the limit on the memory of all serving processes: the bytes in flight, and 300 MiB for each process.

        A process that has served calls may take more than 300 MiB itself, and the C library keeps some freed memory:
        then the limit is what the processes take in calm traffic, the bytes in flight, and KEPT_MIB for each.
        """
        inflight, workers = INFLIGHT_BYTES // MIB, self._variant.workers
        return inflight + max(300 * workers, calm_mib + KEPT_MIB * workers)

    def serving(self) -> list[psutil.Process]:
        """Return the processes that serve: the workers, if there are several."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            return process.children() if self._variant.workers > 1 else [process]
        return []

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the log lines so far."""
        with self._log.open(errors="replace") as lines:
            for line in lines:
                with suppress(json.JSONDecodeError):
                    yield json.loads(line)

    def stop(self) -> tuple[float, list[str]]:
        """Stop the server with SIGTERM; return the seconds that this took, and what was wrong with it."""
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        allowed = DRAIN_SECONDS + GRACE_SECONDS + EXIT_SECONDS
        try:
            status = self.process.wait(allowed)
        except subprocess.TimeoutExpired:
            self.kill()
            return allowed, [f"SIGTERM: expected the end within {allowed:g} s, got none"]
        faults = [f"SIGTERM: expected status 0, got {status}"] if status else []
        if any(child.is_running() for child in children):
            faults.append("SIGTERM: expected the workers to end with their supervisor, got one that stays")
        return round(time.monotonic() - started, 2), faults

    def kill(self) -> None:
        """End the server, and whatever belongs to it."""
        everything = [self.process.pid, *([self._log_reader.pid] if self._log_reader else [])]
        with suppress(psutil.NoSuchProcess):
            everything += [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
        for pid in everything:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        if self._log_reader:
            self._log_reader.wait()

    def counters_at_rest(self, timeout: float) -> dict[str, float]:
        """Return the gauges that are not what they were before the first call, without calls; empty if all are.

        Args:
            timeout: Seconds within which they must be back.

        """
        until, busy = time.monotonic() + timeout, {"unread": 1.0}
        while time.monotonic() < until:
            with suppress(Exception):
                # Workers show their gauges as calls start and end.
                self._call_each_worker()
                gauges = self._read_gauges()
                busy = {
                    name: value
                    for name, value in gauges.items()
                    if value != (0 if name.startswith(AT_REST) else self._gauges.get(name, value))
                }
            if not busy:
                break
            time.sleep(0.1)
        return busy

    def _call_each_worker(self) -> None:
        options = {"grpc.use_local_subchannel_pool": 1, "grpc.enable_retries": 0}
        token = GOOD_TOKEN if self._variant.tokens else None
        for _ in range(8 if self._variant.workers > 1 else 0):
            with poolrpc.PoolClient(self.tcp, token=token, timeout=2, options=options) as client:
                client.server_info()

    def _read_gauges(self) -> dict[str, float]:
        with urlopen(f"http://{self._start_line['metrics']}/metrics", timeout=5) as page:
            families = text_string_to_metric_families(page.read().decode())
        gauges = [sample for family in families if family.type == "gauge" for sample in family.samples]
        return {
            f"{each.name} {' '.join(each.labels.values())}".strip(): each.value
            for each in gauges
            if each.name.startswith("poolrpc_") and "_created" not in each.name and each.name not in MEASURED
        }

    def _wait_until_serving(self) -> dict[str, Any]:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            for line in self.lines():
                if line["event"] == "serving":
                    return line
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)
        raise RuntimeError(f"expected a server, got status {self.process.poll()}: {self._log.read_text()[-2000:]}")
