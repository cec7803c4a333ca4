"""Schedules: the work, the estimated duration and the batch key of a request."""

import pytest

from poolrpc import AvgPool2d, FractionalMaxPool2d, MaxPool2d
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.engine import Engine
from poolrpc_server.compute.schedule import BATCHED_LAYERS, CPU_BATCHED_BYTES, WORK_SECONDS, WORKSPACE_BYTES

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


def test_only_small_requests_have_cached_workspaces(engine):
    """The limit counts inputs and outputs."""
    planes = WORKSPACE_BYTES // (256 + 64)
    assert schedule(engine, (1, planes, 8, 8)).cached
    assert not schedule(engine, (1, planes + 1, 8, 8)).cached
