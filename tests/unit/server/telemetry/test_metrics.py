"""The metrics of a server: their names and their values."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import poolrpc_server
from poolrpc_server.telemetry.metrics import CANCELLATION_STAGES, END_REASONS, REASONS, Load, Metrics
from poolrpc_server.telemetry.stage_times import DEVICE_STAGES, DeviceStage

CALL = ("unary", "poolrpc.v1.PoolService", "Pool")
LABELS = dict(zip(("grpc_type", "grpc_service", "grpc_method"), CALL, strict=True))
LOAD = Load(
    1000,
    (2, 0, 1),
    1.5,
    3,
    4096,
    5,
    pinned_bytes=8,
    device_memory_bytes=9,
    device_blocks=10,
    calls=6,
    memory_bytes=7,
    certificates={"tls_cert": 1.9e9},
)


def families(registry):
    """Return what a registry shows, as Prometheus reads it, by name."""
    return {each.name: each for each in text_string_to_metric_families(generate_latest(registry).decode())}


def value(registry, name, **labels):
    """Return one sample."""
    return registry.get_sample_value(name, labels)


def found(pattern):
    """Return what a pattern's group finds in the server's code."""
    sources = [each.read_text() for each in Path(poolrpc_server.__file__).parent.rglob("*.py")]
    return {match for source in sources for match in re.findall(pattern, source)}


BUILD = {"version": "1", "torch": "2", "python": "3", "device": "cpu"}


def busy():
    """Return metrics in which everything was counted once."""
    metrics = Metrics()
    metrics.describe(BUILD, {"max_work": 5}, {"max_queue": 64}, 2**30, 2**34)
    metrics.watch(lambda: LOAD)
    metrics.started(*CALL)
    metrics.handled(*CALL, "OK", 0.002)
    metrics.rejected("STREAMS")
    metrics.escaped()
    metrics.cancelled("queue")
    metrics.ended("STALLED")
    metrics.executed(3, 24, 4096, 0.001)
    metrics.queued(0.003)
    metrics.received(0.004)
    return metrics


def test_names_follow_prometheus_conventions():
    """Names are lower-case with a prefix and a help text; counters end in _total, times in _seconds, sizes in _bytes.

    What Prometheus parses is what was counted.
    """
    shown = families(busy().collect())
    shown = {name: family for name, family in shown.items() if not name.endswith("_created")}
    assert set(shown) >= {"grpc_server_started", "grpc_server_handled", "grpc_server_handling_seconds"}
    assert {"poolrpc_rejects", "poolrpc_validator_escapes", "poolrpc_cancelled", "poolrpc_ended"} < set(shown)
    for name, family in shown.items():
        assert name.startswith(("grpc_server_", "poolrpc_", "process_"))
        assert name == name.lower()
        assert family.documentation.endswith(".")
        assert family.samples
        suffixes = {sample.name.removeprefix(name) for sample in family.samples}
        expected = {"counter": {"_total"}, "histogram": {"_bucket", "_sum", "_count"}, "gauge": {""}}
        assert suffixes == expected[family.type]
        assert not name.endswith(("_ms", "_milliseconds", "_kb", "_mb"))


def test_calls_are_counted_by_method_and_status():
    """Calls are counted at their start and end and timed, with the labels and codes of grpc-ecosystem."""
    metrics = Metrics()
    for code in ("OK", "OK", "INVALID_ARGUMENT", "CANCELLED"):
        metrics.started(*CALL)
        metrics.handled(*CALL, code, 0.25)
    shown = metrics.collect()
    assert value(shown, "grpc_server_started_total", **LABELS) == 4
    assert value(shown, "grpc_server_handled_total", **LABELS, grpc_code="OK") == 2
    assert value(shown, "grpc_server_handled_total", **LABELS, grpc_code="InvalidArgument") == 1
    assert value(shown, "grpc_server_handled_total", **LABELS, grpc_code="Canceled") == 1
    assert value(shown, "grpc_server_handling_seconds_sum", **LABELS) == 1
    assert value(shown, "grpc_server_handling_seconds_bucket", **LABELS, le="0.1") == 0
    assert value(shown, "grpc_server_handling_seconds_bucket", **LABELS, le="0.25") == 4


def test_an_execution_is_counted_with_its_contents():
    """Executions, their requests, and the sizes and durations of batches are counted."""
    metrics = busy()
    metrics.executed(1, 8, 1000, 0.25, [DeviceStage("upload", 5, 9, 10**9), DeviceStage("kernel", 7, 9, 10**8)])
    shown = metrics.collect()
    assert value(shown, "poolrpc_executions_total") == 2
    assert value(shown, "poolrpc_requests_total") == 4
    assert value(shown, "poolrpc_executed_bytes_total") == 5096
    assert value(shown, "poolrpc_batch_requests_bucket", le="1.0") == 1
    assert value(shown, "poolrpc_batch_planes_sum") == 32
    assert value(shown, "poolrpc_compute_seconds_sum") == pytest.approx(0.251)
    assert value(shown, "poolrpc_queue_seconds_count") == 1
    assert [value(shown, "poolrpc_device_seconds_sum", stage=each) for each in DEVICE_STAGES] == [1, 0.1, 0]


def test_calls_that_fail_are_counted_by_their_reason():
    """Rejections and ended calls are counted by reason, cancelled calls by stage, validator escapes without a label."""
    shown = busy().collect()
    assert value(shown, "poolrpc_rejects_total", reason="STREAMS") == 1
    assert value(shown, "poolrpc_cancelled_total", stage="queue") == 1
    assert value(shown, "poolrpc_ended_total", reason="STALLED") == 1
    assert value(shown, "poolrpc_validator_escapes_total") == 1


def test_every_sample_is_shown_from_0_on():
    """Every reason, stage and method of a service has its samples before the first call."""
    metrics = Metrics()
    metrics.expect(*CALL)
    shown = metrics.collect()
    assert {value(shown, "poolrpc_rejects_total", reason=each) for each in REASONS} == {0}
    assert {value(shown, "poolrpc_cancelled_total", stage=each) for each in CANCELLATION_STAGES} == {0}
    assert {value(shown, "poolrpc_ended_total", reason=each) for each in END_REASONS} == {0}
    assert {value(shown, "poolrpc_device_seconds_count", stage=each) for each in DEVICE_STAGES} == {0}
    assert value(shown, "grpc_server_started_total", **LABELS) == 0
    codes = ("OK", "Unavailable", "DeadlineExceeded", "Internal")
    assert {value(shown, "grpc_server_handled_total", **LABELS, grpc_code=each) for each in codes} == {0}
    assert value(shown, "grpc_server_handling_seconds_bucket", **LABELS, le="30.0") == 0


def test_every_reason_of_a_rejection_is_listed():
    """REASONS has each reason of an UnavailableError in the server's code, and no other."""
    assert found(r'(?:rejection\(|CallLimit\(|UnavailableError\([^)]*reason=)"([A-Z_]+)"') == set(REASONS)


