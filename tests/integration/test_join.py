"""join= of pool_each: the outputs of branches as one result, and the recipes that need it."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

import poolrpc
from poolrpc import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AsyncPoolClient,
    GlobalPool2d,
    InvalidArgumentError,
    MaxPool2d,
    ToDtype,
)
from poolrpc.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from poolrpc import PoolClient, PoolResult

X = np.arange(2 * 3 * 6 * 8, dtype=np.float32).reshape(2, 3, 6, 8) % 17
GLOBAL = [GlobalPool2d("mean"), GlobalPool2d("max"), GlobalPool2d("std")]


def layouts(x: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return a channels-first tensor in both layouts."""
    return [("NCHW", x), ("NHWC", np.moveaxis(x, -3, -1))]


@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (3, 6, 8)], ids=["batched", "unbatched"])
def test_cat_joins_channels(client: PoolClient, shape: tuple[int, ...]) -> None:
    """Outputs of one spatial shape are concatenated along the channels, in both layouts."""
    for layout, x in layouts(X[:2].reshape(-1)[: np.prod(shape)].reshape(shape)):
        apart = client.pool_each(x, GLOBAL, layout=layout)
        joined = client.pool_each(x, GLOBAL, layout=layout, join="cat")
        axis = -1 if layout == "NHWC" else -3
        np.testing.assert_array_equal(joined.output, np.concatenate([each.output for each in apart], axis))
        assert joined.shape == joined.output.shape
        assert joined.transport == apart[0].transport


@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (3, 6, 8), (0, 3, 6, 8)], ids=["batched", "unbatched", "none"])
def test_flatten_joins_outputs_of_any_size(client: PoolClient, shape: tuple[int, ...]) -> None:
    """The outputs of an image are flattened in their layout and concatenated: a spatial pyramid."""
    pyramid = [AdaptiveMaxPool2d(1), AdaptiveMaxPool2d(2), AdaptiveMaxPool2d((3, 4))]
    lead = shape[:-3]
    for layout, x in layouts(X.reshape(-1)[: np.prod(shape)].reshape(shape)):
        apart = client.pool_each(x, pyramid, layout=layout)
        joined = client.pool_each(x, pyramid, layout=layout, join="flatten")
        expected = np.concatenate([each.output.reshape(*lead, np.prod(each.shape[-3:])) for each in apart], -1)
        np.testing.assert_array_equal(joined.output, expected)
        assert joined.shape == (*lead, 3 * (1 + 4 + 12))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_mean_and_sum_join_cell_by_cell(client: PoolClient, dtype: Any) -> None:
    """Sums of half precision are added in float32 and rounded once; those of integers keep their dtype."""
    branches = [AdaptiveMaxPool2d(2), AdaptiveMaxPool2d(2), AdaptiveAvgPool2d(2)]
    if dtype is np.int64:
        branches = [MaxPool2d((3, 4)), MaxPool2d((3, 4))]
    x = (X * 1.7).astype(dtype)
    apart = [each.output for each in client.pool_each(x, branches)]
    wide = [each.astype(np.float32) if each.dtype.itemsize == 2 else each for each in apart]
    total = client.pool_each(x, branches, join="sum").output
    assert total.dtype == x.dtype
    np.testing.assert_array_equal(total, sum(wide[1:], wide[0]).astype(dtype))
    if dtype is np.int64:
        with pytest.raises(InvalidArgumentError, match=r"^join: expected floats for a mean, got int64"):
            client.pool_each(x, branches, join="mean")
    else:
        mean = client.pool_each(x, branches, join="mean").output
        np.testing.assert_array_equal(mean, (sum(wide[1:], wide[0]) / len(wide)).astype(dtype))


