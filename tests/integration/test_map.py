"""map() of both clients against a real server: order, groups, errors, and how far ahead it reads."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import poolrpc
import poolrpc_server
from poolrpc import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AsyncPoolClient,
    AvgPool2d,
    FractionalMaxPool2d,
    GlobalPool2d,
    LPPool2d,
    MaxPool2d,
    PoolClient,
)
from poolrpc._base_client import IN_FLIGHT
from poolrpc._transport.coalesce import GROUP_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.integration.conftest import Connect

RNG = np.random.default_rng(7)
METHOD = "/poolrpc.v1.PoolService/Pool"
THREADS = "poolrpc-map"


def tensors(*shapes: tuple[int, ...], dtype: str = "float32") -> list[np.ndarray]:
    """Return a tensor of each shape."""
    return [(RNG.standard_normal(shape) * 50).astype(dtype) for shape in shapes]


MIXED = [
    *tensors((2, 3, 8, 8), (1, 1, 8, 8), (3, 8, 8), (4, 1, 8, 8)),
    *tensors((2, 3, 8, 8), (1, 8, 8), dtype="float64"),
    *tensors((2, 3, 8, 10), (0, 3, 8, 10), (2, 2, 8, 10)),
    *tensors((1, 1, 300, 400), (2, 3, 8, 8)),
    *tensors((2, 3, 8, 8), (2, 8, 8), dtype="float16"),
    tensors((8, 8, 2, 3))[0].transpose(2, 3, 0, 1),
    tensors((2, 3, 8, 8))[0].astype(">f4"),
]
"""Tensors of several dtypes and plane sizes: batched or not, empty, large, strided, big-endian."""


@pytest.fixture
def mapped(connect: Connect, address: str) -> Callable[..., list[Any]]:
    """Return map of either client, which returns a list."""
    client = connect(address)
    return lambda *arguments, **options: list(client.map(*arguments, **options))


def assert_same(results: list[poolrpc.PoolResult], expected: list[poolrpc.PoolResult]) -> None:
    """Check that results are equal bit by bit, in order."""
    assert len(results) == len(expected)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.shapes == theirs.shapes
        assert (ours.output.shape, ours.output.dtype) == (theirs.output.shape, theirs.output.dtype)
        assert ours.output.tobytes() == theirs.output.tobytes()
        assert (ours.indices is None) == (theirs.indices is None)
        if ours.indices is not None:
            np.testing.assert_array_equal(ours.indices, theirs.indices)


CHAINS = {
    "max": [MaxPool2d(2)],
    "indices": [MaxPool2d(3, 2, 1, return_indices=True)],
    "average": [AvgPool2d(3, 1)],
    "lp": [LPPool2d(2, 2)],
    "adaptive": [AdaptiveAvgPool2d((3, None))],
    "fractional": [FractionalMaxPool2d(2, output_size=4, return_indices=True, seed=9)],
    "chain": [MaxPool2d(2), AdaptiveMaxPool2d(2), AvgPool2d(2)],
    "chain with fractional": [AvgPool2d(2, 1), FractionalMaxPool2d(2, output_size=3, seed=9)],
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("case", CHAINS)
def test_map_returns_what_pool_returns(
    mapped: Callable[..., list[Any]], client: PoolClient, case: str, layout: str
) -> None:
    """Each tensor's result is that of a call of its own, in order, however tensors are grouped."""
    chain = CHAINS[case]
    given = [each for each in MIXED if each.dtype != np.float16 or case == "max"]
    if layout == "NHWC":
        given = [np.moveaxis(each, -3, -1) for each in given]
    expected = [client.pool(each, chain, layout=layout) for each in given]
    assert_same(mapped(given, chain, layout=layout), expected)
    assert_same(mapped(iter(given), chain, layout=layout, in_flight=1), expected)


def test_tensors_of_another_rank_are_rejected(mapped: Callable[..., list[Any]], client: PoolClient) -> None:
    """Map rejects the tensors that pool rejects, and no others."""
    given = tensors((1, 2, 8, 8), (3, 2, 8, 8), (2, 8), (2, 4, 8, 8))
    results = mapped(given, GlobalPool2d("max"), return_exceptions=True)
    assert isinstance(results.pop(2), poolrpc.InvalidArgumentError)
    assert_same(results, [client.pool(each, GlobalPool2d("max")) for each in (*given[:2], given[3])])


