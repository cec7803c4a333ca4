"""Whether the environment asks for traces, and where to, by OpenTelemetry's OTEL_ variables; doesn't import it."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from poolrpc_server.telemetry.logs import adopt, log

if TYPE_CHECKING:
    from collections.abc import Mapping

    from poolrpc_server.telemetry.spans import Spans

OTLP = {
    "grpc": ("otlp_proto_grpc", "http://localhost:4317"),
    "http/protobuf": ("otlp_proto_http", "http://localhost:4318"),
}
"""The exporter of each protocol of OTLP, and where it sends to unless told otherwise."""

EXPORTERS = "opentelemetry_traces_exporter"
"""The entry points by which packages offer exporters."""


def wanted(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Give the names of the exporters that the environment asks for.

    OpenTelemetry's own default would be to send to this machine; here silence is none.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ()
    names = environment.get("OTEL_TRACES_EXPORTER", "")
    if not names.strip() and _of_traces(environment, "ENDPOINT"):
        names = "otlp"
    return tuple(name for each in names.split(",") if (name := each.strip()) not in ("", "none"))


def destination(name: str, environment: Mapping[str, str] = os.environ) -> str:
    """Say where an exporter sends to, without what may be secret in it."""
    if name != "otlp":
        return name
    _, default = OTLP.get(_protocol(environment), ("", ""))
    place = _of_traces(environment, "ENDPOINT") or default
    url = urlsplit(place if "://" in place else f"//{place}")
    scheme = f"{url.scheme}://" if url.scheme else ""
    return f"otlp {scheme}{url.netloc.rpartition('@')[2]}{url.path}"


def begin() -> Spans | None:
    """Give what makes spans, where the environment asks for it and it can be had; a warning says why where not."""
    names = wanted()
    if not names:
        return None
    adopt("opentelemetry")
    try:
        from poolrpc_server.telemetry.spans import Spans  # noqa: PLC0415 - most servers run without, and may not have it

        return Spans([_exporter(name) for name in names], " ".join(map(destination, names)))
    except ImportError:
        log.warning("no traces: the server needs its extra, pip install 'poolrpc[otel]'", exporters=" ".join(names))
    except Exception as error:  # noqa: BLE001 - an exporter's own, for a bad variable: no reason not to serve
        log.warning("no traces", exporters=" ".join(names), error=str(error))
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
    there = ", ".join(sorted(entry_points(group=EXPORTERS).names))
    raise ValueError(f"OTEL_TRACES_EXPORTER: expected one that is installed ({there}), got {name!r}")
