"""Operands by every transport, client and protocol: offsets, weights and boxes."""

from __future__ import annotations

import asyncio
import json
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import poolrpc_server
from poolrpc import (
    AsyncPoolClient,
    GlobalPool1d,
    GlobalPool2d,
    InvalidArgumentError,
    LimitExceededError,
    MaxPool1d,
    MaxPool2d,
    MaxUnpool2d,
    PoolClient,
    PoolError,
    RoIAlign,
    RoIPool,
    SegmentPool,
    UnsupportedError,
    branch_shapes,
)
from poolrpc.cli import main
from poolrpc.torch import RemotePool
from tests.scrape import Scrape

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from poolrpc_server import Server

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(5, 6, 64)).astype(np.float32)
MASK = RANDOM.random((5, 64)) > 0.4
OFFSETS = np.array([0, 3, 3, 20, 64])
IMAGES = RANDOM.normal(size=(2, 3, 12, 10)).astype(np.float32)
BOXES = np.array([[1, 0, 0, 5, 5], [0, 2, 1, 9, 8]], np.float32)
CALLS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "offsets": (X, SegmentPool("mean"), {"offsets": OFFSETS}),
    "weights": (X, GlobalPool1d("mean"), {"weights": MASK}),
    "RoIPool": (IMAGES, RoIPool(3), {"boxes": BOXES}),
    "RoIAlign": (IMAGES, RoIAlign(3, 0.5), {"boxes": BOXES}),
}
STREAMED = ("offsets", "weights")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server on a unix socket."""
    with poolrpc_server.embedded() as client:
        yield str(client.address)


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[PoolClient]:
    """A client of that server."""
    with PoolClient(address) as made:
        yield made


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("transport", ["stream", "arena", "local"])
@pytest.mark.parametrize("name", CALLS)
def test_every_transport_has_the_same_result(client: PoolClient, name: str, transport: Any, layout: Any) -> None:
    """A call with an operand has the same output by every transport, in both layouts; boxes are not streamed."""
    x, layer, operand = CALLS[name]
    given = x if layout == "NCHW" else np.ascontiguousarray(np.moveaxis(x, 1, -1))
    expected = client.pool(given, layer, layout=layout, transport="unary", **operand)
    if transport == "stream" and name not in STREAMED:
        with pytest.raises(UnsupportedError, match="send the images in one message"):
            client.pool(given, layer, layout=layout, transport=transport, **operand)
        return
    result = client.pool(given, layer, layout=layout, transport=transport, **operand)
    assert result.transport == transport
    assert np.array_equal(result.output, expected.output, equal_nan=True)
    assert result.shapes == expected.shapes


@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_of_several_blocks_has_the_operand_once(client: PoolClient, name: str) -> None:
    """Blocks that begin and end within an image have the weights of their images, and all have the same offsets."""
    _, layer, operand = CALLS[name]
    x = RANDOM.normal(size=(5, 3001, 64)).astype(np.float32)  # more than one block, none of whole images
    expected = client.pool(x, layer, transport="unary", **operand).output
    assert np.array_equal(client.pool(x, layer, transport="stream", **operand).output, expected, equal_nan=True)


def test_an_operand_goes_only_to_the_first_layers_that_take_it(client: PoolClient) -> None:
    """Branches share the operand; a branch that takes none, and layers after the first, are computed without it."""
    mean, most, plain, chain = client.pool_each(
        X, [GlobalPool1d("mean"), GlobalPool1d("max"), MaxPool1d(2), [MaxPool1d(2), GlobalPool1d("max")]], weights=MASK
    )
    masked = np.where(MASK[:, None], X, -np.inf)
    assert np.array_equal(most.output, masked.max(-1, keepdims=True))
    np.testing.assert_allclose(mean.output[..., 0], (X * MASK[:, None]).sum(-1) / MASK.sum(-1)[:, None], rtol=1e-5)
    assert np.array_equal(plain.output, client.pool(X, MaxPool1d(2)).output)
    assert np.array_equal(chain.output, X.max(-1, keepdims=True))
    for steps in ([SegmentPool("max"), MaxPool1d(2)], [SegmentPool("max"), GlobalPool1d("max")]):
        first, second = client.pool_steps(X, steps, offsets=[0, 10, 30, 64])
        assert np.array_equal(second.output, client.pool(first.output, steps[1]).output)
    first, second = client.pool_steps(IMAGES, [RoIAlign(4), MaxPool2d(2)], boxes=BOXES)
    assert np.array_equal(second.output, client.pool(first.output, MaxPool2d(2)).output)


def test_the_async_client_takes_operands(address: str) -> None:
    """Every method of the async client takes them as that of the blocking one does."""

    async def calls() -> None:
        async with AsyncPoolClient(address) as client:
            for x, layer, operand in CALLS.values():
                one = (await client.pool(x, layer, **operand)).output
                assert np.array_equal((await client.pool_each(x, [layer], **operand))[0].output, one, equal_nan=True)
                assert np.array_equal((await client.pool_steps(x, [layer], **operand))[0].output, one, equal_nan=True)
                each = {name: repeat(value) for name, value in operand.items()}
                async for result in client.map([x, x], layer, **each):
                    assert np.array_equal(result.output, one, equal_nan=True)
            assert await client.output_shape(X.shape, SegmentPool("max"), operand_shape=(5,)) == (5, 6, 4)

    asyncio.run(calls())


def test_a_map_has_an_operand_for_each_tensor(client: PoolClient) -> None:
    """Tensors that are sent together have the results of each alone, with the same offsets, other offsets, or masks."""
    lengths = [7, 7, 3, 7]
    pages = [RANDOM.normal(size=(4, length)).astype(np.float32) for length in lengths for _ in range(3)]
    for layer, name, operands in (
        (SegmentPool("mean"), "offsets", [[0, 1, 3]] * 12),
        (SegmentPool("mean"), "offsets", [[0, 1 + number % 2, 3] for number in range(12)]),
        (SegmentPool("max"), "lengths", [[1, 1]] * 12),
        (GlobalPool1d("mean"), "weights", [RANDOM.random(page.shape[1]) > 0.3 for page in pages]),
    ):
        results = list(client.map(pages, layer, **{name: operands}))
        for page, operand, result in zip(pages, operands, results, strict=True):
            expected = client.pool(page, layer, **{name: operand})
            assert np.array_equal(result.output, expected.output, equal_nan=True)
            assert result.shapes == expected.shapes
    unpooled = list(
        client.map([np.ones((1, 1, 1), np.float32)] * 3, MaxUnpool2d(2), indices=repeat(np.zeros((1, 1, 1), int)))
    )
    assert [result.output.tolist() for result in unpooled] == [[[[1, 0], [0, 0]]]] * 3


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("reduce", ["max", "mean", "std"])
def test_a_map_sends_segments_of_any_lengths_together(
    local_server: Server, reduce: Any, dtype: str, layout: Any
) -> None:
    """Tensors of other lengths, with other offsets, which may leave out cells at either end, are one request."""
    tensors, offsets = [], []
    for number in range(12):
        length = int(RANDOM.integers(1, 50))
        x = RANDOM.normal(size=(2, 3, length)).astype(dtype)
        tensors.append(x if layout == "NCHW" else np.ascontiguousarray(np.moveaxis(x, 1, -1)))
        offsets.append(np.sort(RANDOM.integers(0, length + 1, 2 + number % 4)))
    with PoolClient(local_server.addresses[0]) as client:
        results = list(client.map(tensors, SegmentPool(reduce), layout=layout, offsets=offsets))
        assert Scrape(local_server.metrics_address)("poolrpc_requests_total") == 1
        for x, each, result in zip(tensors, offsets, results, strict=True):
            alone = client.pool(x, SegmentPool(reduce), layout=layout, offsets=each)
            assert np.array_equal(result.output, alone.output, equal_nan=True)
            assert (result.shapes, result.output.flags.c_contiguous) == (alone.shapes, True)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("chain", [RoIAlign(3, 0.5), [RoIPool(4), MaxPool2d(2, return_indices=True)]])
def test_a_map_sends_images_with_their_boxes_together(local_server: Server, chain: Any, layout: Any) -> None:
    """Several images, one, and one without N, each with its own boxes or none, are one request."""
    tensors, boxes = [], []
    for number, lead in enumerate([(2,), (1,), (), (3,)] * 2):
        x = RANDOM.normal(size=(*lead, 3, 12, 10)).astype(np.float32)
        tensors.append(x if layout == "NCHW" else np.ascontiguousarray(np.moveaxis(x, -3, -1)))
        numbers = RANDOM.integers(0, (*lead, 1)[0], (number, 1))
        boxes.append(np.concatenate([numbers, RANDOM.uniform(0, 20, (number, 4))], 1))
    with PoolClient(local_server.addresses[0]) as client:
        results = list(client.map(tensors, chain, layout=layout, boxes=boxes))
        assert Scrape(local_server.metrics_address)("poolrpc_requests_total") == 1
        for x, each, result in zip(tensors, boxes, results, strict=True):
            alone = client.pool(x, chain, layout=layout, boxes=each)
            assert np.array_equal(result.output, alone.output)
            assert result.shapes == alone.shapes
            assert (result.indices is None) == (alone.indices is None)
            assert result.indices is None or np.array_equal(result.indices, alone.indices)


def test_a_box_of_a_map_is_of_its_own_tensor(client: PoolClient) -> None:
    """A box of an image that its tensor lacks is an error, although the tensor after it has one."""
    boxes = [np.array([[number == 1, 0, 0, 5, 5]], float) for number in range(4)]
    results = list(client.map([IMAGES[:1]] * 4, RoIPool(2), boxes=boxes, return_exceptions=True))
    assert [isinstance(result, PoolError) for result in results] == [False, True, False, False]
    assert "the number of an image, 0..0, got 1" in str(results[1])


def test_segments_of_a_map_are_of_their_own_tensor(client: PoolClient) -> None:
    """An offset beyond its tensor is an error, although another tensor follows."""
    offsets = [[0, 3], [0, 9], [0, 4], [4, 3]]
    results = list(client.map([X[:1, :, :8]] * 4, SegmentPool("max"), offsets=offsets, return_exceptions=True))
    assert [isinstance(result, PoolError) for result in results] == [False, True, False, True]
    assert "offsets in 0..8, got 0..9" in str(results[1])


def test_a_bad_tensor_of_a_map_keeps_its_operand(client: PoolClient) -> None:
    """The tensors after one that is not valid have their own operands, not those of the tensors before them."""
    masks = [np.eye(4)[number : number + 1] for number in range(4)]
    row = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
    results = list(client.map([row, "no tensor", row, row], GlobalPool1d("max"), weights=masks, return_exceptions=True))
    assert isinstance(results[1], PoolError)
    assert [result.output.item() for result in results if not isinstance(result, PoolError)] == [0, 2, 3]


def test_one_bad_operand_of_a_map_fails_alone(client: PoolClient) -> None:
    """The error of an operand is that of its tensor, whether the client or the server finds it."""
    masks = [np.ones(64)] * 5
    for bad, message in ((-np.ones(64), "weights: expected finite"), (np.ones(63), "weights.shape: expected")):
        masks[3] = bad
        results = list(client.map(list(X), GlobalPool1d("mean"), weights=masks, return_exceptions=True))
        assert [isinstance(result, PoolError) for result in results] == [False, False, False, True, False]
        assert str(results[3]).startswith(message)
        assert results[3].tensor == 3  # type: ignore[union-attr]  # an error, by the line before
    with pytest.raises(InvalidArgumentError, match=r"^weights: expected one for each tensor, got fewer") as raised:
        list(client.map(list(X), GlobalPool1d("mean"), weights=masks[:2]))
    assert raised.value.tensor == 2
    with pytest.raises(InvalidArgumentError, match=r"^offsets: expected an iterable"):
        client.map(list(X), SegmentPool("mean"), offsets=5)


NAN, INF = float("nan"), float("inf")
BAD: list[tuple[Any, Any, dict[str, Any], str]] = [
    (X, SegmentPool("mean"), {}, "offsets: expected the offsets for SegmentPool, got none"),
    (X, SegmentPool("mean"), {"offsets": [0, 5, 3]}, "offsets: expected offsets in ascending order, got 5 before 3"),
    (X, SegmentPool("mean"), {"offsets": [0, 65]}, "offsets: expected offsets in 0..64, got 0..65"),
    (X, SegmentPool("mean"), {"offsets": [-1, 5]}, "offsets: expected offsets in 0..64, got -1..5"),
    (X, SegmentPool("mean"), {"offsets": [0]}, "offsets.shape: expected (S + 1,)"),
    (X, SegmentPool("mean"), {"offsets": [[0, 1]]}, "offsets.shape: expected one axis, got shape (1, 2)"),
    (X, SegmentPool("mean"), {"offsets": [0.0, 1.0]}, "offsets.dtype: expected integers, got float64"),
    (X, SegmentPool("mean"), {"offsets": [False, True]}, "offsets.dtype: expected integers, got bool"),
    (X, SegmentPool("mean"), {"lengths": [3, -1]}, "lengths: expected at least 0, got -1"),
    (X, SegmentPool("mean"), {"lengths": [60, 5]}, "lengths: expected at most 64 cells in all, got 65"),
    (X, SegmentPool("mean"), {"ids": [0, 0, 1]}, "ids: expected 64 numbers, one for each cell, got 3"),
    (X, SegmentPool("mean"), {"ids": [0] * 65}, "ids: expected 64 numbers, one for each cell, got 65"),
    (X, SegmentPool("mean"), {"ids": [0] * 63 + [2**30]}, "ids: expected numbers below 268435456, got 1073741824"),
    (X, SegmentPool("mean"), {"ids": [0, 1, 0]}, "ids: expected numbers from 0 on in ascending order, got 0 at"),
    (X, SegmentPool("mean"), {"ids": [-1, 0]}, "ids: expected numbers from 0 on in ascending order, got -1 at"),
    (X, SegmentPool("mean"), {"offsets": "no"}, "offsets: expected an array"),
    (X, SegmentPool("mean"), {"weights": MASK}, "weights: expected offsets for SegmentPool, got weights"),
    (X, SegmentPool("mean"), {"offsets": OFFSETS, "ids": [0]}, "ids: expected one operand, got offsets and ids"),
    (X, MaxPool1d(2), {"weights": MASK}, "weights: expected no operand for MaxPool1d, got weights"),
    (X, GlobalPool1d("mean"), {"weights": MASK[:4]}, "weights.shape: expected (5, 64), the input's without its chan"),
    (X, GlobalPool1d("mean"), {"weights": np.where(MASK, NAN, 1)}, "weights: expected finite weights of at least 0"),
    (X, GlobalPool1d("mean"), {"weights": np.where(MASK, INF, 1)}, "weights: expected finite weights of at least 0"),
    (X, GlobalPool1d("mean"), {"weights": MASK - 1.0}, "weights: expected finite weights of at least 0, got -1.0..0.0"),
    (X, GlobalPool1d("mean"), {"weights": MASK * 1j}, "weights.dtype: expected numbers or bool, got complex128"),
    (
        IMAGES,
        RoIAlign(2),
        {"boxes": [[2, 0, 0, 1, 1]]},
        "boxes: expected the number of an image, 0..1, got 2 for box 0",
    ),
    (IMAGES, RoIAlign(2), {"boxes": [[0.5, 0, 0, 1, 1]]}, "boxes: expected the number of an image, 0..1, got 0.5"),
    (IMAGES, RoIAlign(2), {"boxes": [[-1, 0, 0, 1, 1]]}, "boxes: expected the number of an image, 0..1, got -1"),
    (IMAGES, RoIPool(2), {"boxes": [[0, NAN, 0, 1, 1]]}, "boxes: expected finite coordinates within 1073741824 cells"),
    (IMAGES, RoIPool(2), {"boxes": [[0, 0, 0, INF, 1]]}, "boxes: expected finite coordinates within 1073741824 cells"),
    (IMAGES, RoIPool(2, 1e6), {"boxes": [[0, 0, 0, 1e6, 1]]}, "boxes: expected finite coordinates within 1073741824"),
    (IMAGES, RoIPool(2), {"boxes": [[0, 0, 1, 1]]}, "boxes.shape: expected (K, 5) for K boxes, got (1, 4)"),
    (IMAGES, RoIPool(2), {"boxes": [np.zeros((1, 5))]}, "boxes.shape: expected (K, 5), or for each image (K, 4), got"),
    (IMAGES[:0], RoIPool(2), {"boxes": BOXES}, "boxes.shape: expected (0, 5) for no images, got (2, 5)"),
    (IMAGES, MaxUnpool2d(2), {"boxes": BOXES}, "boxes: expected indices for MaxUnpool2d, got boxes"),
]


@pytest.mark.parametrize(("x", "layer", "operand", "message"), BAD, ids=[message[:60] for *_, message in BAD])
def test_a_bad_operand_is_named(client: PoolClient, x: Any, layer: Any, operand: dict[str, Any], message: str) -> None:
    """The error names the operand, what was expected of it, and what was received."""
    with pytest.raises(InvalidArgumentError) as raised:
        client.pool(x, layer, **operand)
    assert str(raised.value).startswith(message)
    assert raised.value.violations[0].field == message.partition(":")[0]


def test_operands_of_other_kinds_are_rejected(client: PoolClient) -> None:
    """Branches share one operand, weights are for floats, a later layer takes none, and no name is made up."""
    with pytest.raises(InvalidArgumentError, match="branches that share one operand, got boxes and indices"):
        client.pool_each(IMAGES, [RoIAlign(2), MaxUnpool2d(2)], boxes=BOXES)
    with pytest.raises(UnsupportedError, match=r"layers with weights take float16, .* got uint8"):
        client.pool(IMAGES.astype(np.uint8), GlobalPool2d("max"), weights=np.ones((2, 12, 10)))
    with pytest.raises(InvalidArgumentError, match="expected SegmentPool first in its chain"):
        client.pool(X, [MaxPool1d(2), SegmentPool("max")])
    with pytest.raises(TypeError, match="got the keyword argument 'mask'"):
        client.pool(X, GlobalPool1d("mean"), mask=MASK)  # type: ignore[call-arg]
    with pytest.raises(InvalidArgumentError, match=r"^operand_shape: expected the shape of the offsets"):
        SegmentPool("max").output_shape((1, 2, 3))
    with pytest.raises(InvalidArgumentError, match=r"^operand_shape: expected none for MaxPool2d"):
        MaxPool2d(2).output_shape((1, 1, 4, 4), operand_shape=(2,))


def test_shapes_need_the_operands_shape_alone(client: PoolClient) -> None:
    """The shapes of a call are the same offline, from the server, and of its result."""
    for x, layer, operand in CALLS.values():
        (array,) = operand.values()
        expected = client.pool(x, layer, **operand).shape
        assert layer.output_shape(x.shape, operand_shape=array.shape) == expected
        assert branch_shapes(x.shape, [layer], operand_shape=array.shape) == [(expected,)]
        assert client.output_shape(x.shape, layer, operand_shape=array.shape) == expected
    last = branch_shapes((2, 12, 10, 3), [[RoIAlign(4), MaxPool2d(2)]], "NHWC", operand_shape=(7, 5))
    assert last == [((7, 4, 4, 3), (7, 2, 2, 3))]


def test_boxes_are_a_list_for_each_image_too(client: PoolClient) -> None:
    """A list with the boxes of each image, as torchvision takes it, is the boxes with the images' numbers."""
    boxes = [np.array([[0, 0, 5, 5], [1, 1, 4, 4]]), np.array([[2, 1, 9, 8]])]
    together = np.array([[0, 0, 0, 5, 5], [0, 1, 1, 4, 4], [1, 2, 1, 9, 8]])
    assert np.array_equal(
        client.pool(IMAGES, RoIAlign(2), boxes=boxes).output, client.pool(IMAGES, RoIAlign(2), boxes=together).output
    )


