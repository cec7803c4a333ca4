"""The client's spans, by OpenTelemetry's API, where the program that calls has imported it: else there is no cost."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING

import grpc

from poolrpc._shapes.rules import clip
from poolrpc._version import __version__
from poolrpc.errors import PoolError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.trace import Span

    from poolrpc._transport.stream import CallOptions
    from poolrpc._wire.codec import Request

FACT_CHARS = 300
"""Of each attribute."""

_NOTHING: nullcontext[None] = nullcontext()


def traced(
    method: str, address: str, call: CallOptions, request: Request | None = None
) -> AbstractContextManager[Span | None]:
    """Give the span of a call, which lasts as long as the context and goes with the call as its metadata.

    Args:
        method: "package.Service/Method".
        address: The client's.
        call: What the call is made with.
        request: What is asked, where it is to be pooled.

    """
    # Who has set up traces has imported this; nobody else is to pay for it.
    return _span(method, address, call, request) if "opentelemetry.trace" in sys.modules else _NOTHING


@contextmanager
def _span(method: str, address: str, call: CallOptions, request: Request | None) -> Iterator[Span]:
    from opentelemetry import propagate, trace  # noqa: PLC0415 - the program has it

    tracer = trace.get_tracer("poolrpc", __version__)
    service, _, name = method.partition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name, **_server(address)}
    with tracer.start_as_current_span(
        method,
        kind=trace.SpanKind.CLIENT,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        if request is not None and span.is_recording():
            spec = request.input
            asked = {"layers": clip(request.branches, FACT_CHARS), "shape": clip(spec.shape), "dtype": spec.dtype}
            span.set_attributes({f"poolrpc.{key}": value for key, value in asked.items()})
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        call.carry(carrier)
        try:
            yield span
        except BaseException as error:
            # What isn't ours is raised where the caller leaves: an asyncio task that is cancelled, Ctrl-C.
            code, text = (error.code, error.message) if isinstance(error, PoolError) else ("CANCELLED", "")
            span.set_attributes({"rpc.grpc.status_code": grpc.StatusCode[code].value[0], "error.type": code})
            span.set_status(trace.StatusCode.ERROR, text)
            raise
        span.set_attribute("rpc.grpc.status_code", 0)


@lru_cache(64)
def _server(address: str) -> dict[str, str | int]:
    if address.startswith("unix:"):
        return {"server.address": address.removeprefix("unix:").removeprefix("//"), "network.transport": "unix"}
    host, _, port = address.rpartition("/")[2].rpartition(":")  # "dns:///name:port" too
    return {"server.address": host, "server.port": int(port)} if port.isdecimal() else {"server.address": address}
