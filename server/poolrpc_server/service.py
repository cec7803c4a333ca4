"""A server without its transports: the engine, the dispatcher, the protocols and the pipeline, built from a Config."""

from __future__ import annotations

import platform
from dataclasses import fields
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from poolrpc import __version__
from poolrpc._shapes.limits import MAX_BRANCHES, MAX_CHAIN, MAX_FRACTIONAL_AXIS, MAX_NUMEL, MAX_PARAMETER
from poolrpc._wire.codec import Limit, ServerInfo
from poolrpc.errors import UnavailableError
from poolrpc.layers import LAYERS, STEPS
from poolrpc.tensors import keep_freed_memory
from poolrpc_server.calls.admission import AdmissionControl
from poolrpc_server.calls.dispatch import Dispatcher, no_arena
from poolrpc_server.calls.method import Observers
from poolrpc_server.calls.pipeline import CallPipeline
from poolrpc_server.calls.queue import QueueLimits
from poolrpc_server.calls.reaper import Reaper
from poolrpc_server.calls.streams import OpenStreams
from poolrpc_server.calls.tokens import TokenFile
from poolrpc_server.calls.validate import Limits
from poolrpc_server.compute.device import TORCH_VERSION
from poolrpc_server.compute.engine import IDLE_LIMIT, WORKSPACE_LIMIT, Engine
from poolrpc_server.config import Config, ConfigError
from poolrpc_server.presets import read_presets
from poolrpc_server.protocols import health, native
from poolrpc_server.protocols.json.servicer import JsonServicer
from poolrpc_server.protocols.triton import servicer as triton
from poolrpc_server.protocols.triton.shared_memory import SharedMemoryRegistry
from poolrpc_server.resources import memory_bytes, resident_bytes
from poolrpc_server.telemetry.logs import CallLog, log
from poolrpc_server.telemetry.metrics import Load, Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from poolrpc.errors import PoolError
    from poolrpc_server.calls.dispatch import SharedMemory
    from poolrpc_server.telemetry.traces import Spans

UNCOUNTED_BYTES = 160 * 2**20
"""Memory that the process may take in addition to what is counted, before it ends calls that wait for messages."""

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


CAPACITIES = (
    "threads",
    "call_threads",
    "max_inflight_bytes",
    "max_queue",
    "max_arena_bytes",
    "max_page_locked_bytes",
    "max_arenas",
    "max_streams",
    "max_connections",
)
"""Settings that limit what a process has at a time: of several processes, the metrics show the sums."""


class ArenaCounts(Protocol):
    """Memory that is shared with clients, for the metrics."""

    @property
    def live(self) -> int: ...  # noqa: D102 - number of arenas with a client
    @property
    def nbytes(self) -> int: ...  # noqa: D102 - bytes of all arenas