def test_results_are_independent(client: PoolClient) -> None:
    """Each result is writable, and changing it changes no other."""
    given = tensors(*[(1, 2, 8, 8)] * 5)
    results = list(client.map(given, MaxPool2d(2)))
    results[1].output[...] = 0
    expected = [client.pool(each, MaxPool2d(2)) for each in given]
    assert_same(results[:1] + results[2:], expected[:1] + expected[2:])


def test_no_tensors(mapped: Callable[..., list[Any]]) -> None:
    """Without tensors there are no results and no request."""
    assert mapped([], MaxPool2d(2)) == []
    assert mapped(iter(()), MaxPool2d(2), return_exceptions=True) == []


@pytest.fixture
def calls(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], int]]:
    """Return a function that counts the Pool calls that servers of this process, which have ended, answered."""
    with caplog.at_level(logging.INFO, "poolrpc_server"):
        yield lambda: sum(each.getMessage() == "call" and each.method == METHOD for each in caplog.records)


def test_small_tensors_share_requests(calls: Callable[[], int], connect: Connect) -> None:
    """A thousand tensors of a kilobyte are one megabyte, and so one or two requests."""
    given = tensors(*[(1, 1, 16, 16), (4, 16, 16)] * 500)
    with poolrpc_server.embedded() as server:
        results = list(connect(server.address).map(given, MaxPool2d(2)))
    assert len(results) == 1000
    assert calls() == -(-sum(each.nbytes for each in given) // GROUP_BYTES)
    np.testing.assert_array_equal(results[-1].output, given[-1].reshape(4, 8, 2, 8, 2).max((2, 4)))


def test_different_tensors_have_requests_of_their_own(calls: Callable[[], int]) -> None:
    """A tensor of another dtype or plane size ends a group; so does each tensor of a layer that counts planes."""
    one, two, three = (
        tensors((1, 1, 8, 8), (1, 1, 8, 10)),
        *[tensors((1, 1, 8, 8), dtype="float64")],
        tensors((1, 8, 8)),
    )
    with poolrpc_server.embedded() as client:
        list(client.map([*one, *two, *three, *three], MaxPool2d(2)))
    assert calls() == 4
    with poolrpc_server.embedded() as client:
        list(client.map(three * 3, FractionalMaxPool2d(2, output_size=3)))
    assert calls() == 4 + 3


class CountedTensors:
    """A generator of tensors of half a group each, which counts those that were taken."""

    def __init__(self, length: int = 10**6) -> None:
        self.count = 0
        self.x = np.zeros((1, 1, GROUP_BYTES // 4 // 1024 * 3 // 4, 1024), np.float32)
        self._length = length

    def __iter__(self) -> Iterator[np.ndarray]:
        for _ in range(self._length):
            self.count += 1
            yield self.x

    async def __aiter__(self) -> AsyncIterator[np.ndarray]:
        for each in self:
            yield each


@pytest.mark.parametrize("in_flight", [1, IN_FLIGHT])
def test_a_generator_is_not_read_far_ahead(client: PoolClient, in_flight: int) -> None:
    """Taken are those in flight, one whose result is awaited, and one that waits for its group."""
    tensors = CountedTensors()
    results = client.map(tensors, MaxPool2d(2), in_flight=in_flight)
    assert tensors.count == 0
    for given in range(1, 10):
        next(results)
        assert tensors.count - given <= in_flight + 1
    results.close()


async def test_an_async_generator_is_not_read_far_ahead(address: str) -> None:
    """The asyncio client takes either kind of generator, and reads as little ahead."""
    async with AsyncPoolClient(address) as client:
        for source in (lambda each: each, iter):
            tensors, given = CountedTensors(), 0
            results = client.map(source(tensors), MaxPool2d(2), in_flight=2)
            async for _ in results:
                given += 1
                assert tensors.count - given <= 3
                if given == 10:
                    break
            await results.aclose()


async def test_an_async_generator_maps_like_a_list(address: str, client: PoolClient) -> None:
    """Tensors of an async generator are grouped too, and their results are in order."""

    async def given() -> AsyncIterator[np.ndarray]:
        for each in MIXED:
            yield each
            await asyncio.sleep(0)

    async with AsyncPoolClient(address) as other:
        results = [each async for each in other.map(given(), MaxPool2d(2))]
    assert_same(results, [client.pool(each, MaxPool2d(2)) for each in MIXED])


# Errors

GOOD = tensors((1, 3, 8, 8))[0]
FAULTY = [
    GOOD,
    GOOD,
    GOOD.astype(np.int32),  # not a dtype of an average
    GOOD,
    GOOD[..., :2, :2],  # smaller than the window
    object(),
    GOOD,
    GOOD[0, 0],  # of rank 2
    GOOD.astype(complex),
    GOOD[:, :0],
    GOOD,
]
FAULTS = {
    2: poolrpc.UnsupportedError,
    4: poolrpc.InvalidArgumentError,
    5: poolrpc.InvalidArgumentError,
    7: poolrpc.InvalidArgumentError,
    8: poolrpc.UnsupportedError,
    9: poolrpc.InvalidArgumentError,
}


def test_errors_are_results_of_their_tensors(mapped: Callable[..., list[Any]], client: PoolClient) -> None:
    """With return_exceptions a tensor's error is its result, and the others have results."""
    results = mapped(FAULTY, AvgPool2d(3), return_exceptions=True)
    assert {i: type(each) for i, each in enumerate(results) if isinstance(each, Exception)} == FAULTS
    assert {i: results[i].tensor for i in FAULTS} == {i: i for i in FAULTS}
    expected = client.pool(GOOD, AvgPool2d(3))
    assert_same([results[i] for i in range(len(FAULTY)) if i not in FAULTS], [expected] * (len(FAULTY) - len(FAULTS)))


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_is_raised_in_order(connect: Connect, address: str, fault: int) -> None:
    """Without return_exceptions the results before it come first, then the error, with its tensor's number."""
    given = [*FAULTY[:2], FAULTY[fault], GOOD]
    results: list[Any] = []
    with pytest.raises(FAULTS[fault]) as caught:
        results.extend(connect(address).map(given, AvgPool2d(3)))
    assert len(results) == 2
    assert caught.value.tensor == 2
    assert caught.value.__notes__ == ["tensor 2 of the map"]


def test_each_tensor_of_a_group_has_its_own_error(mapped: Callable[..., list[Any]]) -> None:
    """Tensors that fail together have an error each, with a number of its own."""
    errors = mapped([GOOD] * 3, MaxPool2d(9), return_exceptions=True)
    assert [each.tensor for each in errors] == [0, 1, 2]
    assert len({id(each) for each in errors}) == 3
    assert {str(each) for each in errors} == {str(errors[0])}


def test_a_group_over_a_limit_is_sent_again_one_by_one(connect: Connect) -> None:
    """Only a tensor that is rejected alone has an error."""
    layer = LPPool2d(2, 3, stride=1)
    given = tensors((1, 2, 16, 16), (1, 3, 16, 16), (1, 40, 16, 16), (1, 1, 16, 16))
    with poolrpc_server.embedded(max_work=layer.work((16, 16)) * 8) as client:
        results: list[Any] = list(connect(client.address).map(given, layer, return_exceptions=True))
        expected = [client.pool(each, layer) for each in (*given[:2], given[3])]
    assert isinstance(results[2], poolrpc.LimitExceededError)
    assert (results[2].reason, results[2].tensor) == ("WORK_BUDGET", 2)
    assert_same(results[:2] + results[3:], expected)


def test_an_exception_of_the_generator_is_raised(mapped: Callable[..., list[Any]]) -> None:
    """An error of the caller's own generator is raised to the caller, and no thread stays."""

    def given() -> Iterator[np.ndarray]:
        yield GOOD
        raise KeyError("the generator's")

    with pytest.raises(KeyError, match="the generator's"):
        mapped(given(), MaxPool2d(2))
    assert not map_threads()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"in_flight": 0}, "in_flight"),
        ({"in_flight": 65}, "in_flight"),
        ({"in_flight": 1.5}, "in_flight"),
        ({"layout": "CHWN"}, "expected one of NCHW, NHWC"),
    ],
)
def test_wrong_options_are_rejected(mapped: Callable[..., list[Any]], options: dict[str, Any], words: str) -> None:
    """in_flight is 1 to 64, and a layout is NCHW or NHWC."""
    with pytest.raises(poolrpc.InvalidArgumentError, match=words):
        mapped([GOOD], MaxPool2d(2), **options)


