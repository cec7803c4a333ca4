"""grpc.health.v1.Health/Watch: gRPC clients keep such a stream open to learn when the server stops taking calls.

A watcher has a thread only until its request has arrived and the present state is sent. Nothing is sent under a lock.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from poolrpc.errors import PoolError
from poolrpc.v1 import standard_pb2
from poolrpc_server.calls.admission import CONTROL_STALLED_SECONDS, CallLimit
from poolrpc_server.calls.call import StatusError
from poolrpc_server.calls.method import Method
from poolrpc_server.protocols.health import HEALTH_SERVICE
from poolrpc_server.protocols.messages import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from poolrpc_server.calls.call import CallContext
    from poolrpc_server.protocols.health import Health
    from poolrpc_server.transports.grpc.interceptor import GrpcContext

MAX_WATCHERS = 1024
"""Maximum number of watchers."""

MAX_OPENING = 64
"""Watchers at a time whose request has not arrived, or to which a state is being sent. Each has a thread."""

OPENING_SECONDS = 2.0
"""Seconds that a watcher may take to send its request, or to let a state be sent."""

_Status = standard_pb2.HealthCheckResponse


class HealthWatch:
    """The watchers of a server's health.

    Args:
        health: The health of the server and its services.
        reject: Rejects a call of the method, with an error.

    Attributes:
        method: The method.

    """

    def __init__(self, health: Health, reject: Callable[[CallContext, Method, PoolError], NoReturn]) -> None:
        self.method = Method(f"/{HEALTH_SERVICE}/Watch", probe=True, public=health.public)
        self._health = health
        self._reject = reject
        self._limit = CallLimit("WATCHERS", "watchers at a time", MAX_WATCHERS)
        self._opening = CallLimit("WATCHERS", "watchers at a time that are not open yet", MAX_OPENING)
        self._executor = ThreadPoolExecutor(MAX_OPENING, "poolrpc-watch")
        self._watchers: dict[_Watcher, None] = {}
        health.add_observer(self._changed)

    def handler(self, context: GrpcContext) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of one call, for grpcio."""

        def watch(
            messages: Iterator[bytes], servicer_context: grpc.ServicerContext, send: Callable[[bytes | None], object]
        ) -> None:
            context.bind(servicer_context)
            try:
                self._open(messages, context, send)
            except PoolError as error:
                try:
                    self._reject(context, self.method, error)
                except StatusError as status:
                    context.abort(status)

        # grpcio's attributes, which its own health service uses: the call goes on after the function has returned.
        watch.experimental_non_blocking = True  # type: ignore[attr-defined]
        watch.experimental_thread_pool = self._executor  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(watch)

    def close(self) -> None:
        """End every watcher's call, and the threads."""
        for watcher in list(self._watchers):
            self._executor.submit(watcher.send, None)
        self._executor.shutdown()

    def _open(self, messages: Iterator[bytes], context: GrpcContext, send: Callable[[bytes | None], object]) -> None:
        ticket = context.ticket
        ticket.enter(self._opening)
        ticket.identify(context.caller)
        ticket.wait(OPENING_SECONDS, patience=CONTROL_STALLED_SECONDS)
        message = None
        with suppress(grpc.RpcError):  # the call was cancelled
            message = next(messages, None)
        if message is None:
            return
        self.method.check_size(message)
        known = parse(standard_pb2.HealthCheckRequest, message).service in self._health.services
        ticket.enter(self._limit)
        watcher = _Watcher(context, send, known=known)
        self._watchers[watcher] = None
        if not context.add_done_callback(lambda: self._watchers.pop(watcher, None)):
            self._watchers.pop(watcher, None)
        self._update(watcher)
        ticket.leave(self._opening)

    def _changed(self, _: bool) -> None:  # noqa: FBT001 - an observer of Health
        for watcher in list(self._watchers):
            self._executor.submit(self._update, watcher)

    def _update(self, watcher: _Watcher) -> None:
        """Send the present state, unless another thread sends it."""
        with watcher.lock:
            if watcher.sending:
                return
            watcher.sending = True
        while True:
            state = self._state(watcher)
            with watcher.lock:
                if state == watcher.state:
                    watcher.sending = False
                    return
            watcher.state = state
            # A caller that does not read keeps the thread until the call is ended.
            watcher.context.ticket.wait(OPENING_SECONDS, patience=CONTROL_STALLED_SECONDS)
            watcher.send(_Status(status=state).SerializeToString())
            watcher.context.ticket.proceed()

    def _state(self, watcher: _Watcher) -> standard_pb2.HealthCheckResponse.ServingStatus.ValueType:
        if not watcher.known:
            return _Status.SERVING_STATUS_SERVICE_UNKNOWN
        return _Status.SERVING_STATUS_SERVING if self._health.serving else _Status.SERVING_STATUS_NOT_SERVING


class _Watcher:
    """One watcher's call.

    Attributes:
        context: Its context.
        send: Sends a message, and returns when it is sent or the call has ended; None ends the call.
        known: Whether it watches a service of this server.
        state: The latest state that was sent.
        sending: Whether a thread sends a state.
        lock: Protects the latter.

    """

    def __init__(self, context: GrpcContext, send: Callable[[bytes | None], object], *, known: bool) -> None:
        self.context, self.send, self.known = context, send, known
        self.state: object = None
        self.sending = False
        self.lock = Lock()
