"""The watchdog: calls the process's own gRPC server, and ends the process if the server stops answering."""

from __future__ import annotations

import faulthandler
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING

import grpc

from poolrpc._wire.status import DETAILS_KEY
from poolrpc.addresses import grpc_target

if TYPE_CHECKING:
    from collections.abc import Callable

CHECK_SECONDS = 1.0
"""Maximum seconds between two checks."""

CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

UNANSWERED = {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}
"""Statuses that gRPC itself gives to calls without an answer. Any other one shows that the server serves, and so does
one of these with the server's details."""


class Watchdog:
    """A thread that calls the server of its own process, as callers do, for as long as it runs.

    A thread of the server that hangs, and an executor without a free thread, are noticed here. A thread that never
    releases the interpreter stops this one too: faulthandler, which needs no interpreter, then ends the process with
    status 1 after twice the time.

    Args:
        address: An address of the server, "unix:PATH".
        method: The method to call, "/package.Service/Method".
        seconds: Seconds without an answer after which the process is ended.
        answered: Called after each answer.
        failed: Called with a reason if there is none; it should end the process.

    """

    def __init__(
        self,
        address: str,
        method: str,
        seconds: float,
        answered: Callable[[], object],
        failed: Callable[[str], object],
    ) -> None:
        self._seconds = seconds
        self._answered = answered
        self._failed = failed
        self._channel = grpc.insecure_channel(grpc_target(address), CHANNEL_OPTIONS)
        self._call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(method)
        self._closing = Event()
        self._thread = Thread(target=self._run, name="poolrpc-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; the process is not ended any more."""
        self._closing.set()
        self._channel.close()  # which ends the call in progress
        self._thread.join(self._seconds)
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        silent, pause = 0.0, min(CHECK_SECONDS, self._seconds / 10)
        faulthandler.dump_traceback_later(2 * self._seconds, exit=True)
        while not self._closing.wait(pause):
            begun = monotonic()
            if self._is_answered():
                silent = 0.0
                faulthandler.dump_traceback_later(2 * self._seconds, exit=True)
                self._answered()
            elif not self._closing.is_set():
                # The time in which the process or the machine was suspended counts as one failed check at most. But
                # faulthandler counts all of it, and ends a process that was suspended for twice `seconds`.
                silent += min(monotonic() - begun + pause, self._seconds / 2)
                if silent >= self._seconds:
                    self._failed(f"the server has not answered its own calls for {self._seconds:g} seconds")
                    return

    def _is_answered(self) -> bool:
        try:
            self._call(b"", timeout=self._seconds / 2, wait_for_ready=True)
        except grpc.RpcError as error:
            details = [each for each in error.trailing_metadata() or () if each.key == DETAILS_KEY]
            return error.code() not in UNANSWERED or bool(details)
        except ValueError:  # the channel was closed
            return False
        return True
