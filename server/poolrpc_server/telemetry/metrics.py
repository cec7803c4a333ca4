"""Prometheus metrics, and the HTTP server of /metrics, /healthz and /readyz."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from functools import cache
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

T = TypeVar("T", bound="Counter | Histogram | _Nothing")

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
IN_FOLDER = FOLDER_VARIABLE in os.environ
"""Whether this process counts into files of a folder that another process sums: prometheus_client's multiprocess mode.
prometheus_client reads the variable when it is imported, so this does too."""

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Buckets of durations in seconds, from a small call to a large stream."""

REQUESTS = tuple(2**power for power in range(9))
PLANES = tuple(4**power for power in range(9))

REASONS = ("CALLS", "DEVICE_FAILED", "IN_FLIGHT_BYTES", "QUEUE", "STOPPING", "STREAMS")
"""The reasons for which calls are rejected temporarily."""

CANCELLATION_STAGES = ("arrival", "queue", "compute", "send")
"""The stages in which calls are cancelled."""

REQUEST_SECONDS = 10
"""Seconds that an HTTP connection may take to send its request."""


@dataclass(frozen=True, slots=True)
class Load:
    """The load at a moment: the values of the gauges.

    Attributes:
        inflight_bytes: Bytes of inputs and outputs in flight.
        queue_lengths: Queued requests of each priority, from 0.
        queue_oldest_seconds: Age of the oldest queued request, in seconds.
        arenas: Arenas that a client has.
        arena_bytes: Bytes of all arenas.
        streams: Open streams.

    """

    inflight_bytes: int = 0
    queue_lengths: tuple[int, ...] = ()
    queue_oldest_seconds: float = 0
    arenas: int = 0
    arena_bytes: int = 0
    streams: int = 0


class Metrics:
    """The metrics of one server.

    Args:
        enabled: Whether anything is counted. If not, counting costs nothing.

    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._registry = CollectorRegistry() if enabled else None
        self._read: Callable[[], Load] = Load
        self._refreshing = threading.Lock()
        self._shown = Load()
        # The names and labels of grpc-ecosystem's interceptors in other languages, for which dashboards exist.
        method = "grpc_type", "grpc_service", "grpc_method"
        self._started = _children(self._counter("grpc_server_started", "Calls that started.", *method))
        self._handled = _children(self._counter("grpc_server_handled", "Calls that ended.", *method, "grpc_code"))
        self._seconds = _children(
            self._histogram("grpc_server_handling_seconds", "Duration of calls in seconds.", SECONDS, *method)
        )
        self._rejects = self._counter("poolrpc_rejects", "Calls rejected temporarily, by limit.", "reason")
        self._escapes = self._counter("poolrpc_validator_escapes", "Valid calls that failed unexpectedly.")
        self._cancelled = self._counter("poolrpc_cancelled", "Cancelled calls, by their stage.", "stage")
        self._executions = self._counter("poolrpc_executions", "Batches that the engine executed.")
        self._requests = self._counter("poolrpc_requests", "Requests in executed batches.")
        self._bytes = self._counter("poolrpc_executed_bytes", "Bytes of inputs and outputs in executed batches.")
        self._batch_requests = self._histogram("poolrpc_batch_requests", "Requests of a batch.", REQUESTS)
        self._batch_planes = self._histogram("poolrpc_batch_planes", "Planes of a batch.", PLANES)
        self._compute = self._histogram("poolrpc_compute_seconds", "Duration of executions in seconds.", SECONDS)
        self._queue = self._histogram("poolrpc_queue_seconds", "Time of requests in the queue in seconds.", SECONDS)
        self._gauges = {
            "inflight_bytes": self._gauge("poolrpc_inflight_bytes", "Bytes of inputs and outputs in flight."),
            "queue_oldest_seconds": self._gauge(
                "poolrpc_queue_oldest_seconds", "Age of the oldest queued request in seconds.", "livemax"
            ),
            "arenas": self._gauge("poolrpc_arenas", "Arenas of shared memory that a client has."),
            "arena_bytes": self._gauge("poolrpc_arena_bytes", "Bytes of all arenas."),
            "streams": self._gauge("poolrpc_streams", "Open streams."),
        }
        self._queue_length = self._gauge(
            "poolrpc_queue_length", "Queued requests, by priority.", "livesum", labels=("priority",)
        )
        # Prometheus does not see the rise of a counter that first appears with 1: all are shown from 0 on.
        for reason in REASONS:
            self._rejects.labels(reason)
        for stage in CANCELLATION_STAGES:
            self._cancelled.labels(stage)

    def expect(self, kind: str, service: str, method: str) -> None:
        """Show a method before its first call, with 0 calls for the codes OK and INTERNAL."""
        self._started(kind, service, method)
        self._seconds(kind, service, method)
        for code in ("OK", "INTERNAL"):
            self._handled(kind, service, method, _shown_code(code))

    def started(self, kind: str, service: str, method: str) -> None:
        """Count a call that starts; `kind` is "unary" or "bidi_stream"."""
        self._started(kind, service, method).inc()
        if IN_FOLDER:
            self.refresh()

    def handled(self, kind: str, service: str, method: str, code: str, seconds: float) -> None:
        """Count a call that ended, with the name of its gRPC status code ("INVALID_ARGUMENT") and its duration."""
        self._handled(kind, service, method, _shown_code(code)).inc()
        self._seconds(kind, service, method).observe(seconds)
        if IN_FOLDER:
            self.refresh()

    def rejected(self, reason: str) -> None:
        """Count a call that was rejected temporarily, for one of REASONS."""
        self._rejects.labels(reason).inc()

    def escaped(self) -> None:
        """Count a call that failed unexpectedly: validation should have rejected it."""
        self._escapes.inc()

    def cancelled(self, stage: str) -> None:
        """Count a call that was cancelled in one of CANCELLATION_STAGES."""
        self._cancelled.labels(stage).inc()

    def executed(self, requests: int, planes: int, nbytes: int, seconds: float) -> None:
        """Count one batch that the engine executed, its contents and its duration."""
        self._executions.inc()
        self._requests.inc(requests)
        self._bytes.inc(nbytes)
        self._batch_requests.observe(requests)
        self._batch_planes.observe(planes)
        self._compute.observe(seconds)

    def queued(self, seconds: float) -> None:
        """Count the time that a request spent in the queue."""
        self._queue.observe(seconds)

    def watch(self, read: Callable[[], Load]) -> None:
        """Take the gauges' values from `read`: when they are collected or, in a folder, as calls start and end."""
        self._read = read
        if IN_FOLDER:
            self.refresh()

    def refresh(self) -> None:
        """Read the gauges' values now.

        They are read when they are collected. In a folder another process collects, so they are read as calls start and
        end; whatever else changes them may call this.
        """
        if self._registry is None:
            return
        # Read and written under one lock, so that the latest values remain.
        with self._refreshing:
            load = self._read()
            if load == self._shown:
                return
            self._shown = load
            for name, gauge in self._gauges.items():
                gauge.set(getattr(load, name))
            for priority, length in enumerate(load.queue_lengths):
                self._queue_length.labels(priority).set(length)

    def collect(self) -> CollectorRegistry:
        """Return the registry of this process alone, with current gauges."""
        self.refresh()
        return self._registry or CollectorRegistry()

    def _counter(self, name: str, what: str, *labels: str) -> Counter | _Nothing:
        return Counter(name, what, labels, registry=self._registry) if self._registry else _Nothing()

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram | _Nothing:
        if not self._registry:
            return _Nothing()
        return Histogram(name, what, labels, buckets=buckets, registry=self._registry)

    def _gauge(
        self, name: str, what: str, mode: Literal["livesum", "livemax"] = "livesum", labels: tuple[str, ...] = ()
    ) -> Gauge | _Nothing:
        if not self._registry:
            return _Nothing()
        return Gauge(name, what, labels, registry=self._registry, multiprocess_mode=mode)


