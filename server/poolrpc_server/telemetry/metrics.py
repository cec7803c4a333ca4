"""Prometheus metrics of one server."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Self, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

from poolrpc_server.telemetry.logs import dropped_lines
from poolrpc_server.telemetry.stage_times import DEVICE_STAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from poolrpc_server.telemetry.stage_times import DeviceStage

T = TypeVar("T", bound="Counter | Histogram | _Nothing")

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Buckets of durations in seconds, from a small call to a large stream."""

REQUESTS = tuple(2**power for power in range(9))
PLANES = tuple(4**power for power in range(9))

REASONS = ("CALLS", "DEVICE_FAILED", "IN_FLIGHT_BYTES", "QUEUE", "STOPPING", "STREAMS", "WATCHERS")
"""The reasons for which calls are rejected temporarily."""

END_REASONS = ("MEMORY", "STALLED", "TIMEOUT")
"""The reasons for which calls are ended: too much memory, a stalled caller while others wait, and a timeout."""

TRANSPORTS = ("grpc", "local", "http")
"""The transports that every server may have."""

WATCHDOG_SERVICE = "poolrpc.v1.Watchdog"
"""The service that a server itself calls every second, which is not counted."""

SILENT = "poolrpc_watchdog_silent_seconds"
SILENT_HELP = "Seconds since the server answered its own call; 0 without a watchdog."
"""The gauge of the time since a server last answered its watchdog, and its help text."""

NOT_SUMMED: dict[str, Callable[[float, float], float]] = {
    "poolrpc_queue_oldest_seconds": max,
    SILENT: max,
    "poolrpc_build_info": max,
    "poolrpc_limit": max,
    "poolrpc_memory_limit_bytes": max,
    "poolrpc_device_memory_limit_bytes": max,
    "poolrpc_certificate_expiry_timestamp_seconds": min,
    "process_start_time_seconds": min,
    "process_max_fds": min,
}
"""The gauges of which several processes do not show the sum, with what they show of two values."""

CANCELLATION_STAGES = ("receive", "arrival", "queue", "compute", "send")
"""The stages in which calls are cancelled."""


FAILURES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL")
"""The status codes of calls that failed without their caller's fault."""


@dataclass(frozen=True, slots=True)
class Load:
    """The load at a moment: the values of the gauges.

    Attributes:
        inflight_bytes: Bytes that calls in flight have reserved.
        queue_lengths: Queued requests of each priority, from 0.
        queue_oldest_seconds: Age of the oldest queued request, in seconds.
        arenas: Arenas that a client has.
        arena_bytes: Bytes of all arenas.
        streams: Open streams.
        page_locked_bytes: Bytes of arenas that are page-locked for a GPU.
        page_lock_failures: Arenas that could not be page-locked.
        pinned_bytes: Bytes of the server's own buffers that are page-locked for a GPU.
        device_memory_bytes: Bytes of a GPU's memory that the process has.
        device_blocks: Blocks of planes whose copies and kernels are queued on a GPU.
        calls: Calls that compute or wait to be computed.
        memory_bytes: Bytes of memory that the process has for itself.
        watchdog_silent_seconds: Seconds since the server answered its watchdog; 0 without one.
        certificates: When the certificates of a setting's file expire first, in seconds since 1970.

    """

    inflight_bytes: int = 0
    queue_lengths: tuple[int, ...] = ()
    queue_oldest_seconds: float = 0
    arenas: int = 0
    arena_bytes: int = 0
    streams: int = 0
    page_locked_bytes: int = 0
    page_lock_failures: int = 0
    pinned_bytes: int = 0
    device_memory_bytes: int = 0
    device_blocks: int = 0
    calls: int = 0
    memory_bytes: int = 0
    watchdog_silent_seconds: float = 0
    certificates: Mapping[str, float] = field(default_factory=dict)