def test_every_reason_of_an_end_is_listed():
    """END_REASONS has each reason with which the server's code ends a call, and no other."""
    assert found(r'ticket\.end\("([A-Z_]+)"\)') == set(END_REASONS)


def test_gauges_are_read_when_they_are_collected():
    """The load is read at each collection, and not when calls end."""
    metrics, asked = Metrics(), [Load(7), LOAD, LOAD]
    metrics.watch(lambda: asked.pop(0))
    assert value(metrics.collect(), "poolrpc_inflight_bytes") == 7
    metrics.started(*CALL)
    shown = metrics.collect()
    assert metrics.collect() is shown
    assert asked == []
    assert value(shown, "poolrpc_inflight_bytes") == 1000
    assert [value(shown, "poolrpc_queue_length", priority=each) for each in "012"] == [2, 0, 1]
    assert value(shown, "poolrpc_queue_oldest_seconds") == 1.5
    assert value(shown, "poolrpc_arenas") == 3
    assert value(shown, "poolrpc_arena_bytes") == 4096
    assert value(shown, "poolrpc_streams") == 5
    assert value(shown, "poolrpc_calls") == 6
    assert value(shown, "poolrpc_memory_bytes") == 7
    assert value(shown, "poolrpc_pinned_bytes") == 8
    assert value(shown, "poolrpc_device_memory_bytes") == 9
    assert value(shown, "poolrpc_device_blocks") == 10
    assert value(shown, "poolrpc_certificate_expiry_timestamp_seconds", setting="tls_cert") == 1.9e9


def test_what_does_not_change_is_described():
    """The build, the limits and the memory are shown, and what the system says of the process."""
    shown = busy().collect()
    assert value(shown, "poolrpc_build_info", **BUILD) == 1
    assert value(shown, "poolrpc_limit", setting="max_work") == 5
    assert value(shown, "poolrpc_capacity", setting="max_queue") == 64
    assert value(shown, "poolrpc_memory_limit_bytes") == 2**30
    assert value(shown, "poolrpc_device_memory_limit_bytes") == 2**34
    assert value(shown, "process_resident_memory_bytes") > 2**20
    assert value(shown, "process_start_time_seconds") == pytest.approx(psutil.Process().create_time(), abs=2)


def test_metrics_that_are_off_count_nothing():
    """Disabled metrics accept every count, read no load and show nothing."""
    metrics = Metrics(enabled=False)
    metrics.watch(lambda: pytest.fail("asked"))
    metrics.started(*CALL)
    metrics.handled(*CALL, "OK", 1)
    metrics.rejected("STREAMS")
    metrics.escaped()
    metrics.cancelled("queue")
    metrics.ended("STALLED")
    metrics.executed(1, 1, 1, 1)
    metrics.queued(1)
    metrics.received(1)
    metrics.describe(BUILD, {"max_work": 5}, {"max_queue": 64}, 2**30)
    assert families(metrics.collect()) == {}


def test_threads_lose_no_count():
    """Counts of several threads add up."""
    metrics = Metrics()

    def count(_):
        for _ in range(500):
            metrics.started(*CALL)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(count, range(4)))
    assert value(metrics.collect(), "grpc_server_started_total", **LABELS) == 2000


def test_a_supervisor_needs_neither_torch_nor_grpc():
    """Importing the metrics imports neither torch nor grpc."""
    program = (
        "import poolrpc_server.telemetry.summed_metrics, poolrpc_server.telemetry.monitoring_server, sys; "
        "sys.exit(bool({'torch', 'grpc', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0  # noqa: S603 - ours
