"""The spans of a server process: OpenTelemetry's own, made of what is known of each call. Knows no gRPC."""

from __future__ import annotations

import os
from threading import Thread
from typing import TYPE_CHECKING
from uuid import uuid4

from opentelemetry import propagate
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id, set_span_in_context

from poolrpc import __version__
from poolrpc_server.telemetry.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from poolrpc_server.telemetry.timeline import Turn

FLUSH_SECONDS = 2.0
"""How long the last spans may take to be sent, when the server stops: a collector that is down holds nothing up."""

OWN_FAULT = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
"""The statuses that make a server's span an error by OpenTelemetry's conventions; the others are the caller's."""


class Spans:
    """Makes spans and sends them, in the background.

    Attributes:
        destination: Where to, for people to read.

    """

    def __init__(self, exporters: Sequence[SpanExporter], destination: str) -> None:
        """Begin to send to these exporters; sampling, batches and limits are as the OTEL_ variables have them."""
        self.destination = destination
        ours = {"service.name": "poolrpc", "service.version": __version__, "service.instance.id": str(uuid4())}
        # What the environment says goes before what we say, which goes before what OpenTelemetry would.
        told = {**ours, "process.pid": os.getpid(), **OTELResourceDetector().detect().attributes}
        # Its own way to end with the process would wait for a collector that is down.
        self._provider = TracerProvider(resource=Resource.create(told), shutdown_on_exit=False)
        self._exporters = exporters
        for each in exporters:
            self._provider.add_span_processor(BatchSpanProcessor(each))
        self._tracer = self._provider.get_tracer("poolrpc_server", __version__)

    def begin(self, method: str, metadata: Iterable[tuple[str, str | bytes]] | None, peer: str) -> CallSpan:
        """Begin the span of a call: its method as gRPC names it, its metadata, and its peer as gRPC names that."""
        carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
        name = method.removeprefix("/")
        service, _, short = name.partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": short, **_peer(peer)}
        span = self._tracer.start_span(name, propagate.extract(carrier), SpanKind.SERVER, attributes)
        return CallSpan(self, span)

    def add(self, parent: Span, turn: Turn, started: int) -> None:
        """Add the spans of a turn below that of its call; `started`: when the call came; 0: it says nothing."""
        stages = [("queue", turn.queued, turn.begun)]
        if started:
            stages.insert(0, ("validate", started, turn.queued))
        if turn.begun:
            stages.append(("compute", turn.begun, turn.computed))
        if turn.computed:
            stages.append(("encode", turn.computed, turn.encoded))
        context = set_span_in_context(parent)
        attributes = {
            "queue": {"poolrpc.priority": turn.priority},
            "compute": {
                "poolrpc.planes": turn.planes,
                "poolrpc.batch_requests": turn.batch_requests,
                "poolrpc.batch_planes": turn.batch_planes,
            },
        }
        for name, begin, end in stages:
            span = self._tracer.start_span(name, context, attributes=attributes.get(name), start_time=begin)
            if turn.error and name == stages[-1][0]:
                span.set_attribute("error.type", turn.error)
                span.set_status(StatusCode.ERROR)
            # Whoever computes for one that has left may do so after its end.
            span.end(min(end or turn.ended, turn.ended))

    def close(self, seconds: float) -> None:
        """Send what there is, for so many seconds and FLUSH_SECONDS at most, and end."""
        ending = Thread(target=self._provider.shutdown, name="poolrpc-flush", daemon=True)
        ending.start()
        ending.join(min(seconds, FLUSH_SECONDS))
        if ending.is_alive():
            for each in self._exporters:
                each.shutdown()


class CallSpan:
    """The span of one call, while it lasts.

    Attributes:
        trace_id: As the log has it.
        timeline: Where the call's turns are told; None where nobody wants to know.

    """

    def __init__(self, spans: Spans, span: Span) -> None:
        self._spans = spans
        self._span = span
        self.trace_id = format_trace_id(span.get_span_context().trace_id)
        self.timeline = Timeline() if span.is_recording() else None

    def end(self, status: str, code: int, facts: Mapping[str, str], *, streams: bool) -> None:
        """End it.

        Args:
            status: The name of gRPC's status, and `code` its number.
            code: See status.
            facts: What the log says of the call: attributes.
            streams: Whether the call is a stream, so that its begin says nothing of its first turn.

        """
        timeline = self.timeline
        if timeline is None:
            return
        for number, turn in enumerate(timeline.turns):
            self._spans.add(self._span, turn, 0 if streams or number else timeline.started)
        self._span.set_attributes({f"poolrpc.{name}": value for name, value in facts.items()})
        self._span.set_attribute("rpc.grpc.status_code", code)
        if timeline.turns:
            self._span.set_attribute("poolrpc.executions", timeline.count)
        if status != "OK":
            self._span.set_attribute("error.type", status)
        if status in OWN_FAULT:
            self._span.set_status(StatusCode.ERROR, facts.get("error", ""))
        self._span.end()


def _peer(peer: str) -> dict[str, str | int]:
    # gRPC's: "ipv4:127.0.0.1:50051", "ipv6:%5B::1%5D:50051", "unix:" and perhaps a path.
    kind, _, rest = peer.partition(":")
    host, _, port = rest.rpartition(":")
    if kind == "unix" or not port.isdecimal():
        return {"network.transport": "unix"} if kind == "unix" else {}
    return {"network.peer.address": host.removeprefix("%5B").removesuffix("%5D"), "network.peer.port": int(port)}
