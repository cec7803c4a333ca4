"""A running server: a service with its gRPC, arena and HTTP transports, and the process that runs it until a signal."""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from poolrpc.addresses import unix_path
from poolrpc_server.calls.method import Method
from poolrpc_server.calls.pipeline import CONTROL_CALLS
from poolrpc_server.compute.buffers import use_one_heap
from poolrpc_server.config import Config, ConfigError
from poolrpc_server.process import (
    FAILED,
    FAILED_SECONDS,
    ProcessControl,
    exit_later,
    exit_now,
    private_folder,
    raise_descriptor_limit,
)
from poolrpc_server.service import Service
from poolrpc_server.signals import STOP_SIGNALS, preserved_handlers
from poolrpc_server.telemetry.logs import log
from poolrpc_server.telemetry.metrics import WATCHDOG_SERVICE
from poolrpc_server.telemetry.monitoring_server import open_monitoring
from poolrpc_server.telemetry.traces import start_tracing
from poolrpc_server.transports.grpc.server import GrpcServer, GrpcSettings
from poolrpc_server.transports.grpc.tls import Certificates
from poolrpc_server.transports.grpc.watchdog import Watchdog
from poolrpc_server.transports.http.server import HttpServer
from poolrpc_server.transports.local.arenas import ArenaListener, arena_finder
from poolrpc_server.transports.local.calls import Connection, LocalCalls

if TYPE_CHECKING:
    from poolrpc._wire.codec import ServerInfo
    from poolrpc_server.telemetry.traces import Spans

STOPPING_SECONDS = 1.0
"""Seconds after the grace in which calls that are still queued receive their rejection."""

SWITCH_SECONDS = 0.0005
"""Time after which a thread that runs Python gives way to others. One thread of gRPC begins and ends all calls: while
many others run Python, it would wait for Python's own 5 ms at each step."""

MIN_LOOKAHEAD_BYTES, MAX_LOOKAHEAD_BYTES = 64 * 2**10, 4 * 2**20
"""Bytes of a message that gRPC takes before there is room for it: HTTP/2's own window, and what a stream of large
messages over 10 ms needs to be as fast as the network."""

WATCHDOG = Method(f"/{WATCHDOG_SERVICE}/Check", unary=lambda *_: b"", probe=True, public=True)
"""The method that the watchdog calls. Not a health check, which may require a token and is counted by the metrics."""