class _Nothing:
    """A metric that counts nothing."""

    def labels(self, *_: object) -> Self:
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


def summed(folder: str, restarts: Callable[[], int]) -> CollectorRegistry:
    """Return the registry of all processes that count into a folder.

    Args:
        folder: The value of their FOLDER_VARIABLE.
        restarts: Returns how many of them were restarted.

    """
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=folder)  # type: ignore[no-untyped-call]  # prometheus_client's
    registry.register(_Restarts(restarts))
    return registry


def forget(folder: str, pid: int) -> None:
    """Remove the gauges of a process that has ended from the sums; its counters remain."""
    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]  # prometheus_client's


class _Restarts(Collector):
    # A Counter would be a file in the folder, and counted twice, if this process had the variable too.
    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read

    def collect(self) -> Iterable[CounterMetricFamily]:
        yield CounterMetricFamily("poolrpc_worker_restarts", "Workers that were restarted.", value=self._read())


class MetricsServer:
    """An HTTP server of /metrics, /healthz (the process answers) and /readyz (it should get calls).

    Attributes:
        address: The address on which it listens, "host:port".

    """

    def __init__(self, address: str, collect: Callable[[], CollectorRegistry], ready: Callable[[], bool]) -> None:
        """Start the server.

        Args:
            address: "host:port"; port 0: a free one.
            collect: Returns the registry to show, for each request.
            ready: Returns whether calls should be sent here.

        Raises:
            OSError: The address is in use, or not one of this machine.

        """
        self._collect = collect
        self._ready = ready
        host, _, port = address.rpartition(":")
        self._server = (_HttpServer6 if ":" in host else _HttpServer)((host.strip("[]"), int(port)), _Connection)
        self._server.set_app(self._answer)
        self.address = f"{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="poolrpc-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environment: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        match environment.get("PATH_INFO"):
            case "/metrics":
                shown: Iterable[bytes] = make_wsgi_app(self._collect())(environment, start)
                return shown
            case "/healthz":
                return _text(start, "200 OK", "ok")
            case "/readyz" if self._ready():
                return _text(start, "200 OK", "ready")
            case "/readyz":
                return _text(start, "503 Service Unavailable", "not ready")
            case path:
                return _text(start, "404 Not Found", f"expected /metrics, /healthz or /readyz, got {path}")


def _text(start: StartResponse, status: str, text: str) -> Iterable[bytes]:
    start(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{text}\n".encode()]


class _Connection(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    def log_message(self, *_: object) -> None:
        """Log nothing: monitoring asks every few seconds."""


class _HttpServer(ThreadingWSGIServer):
    address_family = AF_INET

    def handle_error(self, request: object, client_address: object) -> None:
        """Log errors other than those of a client that left or was slow."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # socketserver's own type is not public


class _HttpServer6(_HttpServer):
    address_family = AF_INET6
