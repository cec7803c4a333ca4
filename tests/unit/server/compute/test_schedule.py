"""Schedules: the work, the estimated duration and the batch key of a request."""

import pytest
import torch

from poolrpc import AvgPool2d, FractionalMaxPool2d, LPPool2d, MaxPool2d, MaxPool3d, Normalize
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.engine import GRID_ROWS, WORKSPACE_SHARE, Engine
from poolrpc_server.compute.schedule import (
    BATCHED_LAYERS,
    CPU_BATCHED_BYTES,
    EAGER_WORKSPACE_BYTES,
    WORK_SECONDS,
    WORKSPACE_BYTES,
)

LIMITS = Limits(2**24, 2**24, 64, 10**9)


@pytest.fixture(scope="module")
def engine():
    """An engine on the CPU."""
    made = Engine("cpu", 1)
    yield made
    made.close()


def schedule(engine, shape, *branches):
    """Return the schedule of a request for float32 cells, with 2x2 max pooling by default."""
    request = Request(TensorSpec("float32", shape), branches or ((MaxPool2d(2),),))
    return check_request(request, LIMITS, engine.schedule).schedule


def test_the_work_is_that_of_all_layers(engine):
    """The work of a request is the sum over the layers of its branches."""
    first = schedule(engine, (1, 3, 8, 8), (MaxPool2d(2),)).work
    second = schedule(engine, (1, 3, 8, 8), (AvgPool2d(2),)).work
    third = schedule(engine, (1, 3, 4, 4), (MaxPool2d(2),)).work
    assert schedule(engine, (1, 3, 8, 8), (MaxPool2d(2),), (AvgPool2d(2), MaxPool2d(2))).work == first + second + third


def test_the_duration_is_estimated_by_the_work_and_then_by_measurements(engine):
    """The estimate starts from the work, and each recorded duration moves it by a quarter of the difference."""
    made = schedule(engine, (1, 3, 8, 8))
    assert WORK_SECONDS * made.work < made.seconds < WORK_SECONDS * made.work + 1e-4
    before = made.seconds
    made.record_duration(before + 4)
    assert made.seconds == pytest.approx(before + 1)


def test_the_undisturbed_duration_is_nearly_the_shortest(engine):
    """Executions that other threads disturb hardly move it, shorter ones do at once, longer ones in the end."""
    made = schedule(engine, (1, 3, 8, 8))
    made.record_duration(1e-6)
    for _ in range(8):
        made.record_duration(1e-3)
        made.record_duration(1e-5)
    assert made.undisturbed_seconds <= 1e-5 < made.seconds
    for _ in range(200):
        made.record_duration(1e-3)
    assert made.undisturbed_seconds == pytest.approx(1e-3, rel=0.1)


def test_sizes(engine):
    """A schedule knows its planes and the bytes of its inputs and outputs."""
    made = schedule(engine, (2, 3, 8, 8))
    assert (made.planes, made.input_bytes, made.nbytes) == (6, 6 * 256, 6 * 256 + 6 * 64)


def test_requests_that_differ_only_in_planes_have_one_key(engine):
    """The key is the same object for any number of planes."""
    assert schedule(engine, (2, 3, 8, 8)).key is schedule(engine, (1, 1, 8, 8)).key is not None
    assert schedule(engine, (2, 3, 8, 6)).key is not schedule(engine, (1, 1, 8, 8)).key


def test_large_dependent_and_empty_requests_have_no_key(engine):
    """A request has no key if it is large or has many layers, depends on the planes' numbers, or has no planes."""
    planes = CPU_BATCHED_BYTES // (256 + 64)
    assert schedule(engine, (1, planes, 8, 8)).key is not None
    assert schedule(engine, (1, planes + 1, 8, 8)).key is None
    assert schedule(engine, (1, 3, 8, 8), (FractionalMaxPool2d(2, 3),)).key is None
    assert schedule(engine, (0, 3, 8, 8)).key is None
    assert schedule(engine, (1, 3, 8, 8), *[(MaxPool2d(1),)] * BATCHED_LAYERS).key is not None
    assert schedule(engine, (1, 3, 8, 8), *[(MaxPool2d(1),)] * (BATCHED_LAYERS + 1)).key is None


@pytest.mark.parametrize(("layer", "limit"), [(MaxPool2d(2), WORKSPACE_BYTES), (AvgPool2d(7), EAGER_WORKSPACE_BYTES)])
def test_only_small_requests_have_cached_workspaces(engine, layer, limit):
    """The limit is for the input; it is lower for what torch's own operators compute."""
    plane = 8 * 16 * 4
    assert schedule(engine, (1, limit // plane, 8, 16), (layer,)).cached
    assert not schedule(engine, (1, limit // plane + 1, 8, 16), (layer,)).cached


def test_scratch_memory_counts_for_the_limit_of_workspaces():
    """No workspace may take more than a share of all workspaces' memory, with the scratch memory of its program."""
    request = (1, 3, 128, 128), (MaxPool2d(3, 1, 1),)
    for limit, cached in ((2**20 * WORKSPACE_SHARE, False), (2**22 * WORKSPACE_SHARE, True)):
        engine = Engine("cpu", 1, workspace_limit=limit)
        made = schedule(engine, *request)
        assert made.nbytes < 2**19
        assert made.cached == cached
        engine.close()


def test_a_request_that_is_divided_among_threads_has_no_workspace():
    """A workspace's program is for one thread."""
    for threads in (1, 2):
        engine = Engine("cpu", threads)
        assert schedule(engine, (1, 140, 64, 64), (LPPool2d(2.0, 5, 1),)).cached == (threads == 1)
        engine.close()


def test_a_program_that_is_kept_is_chosen_for_smaller_requests():
    """The kernel that is faster once its program is made is used if the request has a workspace, and else torch's."""
    for limit, kernel in ((0, None), (2**26, "separable max")):
        engine = Engine("cpu", 1, workspace_limit=limit)
        ((_, row),) = schedule(engine, (1, 3, 64, 64)).branches[0].steps
        assert (row and row.name) == kernel
        engine.close()


def test_a_request_with_a_workspace_is_estimated_to_take_less_time():
    """What is made once does not count for each request."""
    seconds = []
    for limit in (0, 2**26):
        engine = Engine("cpu", 1, workspace_limit=limit)
        seconds.append(schedule(engine, (1, 1, 4, 4), (AvgPool2d(2),)).seconds)
        engine.close()
    assert seconds[1] < seconds[0] / 2


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_planes_of_more_rows_than_a_gpu_accepts_are_computed_on_the_cpu(layout):
    """The operators of three axes reject them on CUDA."""
    engine = Engine("cpu", 1)
    engine.device = torch.device("meta")  # any device but the CPU
    wide = Limits(2**40, 2**40, 2**40, 2**50)

    def device(rows, *layers):
        shape = (1, 1, 1, rows, 2) if layout == "NCHW" else (1, 1, rows, 2, 1)
        request = Request(TensorSpec("float32", shape, layout), (layers,))
        return check_request(request, wide, engine.schedule).schedule.device.type

    halves = MaxPool3d((1, 2, 1))
    assert device(GRID_ROWS, halves) == device(GRID_ROWS, Normalize(0.5, 2), halves) == "meta"
    assert device(GRID_ROWS + 1, halves) == "cpu"
    engine.close()
