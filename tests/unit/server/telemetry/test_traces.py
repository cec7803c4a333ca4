"""What the OTEL_ variables ask for, and what is told of a call's stages."""

from __future__ import annotations

import logging
import sys

import pytest

from poolrpc_server.telemetry import traces
from poolrpc_server.telemetry.timeline import MOST_TURNS, Timeline

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
    assert traces.wanted(environment) == names


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
    """Of an endpoint its scheme, host, port and path are said; neither a user, a password nor a query."""
    assert traces.destination("otlp", environment) == said


def test_other_exporters_are_said_by_their_name():
    """The console, for example."""
    assert traces.destination("console", {}) == "console"


def test_without_the_extra_there_is_a_warning(monkeypatch, caplog):
    """A server that is asked for traces but lacks the extra says what to install, and has none."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    monkeypatch.setitem(sys.modules, "poolrpc_server.telemetry.spans", None)  # as where OpenTelemetry can't be imported
    with caplog.at_level(logging.WARNING, "poolrpc_server"):
        assert traces.begin() is None
    assert [each.getMessage() for each in caplog.records] == [
        "no traces: the server needs its extra, pip install 'poolrpc[otel]'"
    ]


def test_a_turn_is_told_stage_by_stage():
    """Times follow each other, and a batch that is computed anew, one by one, is told anew."""
    timeline = Timeline()
    with timeline.turn(6, 1) as turn:
        turn.begin(3, 18)
        turn.compute_ended()
        turn.begin(1, 6)
        assert turn.computed == 0
        assert turn.timed(lambda outputs: [*outputs, "made"])([]) == ["made"]
    times = [timeline.started, turn.queued, turn.begun, turn.computed, turn.encoded, turn.ended]
    assert times == sorted(times)
    assert (turn.batch_requests, turn.batch_planes, turn.error) == (1, 6, "")


def test_a_turn_keeps_what_it_failed_with():
    """The error's name is kept, and the error goes on."""
    timeline = Timeline()
    with pytest.raises(ValueError, match="no"), timeline.turn(1, 1) as turn:
        raise ValueError("no")
    assert (turn.error, turn.begun) == ("ValueError", 0)
    assert turn.ended >= turn.queued


def test_only_the_first_turns_are_kept():
    """Any number is counted; a stream without end takes no more memory."""
    timeline = Timeline()
    for _ in range(MOST_TURNS + 5):
        with timeline.turn(1, 1):
            pass
    assert (timeline.count, len(timeline.turns)) == (MOST_TURNS + 5, MOST_TURNS)