def test_map_of_a_closed_client(connect: Connect, address: str) -> None:
    """After close map raises PoolError, like every call."""
    client = connect(address)
    client.close()
    with pytest.raises(poolrpc.PoolError, match="is closed"):
        list(client.map([GOOD], MaxPool2d(2)))


def test_a_timeout_is_for_each_request(mapped: Callable[..., list[Any]]) -> None:
    """A timeout is for each request, and its error is the tensor's."""
    (error,) = mapped([np.zeros((1, 16, 512, 512), np.float32)], MaxPool2d(2), timeout=1e-5, return_exceptions=True)
    assert isinstance(error, poolrpc.DeadlineExceededError)


# How maps end


def map_threads() -> list[str]:
    """Return the names of map's threads."""
    return [each.name for each in threading.enumerate() if each.name.startswith(THREADS)]


def test_leaving_a_map_ends_its_threads(client: PoolClient) -> None:
    """Closing the generator, or dropping it, ends its threads; the client can still be used."""
    results = client.map(CountedTensors(), MaxPool2d(2))
    next(results)
    assert map_threads()
    results.close()
    assert not map_threads()
    for _ in client.map(CountedTensors(), MaxPool2d(2)):
        break
    assert not map_threads()
    np.testing.assert_array_equal(client.pool(GOOD, MaxPool2d(4)).output, GOOD.reshape(1, 3, 2, 4, 2, 4).max((3, 5)))


