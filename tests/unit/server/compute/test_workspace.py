"""Workspaces: reused by requests of one schedule, limited in bytes over all schedules."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from poolrpc import AvgPool2d, MaxPool2d
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.engine import Engine
from poolrpc_server.compute.workspace import OVERHEAD_BYTES

LIMITS = Limits(2**20, 2**20, 64, 10**7)
LIMIT = 64 * 2**10
THREADS = 2


@pytest.fixture
def engine():
    """An engine whose workspaces are limited to 64 KiB."""
    made = Engine("cpu", THREADS, workspace_limit=LIMIT)
    yield made
    made.close()


def schedule(engine, width, layer=None):
    """Return the schedule of a small request whose planes have `width` columns."""
    request = Request(TensorSpec("float32", (1, 1, 4, width)), ((layer or MaxPool2d(2),),))
    return check_request(request, LIMITS, engine.schedule).schedule


def execute(engine, scheduled, finish=bytes):
    """Execute a request of zeros, and return its first output's bytes, or what `finish` returns for them."""
    return engine.execute([engine.run(scheduled, bytes(scheduled.input_bytes), lambda outputs: finish(outputs[0]))])[0]


def address(output):
    """Return the address of an output."""
    return np.asarray(output).ctypes.data


def test_the_limit_holds_over_many_schedules(engine):
    """However many schedules are used, their workspaces together stay within the limit."""
    schedules = [schedule(engine, width) for width in range(2, 200)]
    for scheduled in schedules:
        execute(engine, scheduled)
        assert engine.idle_bytes <= LIMIT
    assert engine.idle_bytes > LIMIT / 2
    idle = sum(workspace.nbytes for scheduled in schedules for workspace in scheduled.workspaces)
    assert idle == engine.idle_bytes


def test_the_least_recently_used_workspace_is_dropped_first(engine):
    """A schedule that is used all the time keeps its workspace, whatever else comes."""
    hot, cold = schedule(engine, 2), schedule(engine, 3)
    first = execute(engine, hot, address)
    execute(engine, cold)
    for width in range(4, 100):
        execute(engine, schedule(engine, width))
        assert execute(engine, hot, address) == first
    assert len(hot.workspaces) == 1
    assert cold.workspaces == []


def test_a_dropped_workspace_is_created_again(engine):
    """A schedule whose workspace was dropped computes as before."""
    cold = schedule(engine, 3, AvgPool2d(2))
    expected = execute(engine, cold)
    for width in range(4, 100):
        execute(engine, schedule(engine, width))
    assert cold.workspaces == []
    assert execute(engine, cold) == expected


def test_a_workspace_counts_its_bytes_and_the_objects_for_them(engine):
    """The engine's idle bytes are those of inputs, outputs and overhead."""
    assert engine.idle_bytes == 0
    execute(engine, schedule(engine, 8))
    assert engine.idle_bytes == 4 * 8 * 4 + 2 * 4 * 4 + OVERHEAD_BYTES


def test_idle_memory_can_be_dropped(engine):
    """drop_idle drops cached workspaces and idle buffers, and later requests are computed as before."""
    small, large = schedule(engine, 8), schedule(engine, 32_768)
    for scheduled in (small, large):
        execute(engine, scheduled)
    assert engine.idle_bytes > large.outputs[0].nbytes
    engine.drop_idle()
    assert engine.idle_bytes == 0
    for scheduled in (small, large):
        assert execute(engine, scheduled) == bytes(scheduled.outputs[0].nbytes)


def test_a_failed_execution_drops_its_workspace(engine):
    """A workspace whose execution failed is neither kept nor counted."""

    def fail(_):
        raise KeyError

    scheduled = schedule(engine, 8)
    with pytest.raises(KeyError):
        execute(engine, scheduled, fail)
    assert scheduled.workspaces == []
    assert engine.idle_bytes == 0


def test_a_schedule_keeps_a_workspace_for_each_thread(engine):
    """Of the workspaces that were in use at the same time, as many stay as there are threads."""
    scheduled = schedule(engine, 8)

    def nest(depth):
        return execute(engine, scheduled, lambda _: nest(depth - 1) if depth else None)

    nest(THREADS - 1)
    assert len(scheduled.workspaces) == THREADS
    assert engine.idle_bytes == THREADS * scheduled.workspaces[0].nbytes


def test_a_limit_of_0_keeps_nothing():
    """An engine that may keep no workspaces still computes."""
    engine = Engine("cpu", 1, workspace_limit=0)
    scheduled = schedule(engine, 8)
    assert execute(engine, scheduled) == bytes(2 * 4 * 4)
    assert engine.idle_bytes == 0
    engine.close()


def test_threads_share_the_cache(engine):
    """Executions on several threads over many schedules compute correctly, and what is counted is what is kept."""
    schedules = [schedule(engine, width) for width in range(2, 60)]

    def repeat(seed):
        order = np.random.default_rng(seed).permutation(len(schedules))
        return all(execute(engine, schedules[i]) == bytes(schedules[i].outputs[0].nbytes) for i in order)

    with ThreadPoolExecutor(THREADS) as callers:
        assert all(callers.map(repeat, range(20)))
    idle = sum(workspace.nbytes for scheduled in schedules for workspace in scheduled.workspaces)
    assert idle == engine.idle_bytes <= LIMIT


def test_another_thread_may_take_the_last_idle_workspace(engine):
    """A call that finds a schedule's last workspace taken creates one."""

    class Taken(list):
        """A list that seems to have an item, as a list does until another thread takes its last one."""

        def __bool__(self):
            return True

    scheduled = schedule(engine, 8)
    scheduled.workspaces = Taken()
    assert execute(engine, scheduled) == bytes(2 * 4 * 4)
