"""Every layer through a real server, compared with torch.nn bit for bit: values, indices, dtype, shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import poolrpc as p
import poolrpc_server
from tests.operand_bytes import operand_for
from tests.parity.grid import GRID, cases, features, sampled
from tests.parity.reference import as_torch, assert_result, assert_same, reference, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.parity.grid import Case

extent = pytest.mark.parametrize("grid", [sampled, pytest.param(cases, marks=pytest.mark.slow)])
"""A sample of the grid by default, the full grid with the slow tests."""


@pytest.fixture(scope="module")
def client() -> Iterator[p.PoolClient]:
    """A client of an embedded server."""
    with poolrpc_server.embedded() as made:
        yield made


def test_every_layer_has_a_row() -> None:
    """The grid has a row for every layer, and each row covers every dtype of its layer."""
    assert list(GRID) == list(p.LAYERS)
    for name in GRID:
        assert {dtype for _, _, dtype in cases(name)} == set(GRID[name][0].dtypes), name


@pytest.mark.parametrize("name", GRID)
def test_the_sample_has_all_that_the_grid_has(name: str) -> None:
    """The sample has every size and leading axes of the grid, and every value of a parameter with every dtype."""

    def parts(of: Iterable[Case]) -> set[object]:
        return {
            part
            for case in of
            for feature in features(case)
            for part in (feature, (feature, case[2]) if feature[0] not in {"size", "lead"} else feature)
        }

    assert parts(cases(name)) <= parts(sampled(name))


@extent
@pytest.mark.parametrize(
    "name", [name for name in GRID if not p.LAYERS[name].operand or p.LAYERS[name].operand_optional]
)
def test_parity(client: p.PoolClient, name: str, grid: Callable[[str], Iterable[Case]]) -> None:
    """The server's result is torch.nn's, bit for bit, in both layouts."""
    for turn, (layer, shape, dtype) in enumerate(grid(name)):
        x = values(shape, dtype, turn)
        expected, indices = reference(layer, x)
        result = client.pool(x, layer)
        what = (layer, shape, dtype, turn)
        assert_result(result.output, expected, layer, what)
        assert result.shape == tuple(expected.shape), what
        assert (result.indices is None) == (not layer.returns_indices), what
        if layer.returns_indices:
            assert_same(result.indices, indices, what)
        if grid is sampled or turn % 3 == 0:
            axis = 1 if len(shape) == layer.spatial_dims + 2 else 0
            last = client.pool(x.movedim(axis, -1), layer, layout="NHWC")
            assert_same(last.output, as_torch(result.output).movedim(axis, -1), (*what, "NHWC"))
            if layer.returns_indices:
                assert_same(last.indices, indices.movedim(axis, -1), (*what, "NHWC"))


@extent
@pytest.mark.parametrize("name", [name for name in GRID if "Unpool" in name])
def test_unpool_parity(client: p.PoolClient, name: str, grid: Callable[[str], Iterable[Case]]) -> None:
    """Unpooling the result of torch's MaxPool is torch.nn's MaxUnpool, in both layouts, for any output size."""
    for turn, (layer, shape, dtype) in enumerate(grid(name)):
        dims = layer.spatial_dims
        pooling = p.LAYERS[f"MaxPool{dims}d"](layer.kernel_size, layer.stride, layer.padding, return_indices=True)
        full = values(layer.output_shape(shape), dtype, turn)
        y, indices = reference(pooling, full)
        for size in (None, tuple(full.shape[-dims:]), tuple(s + 1 for s in full.shape[-dims:])):
            sized = type(layer)(layer.kernel_size, layer.stride, layer.padding, size)
            try:
                sized.output_shape(tuple(y.shape))
            except p.InvalidArgumentError:
                continue
            what = (sized, y.shape, dtype, turn)
            if int(indices.max()) >= np.prod(sized.output_shape(tuple(y.shape))[-dims:]):
                with pytest.raises(p.InvalidArgumentError, match="indices"):
                    client.pool(y, sized, indices=indices)
                continue
            expected, _ = reference(sized, y, indices)
            assert_same(client.pool(y, sized, indices=indices).output, expected, what)
            axis = y.ndim - dims - 1
            last = client.pool(y.movedim(axis, -1), sized, indices=indices.movedim(axis, -1), layout="NHWC")
            assert_same(last.output, expected.movedim(axis, -1), (*what, "NHWC"))


def test_a_chain_is_its_layers_in_order(client: p.PoolClient) -> None:
    """The result of a chain is that of torch.nn.Sequential, with the shape after each step."""
    x = values((2, 4, 37, 29), "float32", 0)
    chain = [
        p.MaxPool2d(3, stride=2, padding=1),
        p.AvgPool2d(2, ceil_mode=True),
        p.LPPool2d(2, 2),
        p.GlobalPool2d("mean"),
    ]
    steps = [reference(chain[0], x)[0]]
    for layer in chain[1:]:
        steps.append(reference(layer, steps[-1])[0])
    result = client.pool(x, chain)
    assert_same(result.output, steps[-1], chain)
    assert result.shapes == tuple(tuple(step.shape) for step in steps)


def test_branches_each_start_from_the_input(client: p.PoolClient) -> None:
    """The result of each branch is that of its layers alone, with indices if it returns them."""
    x = values((2, 4, 20, 21), "float64", 1)
    branches = [
        p.AdaptiveAvgPool2d(1),
        [p.MaxPool2d(2), p.MaxPool2d(2, return_indices=True)],
        p.AdaptiveMaxPool2d((4, 3)),
    ]
    results = client.pool_each(x, branches)
    assert_same(results[0].output, reference(branches[0], x)[0], 0)
    y, indices = reference(branches[1][1], reference(branches[1][0], x)[0])
    assert_same(results[1].output, y, 1)
    assert_same(results[1].indices, indices, 1)
    assert_same(results[2].output, reference(branches[2], x)[0], 2)


def test_an_empty_batch_gives_an_empty_output(client: p.PoolClient) -> None:
    """An input with N = 0 gives an output of the right shape without elements, for every layer."""
    for name, layers in GRID.items():
        layer = layers[0]
        dims = layer.spatial_dims
        shape = (0, 3, *(9,) * dims)
        x = torch.empty(shape)
        spec, contents = operand_for([(layer,)], shape)
        operand = {} if spec is None else {layer.operand: np.frombuffer(contents, spec.dtype).reshape(spec.shape)}
        result = client.pool(x, layer, **operand)
        expected = layer.output_shape(shape, None if spec is None else spec.shape)
        assert result.output.shape == expected == (0, 3, *result.shape[2:]), name
        assert result.output.dtype == np.float32, name


def test_fractional_planes_do_not_depend_on_their_batch(client: p.PoolClient) -> None:
    """The same planes give the same output for any N and C, and as the start of a longer tensor."""
    x = values((2, 6, 12, 11), "float32", 0)
    layer = p.FractionalMaxPool2d(2, output_ratio=0.6, seed=7)
    whole = client.pool(x, layer).output.reshape(12, 7, 6)
    assert_same(
        client.pool(x.reshape(4, 3, 12, 11), layer).output.reshape(12, 7, 6), torch.from_numpy(whole), "regrouped"
    )
    assert_same(client.pool(x.reshape(12, 12, 11)[:5], layer).output, torch.from_numpy(whole[:5]), "a part")
    other = client.pool(x, p.FractionalMaxPool2d(2, output_ratio=0.6, seed=8)).output
    assert not np.array_equal(other.reshape(12, 7, 6), whole)
