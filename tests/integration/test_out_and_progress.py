"""Arguments of pool that say where results go (out=, copy=) and who hears of them (progress=)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import poolrpc
from poolrpc import GlobalPool2d, MaxPool2d, PoolClient

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from poolrpc._transport.options import Transport
    from tests.integration.conftest import Connect

RNG = np.random.default_rng(7)
X = RNG.standard_normal((3, 5, 11, 14), np.float32)


@pytest.fixture(params=["unary", "stream", "arena", "local"])
def pool_each(
    request: pytest.FixtureRequest, connect: Connect, addresses: list[str], stream_in: Callable[..., None]
) -> Callable[..., list[poolrpc.PoolResult]]:
    """Return pool_each of either client, through each transport."""
    stream_in(1900, 500)  # two or three planes of X in a block, and less than a plane in a message
    client = connect(addresses[request.param in ("arena", "local")])

    def call(*arguments: Any, **options: Any) -> list[poolrpc.PoolResult]:
        results = client.pool_each(*arguments, transport=request.param, **options)
        assert {result.transport for result in results} == {request.param}
        return results

    return call


def test_files_are_read_and_written_where_they_are_mapped(
    pool_each: Callable[..., list[poolrpc.PoolResult]], client: PoolClient, tmp_path: Path
) -> None:
    """A mapped file may be the input, and others the output and the indices."""
    X.tofile(tmp_path / "x")
    x = np.memmap(tmp_path / "x", np.float32, "r", shape=X.shape)
    layer = MaxPool2d(3, 2, 1, return_indices=True)
    shape = layer.output_shape(X.shape)
    y = np.memmap(tmp_path / "y", np.float32, "w+", shape=shape)
    indices = np.memmap(tmp_path / "indices", np.int64, "w+", shape=shape)
    (result,) = pool_each(x, [layer], out=[(y, indices)])
    assert result.output is y
    assert result.indices is indices
    y.flush()
    indices.flush()
    expected = client.pool(X, layer, transport="unary")
    assert (tmp_path / "y").read_bytes() == expected.output.tobytes()
    assert expected.indices is not None
    assert (tmp_path / "indices").read_bytes() == expected.indices.tobytes()


def test_out_for_some_branches(pool_each: Callable[..., list[poolrpc.PoolResult]], client: PoolClient) -> None:
    """The list of `out` has an entry for each branch; None stands for a new array."""
    y = np.empty(GlobalPool2d("mean").output_shape(X.shape), np.float32)
    pair = (np.empty((3, 5, 5, 7), np.float32), np.empty((3, 5, 5, 7), np.int64))
    branches = [MaxPool2d(2), GlobalPool2d("mean"), MaxPool2d(2, return_indices=True)]
    results = pool_each(X, branches, out=[None, y, pair])
    assert results[1].output is y
    assert results[2].output is pair[0]
    assert results[2].indices is pair[1]
    for ours, theirs in zip(results, client.pool_each(X, branches, transport="unary"), strict=True):
        assert ours.output.tobytes() == theirs.output.tobytes()
        assert ours.indices is None or np.array_equal(ours.indices, theirs.indices)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (np.empty((3, 5, 5, 6), np.float32), r"array of float32 \(3, 5, 5, 7\), got float32 \(3, 5, 5, 6\)"),
        (np.empty((3, 5, 5, 7), np.float64), r"got float64"),
        (np.empty((3, 5, 5, 14), np.float32)[..., ::2], "strided"),
        (np.broadcast_to(np.float32(), (3, 5, 5, 7)), "read-only"),
        ([[0.0]], "got 'list'"),
        ((np.empty((3, 5, 5, 7), np.float32), np.empty((3, 5, 5, 7), np.int64)), "expected 1 arrays"),
    ],
    ids=["shape", "dtype", "strides", "read-only", "list", "pair"],
)
def test_an_out_that_does_not_fit_is_rejected(
    pool_each: Callable[..., list[poolrpc.PoolResult]], out: Any, words: str
) -> None:
    """The client checks `out` before it sends anything."""
    with pytest.raises(poolrpc.InvalidArgumentError, match=words) as caught:
        pool_each(X, [MaxPool2d(2)], out=[out])
    assert caught.value.violations[0].field == "out"


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_progress_counts_planes(
    connect: Connect, addresses: list[str], stream_in: Callable[..., None], layout: str
) -> None:
    """The callback is called with the planes that are done and their number, after each block of a stream.

    With channels last an image is one plane. The other transports call it once, at the end.
    """
    stream_in(1900)
    calls: list[tuple[int, int]] = []
    x = X if layout == "NCHW" else np.moveaxis(X, 1, -1)
    count = 15 if layout == "NCHW" else 3

    def progress(done: int, planes: int) -> None:
        calls.append((done, planes))

    connect(addresses[0]).pool(x, MaxPool2d(2), layout=layout, transport="stream", progress=progress)
    done = [at for at, _ in calls]
    assert {planes for _, planes in calls} == {count}
    assert done == sorted(set(done))
    assert done[-1] == count
    assert len(calls) == (5 if layout == "NCHW" else 3)
    for transport, address in (("unary", addresses[0]), ("arena", addresses[1]), ("local", addresses[1])):
        calls.clear()
        connect(address).pool(x, MaxPool2d(2), layout=layout, transport=transport, progress=progress)
        assert calls == [(count, count)]


def test_an_out_on_the_input_is_rejected_by_every_transport(unix_address: str) -> None:
    """Only some transports read all of the input before they write; nothing is written."""
    with PoolClient(unix_address) as client:
        for x in (client.empty((1, 1, 64, 64)), np.empty((1, 1, 64, 64), np.float32)):
            x[...] = 1
            for transport in ("unary", "stream", "arena", "local"):
                with pytest.raises(poolrpc.InvalidArgumentError, match=r"^out: expected memory apart from the input"):
                    client.pool(x, MaxPool2d(3, 1, 1), transport=transport, out=x)
            assert (x == 1).all()


@pytest.mark.parametrize("source", ["inside", "outside"])
@pytest.mark.parametrize("goal", ["inside", "outside", "same buffer", "pair"])
@pytest.mark.parametrize("transport", ["arena", "local"])
def test_out_and_input_inside_and_outside_the_arena(
    unix_address: str, transport: Transport, source: str, goal: str
) -> None:
    """An `out` is filled inside the arena, outside of it, or next to the input."""
    with PoolClient(unix_address) as client:
        buffer = client.empty((2, 2, 3, 64, 64))
        x = buffer[0] if source == "inside" else np.empty((2, 3, 64, 64), np.float32)
        x[...] = RNG.standard_normal(x.shape, np.float32)
        layer = MaxPool2d(3, 1, 1, return_indices=goal == "pair")
        expected = client.pool(x, layer, transport="unary")
        out: Any = {
            "inside": client.empty(x.shape),
            "outside": np.empty(x.shape, np.float32),
            "same buffer": buffer[1],
            "pair": (client.empty(x.shape), np.empty(x.shape, np.int64)),
        }[goal]
        for copy in (True, False):
            result = client.pool(x, layer, transport=transport, out=out, copy=copy)
            assert result.output is (out[0] if goal == "pair" else out)
            assert result.transport == transport
            np.testing.assert_array_equal(result.output, expected.output)
            if expected.indices is not None:
                assert result.indices is out[1]
                np.testing.assert_array_equal(result.indices, expected.indices)
