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
    metrics.watch(lambda: Load(1000, (2, 0, 1), oldest, 3, 4096, 5))
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
    made = SummedMetrics(lambda: 7)
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
