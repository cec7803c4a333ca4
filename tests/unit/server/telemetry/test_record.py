"""The record of one call."""

from poolrpc_server.telemetry.record import MAX_EXECUTIONS, CallRecord


def test_only_the_first_executions_are_kept():
    """A stream without end takes no more memory, but every execution is counted and summed."""
    record = CallRecord("/a.B/C")
    for _ in range(MAX_EXECUTIONS + 5):
        times = record.begin_execution(1, 1)
        times.compute_started(1, 1)
        record.end_execution(times)
    assert (record.count, len(record.executions)) == (MAX_EXECUTIONS + 5, MAX_EXECUTIONS)
    assert record.latest is times
    assert record.queue_ns >= sum(each.queue_ns for each in record.executions)
