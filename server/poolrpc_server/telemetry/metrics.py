"""What the server counts, for Prometheus, and the HTTP address where that is read, with probes of health."""

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
"""Whether this process counts into files of a folder, which another sums: prometheus_client's multiprocess mode. The
variable has to be set before prometheus_client is imported, so what it becomes later says nothing."""

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""The buckets of times: from a small call's to a large stream's."""

REQUESTS = tuple(2**power for power in range(9))
PLANES = tuple(4**power for power in range(9))

REASONS = ("CALLS", "DEVICE_FAILED", "IN_FLIGHT_BYTES", "QUEUE", "STOPPING", "STREAMS")
"""Why calls are refused for what is under way."""

STAGES = ("arrival", "queue", "compute", "send")
"""How far calls are whose caller leaves."""

PATIENCE = 10
"""Seconds that a connection may take to send its request."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is under way at a moment: the gauges.

    Attributes:
        inflight_bytes: Of inputs and outputs.
        queue_lengths: Requests that wait, of each priority from 0.
        queue_oldest_seconds: How long the one that came first has waited.
        arenas: Pieces of shared memory.
        arena_bytes: Of all of them.
        streams: Streams that are open.

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
        enabled: False: nothing is counted, at no cost.

    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._registry = CollectorRegistry() if enabled else None
        self._read: Callable[[], Load] = Load
        self._refreshing = threading.Lock()
        self._shown = Load()
        # The names and labels that the interceptors of grpc-ecosystem have in other languages, so that dashboards fit.
        method = "grpc_type", "grpc_service", "grpc_method"
        self._started = _children(self._counter("grpc_server_started", "Calls that began.", *method))
        self._handled = _children(self._counter("grpc_server_handled", "Calls that ended.", *method, "grpc_code"))
        self._seconds = _children(
            self._histogram("grpc_server_handling_seconds", "How long calls took.", SECONDS, *method)
        )
        self._rejects = self._counter("poolrpc_rejects", "Calls refused for what is under way.", "reason")
        self._escapes = self._counter("poolrpc_validator_escapes", "Calls that failed although they passed the checks.")
        self._cancelled = self._counter("poolrpc_cancelled", "Calls whose caller left, by how far they were.", "stage")
        self._executions = self._counter("poolrpc_executions", "Executions of the engine, each of a batch.")
        self._requests = self._counter("poolrpc_requests", "Requests in them.")
        self._bytes = self._counter("poolrpc_executed_bytes", "Bytes of inputs and outputs in them.")
        self._batch_requests = self._histogram("poolrpc_batch_requests", "Requests of an execution.", REQUESTS)
        self._batch_planes = self._histogram("poolrpc_batch_planes", "Planes of an execution.", PLANES)
        self._compute = self._histogram("poolrpc_compute_seconds", "How long executions took.", SECONDS)
        self._queue = self._histogram("poolrpc_queue_seconds", "How long requests waited to be executed.", SECONDS)
        self._gauges = {
            "inflight_bytes": self._gauge("poolrpc_inflight_bytes", "Bytes of inputs and outputs under way."),
            "queue_oldest_seconds": self._gauge(
                "poolrpc_queue_oldest_seconds", "How long the oldest request in the queue has waited.", "livemax"
            ),
            "arenas": self._gauge("poolrpc_arenas", "Pieces of shared memory."),
            "arena_bytes": self._gauge("poolrpc_arena_bytes", "Bytes of shared memory."),
            "streams": self._gauge("poolrpc_streams", "Streams that are open."),
        }
        self._queue_length = self._gauge(
            "poolrpc_queue_length", "Requests in the queue.", "livesum", labels=("priority",)
        )
        # Prometheus doesn't see a sample that begins with 1 rise: what there may be is shown from 0 on.
        for reason in REASONS:
            self._rejects.labels(reason)
        for stage in STAGES:
            self._cancelled.labels(stage)

    def expect(self, kind: str, service: str, method: str) -> None:
        """Show a method before its first call, with no calls that ended well and none that failed."""
        self._started(kind, service, method)
        self._seconds(kind, service, method)
        for code in ("OK", "INTERNAL"):
            self._handled(kind, service, method, _shown_code(code))

    def started(self, kind: str, service: str, method: str) -> None:
        """Count a call that begins; its kind is "unary", or "bidi_stream" and the like."""
        self._started(kind, service, method).inc()
        if IN_FOLDER:
            self.refresh()

    def handled(self, kind: str, service: str, method: str, code: str, seconds: float) -> None:
        """Count a call that ended, with the name of its status code as gRPC has it: "INVALID_ARGUMENT"."""
        self._handled(kind, service, method, _shown_code(code)).inc()
        self._seconds(kind, service, method).observe(seconds)
        if IN_FOLDER:
            self.refresh()

    def rejected(self, reason: str) -> None:
        """Count a call that was refused for what is under way: one of REASONS."""
        self._rejects.labels(reason).inc()

    def escaped(self) -> None:
        """Count a call that failed unexpectedly: the checks should not have let it pass."""
        self._escapes.inc()

    def cancelled(self, stage: str) -> None:
        """Count a call whose caller left, at one of STAGES."""
        self._cancelled.labels(stage).inc()

    def executed(self, requests: int, planes: int, nbytes: int, seconds: float) -> None:
        """Count one execution of the engine: what was in it and how long it took."""
        self._executions.inc()
        self._requests.inc(requests)
        self._bytes.inc(nbytes)
        self._batch_requests.observe(requests)
        self._batch_planes.observe(planes)
        self._compute.observe(seconds)

    def queued(self, seconds: float) -> None:
        """Count how long a request waited to be executed."""
        self._queue.observe(seconds)

    def watch(self, read: Callable[[], Load]) -> None:
        """Take the gauges from what a function gives: when they are looked at, or now and as calls begin and end."""
        self._read = read
        if IN_FOLDER:
            self.refresh()

    def refresh(self) -> None:
        """Take the gauges now.

        They are taken when they are looked at. In a folder, where whoever looks is another process, they are as calls
        begin and end; other moments at which they change may call this.
        """
        if self._registry is None:
            return
        # Read and written in one step, so that what was read last stays.
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
        """Give what is to be shown of this process alone."""
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
    """Stands for a metric where nothing is counted."""

    def labels(self, *_: object) -> Self:
        return self

    def inc(self, amount: float = 1) -> None:
        pass

    def observe(self, amount: float) -> None:
        pass

    def set(self, value: float) -> None:
        pass


