"""Workspaces: reused by requests of one schedule, limited in bytes over all schedules."""

from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
import pytest

from poolrpc import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool2d,
    FractionalMaxPool2d,
    GlobalPool2d,
    LPPool2d,
    MaxPool2d,
    MaxUnpool2d,
    Normalize,
    Round,
    ToDtype,
)
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.engine import Engine
from poolrpc_server.compute.kernels.blocks import VIEW_BYTES
from poolrpc_server.compute.locations import MAX_LOCATIONS, Locations
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
    """The engine's idle bytes are those of inputs, outputs and overhead, and of the views of a kept program."""
    assert engine.idle_bytes == 0
    execute(engine, schedule(engine, 8, AvgPool2d(2)))
    assert engine.idle_bytes == 4 * 8 * 4 + 2 * 4 * 4 + OVERHEAD_BYTES
    execute(engine, schedule(engine, 8))
    views = engine.idle_bytes - 2 * (4 * 8 * 4 + 2 * 4 * 4 + OVERHEAD_BYTES)
    assert VIEW_BYTES <= views < OVERHEAD_BYTES


def test_a_workspace_counts_the_scratch_memory_of_its_program():
    """The idle bytes of a padded max pooling are at least those of its padded copy too."""
    engine = Engine("cpu", 1)
    spec = TensorSpec("float32", (1, 4, 100, 100))
    made = check_request(Request(spec, ((MaxPool2d(3, 1, 1),),)), LIMITS, engine.schedule).schedule
    execute(engine, made)
    assert engine.idle_bytes > made.nbytes + 4 * 100 * 101 * 4
    assert engine.idle_bytes <= made.nbytes + made.scratch_bytes
    engine.close()


CHAIN = (MaxPool2d(3, 1, 1), AvgPool2d(2), LPPool2d(2.0, 2))
REUSED = {
    "max": ((MaxPool2d(3, 2, 1),),),
    "tiny max": ((MaxPool2d(2, 1, 1, 3),),),
    "max with indices": ((MaxPool2d(3, 1, 1, return_indices=True),),),
    "average": ((AvgPool2d(3, 1, 1, count_include_pad=False),),),
    "power average": ((LPPool2d(float("inf"), 3, 1),),),
    "adaptive": ((AdaptiveMaxPool2d(5),), (AdaptiveMaxPool2d(8),), (AdaptiveAvgPool2d(8),)),
    "fractional": ((FractionalMaxPool2d(2, 5, return_indices=True),),),
    "chain and branches": (CHAIN, (GlobalPool2d("max"),), (LPPool2d(1.7, 3, 1), MaxPool2d(2))),
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(1, 2, 16, 16), (2, 40, 64, 64)], ids=["small", "middle"])
@pytest.mark.parametrize("name", REUSED)
def test_a_reused_workspace_holds_nothing_of_earlier_requests(name, shape, dtype, layout):
    """The second, third and fourth input of a schedule give what an engine without workspaces gives, NaN included."""
    spec = TensorSpec(dtype, shape if layout == "NCHW" else (shape[0], *shape[2:], shape[1]), layout)
    engines = [Engine("cpu", 1, workspace_limit=limit) for limit in (2**28, 0)]
    ours, fresh = (
        check_request(Request(spec, REUSED[name]), Limits(2**24, 2**26, 64, 10**10), engine.schedule).schedule
        for engine in engines
    )
    x = np.random.default_rng(0).standard_normal(spec.shape).astype(dtype)
    nan, infinite = x.copy(), -x
    nan.reshape(-1)[:: 500 if x.size > 1000 else 50] = np.nan
    infinite.reshape(-1)[::7] = -np.inf
    for each in (x, nan, infinite, x):
        one, two = (
            engine.execute([engine.run(made, each.tobytes(), lambda outputs: [bytes(part) for part in outputs])])[0]
            for engine, made in zip(engines, (ours, fresh), strict=True)
        )
        for ours_part, fresh_part, output in zip(one, two, fresh.outputs, strict=True):
            arrays = [np.frombuffer(part, output.dtype) for part in (ours_part, fresh_part)]
            assert np.array_equal(*arrays, equal_nan=output.dtype == dtype)
    assert not fresh.workspaces
    for engine in engines:
        engine.close()


