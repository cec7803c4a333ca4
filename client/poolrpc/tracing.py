"""The client's OpenTelemetry spans; they cost nothing unless the program has imported OpenTelemetry."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING

from poolrpc._shapes.rules import clip
from poolrpc._version import __version__
from poolrpc._wire.status import STATUS_NUMBERS
from poolrpc.errors import PoolError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.trace import Span

    from poolrpc._transport.options import CallOptions
    from poolrpc._wire.codec import Request

ATTRIBUTE_CHARS = 300
"""The length of an attribute, in characters, at most."""

_NO_SPAN: nullcontext[None] = nullcontext()


def traced(
    method: str, address: str, options: CallOptions, request: Request | None = None
) -> AbstractContextManager[Span | None]:
    """Return the span of a call, which is sent with the call as metadata and ends with the context.

    Args:
        method: "package.Service/Method".
        address: The address of the client.
        options: The options of the call.
        request: The request, if the call pools a tensor.

    """
    # A program that has set up tracing has imported this module; other programs should not pay for it.
    return _span(method, address, options, request) if "opentelemetry.trace" in sys.modules else _NO_SPAN


@contextmanager
def _span(method: str, address: str, options: CallOptions, request: Request | None) -> Iterator[Span]:
    from opentelemetry import propagate, trace  # noqa: PLC0415 - the program has imported it

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
            values = {"layers": clip(request.branches, ATTRIBUTE_CHARS), "shape": clip(spec.shape), "dtype": spec.dtype}
            span.set_attributes({f"poolrpc.{key}": value for key, value in values.items()})
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        options.add_metadata(carrier)
        try:
            yield span
        except BaseException as error:
            # Any other error cancels the call: asyncio.CancelledError, KeyboardInterrupt.
            code, text = (error.code, error.message) if isinstance(error, PoolError) else ("CANCELLED", "")
            span.set_attributes({"rpc.grpc.status_code": STATUS_NUMBERS[code], "error.type": code})
            span.set_status(trace.StatusCode.ERROR, text)
            raise
        span.set_attribute("rpc.grpc.status_code", STATUS_NUMBERS["OK"])


@lru_cache(64)
def _server(address: str) -> dict[str, str | int]:
    if address.startswith("unix:"):
        return {"server.address": address.removeprefix("unix:").removeprefix("//"), "network.transport": "unix"}
    host, _, port = address.rpartition("/")[2].rpartition(":")  # of "dns:///name:port" too
    return {"server.address": host, "server.port": int(port)} if port.isdecimal() else {"server.address": address}
