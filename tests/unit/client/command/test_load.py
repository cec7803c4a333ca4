"""A load's schedule and percentiles, and the drawing of its result, without a server."""

from dataclasses import replace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import MaxPool2d
from poolrpc.command.load import Load, LoadResult, quantile
from poolrpc.command.plot import svg
from poolrpc.tensors import ITEM_BYTES, dtype_name

REQUESTS = (((1, 1, 4, 4), ((MaxPool2d(2),),)), ((1, 3, 8, 8), ((MaxPool2d(2),),)))
SECONDS = st.floats(1e-6, 1e3)


def result_of(latencies, failed=(), unsent=0):
    """Return a result with one call each millisecond."""
    count = len(latencies)
    return LoadResult(
        due=np.arange(count) / 1000,
        late=np.zeros(count),
        latency=np.array(latencies, float),
        request=np.zeros(count, int),
        failed=np.isin(np.arange(count), failed),
        errors={},
        messages={},
        unsent=unsent,
        seconds=max(count, 1) / 1000,
        cpus=0.5,
        busiest=0.5,
    )


@given(st.lists(SECONDS, min_size=1, max_size=300), st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999, 1.0]))
def test_a_percentile_is_a_value_that_was_measured(values, part):
    """A percentile is the smallest measured value that so large a part does not exceed: NumPy's inverse of the CDF."""
    found = quantile(np.array(values), part)
    assert found == np.percentile(values, part * 100, method="inverted_cdf")
    enough = [value for value in values if sum(each <= value for each in values) >= part * len(values) - 1e-9]
    assert found == min(enough)


def test_a_part_is_counted_exactly():
    """A part of n calls is that of so many calls, although their quotient times n may be a little more."""
    for total in range(1, 200):
        values = np.arange(1, total + 1)
        assert [quantile(values, count / total) for count in values] == values.tolist()


@given(st.lists(SECONDS, min_size=1, max_size=100), st.integers(0, 100), st.data())
def test_a_call_that_fails_is_not_answered_within_any_time(latencies, unsent, data):
    """Calls that fail or are not sent count as infinitely late, so that rejections do not flatter a percentile."""
    failed = data.draw(st.sets(st.integers(0, len(latencies) - 1)))
    result = result_of(latencies, list(failed), unsent)
    answered = sorted(each for number, each in enumerate(latencies) if number not in failed)
    total = len(latencies) + unsent
    assert result.within(len(answered) / total) == (answered[-1] if answered else float("inf"))
    if len(answered) < total:
        assert result.within(1) == float("inf")


@given(st.floats(0.1, 500), st.floats(0.01, 5), st.floats(0, 2), st.integers(1, 5))
def test_the_parts_of_a_load_make_all_of_its_calls(rate, seconds, warmup, count):
    """A rate is that many calls at random times, each made by one of the processes; the warm-up is before zero."""
    load = Load(REQUESTS, rate=rate, seconds=seconds, warmup=warmup)
    schedule = load.schedule()
    assert schedule == sorted(schedule)
    assert all(-warmup <= due <= seconds for due, _ in schedule)
    assert sum(due >= 0 for due, _ in schedule) == pytest.approx(rate * seconds, abs=0.51)
    assert {request for _, request in schedule} <= {0, 1}
    assert sorted(call for part in load.split(count) for call in part.schedule()) == schedule


@pytest.mark.parametrize(("total", "count"), [(1, 1), (7, 3), (128, 5)])
def test_calls_and_connections_are_shared(total, count):
    """Each process has its share of the calls at a time and of the connections."""
    parts = Load(REQUESTS, concurrency=total, connections=total).split(count)
    assert sum(part.concurrency for part in parts) == sum(part.connections for part in parts) == total
    assert max(part.concurrency for part in parts) - min(part.concurrency for part in parts) <= 1


@pytest.mark.parametrize("dtype", [each for each in ITEM_BYTES if each != "bool"])
def test_an_input_is_random_and_always_the_same(dtype):
    """Every process has the same tensor for a request, of the load's dtype, with different values."""
    load = Load(REQUESTS, dtype=dtype)
    x = load.input_of(1)
    assert (dtype_name(x.dtype), x.shape) == (dtype, (1, 3, 8, 8))
    assert x.tobytes() == load.input_of(1).tobytes()
    assert len(set(x.reshape(-1).view(np.uint8).tolist())) > 10


@pytest.mark.parametrize("latencies", [[], [0.001], [0.002] * 50, list(np.geomspace(1e-4, 30, 1000))], ids=len)
def test_a_drawing_is_svg_within_its_frame(latencies):
    """A drawing is XML, for any number of calls, with every point of a curve inside of the picture."""
    root = ET.fromstring(svg("MaxPool2d(2) <&>", result_of(latencies)))  # noqa: S314 - our own
    width, height = float(root.get("width")), float(root.get("height"))
    names = {each.tag.rpartition("}")[2] for each in root}
    assert {"rect", "text"} <= names
    for curve in root.findall("{*}polyline"):
        points = [tuple(map(float, point.split(","))) for point in curve.get("points").split()]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert any(each.text == "MaxPool2d(2) <&>" for each in root)


def test_a_load_without_a_rate_has_no_schedule():
    """Without a rate no call is due at a time of its own."""
    assert replace(Load(REQUESTS, rate=10), rate=None).schedule() == []