FLOATS = ToDtype("float32", scale=True)
NUMBERS = tuple(number / 7 for number in range(1, 41))
STEPS = {
    "preprocessing": ((FLOATS, Normalize(NUMBERS, NUMBERS[::-1]), AvgPool2d(2)),),
    "normalized twice": ((FLOATS, Normalize(NUMBERS, 0.5), MaxPool2d(3, 1, 1), Normalize(0.5, NUMBERS)),),
    "thumbnail": ((ToDtype("float32"), AvgPool2d(2), Round(), ToDtype("uint8")),),
    "shifts": ((ToDtype("uint16", scale=True), MaxPool2d(3, 1, 1), ToDtype("int64", scale=True), AvgPool2d(2)),),
    "maxima": ((MaxPool2d(3, 1, 1), MaxPool2d(2, return_indices=True)), (ToDtype("int8", scale=True),)),
    "unpooled": ((MaxUnpool2d(1), ToDtype("float64"), AvgPool2d(3, 1, 1)),),
    "pyramid": ((ToDtype("float32"), AvgPool2d(2), Round(), ToDtype("uint16"), MaxPool2d(2, return_indices=True)),),
    "two pyramids": ((MaxPool2d(2, return_indices=True),) * 3, (FLOATS, MaxPool2d(3, 1, 1), AvgPool2d(2))),
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
@pytest.mark.parametrize("shape", [(1, 40, 8, 8), (2, 40, 64, 64)], ids=["small", "middle"])
@pytest.mark.parametrize("name", STEPS)
def test_a_reused_workspace_of_steps_holds_nothing_of_earlier_requests(name, shape, dtype, layout):
    """The same for steps that change the dtype or depend on the channel, and for the outputs of several layers."""
    spec = TensorSpec(dtype, shape if layout == "NCHW" else (shape[0], *shape[2:], shape[1]), layout)
    indices = TensorSpec("int64", spec.shape, layout) if name == "unpooled" else None
    outputs = tuple(tuple(range(len(chain))) for chain in STEPS[name]) if "pyramid" in name else ()
    engines = [Engine("cpu", 1, workspace_limit=limit) for limit in (2**28, 0)]
    ours, fresh = (
        check_request(
            Request(spec, STEPS[name], indices, outputs), Limits(2**24, 2**26, 64, 10**10), engine.schedule
        ).schedule
        for engine in engines
    )
    assert ours.cached
    rng = np.random.default_rng(0)
    for _ in range(3):
        payload = rng.bytes(spec.nbytes)
        if indices is not None:
            cells = np.broadcast_to(np.arange(prod(shape[2:])), (*shape[:2], prod(shape[2:])))
            permuted = rng.permuted(cells, axis=-1).reshape(shape)
            payload += (permuted if layout == "NCHW" else np.moveaxis(permuted, 1, -1)).tobytes()
        one, two = (
            engine.execute([engine.run(made, payload, lambda parts: [bytes(part) for part in parts])])[0]
            for engine, made in zip(engines, (ours, fresh), strict=True)
        )
        assert one == two
    assert len(ours.workspaces) == 1
    if shape[0] > 1:  # of a small one, the views take more than the scratch memory
        assert engines[0].idle_bytes <= ours.nbytes + ours.scratch_bytes
    for engine in engines:
        engine.close()


def test_a_workspace_counts_the_numbers_of_a_normalize():
    """A mean and a deviation for each cell of a row with channels last are memory that a kept program takes."""
    nbytes = []
    for step in (Round(), Normalize((0.5,) * 8, 0.25)):
        engine = Engine("cpu", 1)
        spec = TensorSpec("float32", (1, 2, 500, 8), "NHWC")
        made = check_request(Request(spec, ((step, ToDtype("int16"), MaxPool2d(2)),)), LIMITS, engine.schedule).schedule
        execute(engine, made)
        nbytes.append(engine.idle_bytes)
        assert engine.idle_bytes <= made.nbytes + made.scratch_bytes
        engine.close()
    assert nbytes[1] - nbytes[0] >= 2 * 500 * 8 * 4


def test_a_workspace_counts_every_output():
    """The workspace of a pyramid takes at least the memory of all of its levels."""
    engine = Engine("cpu", 1)
    spec, chain = TensorSpec("float32", (1, 4, 64, 64)), (MaxPool2d(2, return_indices=True),) * 4
    made = check_request(
        Request(spec, (chain,), None, ((0, 1, 2, 3),)), Limits(2**20, 2**20, 64, 10**7), engine.schedule
    ).schedule
    execute(engine, made)
    assert engine.idle_bytes > sum(each.nbytes for each in (*made.inputs, *made.outputs)) + VIEW_BYTES * 4
    engine.close()


def test_threads_do_not_share_a_workspace():
    """Executions of one schedule at the same time have the results of their own inputs, also if some are cancelled."""
    engine = Engine("cpu", THREADS)
    spec = TensorSpec("float32", (1, 8, 64, 64))
    made = check_request(Request(spec, ((MaxPool2d(3, 1, 1), MaxPool2d(2)),)), LIMITS, engine.schedule).schedule
    assert made.cached

    def repeat(thread):
        wrong = 0
        for number in range(41):
            value = np.float32(100 * thread + number)
            run = engine.run(made, np.full(spec.shape, value).tobytes(), lambda outputs: bytes(outputs[0]))
            if number % 5 == 4:
                calls = iter([])
                run.check = lambda calls=calls: next(calls)  # ends the execution between the two layers
                with pytest.raises(StopIteration):
                    engine.execute([run])
            else:
                wrong += set(np.frombuffer(engine.execute([run])[0], np.float32)) != {value}
        return wrong

    with ThreadPoolExecutor(THREADS) as callers:
        assert sum(callers.map(repeat, range(THREADS))) == 0
    assert 1 <= len(made.workspaces) <= THREADS
    assert engine.idle_bytes == sum(workspace.nbytes for workspace in made.workspaces)
    engine.close()


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (2, 40, 64, 64)], ids=["small", "middle"])
def test_outputs_in_the_callers_memory_need_no_program_of_their_own(shape):
    """A request in place is computed in the cached workspace, and its outputs are copied to the caller's memory."""
    engine = Engine("cpu", 1)
    spec = TensorSpec("float32", shape)
    made = check_request(
        Request(spec, ((MaxPool2d(2, return_indices=True),), (AvgPool2d(2),))),
        Limits(2**24, 2**24, 64, 10**8),
        engine.schedule,
    ).schedule
    for seed in range(2):
        payload = memoryview(np.random.default_rng(seed).standard_normal(shape, np.float32)).cast("B")
        outputs = [memoryview(bytearray(each.nbytes)) for each in made.outputs]
        engine.execute([engine.run_in_place(made, engine.location([payload], outputs))])
        copied = engine.execute([engine.run(made, payload, lambda parts: [bytes(each) for each in parts])])[0]
        assert [bytes(each) for each in outputs] == copied
        assert len(made.workspaces) == 1
    engine.close()