class Server:
    """A service with its transports: made, started and stopped once.

    Attributes:
        service: The service.
        addresses: The addresses on which it listens, with the actual number in place of port 0.
        metrics_address: The address of its metrics, "host:port"; empty if they are not served.
        probes_address: The address of its probes, "host:port"; empty if they have none of their own.
        explorer_address: The address of its explorer, "host:port"; empty if it is not served.

    """

    def __init__(self, config: Config, spans: Spans | None = None, private: tuple[str, ...] = ()) -> None:
        """Make a server and take its addresses.

        Args:
            config: The settings.
            spans: Makes the spans of its calls, and is closed with it. None: calls are not traced.
            private: Addresses for gRPC calls of this process, in addition to the configured ones.

        Raises:
            ConfigError: An address is in use or not one of this machine, there is no such device, or the files of TLS,
                tokens or presets cannot be read.

        """
        certificates = _certificates(config)
        self._arenas: list[ArenaListener] = []
        self._local: LocalCalls | None = None
        self._explorer: HttpServer | None = None
        self.service = Service(config, spans, self._arenas, arena_finder(self._arenas))
        try:
            self._grpc = GrpcServer(
                self.service.pipeline,
                self.service.health,
                (*config.listen, *private),
                _grpc_settings(config),
                certificates,
            )
        except ValueError as error:
            self.service.close()
            raise ConfigError(f"listen: {error}") from None
        self.addresses = self.service.addresses = self._grpc.addresses[: len(config.listen)]
        if certificates:
            self.service.certificates = certificates.expiry
        # With several workers, the supervisor has these addresses, and serves the sums of their metrics.
        addresses = (config.metrics, config.probes) if config.workers == 1 else ("", "")
        try:
            self._monitoring = open_monitoring(*addresses, self.service.metrics.collect, self.service.is_ready)
        except ValueError as error:
            self._end(0)
            raise ConfigError(str(error)) from None
        self.metrics_address, self.probes_address = (
            self._monitoring[name].address if name in self._monitoring else "" for name in ("metrics", "probes")
        )
        self.explorer_address = self._open_explorer(config, certificates) if config.explorer else ""
        if config.max_arena_bytes:
            self._share_memory(config)
        if private:
            self.service.pipeline.add([WATCHDOG])

    @property
    def info(self) -> ServerInfo:
        """The description of the server, as GetServerInfo returns it."""
        return self.service.info

    def start(self) -> None:
        """Serve."""
        self._grpc.start()
        if self._explorer is not None:
            self._explorer.start()
        self.service.health.set_serving(True)

    def local_connections(self) -> tuple[Connection, ...]:
        """Return the connections of clients on this machine that carry calls."""
        return () if self._local is None else self._local.connections

    def drain(self) -> None:
        """Report NOT_SERVING to health checks; calls are still served."""
        self.service.health.set_serving(False)

    def close_arenas(self) -> None:
        """End all arenas and their listeners; calls in flight keep the memory that they use."""
        for listener in self._arenas:
            listener.close()
        if self._local is not None:
            self._local.stop()

    def stop(self, grace: float) -> None:
        """Reject new calls, finish the accepted ones within `grace` seconds, and end."""
        self._end(grace)
        for each in self._monitoring.values():
            each.close()

    def _end(self, grace: float) -> None:
        self.drain()
        others: list[LocalCalls | HttpServer] = [each for each in (self._local, self._explorer) if each is not None]
        for each in others:
            each.stop()
        # Calls that are still queued after the grace get UNAVAILABLE, and STOPPING_SECONDS to receive it.
        deadline = monotonic() + grace
        stopped = self._grpc.stop(grace + STOPPING_SECONDS if grace else 0)
        ended = stopped.wait(grace)
        if not (ended and all(each.wait(max(0.0, deadline - monotonic())) for each in others)):
            self.service.stop_queue()
            stopped.wait()
            for each in others:
                each.wait(STOPPING_SECONDS if grace else 0)
        self.close_arenas()
        for each in others:
            each.close()
        self._grpc.close()
        self.service.close(grace)

    def _open_explorer(self, config: Config, certificates: Certificates | None) -> str:
        """Take the explorer's address, and return it."""
        try:
            self._explorer = HttpServer(
                self.service.pipeline,
                config.explorer,
                tokens=bool(config.token_file),
                tls=None if certificates is None else certificates.context(),
                share_port=config.workers > 1,
            )
        except (OSError, UnicodeError) as error:  # the latter for a name that no host can have
            self.stop(0)
            raise ConfigError(f"explorer: expected a free address, got {config.explorer!r}: {error}") from None
        return self._explorer.address

    def _share_memory(self, config: Config) -> None:
        paths = list(filter(None, map(unix_path, self.addresses)))
        if paths and sys.platform == "linux" and not config.disable_local_calls:
            self._local = LocalCalls(
                self.service.pipeline,
                max_threads=config.call_threads + CONTROL_CALLS,
                max_connections=config.max_connections,
            )
            self.service.on_look(self._local.relieve)
        for path in paths:
            try:
                listener = ArenaListener(
                    path,
                    # The limits are those of all listeners together.
                    max_bytes=config.max_arena_bytes // len(paths),
                    max_arenas=max(1, config.max_arenas // len(paths)),
                    # A worker does not have the arenas of another one.
                    call_socket=Path(path).name if config.workers > 1 else "",
                    calls=self._local,
                    page_lock=self.service.page_lock,
                )
            except ValueError as error:
                log.warning("no shared memory: clients send their bytes", error=str(error))
            else:
                self._arenas.append(listener)


def _certificates(config: Config) -> Certificates | None:
    if not config.tls_cert:
        return None
    try:
        return Certificates(config.tls_cert, config.tls_key, config.tls_client_ca)
    except ValueError as error:
        raise ConfigError(f"tls_cert: {error}") from None


def _grpc_settings(config: Config) -> GrpcSettings:
    return GrpcSettings(
        call_threads=config.call_threads,
        max_message_bytes=config.max_message_bytes,
        max_metadata_bytes=config.max_metadata_bytes,
        max_connections=max(1, config.max_connections // len(config.listen)),
        max_connection_calls=config.max_connection_calls,
        keepalive_seconds=config.keepalive_seconds,
        keepalive_timeout_seconds=config.keepalive_timeout_seconds,
        min_ping_seconds=config.min_ping_seconds,
        max_connection_age_seconds=config.max_connection_age_seconds,
        max_connection_idle_seconds=config.max_connection_idle_seconds,
        lookahead_bytes=max(MIN_LOOKAHEAD_BYTES, min(config.max_inflight_bytes // 1024, MAX_LOOKAHEAD_BYTES)),
        share_ports=config.workers > 1,
    )


def _start_facts(server: Server) -> dict[str, Any]:
    info = server.info
    return {
        "addresses": list(server.addresses),
        "version": info.version,
        "device": info.device,
        "torch": info.torch_version,
        "threads": info.threads,
        **info.features,
        "metrics": server.metrics_address,
        "probes": server.probes_address,
        "explorer": server.explorer_address,
        "models": list(server.service.models),
        **{name: limit.value for name, limit in info.limits.items()},
    }


@preserved_handlers()
def serve(config: Config, *, control: ProcessControl | None = None) -> int:
    """Run a server until SIGTERM or SIGINT, then drain and stop it; a second signal ends the process at once.

    Args:
        config: The settings.
        control: Stops the server from other threads, and receives what it does. None: the log has it.

    Returns:
        The exit status, 0. A server that cannot continue, or does not answer its watchdog, ends the process with
        FAILED.

    Raises:
        ConfigError: The server cannot be made with these settings.

    """
    use_one_heap()  # before threads have heaps of their own
    sys.setswitchinterval(SWITCH_SECONDS)
    raise_descriptor_limit()
    with ExitStack() as serving:
        private = _private_addresses(serving) if config.watchdog_seconds else ()
        server = Server(config, start_tracing(), private)
        # torch's modules are a hundred thousand objects: to look for garbage among them stops every thread for 0.1 s.
        gc.collect()
        gc.freeze()
        control = control or ProcessControl()
        server.service.on_failure = control.stopping.set

        def on_signal(number: int, _: object) -> None:
            # A second signal ends the process at once, by the default action.
            for each in STOP_SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            log.info("stopping", signal=signal.Signals(number).name)
            control.stopping.set()

        with control.stopping.wake_on_signals():
            for number in STOP_SIGNALS:
                signal.signal(number, on_signal)
            server.start()

            def answered() -> None:
                server.service.answered()
                control.answered()

            for address in private:
                server.service.answered()  # silence is counted from now on
                serving.callback(server.service.end_watch)
                watchdog = Watchdog(address, WATCHDOG.name, config.watchdog_seconds, answered, exit_now)
                serving.callback(watchdog.close)
            facts = _start_facts(server) | {"watchdog": "on" if private else "off"}
            control.serving(facts, server.service.metrics.collect)
            control.stopping.wait()
        control.draining()
        if not server.service.failure:
            server.drain()
            # Load balancers need this time to see that the health has changed; only a second signal ends it early.
            control.abandoned.wait(config.drain_seconds)
    if server.service.failure:
        exit_later(FAILED_SECONDS)
        server.stop(grace=min(1.0, config.shutdown_grace))
        # Not by returning: at the interpreter's end, freeing memory of a lost device would abort the process.
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(FAILED)
    if control.abandoned.is_set():
        server.close_arenas()  # so that another server can listen there while the last calls are finished
    if config.watchdog_seconds:
        # Calls and then spans have the grace.
        allowed = 2 * config.shutdown_grace + STOPPING_SECONDS + config.watchdog_seconds
        serving.callback(exit_later(allowed, f"the server did not stop within {allowed:g} seconds").cancel)
    with serving:
        server.stop(config.shutdown_grace)
    log.info("stopped")
    return 0


def _private_addresses(resources: ExitStack) -> tuple[str, ...]:
    """Return the address on which only this process calls its server; none if there is no place for it."""
    try:
        return (f"unix:{resources.enter_context(private_folder()) / 'grpc.sock'}",)
    except OSError as error:
        log.warning("no watchdog: expected a temporary folder for its socket", error=str(error))
        return ()
