"""Every layer through a real server against torch.nn, bit for bit: values, indices, dtype, shape, NaN and infinities.

A new layer adds a row to GRID.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import poolrpc as p
import poolrpc_server
from tests.parity.reference import assert_same, reference, values

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = {
    1: [(1,), (2,), (7,), (32,), (101,)],
    2: [(1, 1), (2, 5), (8, 8), (13, 7), (33, 20)],
    3: [(1, 2, 3), (4, 4, 4), (5, 9, 6)],
}
LEADS = [(2, 3), (1, 1), (3,)]


def windows(cls: type[p.Layer], **more: list[Any]) -> list[p.Layer]:
    """Give layers over a grid of kernels, strides and what else the class has, but those that it refuses."""
    axes = {"kernel_size": [1, 2, 3, 5], "stride": [None, 1, 2, 3], **more}
    made = []
    for each in product(*axes.values()):
        try:
            made.append(cls(**dict(zip(axes, each, strict=True))))
        except p.InvalidArgumentError:
            continue
    return made


BOTH = [False, True]
MAXES = {"padding": [0, 1], "dilation": [1, 2], "ceil_mode": BOTH, "return_indices": BOTH}
MEANS = {"padding": [0, 1], "ceil_mode": BOTH, "count_include_pad": BOTH}
POWERS = {"norm_type": [1.0, 2.0, 3.5, float("inf")], "ceil_mode": BOTH}
SEEDS = [0, 1, 2**64 - 1]
PERMUTED = {2: [{"kernel_size": (3, 2), "stride": (1, 2)}], 3: [{"kernel_size": (2, 3, 1), "stride": (1, 2, 3)}]}

GRID: dict[str, list[p.Layer]] = {
    "MaxPool1d": windows(p.MaxPool1d, **MAXES),
    "MaxPool2d": [
        *windows(p.MaxPool2d, **MAXES),
        p.MaxPool2d((3, 2), stride=(1, 2), padding=(1, 0), dilation=(1, 2)),
        p.MaxPool2d((1, 5), stride=(2, 1), padding=(0, 2), return_indices=True, ceil_mode=True),
    ],
    "MaxPool3d": [*windows(p.MaxPool3d, **MAXES), p.MaxPool3d((2, 3, 1), stride=(1, 2, 3), padding=(1, 1, 0))],
    "AvgPool1d": windows(p.AvgPool1d, **MEANS),
    "AvgPool2d": [
        *windows(p.AvgPool2d, **MEANS, divisor_override=[None, 3]),
        p.AvgPool2d((3, 2), stride=(1, 2), padding=(1, 0), count_include_pad=False),
    ],
    "AvgPool3d": [
        *windows(p.AvgPool3d, **MEANS, divisor_override=[None, 3]),
        p.AvgPool3d((2, 3, 1), padding=(1, 0, 0)),
    ],
    "LPPool1d": windows(p.LPPool1d, **POWERS),
    "LPPool2d": [*windows(p.LPPool2d, **POWERS), p.LPPool2d(2, (3, 2), stride=(1, 2))],
    "LPPool3d": [*windows(p.LPPool3d, **POWERS), p.LPPool3d(2, (2, 3, 1), stride=(1, 2, 3))],
    "FractionalMaxPool2d": [
        p.FractionalMaxPool2d(k, return_indices=r, seed=s, **out)
        for k, r, s, out in product(
            [1, 2, (3, 2)], BOTH, SEEDS, [{"output_size": 1}, {"output_size": (3, 2)}, {"output_ratio": (0.5, 0.71)}]
        )
    ],
    "FractionalMaxPool3d": [
        p.FractionalMaxPool3d(k, return_indices=r, seed=s, **out)
        for k, r, s, out in product([1, 2], BOTH, SEEDS, [{"output_size": (1, 2, 3)}, {"output_ratio": 0.6}])
    ],
    "AdaptiveMaxPool1d": [p.AdaptiveMaxPool1d(o, r) for o, r in product([1, 2, 3, 7, 40, (None,)], BOTH)],
    "AdaptiveMaxPool2d": [p.AdaptiveMaxPool2d(o, r) for o, r in product([1, 2, (3, 5), (None, 4), (7, 1), 40], BOTH)],
    "AdaptiveMaxPool3d": [p.AdaptiveMaxPool3d(o, r) for o, r in product([1, 2, (3, 5, 2), (None, 4, None)], BOTH)],
    "AdaptiveAvgPool1d": [p.AdaptiveAvgPool1d(o) for o in (1, 2, 3, 7, 40, (None,))],
    "AdaptiveAvgPool2d": [p.AdaptiveAvgPool2d(o) for o in (1, 2, (3, 5), (None, 4), (7, 1), 40)],
    "AdaptiveAvgPool3d": [p.AdaptiveAvgPool3d(o) for o in (1, 2, (3, 5, 2), (None, 4, None))],
    "MaxUnpool1d": [p.MaxUnpool1d(k, s, d) for k, s, d in product([2, 3], [None, 2, 3], [0, 1])],
    "MaxUnpool2d": [
        *(p.MaxUnpool2d(k, s, d) for k, s, d in product([2, 3], [None, 2, 3], [0, 1])),
        p.MaxUnpool2d((3, 2), stride=(3, 2), padding=(1, 0)),
    ],
    "MaxUnpool3d": [p.MaxUnpool3d(k, s, d) for k, s, d in product([2, 3], [None, 2], [0, 1])],
    "GlobalMaxPool": [p.GlobalMaxPool()],
    "GlobalAvgPool": [p.GlobalAvgPool()],
}


@pytest.fixture(scope="module")
def client() -> Iterator[p.PoolClient]:
    """A client of an embedded server."""
    with poolrpc_server.embedded() as made:
        yield made


def cases(name: str) -> Iterator[tuple[p.Layer, tuple[int, ...], str]]:
    """Give every layer of a row with every shape that it takes, and dtypes in turn, so that all are met."""
    turn = 0
    layers = GRID[name]
    for layer in layers:
        for dims in [layer.spatial_dims] if layer.spatial_dims else SIZES:
            for size in SIZES[dims]:
                # Few layers: every lead and dtype each time. Many: one lead and two dtypes, in turn.
                turn += 1
                leads = LEADS if len(layers) < 15 else [LEADS[turn % 3]]
                for lead in leads if layer.spatial_dims else leads[:2]:
                    try:
                        layer.output_shape((*lead, *size))
                    except p.InvalidArgumentError:
                        continue
                    dtypes = (
                        layer.dtypes
                        if len(layers) < 15
                        else [layer.dtypes[(turn + i) % len(layer.dtypes)] for i in (0, 1)]
                    )
                    for dtype in dtypes:
                        yield layer, (*lead, *size), dtype


def test_every_layer_has_a_row() -> None:
    """The grid has a row for every layer, and each row covers every dtype of its layer."""
    assert list(GRID) == list(p.LAYERS)
    for name in GRID:
        assert {dtype for _, _, dtype in cases(name)} == set(GRID[name][0].dtypes), name


@pytest.mark.parametrize("name", [name for name in GRID if "Unpool" not in name])
def test_parity(client: p.PoolClient, name: str) -> None:
    """The server's answer is torch.nn's, bit for bit, in both layouts."""
    for turn, (layer, shape, dtype) in enumerate(cases(name)):
        x = values(shape, dtype, turn)
        expected, places = reference(layer, x)
        result = client.pool(x, layer)
        what = (layer, shape, dtype, turn)
        assert_same(result.output, expected, what)
        assert result.shape == tuple(expected.shape), what
        assert (result.indices is None) == (not layer.returns_indices), what
        if layer.returns_indices:
            assert_same(result.indices, places, what)
        if turn % 3 == 0:
            axis = 1 if len(shape) == (layer.spatial_dims or len(shape) - 2) + 2 else 0
            last = client.pool(x.movedim(axis, -1), layer, layout="NHWC")
            assert_same(last.output, expected.movedim(axis, -1), (*what, "NHWC"))
            if layer.returns_indices:
                assert_same(last.indices, places.movedim(axis, -1), (*what, "NHWC"))


@pytest.mark.parametrize("name", [name for name in GRID if "Unpool" in name])
def test_unpool_parity(client: p.PoolClient, name: str) -> None:
    """Unpooling what torch's MaxPool gave is torch.nn's MaxUnpool, in both layouts, of any output size."""
    for turn, (layer, shape, dtype) in enumerate(cases(name)):
        dims = layer.spatial_dims
        pooled = torch.nn.__dict__[f"MaxPool{dims}d"](
            layer.kernel_size, layer.stride, layer.padding, return_indices=True
        )
        full = values(layer.output_shape(shape), dtype, turn)
        y, indices = pooled(full)
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


def test_a_chain_is_its_layers_one_after_the_other(client: p.PoolClient) -> None:
    """A chain gives what torch.nn.Sequential gives, and the shape after each step."""
    x = values((2, 4, 37, 29), "float32", 0)
    chain = [p.MaxPool2d(3, stride=2, padding=1), p.AvgPool2d(2, ceil_mode=True), p.LPPool2d(2, 2), p.GlobalAvgPool()]
    steps = [reference(chain[0], x)[0]]
    for layer in chain[1:]:
        steps.append(reference(layer, steps[-1])[0])
    result = client.pool(x, chain)
    assert_same(result.output, steps[-1], chain)
    assert result.shapes == tuple(tuple(step.shape) for step in steps)


def test_branches_each_start_from_the_input(client: p.PoolClient) -> None:
    """Branches give what each gives alone, with indices where a branch asks for them."""
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
    """N = 0 gives an output of no elements in the right shape, with every layer, as torch does where it takes one."""
    for name, layers in GRID.items():
        layer = layers[0]
        dims = layer.spatial_dims or 2
        shape = (0, 3, *(9,) * dims)
        x = torch.empty(shape)
        indices = torch.empty(shape, dtype=torch.int64) if layer.takes_indices else None
        result = client.pool(x, layer, indices=indices)
        assert result.output.shape == layer.output_shape(shape) == (0, 3, *result.shape[2:]), name
        assert result.output.dtype == np.float32, name


def test_fractional_planes_do_not_depend_on_the_batch_they_are_in(client: p.PoolClient) -> None:
    """The same planes give the same output however N and C divide them, and as the start of a longer tensor."""
    x = values((2, 6, 12, 11), "float32", 0)
    layer = p.FractionalMaxPool2d(2, output_ratio=0.6, seed=7)
    whole = client.pool(x, layer).output.reshape(12, 7, 6)
    assert_same(
        client.pool(x.reshape(4, 3, 12, 11), layer).output.reshape(12, 7, 6), torch.from_numpy(whole), "regrouped"
    )
    assert_same(client.pool(x.reshape(12, 12, 11)[:5], layer).output, torch.from_numpy(whole[:5]), "a part")
    other = client.pool(x, p.FractionalMaxPool2d(2, output_ratio=0.6, seed=8)).output
    assert not np.array_equal(other.reshape(12, 7, 6), whole)
