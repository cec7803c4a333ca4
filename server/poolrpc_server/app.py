"""One running server, put together from a Config: engine, dispatcher, doors, health, reflection; and its end."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from poolrpc import PoolClient, __version__
from poolrpc.codec import Limit, ServerInfo
from poolrpc.errors import UnavailableError
from poolrpc.layers import DTYPES
from poolrpc.limits import MAX_BRANCHES, MAX_CHAIN, MAX_FRACTIONAL_AXIS, MAX_NUMEL, MAX_PARAMETER
from poolrpc.settings import unix_path
from poolrpc.tensors import keep_freed_memory
from poolrpc_server.admission import Admission
from poolrpc_server.arena import ArenaListener, find_in
from poolrpc_server.bell import Bell
from poolrpc_server.config import Config, ConfigError
from poolrpc_server.dispatch import Dispatcher
from poolrpc_server.doors.native import SERVICE, PoolDoor
from poolrpc_server.engine import Engine
from poolrpc_server.interceptors import CallInterceptor
from poolrpc_server.logs import CallLog, log
from poolrpc_server.sockets import take
from poolrpc_server.validate import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from poolrpc.errors import PoolError

FAILED = 70
"""The exit status of a process that can't go on and wants to be started again."""

FAILED_SECONDS = 5.0
"""How long such a process may take to end: whatever hangs in it then is left."""

