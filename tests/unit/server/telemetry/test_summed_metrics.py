"""The sums of the metrics of several processes."""

import json

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from poolrpc_server.telemetry.metrics import Load, Metrics
from poolrpc_server.telemetry.summed_metrics import SummedMetrics, snapshot

CALL = ("unary", "poolrpc.v1.PoolService", "Pool")
LABELS = dict(zip(("grpc_type", "grpc_service", "grpc_method"), CALL, strict=True))


def counted(oldest):
    """Return the metrics of a process that counted one of each, with its oldest request in seconds."""
    metrics = Metrics()
    build = {"version": "1", "torch": "2", "python": "3", "device": "cpu"}
    metrics.describe(build, {"max_work": 5}, {"max_queue": 64}, 2**30)
    expiry = {"tls_cert": 1.9e9 + oldest}
    metrics.watch(lambda: Load(1000, (2, 0, 1), oldest, 3, 4096, 5, certificates=expiry))
    metrics.started(*CALL)
    metrics.handled(*CALL, "OK", 0.002)
    metrics.executed(3, 24, 4096, 0.001)
    return metrics


def sent(metrics):
    """Return the values of a process as its supervisor receives them."""
    return json.loads(json.dumps(snapshot(metrics.collect().collect())))


def value(sums, name, **labels):
    """Return one sample."""
    return sums.registry.get_sample_value(name, labels)


@pytest.fixture
def sums():
    """Return the sums of two processes, with oldest requests of 1.5 and 2.5 seconds."""
    made = SummedMetrics(lambda: 7, lambda: 8.5)
    for process, oldest in enumerate((1.5, 2.5)):
        made.update(process, sent(counted(oldest)))
    return made


def test_processes_are_summed(sums):
    """Counters, histograms and gauges of several processes are summed; of the ages, the largest is shown."""
    assert value(sums, "grpc_server_started_total", **LABELS) == 2
    assert value(sums, "grpc_server_handled_total", **LABELS, grpc_code="OK") == 2
    assert value(sums, "grpc_server_handling_seconds_bucket", **LABELS, le="0.0025") == 2
    assert value(sums, "poolrpc_requests_total") == 6
    assert value(sums, "poolrpc_inflight_bytes") == 2000
    assert value(sums, "poolrpc_queue_length", priority="2") == 2
    assert value(sums, "poolrpc_queue_oldest_seconds") == 2.5
    assert value(sums, "poolrpc_worker_restarts_total") == 7


def test_what_is_the_same_in_each_process_is_shown_once(sums):
    """Capacities are summed; limits, the memory and the build are not, and the first expiry and start are shown.

    The time without an answer to the watchdog is that of the most silent process, as its supervisor sees it.
    """
    assert value(sums, "poolrpc_capacity", setting="max_queue") == 128
    assert value(sums, "poolrpc_limit", setting="max_work") == 5
    assert value(sums, "poolrpc_memory_limit_bytes") == 2**30
    assert value(sums, "poolrpc_build_info", version="1", torch="2", python="3", device="cpu") == 1
    assert value(sums, "poolrpc_certificate_expiry_timestamp_seconds", setting="tls_cert") == 1.9e9 + 1.5
    assert value(sums, "poolrpc_watchdog_silent_seconds") == 8.5
    own = counted(1).collect().get_sample_value("process_resident_memory_bytes")
    assert value(sums, "process_resident_memory_bytes") > 2.5 * own


def test_the_sums_have_every_metric_of_a_process(sums):
    """Prometheus reads the same names, types and help texts as from a single process, and the restarts."""

    def described(registry):
        text = generate_latest(registry).decode()
        return {
            each.name: (each.type, each.documentation)
            for each in text_string_to_metric_families(text)
            if not each.name.endswith("_created")
        }

    shown = described(sums.registry)
    assert shown.pop("poolrpc_worker_restarts") == ("counter", "Workers that were restarted.")
    assert shown == described(counted(1.0).collect())


def test_a_process_that_sends_its_values_again_is_counted_once(sums):
    """The latest values of a process replace its earlier ones."""
    sums.update(1, sent(counted(0.5)))
    assert value(sums, "grpc_server_started_total", **LABELS) == 2
    assert value(sums, "poolrpc_queue_oldest_seconds") == 1.5


def test_a_process_that_ends_leaves_its_counts(sums):
    """The gauges of a process that has ended are no longer shown; its counters are, also after its successor's end."""
    sums.forget(1)
    assert value(sums, "grpc_server_started_total", **LABELS) == 2
    assert value(sums, "poolrpc_inflight_bytes") == 1000
    assert value(sums, "poolrpc_queue_oldest_seconds") == 1.5
    sums.update(1, sent(counted(3.5)))
    assert value(sums, "grpc_server_started_total", **LABELS) == 3
    assert value(sums, "poolrpc_queue_oldest_seconds") == 3.5
    for _ in range(2):  # a process that never sent anything ends too
        sums.forget(1)
        assert value(sums, "grpc_server_handling_seconds_count", **LABELS) == 3
