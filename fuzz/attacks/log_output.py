"""A log that cannot be written: a full disk, a reader that has ended, a reader that does not read."""

from __future__ import annotations

import os
import resource
import signal
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import psutil
from prometheus_client.parser import text_string_to_metric_families

from fuzz.attacks.attack import Target, attack
from fuzz.attacks.messages import POOL, pool
from poolrpc import MaxPool2d

if TYPE_CHECKING:
    from threading import Event

RESUME_SECONDS = 5.0
"""Seconds within which lines are written again when there is room."""


def _call(target: Target) -> None:
    """Make calls that are logged."""
    message = pool((1, 1, 2, 2), [MaxPool2d(2)]).SerializeToString()
    with target.channel() as channel, suppress(grpc.RpcError):
        for _ in range(200):
            channel.unary_unary(POOL)(message, metadata=target.headers, timeout=5)


def _not_counted(target: Target) -> list[str]:
    """Return what is wrong with the count of dropped lines: a counter of the log's that is not 0."""
    with urllib.request.urlopen(f"http://{target.metrics}/metrics", timeout=5) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    counts = {sample.name: sample.value for family in families for sample in family.samples if "log" in sample.name}
    return [] if any(counts.values()) else [f"expected a metric of dropped log lines, got {counts}"]


@attack(variants=("tcp",), alone=True)
def full_log_disk(target: Target, until: Event) -> list[str]:
    """Let writes of the log fail for a while, as on a full disk (row M1: the log ended, and nothing said so).

    Sent: the limit RLIMIT_FSIZE at the log's size, calls, and the limit as it was before.
    Aims at: the thread that writes the log.
    """
    process = psutil.Process(target.pids[0])
    log = Path(target.path).with_name("log")
    before = process.rlimit(resource.RLIMIT_FSIZE)
    process.rlimit(resource.RLIMIT_FSIZE, (log.stat().st_size, before[1]))
    try:
        _call(target)
    finally:
        process.rlimit(resource.RLIMIT_FSIZE, before)
    faults = _not_counted(target)
    size, deadline = log.stat().st_size, time.monotonic() + RESUME_SECONDS
    while log.stat().st_size <= size and time.monotonic() < deadline:
        _call(target)
        time.sleep(0.05)
    if log.stat().st_size <= size:
        faults.append("expected the log to go on when there is room again, got no line")
    until.wait()
    return faults


@attack(variants=("tcp",), log="pipe", alone=True)
def ended_log_reader(target: Target, until: Event) -> list[str]:
    """Kill the process that reads the log (row M1: a closed pipe).

    Sent: SIGKILL to the reader of the server's standard error, and calls.
    Aims at: the thread that writes the log.
    """
    os.kill(target.log_pid, signal.SIGKILL)
    _call(target)
    faults = _not_counted(target)
    while not until.is_set():
        _call(target)
    return faults


@attack(variants=("tcp",), log="pipe", alone=True)
def stopped_log_reader(target: Target, until: Event) -> list[str]:
    """Stop the process that reads the log (of the kind of M1: a pipe that is full).

    Sent: SIGSTOP to the reader of the server's standard error, and calls until the pipe's 64 KiB are full.
    Aims at: threads that wait to write, and memory of lines that wait.
    """
    os.kill(target.log_pid, signal.SIGSTOP)
    try:
        while not until.is_set():
            _call(target)
    finally:
        os.kill(target.log_pid, signal.SIGCONT)
    return []
