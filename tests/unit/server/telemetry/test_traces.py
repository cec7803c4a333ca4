"""Traces: what the OTEL_ variables ask for."""

from __future__ import annotations

import logging
import sys

import pytest

from poolrpc_server.telemetry import traces

OTLP = {"OTEL_TRACES_EXPORTER": "otlp"}
ENDPOINT, TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, ()),
        ({"OTEL_TRACES_EXPORTER": "none", ENDPOINT: "http://c:4317"}, ()),
        ({"OTEL_SDK_DISABLED": "True", **OTLP}, ()),
        ({"OTEL_SERVICE_NAME": "pooling", "OTEL_TRACES_SAMPLER": "always_on"}, ()),
        ({ENDPOINT: " "}, ()),
        (OTLP, ("otlp",)),
        ({ENDPOINT: "http://c:4317"}, ("otlp",)),
        ({TRACES_ENDPOINT: "http://c:4317"}, ("otlp",)),
        ({"OTEL_TRACES_EXPORTER": "console, otlp"}, ("console", "otlp")),
        ({"OTEL_TRACES_EXPORTER": "console", ENDPOINT: "http://c:4317"}, ("console",)),
    ],
)
def test_traces_are_on_where_an_exporter_or_an_endpoint_is_named(environment, names):
    """OTEL_TRACES_EXPORTER names exporters, an OTLP endpoint means otlp, and anything else leaves traces off."""
    assert traces.enabled_exporters(environment) == names


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (OTLP, "otlp http://localhost:4317"),
        ({**OTLP, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "otlp http://localhost:4318"),
        ({ENDPOINT: "https://c:4317", TRACES_ENDPOINT: "https://t:1"}, "otlp https://t:1"),
        ({ENDPOINT: "https://me:secret@c.example:4317/v1?key=secret#secret"}, "otlp https://c.example:4317/v1"),
        ({ENDPOINT: "c.example:4317"}, "otlp c.example:4317"),
        ({ENDPOINT: "me:secret@c.example:4317?key=secret"}, "otlp c.example:4317"),
    ],
)
def test_a_destination_has_no_secrets(environment, said):
    """An endpoint is shown as its scheme, host, port and path, without user, password and query."""
    assert traces.destination("otlp", environment) == said


def test_other_exporters_are_shown_by_name():
    """An exporter without an endpoint, such as the console, is its own destination."""
    assert traces.destination("console", {}) == "console"


def test_without_the_extra_there_is_a_warning(monkeypatch, caplog):
    """A server that is to trace but lacks the extra warns what to install, and does not trace."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)  # as if it were not installed
    with caplog.at_level(logging.WARNING, "poolrpc_server"):
        assert traces.start_tracing() is None
    assert [each.getMessage() for each in caplog.records] == [
        "no traces: expected the extra, pip install 'poolrpc[otel]'"
    ]