def _children(metric: T) -> Callable[..., T]:
    """Give metric.labels, remembered: looking a child up costs more than counting does."""
    labels: Any = metric.labels
    return cache(labels)


@cache
def _shown_code(code: str) -> str:
    # As grpc-ecosystem's interceptor for Go says it, for which most dashboards and alerts are written.
    return {"OK": "OK", "CANCELLED": "Canceled"}.get(code) or code.title().replace("_", "")


def summed(folder: str, restarts: Callable[[], int]) -> CollectorRegistry:
    """Give what is to be shown of all processes that count into a folder.

    Args:
        folder: Their FOLDER_VARIABLE.
        restarts: Gives how many of them were started again.

    """
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=folder)  # type: ignore[no-untyped-call]  # prometheus_client's
    registry.register(_Restarts(restarts))
    return registry


def forget(folder: str, pid: int) -> None:
    """Take the gauges of a process that has ended out of the sums; what it counted stays in them."""
    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]  # prometheus_client's


class _Restarts(Collector):
    # A Counter would be a file of the folder, and counted twice, if this process had the variable too.
    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read

    def collect(self) -> Iterable[CounterMetricFamily]:
        yield CounterMetricFamily("poolrpc_worker_restarts", "Workers that were started again.", value=self._read())


class MetricsServer:
    """HTTP on an address of its own: /metrics, /healthz (the process answers), /readyz (it should get calls).

    Attributes:
        address: Where it listens, "host:port".

    """

    def __init__(self, address: str, collect: Callable[[], CollectorRegistry], ready: Callable[[], bool]) -> None:
        """Listen.

        Args:
            address: "host:port"; port 0: a free one.
            collect: Gives what is shown, each time that somebody looks.
            ready: Tells whether calls should be sent here.

        Raises:
            OSError: The address can't be had.

        """
        self._collect = collect
        self._ready = ready
        host, _, port = address.rpartition(":")
        self._server = (_Server6 if ":" in host else _Server)((host.strip("[]"), int(port)), _Connection)
        self._server.set_app(self._answer)
        self.address = f"{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="poolrpc-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more."""
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
    timeout = PATIENCE

    def log_message(self, *_: object) -> None:
        """Write no line for each look."""


class _Server(ThreadingWSGIServer):
    address_family = AF_INET

    def handle_error(self, request: object, client_address: object) -> None:
        """Leave out of the log that a peer left, or was slow."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # socketserver's own type isn't to be had


class _Server6(_Server):
    address_family = AF_INET6
