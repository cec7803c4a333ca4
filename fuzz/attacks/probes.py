"""The probes of an orchestrator: grpc.health.v1 on a connection that is kept and on new ones, and the HTTP pages."""

from __future__ import annotations

import urllib.request
from functools import partial
from typing import Any
from urllib.error import HTTPError

import grpc

from fuzz.attacks.attack import OWN_CHANNEL
from fuzz.attacks.child import Recorder, run
from poolrpc.v1 import standard_pb2

CHECK = "/grpc.health.v1.Health/Check"
SERVING = standard_pb2.HealthCheckResponse.SERVING_STATUS_SERVING


def check(channel: grpc.Channel, timeout: float) -> str:
    """Ask for the server's health; return what is wrong with the answer, or an empty string."""
    answer = standard_pb2.HealthCheckResponse.FromString(channel.unary_unary(CHECK)(b"", timeout=timeout))
    return "" if answer.status == SERVING else "wrong"


def main(settings: dict[str, Any]) -> None:
    """Probe until standard input ends.

    Args:
        settings: The address ("address"), that of the metrics ("metrics"), and the seconds to wait for an answer
            ("timeout").

    """
    address, timeout = settings["address"], settings["timeout"]
    recorder = Recorder()

    def kept() -> None:
        with grpc.insecure_channel(address, OWN_CHANNEL) as channel:
            recorder.repeat("health", partial(check, channel, timeout), 0.2)

    def new() -> None:
        def attempt() -> str:
            with grpc.insecure_channel(address, OWN_CHANNEL) as channel:
                return check(channel, timeout)

        recorder.repeat("health, new connection", attempt, 0.3)

    def page(name: str) -> str:
        try:
            with urllib.request.urlopen(f"http://{settings['metrics']}/{name}", timeout=timeout) as answer:
                return "" if answer.read() else "wrong"
        except HTTPError as error:
            error.close()
            return ""  # not ready: an answer

    def pages() -> None:
        while not recorder.until.is_set():
            for name in ("livez", "readyz", "metrics"):
                recorder.measure(name, partial(page, name))
            recorder.until.wait(0.3)

    run(recorder, kept, pages, *([new] if settings["new_connections"] else []))
