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
from poolrpc._shapes.limits import MAX_BRANCHES, MAX_CHAIN, MAX_FRACTIONAL_AXIS, MAX_NUMEL, MAX_PARAMETER
from poolrpc._wire.codec import Limit, ServerInfo
from poolrpc.access import unix_path
from poolrpc.errors import UnavailableError
from poolrpc.layers import LAYERS
from poolrpc.tensors import keep_freed_memory
from poolrpc_server.calls.admission import AdmissionControl
from poolrpc_server.calls.dispatch import Dispatcher
from poolrpc_server.calls.queue import QueueLimits
from poolrpc_server.calls.streams import Streams
from poolrpc_server.calls.tokens import TokenFile
from poolrpc_server.calls.validate import Limits
from poolrpc_server.compute.buffers import use_one_heap
from poolrpc_server.compute.engine import Engine
from poolrpc_server.config import Config, ConfigError
from poolrpc_server.presets import read_presets
from poolrpc_server.protocols.native import SERVICE, PoolDoor
from poolrpc_server.protocols.triton import servicer
from poolrpc_server.protocols.triton.shared_memory import SharedMemoryRegistry
from poolrpc_server.signals import STOP_SIGNALS, SignalEvent, preserved_handlers
from poolrpc_server.sockets import prepare_path
from poolrpc_server.telemetry import traces
from poolrpc_server.telemetry.logs import CallLog, log
from poolrpc_server.telemetry.metrics import IN_FOLDER, Load, Metrics, MetricsServer
from poolrpc_server.transports.grpc.interceptor import CallInterceptor
from poolrpc_server.transports.grpc.threads import CallThreads
from poolrpc_server.transports.grpc.tls import Certificates, TokenInterceptor
from poolrpc_server.transports.local.arenas import ArenaListener, arena_finder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from poolrpc.errors import PoolError
    from poolrpc_server.telemetry.spans import Spans

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
    "max_queue",
    "max_batch_bytes",
    "max_arena_bytes",
    "max_arenas",
    "max_streams",
)
NEED_ROOM = (
    f"/{SERVICE}/Pool",
    f"/{SERVICE}/PoolStream",
    *(f"/{servicer.SERVICE}/{name}" for name in servicer.COMPUTE),
)
"""The methods that take a place under way."""