class Service:
    """Everything of a server but its transports: engine, dispatcher, protocols, pipeline, health and metrics.

    Attributes:
        info: The description of the server, as GetServerInfo returns it.
        pipeline: Answers calls.
        health: Whether the server takes calls.
        metrics: The metrics.
        page_lock: Page-locks memory for the device, and returns the function that unlocks it.
        models: Names of the models of the Open Inference Protocol.
        failure: Why the process cannot continue; empty if it can.
        on_failure: Called when it cannot continue.
        addresses: The addresses for clients of gRPC, which the JSON protocol names.
        certificates: Returns when the certificates of each setting's file expire first, in seconds since 1970.

    """

    def __init__(
        self,
        config: Config,
        spans: Spans | None = None,
        arenas: Sequence[ArenaCounts] = (),
        find_arena: Callable[[bytes], SharedMemory] = no_arena,
    ) -> None:
        """Make a service.

        Args:
            config: The settings.
            spans: Makes the spans of its calls, and is closed with it. None: calls are not traced.
            arenas: The listeners on which clients attach arenas, for the metrics; the transport may add more later.
            find_arena: Returns the arena of an id, or raises NotFoundError.

        Raises:
            ConfigError: There is no such device, or the tokens or presets cannot be read.

        """
        keep_freed_memory()
        try:
            tokens = TokenFile(config.token_file) if config.token_file else None
        except ValueError as error:
            raise ConfigError(f"token_file: {error}") from None
        try:
            # The memory kept between calls is a fraction of the memory that calls may use.
            self._engine = Engine(
                config.device,
                config.threads,
                workspace_limit=min(WORKSPACE_LIMIT, config.max_inflight_bytes // 4),
                idle_limit=min(IDLE_LIMIT, config.max_inflight_bytes // 4),
                page_lock_limit=config.max_arena_bytes if (limit := config.max_page_locked_bytes) < 0 else limit,
                max_work=config.max_work,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.page_lock = self._engine.page_locks.lock
        self.info = _describe(config, self._engine, spans)
        self.failure = ""
        self.on_failure: Callable[[], object] = lambda: None
        self.addresses: Sequence[str] = ()
        self.certificates: Callable[[], Mapping[str, float]] = dict
        self._answered: float | None = None
        self._ready_silence = config.watchdog_seconds / 3
        self._arenas = arenas
        self._device_error: Exception | None = None
        self.metrics = Metrics(enabled=bool(config.metrics))
        self.metrics.describe(*_metrics_of(config, self.info), memory_bytes(), self._engine.backend.memory_bytes)
        self._admission = AdmissionControl(config.max_inflight_bytes, self._engine)
        self._reaper = Reaper(
            self._admission,
            resident_bytes,
            resident_bytes() + config.max_inflight_bytes + min(UNCOUNTED_BYTES, memory_bytes() // 16),
            self._engine.drop_idle,
        )
        self._admission.on_enter = self._reaper.wake
        self._dispatcher = Dispatcher(
            Limits(config.max_message_bytes, config.max_output_bytes, config.max_output_growth, config.max_work),
            config.call_threads,
            self._engine,
            self.info,
            find_arena,
            QueueLimits(
                config.max_queue, config.max_queue_seconds, config.max_batch_bytes, config.max_queue_delay / 1000
            ),
            self.metrics if config.metrics else None,
            max_compute_seconds=config.max_compute_seconds,
        )
        self._spans = spans
        self._call_log = CallLog()
        observers = Observers(self._call_log, self.metrics, spans, self._translate)
        self.pipeline = CallPipeline(
            self._admission,
            self._dispatcher.admit,
            observers,
            tokens,
            max_message_bytes=config.max_message_bytes,
            receive_seconds=config.receive_timeout,
        )
        # A stream has a call thread for as long as it lasts: at least one is left for other calls.
        self._streams = OpenStreams(
            max(1, min(config.max_streams, config.call_threads - 1)), config.stream_idle_seconds
        )
        models = read_presets(config.model, config.models)
        self.models = tuple(models)
        self.health = health.Health(
            (native.POOL_SERVICE, triton.TRITON_SERVICE, health.HEALTH_SERVICE), public=not config.health_requires_token
        )
        regions = SharedMemoryRegistry(allowed=config.allow_client_shm)
        for protocol in (
            native.PoolServicer(self._dispatcher, self._streams),
            triton.TritonServicer(
                self._dispatcher, models, regions, self._streams, lambda: self.health.serving, self.metrics.rejected
            ),
            self.health,
        ):
            self.pipeline.add(protocol.methods())
        if config.explorer:
            self.pipeline.add(JsonServicer(self._dispatcher, self._load, lambda: self.addresses).methods())
        self.metrics.watch(self._load)

    @property
    def silent_seconds(self) -> float:
        """Seconds since the server has answered its watchdog; 0 if it has none."""
        return 0.0 if self._answered is None else monotonic() - self._answered

    def answered(self) -> None:
        """Record that the server has answered its watchdog, or that the watchdog starts."""
        self._answered = monotonic()

    def on_look(self, function: Callable[[], object]) -> None:
        """Call a function from time to time while there are calls in flight."""
        self._reaper.on_look = function

    def end_watch(self) -> None:
        """Record that the watchdog has ended: the server may stop answering it."""
        self._answered = None

    def is_ready(self) -> bool:
        """Return whether calls should be sent here: it takes them, and answers its watchdog if it has one."""
        return self.health.serving and self.silent_seconds <= self._ready_silence

    def fail(self, reason: str) -> None:
        """Record that this process cannot continue, because its device is lost, for example; for any thread.

        Health becomes NOT_SERVING, and `serve` ends with FAILED, so that the supervisor, or whatever runs the process,
        starts it again.
        """
        if not self.failure:
            self.failure = reason
            log.critical("failed", reason=reason)
            self.health.set_serving(False)
            self.on_failure()

    def stop_queue(self) -> None:
        """Fail the calls that are queued; those that are being computed are finished."""
        self._dispatcher.stop()

    def close(self, grace: float = 0.0) -> None:
        """Release everything, once no call is in progress; the last spans have `grace` seconds to be sent."""
        self._reaper.close()
        self._engine.close()
        if self._spans is not None:
            self._spans.close(grace)
        self._call_log.close()

    def _translate(self, error: Exception) -> PoolError | None:
        if not self._engine.backend.is_lost(error):
            return None
        # Its traceback keeps the call's tensors alive: freeing memory of a lost device aborts the process, before the
        # callers have their answers.
        self._device_error = error
        self.fail(str(error).partition("\n")[0])
        return UnavailableError("the device failed; the server starts again", reason="DEVICE_FAILED")

    def _load(self) -> Load:
        lengths, oldest = self._dispatcher.waiting()
        return Load(
            inflight_bytes=self._admission.bytes_in_flight,
            queue_lengths=lengths,
            queue_oldest_seconds=oldest,
            arenas=sum(listener.live for listener in self._arenas),
            arena_bytes=sum(listener.nbytes for listener in self._arenas),
            page_locked_bytes=self._engine.page_locks.nbytes,
            page_lock_failures=self._engine.page_locks.failures,
            pinned_bytes=self._engine.pinned_bytes,
            device_memory_bytes=self._engine.backend.reserved_bytes(),
            device_blocks=self._engine.streams.blocks,
            streams=self._streams.count,
            calls=self._dispatcher.calls,
            memory_bytes=resident_bytes(),
            watchdog_silent_seconds=self.silent_seconds,
            certificates=self.certificates(),
        )


def _metrics_of(config: Config, info: ServerInfo) -> tuple[dict[str, str], dict[str, float], dict[str, float]]:
    """Return what the metrics show of a build, of limits, and of capacities."""
    build = {
        "version": info.version,
        "torch": info.torch_version,
        "python": platform.python_version(),
        "device": info.device,
    }
    numbers = {each.name: float(getattr(config, each.name)) for each in fields(config) if config.unit(each.name)}
    capacities = {name: numbers.pop(name) for name in CAPACITIES}
    if capacities["max_page_locked_bytes"] < 0:  # all arenas
        capacities["max_page_locked_bytes"] = capacities["max_arena_bytes"]
    return build, numbers, capacities


def _describe(config: Config, engine: Engine, spans: Spans | None) -> ServerInfo:
    return ServerInfo(
        version=__version__,
        torch_version=TORCH_VERSION,
        device=str(engine.device),
        threads=engine.threads,
        layers={name: layer.dtypes for name, layer in (LAYERS | STEPS).items()},
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
        operands={name: layer.operand for name, layer in LAYERS.items() if layer.operand},
    )