class Metrics:
    """The metrics of one server.

    Args:
        enabled: Whether anything is counted. If not, counting costs nothing.

    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._registry = CollectorRegistry() if enabled else None
        self._read: Callable[[], Load] = Load
        # The names and labels of grpc-ecosystem's interceptors in other languages, for which dashboards exist.
        method = "grpc_type", "grpc_service", "grpc_method"
        self._started = _children(self._counter("grpc_server_started", "Calls that started.", *method))
        self._handled = _children(self._counter("grpc_server_handled", "Calls that ended.", *method, "grpc_code"))
        self._transports = _children(
            self._counter("poolrpc_transport_calls", "Calls that started, by transport.", "transport")
        )
        self._seconds = _children(
            self._histogram("grpc_server_handling_seconds", "Duration of calls in seconds.", SECONDS, *method)
        )
        self._rejects = self._counter("poolrpc_rejects", "Calls rejected temporarily, by limit.", "reason")
        self._escapes = self._counter("poolrpc_validator_escapes", "Valid calls that failed unexpectedly.")
        self._cancelled = self._counter("poolrpc_cancelled", "Cancelled calls, by their stage.", "stage")
        self._ended = self._counter(
            "poolrpc_ended", "Calls that the server ended because of their caller, by reason.", "reason"
        )
        self._executions = self._counter("poolrpc_executions", "Batches that the engine executed.")
        self._requests = self._counter("poolrpc_requests", "Requests in executed batches.")
        self._bytes = self._counter("poolrpc_executed_bytes", "Bytes of inputs and outputs in executed batches.")
        self._batch_requests = self._histogram("poolrpc_batch_requests", "Requests of a batch.", REQUESTS)
        self._batch_planes = self._histogram("poolrpc_batch_planes", "Planes of a batch.", PLANES)
        self._compute = self._histogram("poolrpc_compute_seconds", "Duration of executions in seconds.", SECONDS)
        self._device = self._histogram(
            "poolrpc_device_seconds",
            "Time that the blocks of an execution on a GPU spend in a stage, summed, in seconds.",
            SECONDS,
            "stage",
        )
        self._queue = self._histogram("poolrpc_queue_seconds", "Time of requests in the queue in seconds.", SECONDS)
        self._receive = self._histogram(
            "poolrpc_receive_seconds",
            "Time until a call's message had arrived, with its wait for room, in seconds.",
            SECONDS,
        )
        self._gauges = {
            "inflight_bytes": self._gauge("poolrpc_inflight_bytes", "Bytes that calls in flight have reserved."),
            "calls": self._gauge("poolrpc_calls", "Calls that compute or wait to be computed."),
            "queue_oldest_seconds": self._gauge(
                "poolrpc_queue_oldest_seconds", "Age of the oldest queued request in seconds."
            ),
            "memory_bytes": self._gauge(
                "poolrpc_memory_bytes", "Bytes of memory that the processes have for themselves, without files."
            ),
            "watchdog_silent_seconds": self._gauge(SILENT, SILENT_HELP),
            "arenas": self._gauge("poolrpc_arenas", "Arenas of shared memory that a client has."),
            "arena_bytes": self._gauge("poolrpc_arena_bytes", "Bytes of all arenas."),
            "page_locked_bytes": self._gauge(
                "poolrpc_page_locked_bytes", "Bytes of arenas that are page-locked for a GPU."
            ),
            "page_lock_failures": self._gauge(
                "poolrpc_page_lock_failures", "Arenas that could not be page-locked for a GPU."
            ),
            "pinned_bytes": self._gauge(
                "poolrpc_pinned_bytes", "Bytes of the server's own buffers that are page-locked for a GPU."
            ),
            "device_memory_bytes": self._gauge(
                "poolrpc_device_memory_bytes", "Bytes of a GPU's memory that the processes have, in use or for reuse."
            ),
            "device_blocks": self._gauge(
                "poolrpc_device_blocks", "Blocks of planes whose copies and kernels are queued on a GPU."
            ),
            "streams": self._gauge("poolrpc_streams", "Open streams."),
        }
        self._queue_length = self._gauge("poolrpc_queue_length", "Queued requests, by priority.", "priority")
        self._certificates = self._gauge(
            "poolrpc_certificate_expiry_timestamp_seconds",
            "When a certificate expires, in seconds since 1970, by the setting of its file.",
            "setting",
        )
        self._limits = self._gauge(
            "poolrpc_limit", "Limits on each call or connection, in the unit of the setting, by setting.", "setting"
        )
        self._capacities = self._gauge(
            "poolrpc_capacity",
            "Limits on what all calls have at a time, in the unit of the setting, by setting.",
            "setting",
        )
        self._memory = self._gauge(
            "poolrpc_memory_limit_bytes", "Bytes of memory that the server may use, of its machine or container."
        )
        self._device_memory = self._gauge(
            "poolrpc_device_memory_limit_bytes", "Bytes of the GPU's memory, as it reports them; 0 without a GPU."
        )
        self._build = self._gauge(
            "poolrpc_build_info", "1, with versions and device as labels.", "version", "torch", "python", "device"
        )
        if self._registry:
            self._registry.register(DroppedLines())
            ProcessCollector(registry=self._registry)
        # Prometheus does not see the rise of a counter that first appears with 1: all are shown from 0 on.
        for transport in TRANSPORTS:
            self._transports(transport)
        for reason in REASONS:
            self._rejects.labels(reason)
        for reason in END_REASONS:
            self._ended.labels(reason)
        for stage in CANCELLATION_STAGES:
            self._cancelled.labels(stage)
        for stage in DEVICE_STAGES:
            self._device.labels(stage)

    def describe(
        self,
        build: Mapping[str, str],
        limits: Mapping[str, float],
        capacities: Mapping[str, float],
        memory_limit_bytes: int,
        device_memory_bytes: int = 0,
    ) -> None:
        """Show what does not change.

        Args:
            build: Versions of this package, of torch and of Python, and the device.
            limits: Limits on each call or connection, by setting.
            capacities: Limits on what all calls have at a time, by setting.
            memory_limit_bytes: Bytes of memory that the server may use.
            device_memory_bytes: Bytes of the GPU's memory; 0 without a GPU.

        """
        self._build.labels(**build).set(1)
        self._memory.set(memory_limit_bytes)
        self._device_memory.set(device_memory_bytes)
        for gauge, values in ((self._limits, limits), (self._capacities, capacities)):
            for setting, value in values.items():
                gauge.labels(setting).set(value)

    def expect(self, kind: str, service: str, method: str) -> None:
        """Show a method before its first call, with 0 calls for OK and for the codes by which servers are judged."""
        if service == WATCHDOG_SERVICE:
            return
        self._started(kind, service, method)
        self._seconds(kind, service, method)
        for code in ("OK", *FAILURES):
            self._handled(kind, service, method, _shown_code(code))

    def started(self, kind: str, service: str, method: str, transport: str = "grpc") -> None:
        """Count a call that starts; `kind` is "unary" or "bidi_stream", `transport` one of TRANSPORTS, or "ray"."""
        if service != WATCHDOG_SERVICE:
            self._started(kind, service, method).inc()
            self._transports(transport).inc()

    def handled(self, kind: str, service: str, method: str, code: str, seconds: float) -> None:
        """Count a call that ended, with the name of its gRPC status code ("INVALID_ARGUMENT") and its duration."""
        if service == WATCHDOG_SERVICE:
            return
        self._handled(kind, service, method, _shown_code(code)).inc()
        self._seconds(kind, service, method).observe(seconds)

    def rejected(self, reason: str) -> None:
        """Count a call that was rejected temporarily, for one of REASONS."""
        self._rejects.labels(reason).inc()

    def escaped(self) -> None:
        """Count a call that failed unexpectedly: validation should have rejected it."""
        self._escapes.inc()

    def cancelled(self, stage: str) -> None:
        """Count a call that was cancelled in one of CANCELLATION_STAGES."""
        self._cancelled.labels(stage).inc()

    def ended(self, reason: str) -> None:
        """Count a call that the server ended, for one of END_REASONS."""
        self._ended.labels(reason).inc()

    def executed(
        self, requests: int, planes: int, nbytes: int, seconds: float, stages: Iterable[DeviceStage] = ()
    ) -> None:
        """Count one batch that the engine executed, its contents, its duration, and its stages on a GPU."""
        self._executions.inc()
        self._requests.inc(requests)
        self._bytes.inc(nbytes)
        self._batch_requests.observe(requests)
        self._batch_planes.observe(planes)
        self._compute.observe(seconds)
        for stage in stages:
            self._device.labels(stage.name).observe(stage.busy_ns / 1e9)

    def queued(self, seconds: float) -> None:
        """Count the time that a request spent in the queue."""
        self._queue.observe(seconds)

    def received(self, seconds: float) -> None:
        """Count the time until the message of a call had arrived."""
        self._receive.observe(seconds)

    def watch(self, read: Callable[[], Load]) -> None:
        """Take the gauges' values from `read` whenever they are collected."""
        self._read = read

    def collect(self) -> CollectorRegistry:
        """Return the registry of this process alone, with current gauges."""
        if self._registry is None:
            return CollectorRegistry()
        load = self._read()
        for name, gauge in self._gauges.items():
            gauge.set(getattr(load, name))
        for priority, length in enumerate(load.queue_lengths):
            self._queue_length.labels(priority).set(length)
        for setting, expiry in load.certificates.items():
            self._certificates.labels(setting).set(expiry)
        return self._registry

    def _counter(self, name: str, what: str, *labels: str) -> Counter | _Nothing:
        return Counter(name, what, labels, registry=self._registry) if self._registry else _Nothing()

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram | _Nothing:
        if not self._registry:
            return _Nothing()
        return Histogram(name, what, labels, buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge | _Nothing:
        return Gauge(name, what, labels, registry=self._registry) if self._registry else _Nothing()


class DroppedLines(Collector):
    """The lines of this process's log that were dropped."""

    def collect(self) -> Iterable[CounterMetricFamily]:
        """Return the counter."""
        help_text = "Lines of the log that were dropped, because a write failed or too many waited."
        yield CounterMetricFamily("poolrpc_log_lines_dropped", help_text, value=dropped_lines())


class _Nothing:
    """A metric that counts nothing."""

    def labels(self, *_: object, **__: object) -> Self:
        return self

    def inc(self, amount: float = 1) -> None:
        pass

    def observe(self, amount: float) -> None:
        pass

    def set(self, value: float) -> None:
        pass


def _children(metric: T) -> Callable[..., T]:
    """Return metric.labels with a cache: looking a child up costs more than counting."""
    labels: Any = metric.labels
    return cache(labels)


@cache
def _shown_code(code: str) -> str:
    # In the form of grpc-ecosystem's interceptor for Go, for which most dashboards and alerts are written.
    return {"OK": "OK", "CANCELLED": "Canceled"}.get(code) or code.title().replace("_", "")