STOPPING_SECONDS = 1.0
"""How long, after the grace, calls may take to hear that they are not answered."""

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """A server: made ready, started, stopped once.

    Attributes:
        addresses: Where it listens; free ports filled in once it is made.
        info: What it says of itself.
        metrics_address: Where its metrics are read, "host:port"; empty: nowhere.
        failure: Why it can't go on; empty where it can.
        on_failure: Called when it can't go on.
        models: What it serves by the Open Inference Protocol, by name.

    """

    def __init__(
        self,
        config: Config,
        spans: Spans | None = None,
        make_server: Callable[..., grpc.Server] = grpc.server,
    ) -> None:
        """Make a server and take its addresses.

        Args:
            config: The settings.
            spans: Where its calls' spans are made; closed with it.
            make_server: What receives its calls: gRPC's own server, or one that takes grpc.server's arguments.

        Raises:
            ConfigError: An address is not free, there is no such device, or the TLS or token files can't be used.

        """
        keep_freed_memory()
        self._certificates, tokens = _guards(config)
        try:
            engine = Engine(config.device, config.threads)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.info = _describe(config, engine, spans)
        self._spans = spans
        self.failure = ""
        self.on_failure: Callable[[], object] = lambda: None
        self._engine = engine
        limits = Limits(config.max_message_bytes, config.max_output_bytes, config.max_output_growth, config.max_work)
        self._arenas: list[ArenaListener] = []
        bounds = QueueLimits(
            config.max_queue, config.max_queue_seconds, config.max_batch_bytes, config.max_queue_delay / 1000
        )
        self._admission = AdmissionControl(config.max_inflight_bytes)
        self._metrics = Metrics(enabled=bool(config.metrics))
        counting = self._metrics if config.metrics else None
        self._dispatcher = Dispatcher(
            limits, self._admission, engine, self.info, arena_finder(self._arenas), bounds, counting
        )
        self._call_log = CallLog()
        self._threads = CallThreads(config.call_threads, self._dispatcher)
        # Whoever looks after the server has its answer while every other call waits. A stream of reflection's may be
        # left open for as long as a caller likes.
        self._quick, self._reflecting = (ThreadPoolExecutor(4, f"poolrpc-{name}") for name in ("quick", "reflection"))
        calls = CallInterceptor(
            self._call_log,
            self._metrics,
            self._threads,
            NEED_ROOM,
            {
                f"/{SERVICE}/GetServerInfo": self._quick,
                f"/{SERVICE}/InferShape": self._quick,
                **{f"/{servicer.SERVICE}/{name}": self._quick for name in servicer.QUICK},
                f"/{health.SERVICE_NAME}/": self._quick,
                f"/{reflection.SERVICE_NAME}/": self._reflecting,
            },
            self._judge,
            spans,
        )
        guards = [TokenInterceptor(tokens, calls, health=config.health_requires_token)] if tokens else []
        self._server = make_server(
            self._threads,
            interceptors=[*guards, calls],
            options=[
                *_connection_options(config),
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                # Two servers on one port would take turns unnoticed, but for workers, whose supervisor looks after
                # that; and a compressed message may inflate to any size.
                ("grpc.so_reuseport", int(config.workers > 1)),
                ("grpc.compression_enabled_algorithms_bitset", 1),
            ],
        )
        # A stream has a call thread for as long as it lasts: one at least is left for others.
        most = max(1, min(config.max_streams, config.call_threads - 1))
        self._streams = Streams(most, config.stream_idle_seconds)
        self._metrics.watch(self._load)
        self._serving = False
        models, regions = (
            read_presets(config.model, config.models),
            SharedMemoryRegistry(allowed=config.allow_client_shm),
        )
        self.models = tuple(models)
        pool = PoolDoor(self._dispatcher, self._streams)
        self._threads.quick[f"/{SERVICE}/Pool".encode()] = pool.is_quick
        for service, door in (
            (SERVICE, pool),
            (
                servicer.SERVICE,
                servicer.InferenceDoor(self._dispatcher, models, regions, self._streams, lambda: self._serving),
            ),
        ):
            handlers = door.handlers()
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
            for name, handler in handlers.items():
                self._metrics.expect("bidi_stream" if handler.request_streaming else "unary", service, name)
        self._health = health.HealthServicer(experimental_thread_pool=self._quick)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._services = ("", SERVICE, servicer.SERVICE, health.SERVICE_NAME)
        reflection.enable_server_reflection((*self._services[1:], reflection.SERVICE_NAME), self._server)
        self.addresses = tuple(self._listen(address) for address in config.listen)
        # Where the metrics go to a folder, whoever sums them listens.
        self._metrics_server = self._show_metrics(config.metrics) if config.metrics and not IN_FOLDER else None
        self.metrics_address = self._metrics_server.address if self._metrics_server else ""
        if config.max_arena_bytes:
            self._share_memory(config)

    def _listen(self, address: str) -> str:
        try:
            if path := unix_path(address):
                prepare_path(Path(path))
            # A unix socket is this machine's alone, and its clients share memory with the server.
            if path or self._certificates is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._certificates.credentials())
        except (RuntimeError, BlockingIOError):
            raise ConfigError(
                f"listen: expected a free address, got {address!r}: it is in use, or does not belong to this machine"
            ) from None
        return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"

    def _share_memory(self, config: Config) -> None:
        paths = list(filter(None, map(unix_path, self.addresses)))
        for path in paths:
            # The limits are of all of them together.
            most = {
                "max_bytes": config.max_arena_bytes // len(paths),
                "max_arenas": max(1, config.max_arenas // len(paths)),
                # Other workers don't have a worker's arenas.
                "call_socket": Path(path).name if config.workers > 1 else "",
            }
            try:
                self._arenas.append(ArenaListener(path, **most))  # type: ignore[arg-type]
            except ValueError as error:
                log.warning("no shared memory: clients send their bytes", error=str(error))

    def _show_metrics(self, address: str) -> MetricsServer:
        try:
            return MetricsServer(address, self._metrics.collect, lambda: self._serving)
        except (OSError, UnicodeError) as error:  # the latter of a name that can't be one
            raise ConfigError(f"metrics: expected a free address, got {address!r}: {error}") from None

    def _load(self) -> Load:
        lengths, oldest = self._dispatcher.waiting()
        return Load(
            inflight_bytes=self._admission.held,
            queue_lengths=lengths,
            queue_oldest_seconds=oldest,
            arenas=sum(each.live for each in self._arenas),
            arena_bytes=sum(each.nbytes for each in self._arenas),
            streams=self._streams.count,
        )

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
        # What still waits when the time is up is told to try elsewhere, and has a moment to hear it.
        ended = self._server.stop(grace + STOPPING_SECONDS if grace else 0)
        if not ended.wait(grace):
            self._dispatcher.stop()
            ended.wait()
        for arenas in self._arenas:
            arenas.close()
        for threads in (self._threads, self._quick, self._reflecting):
            threads.shutdown()
        self._engine.close()
        if self._spans is not None:
            self._spans.close(grace)
        self._call_log.close()
        if self._metrics_server:
            self._metrics_server.close()

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        self._serving = status == SERVING
        for service in self._services:
            self._health.set(service, status)


def _guards(config: Config) -> tuple[Certificates | None, TokenFile | None]:
    try:
        cert, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
        certificates = Certificates(cert, key, client_ca) if cert else None
    except ValueError as error:
        raise ConfigError(f"tls_cert: {error}") from None
    try:
        return certificates, TokenFile(config.token_file) if config.token_file else None
    except ValueError as error:
        raise ConfigError(f"token_file: {error}") from None


def _connection_options(config: Config) -> list[tuple[str, int]]:
    options = {
        "grpc.keepalive_time_ms": config.keepalive_seconds,
        "grpc.keepalive_timeout_ms": config.keepalive_timeout_seconds,
        "grpc.http2.min_ping_interval_without_data_ms": config.min_ping_seconds,
        "grpc.max_connection_age_ms": config.max_connection_age_seconds,
        "grpc.max_connection_idle_ms": config.max_connection_idle_seconds,
    }
    return [
        *((name, round(seconds * 1000)) for name, seconds in options.items() if seconds),
        ("grpc.max_connection_age_grace_ms", round(config.shutdown_grace * 1000)),
        # A connection may also be idle, and its peer gone, without calls.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_concurrent_streams", config.max_connection_calls),
        # gRPC drops calls at random between the two.
        ("grpc.max_metadata_size", config.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", config.max_metadata_bytes),
    ]


def _describe(config: Config, engine: Engine, spans: Spans | None) -> ServerInfo:
    return ServerInfo(
        version=__version__,
        torch_version=torch.__version__,
        device=str(engine.device),
        threads=engine.threads,
        layers={name: layer.dtypes for name, layer in LAYERS.items()},
        limits={
            **{name: Limit(getattr(config, name), config.unit(name)) for name in CONFIGURED_LIMITS},
            "max_tensor_cells": Limit(MAX_NUMEL, "cells"),
            "max_parameter": Limit(MAX_PARAMETER, "cells"),
            "max_fractional_axis": Limit(MAX_FRACTIONAL_AXIS, "cells"),
            "max_branches": Limit(MAX_BRANCHES, "branches"),
            "max_chain": Limit(MAX_CHAIN, "layers"),
        },
        features={
            "tls": "mutual" if config.tls_client_ca else "on" if config.tls_cert else "off",
            "tokens": "on" if config.token_file else "off",
            "metrics": "on" if config.metrics else "off",
            "traces": "off" if spans is None else spans.destination,
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
        **info.features,
        "metrics": server.metrics_address,
        "models": " ".join(server.models),
        **{name: str(limit) for name, limit in info.limits.items()},
    }


@preserved_handlers()
def serve(
    config: Config,
    *,
    stopping: SignalEvent | None = None,
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
    use_one_heap()  # before there are threads that have others
    server = Server(config, traces.begin())
    stopping = stopping or SignalEvent()
    server.on_failure = stopping.set

    def on_signal(number: int, _: object) -> None:
        # A second signal ends the process at once, by the default action.
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        log.info("stopping", signal=signal.Signals(number).name)
        stopping.set()

    with stopping.wake_on_signals():
        for number in STOP_SIGNALS:
            signal.signal(number, on_signal)
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