@pytest.mark.parametrize(
    ("branches", "options", "message"),
    [
        (GLOBAL, {"join": "concat"}, "join: expected 'cat' or 'flatten' or 'mean' or 'sum', got 'concat'"),
        (GLOBAL, {"join": True}, "join: expected 'cat'"),
        ([GLOBAL[0], MaxPool2d(2)], {"join": "cat"}, "join: expected outputs of one shape for 'cat'"),
        ([GLOBAL[0], MaxPool2d(2)], {"join": "mean"}, "join: expected outputs of one shape for 'mean'"),
        ([GLOBAL[0], [ToDtype("float64"), GLOBAL[0]]], {"join": "cat"}, "join: expected outputs of one dtype"),
        ([MaxPool2d(2, return_indices=True)], {"join": "cat"}, "join: expected layers without return_indices"),
        (GLOBAL[:1], {"join": "cat", "out": [np.empty((2, 3, 1, 1), np.float32)]}, "out: expected no arrays together"),
    ],
)
def test_an_invalid_join_is_rejected(client: PoolClient, branches: Any, options: Any, message: str) -> None:
    """A join of outputs that do not fit each other is rejected before anything is sent, with what was expected."""
    with pytest.raises(InvalidArgumentError, match=f"^{message}"):
        client.pool_each(X, branches, **options)


def test_the_asyncio_client_joins_too(address: str) -> None:
    """The asyncio client returns the same joined result."""

    async def pooled() -> PoolResult:
        async with AsyncPoolClient(address) as client:
            return await client.pool_each(X, GLOBAL, join="cat")

    with poolrpc.PoolClient(address) as client:
        expected = client.pool_each(X, GLOBAL, join="cat")
    np.testing.assert_array_equal(asyncio.run(pooled()).output, expected.output)


@pytest.mark.parametrize("join", ["cat", "flatten", "mean", "sum"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_the_command_joins_branches(
    client: PoolClient, tmp_path: Path, capsys: pytest.CaptureFixture[str], join: Any, layout: Any
) -> None:
    """`poolrpc pool --join` saves and reports the one output of `pool_each(..., join=)`, and each branch's shapes."""
    x = dict(layouts(X))[layout]
    np.savez(tmp_path / "x.npz", x=x, layout=layout)
    branches = [[MaxPool2d(2), GlobalPool2d("mean")], [GlobalPool2d("max")]]
    expected = client.pool_each(np.ascontiguousarray(x), branches, layout=layout, join=join).output
    flags = [flag for chain in branches for flag in ("--layer", repr(chain))]
    command = ["pool", str(tmp_path / "x.npz"), *flags, "--join", join, "--address", str(client.address)]
    assert main([*command, "--save", str(tmp_path / "y.npz"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [len(each["steps"]) for each in report["branches"]] == [2, 1]
    assert report["saved"] == [str(tmp_path / "y.npz")]
    assert (report["joined"]["join"], report["joined"]["shape"]) == (join, [*expected.shape])
    np.testing.assert_array_equal(np.array(report["joined"]["values"], np.float32), expected)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npz")["x"], expected)
    assert main([*command, "--save", str(tmp_path / "y.npy")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"join {join} -> {expected.shape}" in lines
    moved = np.moveaxis(expected, -1, -3) if layout == "NHWC" and join != "flatten" else expected
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), moved)


def test_the_command_joins_the_branches_of_every_image(
    client: PoolClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mean of branches is an image again; joined channels, and steps together with a join, are rejected."""
    Image.new("RGB", (8, 6), (10, 20, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), (30, 20, 10)).save(tmp_path / "b.png")
    files = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--address", str(client.address)]
    layers = ["--layer", "AvgPool2d(2)", "--layer", "[ToDtype('float32'), MaxPool2d(2)]"]
    assert main(["pool", *files, *layers, "--join", "mean", "--save", str(tmp_path / "out")]) == 0
    for name, size, color in (("a", (4, 3), (10, 20, 30)), ("b", (2, 2), (30, 20, 10))):
        with Image.open(tmp_path / f"out/{name}.png") as image:
            assert (image.size, image.getpixel((1, 1))) == (size, color)
    capsys.readouterr()
    assert main(["pool", *files, *layers, "--join", "cat", "--save", str(tmp_path / "cat")]) == 1
    assert "expected .npy or .npz for outputs that are joined by cat" in capsys.readouterr().err
    assert main(["pool", *files, *layers[:2], "--join", "sum", "--steps", "all"]) == 1
    assert "join: expected no --steps together with --join" in capsys.readouterr().err