async def test_leaving_an_async_map_ends_its_tasks(address: str) -> None:
    """Closing the async generator cancels its tasks; the client can still be used."""
    async with AsyncPoolClient(address) as client:
        before = asyncio.all_tasks()
        results = client.map(CountedTensors(), MaxPool2d(2))
        await anext(results)
        await results.aclose()
        left = asyncio.all_tasks() - before
        if left:
            await asyncio.wait(left, timeout=20)
        assert not asyncio.all_tasks() - before
        assert (await client.pool(GOOD, MaxPool2d(2))).shape == (1, 3, 4, 4)


def test_a_finished_map_has_no_threads(client: PoolClient) -> None:
    """After the last result no thread of the map is left."""
    assert len(list(client.map(MIXED, MaxPool2d(2)))) == len(MIXED)
    assert not map_threads()


# The progress bar


def test_progress_draws_a_bar(mapped: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]) -> None:
    """The bar is tqdm's, on stderr, with the number of tensors; stdout stays empty."""
    pytest.importorskip("tqdm")
    mapped([GOOD] * 40, MaxPool2d(2), progress=True)
    shown = capsys.readouterr()
    assert "40/40" in shown.err
    assert "tensor" in shown.err
    assert not shown.out


def test_the_bar_of_a_generator_has_no_total(client: PoolClient, capsys: pytest.CaptureFixture[str]) -> None:
    """The length of a generator is not known, so the bar counts alone."""
    pytest.importorskip("tqdm")
    list(client.map(iter([GOOD] * 40), MaxPool2d(2), progress=True))
    assert "40tensor" in capsys.readouterr().err


def test_there_is_no_bar_by_default_or_without_tqdm(
    mapped: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without progress=True, or without tqdm, no bar is written and everything works; a warning names the extra."""
    assert len(mapped([GOOD] * 3, MaxPool2d(2))) == 3
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.warns(UserWarning, match=r"poolrpc\[progress\]"):
        assert len(mapped([GOOD] * 3, MaxPool2d(2), progress=True)) == 3
    assert capsys.readouterr() == ("", "")