def test_a_location_that_is_used_again_keeps_a_workspace_which_copies_nothing():
    """From the second run in a location on, a workspace of that location reads what its memory holds at the time."""
    engine = Engine("cpu", 1)
    made, cells = schedule(engine, 8), np.zeros(32, np.float32)
    output = memoryview(bytearray(made.outputs[0].nbytes))
    location = engine.location([memoryview(cells).cast("B")], [output])
    for number in range(1, 4):
        cells[:] = number
        engine.execute([engine.run_in_place(made, location, again=number > 1)])
        assert set(np.frombuffer(output, np.float32)) == {number}
        assert (len(made.workspaces), len(location.workspaces)) == (1, number > 1)
    (kept,) = location.workspaces
    assert kept.nbytes == made.workspaces[0].nbytes - made.nbytes
    engine.close()


def test_a_location_that_has_ended_keeps_no_workspace():
    """Its idle workspaces are dropped at once, and one in use when its run is over; their bytes count no more."""
    engine = Engine("cpu", 1)
    made = schedule(engine, 8)
    location = engine.location([memoryview(bytes(made.input_bytes))], [memoryview(bytearray(made.outputs[0].nbytes))])
    before = engine.idle_bytes
    engine.execute([engine.run_in_place(made, location, again=True)])
    assert engine.idle_bytes > before
    location.end()
    assert (engine.idle_bytes, location.workspaces) == (before, [])
    engine.execute([engine.run_in_place(made, location, again=True)])  # a call that had found it already
    assert (engine.idle_bytes, location.workspaces) == (before, [])
    engine.close()


def test_the_oldest_locations_are_forgotten_and_all_of_them_when_their_client_is_gone():
    """At most MAX_LOCATIONS are remembered; those that are forgotten have ended, as have those that come too late."""
    engine, locations = Engine("cpu", 1), Locations()
    made = [engine.location([], []) for _ in range(MAX_LOCATIONS + 2)]
    for number, location in enumerate(made[:-1]):
        locations.add(number, location)
    assert [location.ended for location in made[:2]] == [True, False]
    assert (locations.find(0), locations.find(1)) == (None, made[1])
    locations.end()
    locations.add("late", made[-1])
    assert (locations.find(1), locations.find("late")) == (None, None)
    assert all(location.ended for location in made[:-1])
    engine.close()


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
