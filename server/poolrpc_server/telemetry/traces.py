"""Traces: whether OpenTelemetry's OTEL_ variables enable them, and the spans of each call, made from its record.

OpenTelemetry is imported only if traces are enabled: most servers run without them, and may not have it installed.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from threading import Thread
from time import monotonic_ns, time_ns
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

from poolrpc import __version__
from poolrpc._wire.status import STATUS_NUMBERS
from poolrpc_server.telemetry.logs import adopt, log

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter

    from poolrpc_server.telemetry.record import CallRecord
    from poolrpc_server.telemetry.stage_times import StageTimes

OTLP = {
    "grpc": ("otlp_proto_grpc", "http://localhost:4317"),
    "http/protobuf": ("otlp_proto_http", "http://localhost:4318"),
}
"""The exporter of each protocol of OTLP, and its default endpoint."""

EXPORTERS = "opentelemetry_traces_exporter"
"""The group of entry points under which packages offer exporters."""

SPAN_FLUSH_SECONDS = 2.0
"""Maximum seconds for which sending the last spans delays the end of the server, since a collector may be down."""

SERVER_FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
"""Status codes that make a server's span an error by OpenTelemetry's conventions; the others are the caller's fault."""


def enabled_exporters(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the names of the exporters that the environment enables.

    Without variables there are none, although OpenTelemetry's own default is to send to this machine.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ()
    names = environment.get("OTEL_TRACES_EXPORTER", "")
    if not names.strip() and _of_traces(environment, "ENDPOINT"):
        names = "otlp"
    return tuple(name for each in names.split(",") if (name := each.strip()) not in ("", "none"))


def destination(name: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return where an exporter sends to, without the credentials that the address may contain."""
    if name != "otlp":
        return name
    _, default = OTLP.get(_protocol(environment), ("", ""))
    endpoint = _of_traces(environment, "ENDPOINT") or default
    url = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    scheme = f"{url.scheme}://" if url.scheme else ""
    return f"otlp {scheme}{url.netloc.rpartition('@')[2]}{url.path}"


def start_tracing() -> Spans | None:
    """Return the Spans, or None if the environment enables none or they cannot be set up; a warning then says why."""
    names = enabled_exporters()
    if not names:
        return None
    adopt("opentelemetry")
    try:
        return Spans([_exporter(name) for name in names], " ".join(map(destination, names)))
    except ImportError:
        log.warning("no traces: expected the extra, pip install 'poolrpc[otel]'", exporters=list(names))
    except Exception as error:  # noqa: BLE001 - an exporter's own, for a bad variable: no reason not to serve
        log.warning("no traces", exporters=list(names), error=str(error))
    return None


def _of_traces(environment: Mapping[str, str], name: str) -> str:
    of_traces = environment.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}", "").strip()
    return of_traces or environment.get(f"OTEL_EXPORTER_OTLP_{name}", "").strip()


def _protocol(environment: Mapping[str, str]) -> str:
    return _of_traces(environment, "PROTOCOL") or "grpc"


def _exporter(name: str) -> Any:  # noqa: ANN401 - whatever a package offers
    if name == "otlp":
        protocol = _protocol(os.environ)
        if protocol not in OTLP:
            raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL: expected one of {', '.join(OTLP)}, got {protocol!r}")
        name, _ = OTLP[protocol]
    for found in entry_points(group=EXPORTERS, name=name):
        return found.load()()
    installed = ", ".join(sorted(entry_points(group=EXPORTERS).names))
    raise ValueError(f"OTEL_TRACES_EXPORTER: expected one that is installed ({installed}), got {name!r}")


class Spans:
    """The spans of calls that have ended, which are sent in the background.

    Attributes:
        destination: The address to which they are sent, for the log.

    """

    def __init__(self, exporters: Sequence[SpanExporter], destination: str) -> None:
        """Send to these exporters; sampling, batches and limits are those of the OTEL_ variables.

        Raises:
            ImportError: OpenTelemetry is not installed.

        """
        from opentelemetry import propagate, trace  # noqa: PLC0415 - see the module's docstring
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        self.destination = destination
        self._trace = trace
        self._extract = propagate.extract
        ours = {"service.name": "poolrpc", "service.version": __version__, "service.instance.id": str(uuid4())}
        # The environment's attributes replace ours, which replace OpenTelemetry's.
        attributes = {**ours, "process.pid": os.getpid(), **OTELResourceDetector().detect().attributes}
        # OpenTelemetry's own hook at the end of the process would wait for a collector that is down.
        self._provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
        self._exporters = exporters
        for exporter in exporters:
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("poolrpc_server", __version__)

    def add(self, record: CallRecord, metadata: Sequence[tuple[str, str | bytes]], peer: str) -> str:
        """Make the spans of a call that ends now.

        Args:
            record: Record of the call.
            metadata: The caller's metadata, which may have the context of a trace.
            peer: Address of the caller in gRPC's notation.

        Returns:
            The trace id in hexadecimal.

        """
        trace = self._trace
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        name = record.method.removeprefix("/")
        service, _, method = name.partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method, **_peer(peer)}
        # Spans have the time of day, for which what was recorded is shifted by one offset.
        now, epoch = monotonic_ns(), time_ns()
        offset = epoch - now
        span = self._tracer.start_span(
            name, self._extract(carrier), trace.SpanKind.SERVER, attributes, start_time=record.started + offset
        )
        trace_id: str = trace.format_trace_id(span.get_span_context().trace_id)
        if not span.is_recording():
            return trace_id
        parent = trace.set_span_in_context(span)
        for number, times in enumerate(record.executions):
            self._add_stages(parent, times, 0 if record.streaming or number else record.started, offset)
        span.set_attributes({f"poolrpc.{key}": str(value) for key, value in record.facts.items()})
        span.set_attribute("rpc.grpc.status_code", STATUS_NUMBERS[record.status])
        if record.executions:
            span.set_attribute("poolrpc.executions", record.count)
        if record.status != "OK":
            span.set_attribute("error.type", record.status)
        if record.status in SERVER_FAULTS:
            span.set_status(trace.StatusCode.ERROR, str(record.facts.get("error", "")))
        span.end(epoch)
        return trace_id

    def _add_stages(self, parent: Context, times: StageTimes, received: int, offset: int) -> None:
        # `received`: when the call's message had arrived; 0 for a further execution of the same call.
        stages = [("queue", times.queued, times.started)]
        if received:
            stages.insert(0, ("validate", received, times.queued))
        if times.started:
            stages.append(("compute", times.started, times.computed))
        if times.computed:
            stages.append(("encode", times.computed, times.encoded))
        attributes = {
            "queue": {"poolrpc.priority": times.priority},
            "compute": {
                "poolrpc.planes": times.planes,
                "poolrpc.batch_requests": times.batch_requests,
                "poolrpc.batch_planes": times.batch_planes,
            },
        }
        for name, start, end in stages:
            span = self._tracer.start_span(name, parent, attributes=attributes.get(name), start_time=start + offset)
            if times.error and name == stages[-1][0]:
                span.set_attribute("error.type", times.error)
                span.set_status(self._trace.StatusCode.ERROR)
            if name == "compute":
                self._add_device_stages(self._trace.set_span_in_context(span), times, offset)
            # A batch may compute for a call that has ended.
            span.end(min(end or times.ended, times.ended) + offset)

    def _add_device_stages(self, parent: Context, times: StageTimes, offset: int) -> None:
        for stage in times.device:
            attributes = {"poolrpc.busy_seconds": stage.busy_ns / 1e9}
            span = self._tracer.start_span(
                stage.name, parent, attributes=attributes, start_time=min(stage.started, times.ended) + offset
            )
            span.end(min(stage.ended, times.ended) + offset)

    def close(self, seconds: float) -> None:
        """Send the remaining spans, for at most `seconds` and SPAN_FLUSH_SECONDS, and end."""
        flushing = Thread(target=self._provider.shutdown, name="poolrpc-flush", daemon=True)
        flushing.start()
        flushing.join(min(seconds, SPAN_FLUSH_SECONDS))
        if flushing.is_alive():
            for exporter in self._exporters:
                exporter.shutdown()


def _peer(peer: str) -> dict[str, str | int]:
    # "ipv4:127.0.0.1:50051", "ipv6:%5B::1%5D:50051", or "unix:" with or without a path.
    kind, _, rest = peer.partition(":")
    host, _, port = rest.rpartition(":")
    if kind == "unix" or not port.isdecimal():
        return {"network.transport": "unix"} if kind == "unix" else {}
    return {"network.peer.address": host.removeprefix("%5B").removesuffix("%5D"), "network.peer.port": int(port)}