CONFIGURED_LIMITS = (
    "max_message_bytes",
    "max_output_bytes",
    "max_output_growth",
    "max_work",
    "max_inflight_bytes",
    "max_arena_bytes",
    "max_arenas",
    "max_streams",
)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """A server: made ready, started, stopped once.

    Attributes:
        addresses: Where it listens; free ports filled in once it is made.
        info: What it says of itself.
        failure: Why it can't go on; empty where it can.
        on_failure: Called when it can't go on.

    """

    def __init__(self, config: Config) -> None:
        """Make a server and take its addresses.

        Raises:
            ConfigError: An address can't be had, or there is no such device.

        """
        keep_freed_memory()
        try:
            engine = Engine(config.device, config.threads)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.info = _describe(config, engine)
        self.failure = ""
        self.on_failure: Callable[[], object] = lambda: None
        self._engine = engine
        limits = Limits(config.max_message_bytes, config.max_output_bytes, config.max_output_growth, config.max_work)
        self._arenas: list[ArenaListener] = []
        dispatcher = Dispatcher(limits, Admission(config.max_inflight_bytes), engine, self.info, find_in(self._arenas))
        self._call_log = CallLog()
        self._threads = ThreadPoolExecutor(config.call_threads, "poolrpc-call")
        self._server = grpc.server(
            self._threads,
            interceptors=[CallInterceptor(self._call_log, self._judge)],
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                # Two servers on one port would take turns unnoticed, but for workers, whose supervisor looks after
                # that; and a compressed message may inflate to any size.
                ("grpc.so_reuseport", int(config.workers > 1)),
                ("grpc.compression_enabled_algorithms_bitset", 1),
            ],
        )
        # A stream has a call thread for as long as it lasts: one at least is left for others.
        streams = max(1, min(config.max_streams, config.call_threads - 1))
        door = PoolDoor(dispatcher, streams, config.stream_idle_seconds)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, door.handlers()),))
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._services = ("", SERVICE, health.SERVICE_NAME)
        reflection.enable_server_reflection((*self._services[1:], reflection.SERVICE_NAME), self._server)
        self.addresses = tuple(self._listen(address) for address in config.listen)
        if config.max_arena_bytes:
            self._share_memory(config)

    def _listen(self, address: str) -> str:
        try:
            if path := unix_path(address):
                take(Path(path))
            port = self._server.add_insecure_port(address)
        except (RuntimeError, BlockingIOError):
            raise ConfigError(f"listen: {address!r} can't be had: in use, or not of this machine") from None
        return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"

    def _share_memory(self, config: Config) -> None:
        paths = list(filter(None, map(unix_path, self.addresses)))
        for path in paths:
            # The limits are of all of them together.
            most = {
                "max_bytes": config.max_arena_bytes // len(paths),
                "max_arenas": max(1, config.max_arenas // len(paths)),
                # Other workers don't have a worker's arenas.
                "calls": Path(path).name if config.workers > 1 else "",
            }
            try:
                self._arenas.append(ArenaListener(path, **most))  # type: ignore[arg-type]
            except ValueError as error:
                log.warning("no shared memory: clients send their bytes", error=str(error))

    def start(self) -> None:
        """Serve."""
        self._server.start()
        self._set_health(SERVING)

    def fail(self, reason: str) -> None:
        """Say that this process can't go on, for any thread: its device's state is lost, for example.

        Health says NOT_SERVING; `serve` ends with FAILED, so that the supervisor, or who runs the process, starts it
        again.
        """
        if not self.failure:
            self.failure = reason
            log.critical("failed", reason=reason)
            self.drain()
            self.on_failure()

    def _judge(self, error: Exception) -> PoolError | None:
        # What CUDA reports this way stays: every later call of its would fail. Out of memory is another class.
        if not isinstance(error, torch.AcceleratorError):
            return None
        self.fail(str(error).partition("\n")[0])
        return UnavailableError("the device failed; the server starts again", reason="DEVICE_FAILED")

    def drain(self) -> None:
        """Tell health checks to send no more; calls are still served."""
        self._set_health(NOT_SERVING)

    def stop(self, grace: float) -> None:
        """Refuse new calls, finish the accepted ones within `grace` seconds, and end."""
        self.drain()
        self._server.stop(grace).wait()
        for arenas in self._arenas:
            arenas.close()
        self._threads.shutdown()
        self._engine.close()
        self._call_log.close()

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in self._services:
            self._health.set(service, status)


def _describe(config: Config, engine: Engine) -> ServerInfo:
    return ServerInfo(
        version=__version__,
        torch_version=torch.__version__,
        device=str(engine.device),
        threads=engine.threads,
        layers=dict(DTYPES),
        limits={
            **{name: Limit(getattr(config, name), config.unit(name)) for name in CONFIGURED_LIMITS},
            "max_tensor_cells": Limit(MAX_NUMEL, "cells"),
            "max_parameter": Limit(MAX_PARAMETER, "cells"),
            "max_fractional_axis": Limit(MAX_FRACTIONAL_AXIS, "cells"),
            "max_branches": Limit(MAX_BRANCHES, "branches"),
            "max_chain": Limit(MAX_CHAIN, "layers"),
        },
    )


def _facts(server: Server) -> dict[str, Any]:
    info = server.info
    return {
        "addresses": " ".join(server.addresses),
        "version": info.version,
        "device": info.device,
        "torch": info.torch_version,
        "threads": info.threads,
        **{name: str(limit) for name, limit in info.limits.items()},
    }


def serve(
    config: Config,
    *,
    stopping: Bell | None = None,
    started: Callable[[dict[str, Any]], object] = lambda facts: log.info("serving", **facts),
) -> int:
    """Run a server until SIGTERM or SIGINT, then drain and stop; a second signal ends the process at once.

    Gives the exit status: 0, or FAILED where the server can't go on.

    Args:
        config: The settings.
        stopping: Stops it as a first signal does, when another thread rings it.
        started: Called with the facts of the start line, once it serves.

    Raises:
        ConfigError: The server can't be made as told.

    """
    server = Server(config)
    stopping = stopping or Bell()
    server.on_failure = stopping.ring

    def on_signal(number: int, _: object) -> None:
        # The next one finds the default: the process ends by it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        log.info("stopping", signal=signal.Signals(number).name)
        stopping.ring()

    with stopping.hearing_signals():
        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)
        server.start()
        started(_facts(server))
        stopping.wait()
    if server.failure:
        last = threading.Timer(FAILED_SECONDS, os._exit, [FAILED])
        last.daemon = True
        last.start()
        server.stop(grace=min(1.0, config.shutdown_grace))
        return FAILED
    server.drain()
    # Load balancers need this time to see the health change; nothing ends it early but a second signal.
    threading.Event().wait(config.drain_seconds)
    server.stop(config.shutdown_grace)
    log.info("stopped")
    return 0


@contextmanager
def embedded(**settings: Any) -> Iterator[PoolClient]:  # noqa: ANN401 - Config's fields
    """Run a whole server in this process, on a private unix socket, and give a client that is connected to it.

    Args:
        settings: Config's fields: threads, device, limits. torch goes to one thread on the server's own threads; those
            of the caller keep theirs.

    Raises:
        ConfigError: A setting is wrong.

    """
    with tempfile.TemporaryDirectory(prefix="poolrpc-") as folder:
        address = f"unix:{Path(folder) / 'pool.sock'}"
        server = Server(Config(**{"listen": (address,), **settings}))
        server.start()
        try:
            with PoolClient(server.addresses[0]) as client:
                yield client
        finally:
            server.stop(grace=0)