def test_the_work_of_boxes_is_limited_by_their_size() -> None:
    """Boxes whose bins have more cells than the limit on work are rejected; small ones on the same map are not."""
    x = np.zeros((1, 8, 200, 200), np.float32)
    small, large = np.tile([[0, 0, 0, 9, 9]], (500, 1)), np.tile([[0, 0, 0, 199, 199]], (500, 1))
    with poolrpc_server.embedded(max_work=100_000_000) as client:
        for layer in (RoIAlign(7), RoIPool(7)):
            client.pool(x, layer, boxes=small)
            with pytest.raises(
                LimitExceededError, match="expected at most 100000000 cells to visit in all boxes"
            ) as raised:
                client.pool(x, layer, boxes=large)
            assert raised.value.reason == "WORK_BUDGET"


def test_a_remote_module_takes_operands(client: PoolClient) -> None:
    """A module of torch passes tensors of torch as operands."""
    x, mask = torch.from_numpy(X), torch.from_numpy(MASK)
    expected = client.pool(X, GlobalPool1d("mean"), weights=MASK).output
    assert torch.equal(RemotePool(client, GlobalPool1d("mean"))(x, weights=mask), torch.from_numpy(expected))


def test_the_command_takes_operands(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An operand is a file that a flag names, for every input, or an array of the .npz with the input."""
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "offsets.npy", OFFSETS)
    np.savez(tmp_path / "masked.npz", x=X, weights=MASK, boxes=BOXES)
    common = ["--address", address, "--json"]
    segments = ["--layer", "SegmentPool('max')", "--offsets", str(tmp_path / "offsets.npy")]
    assert main(["pool", str(tmp_path / "x.npy"), *segments, *common]) == 0
    assert json.loads(capsys.readouterr().out)["branches"][0]["steps"][0]["shape"] == [5, 6, 4]
    assert main(["pool", str(tmp_path / "masked.npz"), "--layer", "GlobalPool1d('mean')", *common]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)["branches"][0]["values"]
    np.testing.assert_allclose(values, client_mean(), rtol=1e-5)
    assert "the boxes are left out, since no layer takes them" in printed.err
    assert main(["pool", str(tmp_path / "x.npy"), *segments, "--weights", str(tmp_path / "x.npy"), *common]) == 1
    assert "expected one operand, got weights and offsets" in capsys.readouterr().err
    assert main(["shape", "2x3x56x56", "RoIAlign(7)", "--operand-shape", "100x5"]) == 0
    assert "RoIAlign(7) -> (100, 3, 7, 7)" in capsys.readouterr().out


def client_mean() -> np.ndarray:
    """Return the masked mean of the planes of X."""
    return (X * MASK[:, None]).sum(-1, keepdims=True) / MASK.sum(-1)[:, None, None]
