"""Element-wise steps in chains, compared bit for bit with torch doing the same steps on the tensor as it was sent."""

from __future__ import annotations

import os
from contextlib import closing
from itertools import product
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import poolrpc as p
import poolrpc_server
from poolrpc.layers import FLOATS, INTEGERS
from poolrpc_server.compute.kernels import blocks
from tests.parity.reference import assert_same, reference, values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from poolrpc.chains import Chain

CHAINS = int(os.environ.get("POOLRPC_CHAINS", "400"))
"""The number of random chains."""

SIZES = {1: [(5,), (64,), (333,)], 2: [(4, 5), (17, 14), (32, 40)], 3: [(3, 4, 5), (6, 7, 8)]}
TRANSPORTS = ("unary", "stream", "arena")
EDGES = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.0, -1.9, 0.999, 1.0, 254.9, 255.0, 255.9]
EDGES += [256.0, 300.0, 65535.0, 65536.0, -129.0, 2.0**31 - 1, 2.0**31, -(2.0**31), 2.0**53, 2.0**63, -(2.0**63), 1e30]


@pytest.fixture(scope="module")
def client() -> Iterator[p.PoolClient]:
    """A client of an embedded server."""
    with poolrpc_server.embedded() as made:
        yield made


def expected(chain: Chain, x: torch.Tensor) -> list[torch.Tensor]:
    """Return torch's result of the steps of a chain one after the other."""
    indices = None
    for layer in chain:
        x, indices = reference(layer, x)
    return [x] if indices is None else [x, indices]


def random_step(random: Random, channels: int) -> p.Layer:
    """Draw a step."""
    numbers = random.choice(
        [(0.5, 2.0), ((0.485, 0.456, 0.406)[:channels] if channels == 3 else 0.1, (0.229, 0.224, 0.225)[:channels])]
        if channels == 3
        else [(0.5, 2.0), (tuple(i / 7 for i in range(channels)), tuple(0.3 + i for i in range(channels)))]
    )
    dtype = random.choice([*FLOATS, *INTEGERS, "float32", "uint8", "float32"])
    return random.choice(
        [p.Round(), p.Normalize(*numbers), p.ToDtype(dtype), p.ToDtype(dtype), p.ToDtype(dtype, scale=True)]
    )


def random_layer(random: Random, dims: int) -> p.Layer:
    """Draw a pooling layer."""
    ceil = random.random() < 0.3
    kernel, stride = random.choice([(2, None), (3, 2), (3, 1), (2, 1)])
    make = {
        "MaxPool": lambda cls: cls(kernel, stride, random.choice([0, 1]), ceil_mode=ceil),
        "AvgPool": lambda cls: cls(kernel, stride, random.choice([0, 1]), ceil),
        "LPPool": lambda cls: cls(random.choice([1, 2, 3]), kernel, stride),
        "AdaptiveMaxPool": lambda cls: cls(random.choice([1, 2])),
        "AdaptiveAvgPool": lambda cls: cls(random.choice([1, 2])),
        "GlobalPool": lambda cls: cls(random.choice(["max", "mean"])),
    }
    family = random.choice([*make, "AvgPool", "AvgPool", "MaxPool"])
    return make[family](p.LAYERS[f"{family}{dims}d"])


def random_chain(random: Random, dims: int, dtype: str, shape: tuple[int, ...]) -> Chain:
    """Draw a chain of layers and steps that fit the dtypes and shapes that they get."""
    channels, chain = shape[-dims - 1], []
    steps, pooled = random.randint(1, 4), False
    while len(chain) < steps or not pooled:
        layer = random_step(random, channels) if random.random() < 0.6 else random_layer(random, dims)
        if dtype not in layer.dtypes:
            continue
        try:
            shape = layer.output_shape(shape)
        except p.InvalidArgumentError:
            continue
        chain.append(layer)
        dtype, pooled = layer.output_dtype(dtype), pooled or layer.spatial_dims > 0
    return tuple(chain)


@pytest.mark.timeout(1800)
def test_random_chains_have_torchs_bits(client: p.PoolClient) -> None:
    """Chains of steps and layers, for every dtype, layout and transport, are what torch computes step by step."""
    seen = set()
    for number in range(CHAINS):
        random = Random(number)  # noqa: S311 - chains that are always the same
        dims = random.choice([1, 2, 2, 3])
        shape = (random.choice([1, 2, 5]), random.choice([1, 3, 3, 4]), *random.choice(SIZES[dims]))
        dtype = random.choice([*FLOATS, *INTEGERS, "bool", "uint8", "uint16"])
        layout, transport = random.choice(["NCHW", "NHWC"]), random.choice(TRANSPORTS)
        chain = random_chain(random, dims, dtype, shape)
        x = values(shape, dtype, number)
        sent = x.movedim(1, -1).contiguous() if layout == "NHWC" else x
        result = client.pool(sent, chain, layout=layout, transport=transport)
        theirs = expected(chain, x)[0]
        assert_same(result.output, theirs.movedim(1, -1) if layout == "NHWC" else theirs, (number, chain, dtype))
        assert result.transport == transport
        seen |= {dtype, layout, transport, *(layer.name for layer in chain)}
    assert {*FLOATS, *INTEGERS, "bool", "NHWC", *TRANSPORTS, *p.STEPS} <= seen


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("count", [1, 5])
def test_steps_in_small_blocks(monkeypatch: pytest.MonkeyPatch, count: int, layout: str) -> None:
    """Blocks of one plane or five, that begin at any channel, have the numbers of their own channels."""
    plane = 23 * 29 * 4
    monkeypatch.setattr(blocks, "TARGET_BYTES", count * plane * (3 if layout == "NHWC" else 1))
    monkeypatch.setattr("poolrpc_server.compute.branch.PARALLEL_WORK", 1)
    x = values((7, 3, 23, 29), "uint8", 0)
    chain = p.parse_chain(
        "[ToDtype('float32', scale=True), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), MaxPool2d(3, 2, 1),"
        " Normalize(0.1, (1, 2, 3)), AvgPool2d(2), Round(), ToDtype('int16'), MaxPool2d(2, return_indices=True)]"
    )
    with poolrpc_server.embedded() as client:
        sent = x.movedim(1, -1).contiguous() if layout == "NHWC" else x
        result = client.pool(sent, chain, layout=layout)
        for ours, theirs in zip((result.output, result.indices), expected(chain, x), strict=True):
            assert_same(ours, theirs.movedim(1, -1) if layout == "NHWC" else theirs, (count, layout))


@pytest.mark.parametrize("source", [*FLOATS, *INTEGERS, "bool"])
def test_conversions_at_the_edges(client: p.PoolClient, source: str) -> None:
    """NaN is 0, values out of range are cut to it, integers wrap around, and large ones are rounded as by torch."""
    kind = getattr(torch, source)
    if kind.is_floating_point:
        x = torch.tensor(EDGES, dtype=torch.float64).to(kind)
    elif source == "bool":
        x = torch.tensor([False, True])
    else:
        info = torch.iinfo(kind)
        edges = {0, 1, 127, 128, 255, 256, 2**24 + 1, 2**53 + 1, 2**53 - 1, info.max, info.max - 1}
        edges |= {-each for each in edges} | {info.min, info.min + 1}
        kept = sorted(each for each in edges if info.min <= each <= info.max)
        x = torch.from_numpy(np.array(kept, source))
    x = x.reshape(1, 1, -1)
    for target, scale in product([*FLOATS, *INTEGERS], [False, True]):
        chain = p.ToDtype(target, scale), p.MaxPool1d(1)
        if source in chain[0].dtypes:
            same = chain if target != "bool" else chain[:1]
            assert_same(client.pool(x, same).output, reference(chain[0], x)[0], (source, target, scale))


def test_what_torch_leaves_to_the_cpu_is_defined(client: p.PoolClient) -> None:
    """Values out of the range of an integer dtype become its nearest value, and NaN becomes 0."""
    x = np.array([[[np.nan, np.inf, -np.inf, 300.7, -1.5, 254.9]]], np.float32)

    def converted(dtype: str) -> list[int]:
        return client.pool(x, [p.ToDtype(dtype), p.MaxPool1d(1)]).output[0, 0].tolist()

    assert converted("uint8") == [0, 255, 0, 255, 0, 254]
    assert converted("int8") == [0, 127, -128, 127, -1, 127]
    assert converted("uint16") == [0, 65535, 0, 300, 0, 254]
    assert converted("int64") == [0, 2**63 - 1, -(2**63), 300, -1, 254]
    wrapped = client.pool(np.array([[[-1, 256]]], np.int16), [p.ToDtype("uint8"), p.MaxPool1d(1)])
    assert wrapped.output.tolist() == [[[255, 0]]]


def test_torchs_own_conversions_in_range(client: p.PoolClient) -> None:
    """Where torch's own conversion of floats is defined, it is the server's."""
    x = (torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(0)) * 255.999).double()
    for source, target in product(FLOATS, ("uint8", "uint16", "int16", "int32", "int64")):
        given = x.clamp(max=254).to(getattr(torch, source))
        result = client.pool(given, [p.ToDtype(target), p.MaxPool1d(1)])
        assert_same(result.output, given.to(getattr(torch, target)), (source, target))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_batch_of_images_of_every_transport(client: p.PoolClient, transport: str) -> None:
    """A preprocessing chain and a thumbnail from uint8 have torch's bits, in several branches of one call."""
    x = values((8, 3, 96, 128), "uint8", 0)
    branches = [
        p.parse_chain("[ToDtype('float32', scale=True), Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), AvgPool2d(2)]"),
        p.parse_chain("[ToDtype('float32'), AvgPool2d(4), Round(), ToDtype('uint8')]"),
        p.parse_chain("[MaxPool2d(2), ToDtype('uint16', scale=True)]"),
        (p.ToDtype("float64"),),
    ]
    for chain, result in zip(branches, client.pool_each(x, branches, transport=transport), strict=True):
        assert_same(result.output, expected(chain, x)[0], chain)


def test_a_map_of_images_with_any_channels(client: p.PoolClient) -> None:
    """Small images are sent together only if their channels are the same, and each has its own result or error."""
    chain = [p.ToDtype("float32"), p.Normalize((1, 2, 3), (4, 5, 6)), p.AvgPool2d(2)]
    images = [values((n, c, 8, 8), "uint8", n + c) for n, c in [(1, 3), (2, 3), (1, 3), (1, 4), (1, 2), (5, 3)]]
    with closing(client.map(images, chain, return_exceptions=True)) as results:
        for x, result in zip(images, results, strict=True):
            if x.shape[1] == 3:
                assert_same(result.output, expected(tuple(chain), x)[0], x.shape)
            else:
                assert isinstance(result, p.InvalidArgumentError)
                assert result.violations[0].field == "branches[0].layers[1].normalize.mean"


def test_integer_means_are_truncated(client: p.PoolClient) -> None:
    """The mean of int64 is truncated towards zero, with any divisor, also that of the lowest integer by -1."""
    x = torch.tensor([[[[-3, -4, 1], [0, 0, 2**62]]]])
    for layer in (p.AvgPool2d(2), p.AvgPool2d(2, 1, divisor_override=-3), p.AvgPool2d(2, (), divisor_override=7)):
        assert_same(client.pool(x, layer).output, reference(layer, x)[0], layer)
    lowest = torch.full((1, 1, 1, 1), -(2**63))
    assert client.pool(lowest, p.AvgPool2d(1, divisor_override=-1)).output.tolist() == [[[[-(2**63)]]]]


@pytest.mark.parametrize("divisor", [-1, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64"])
def test_any_divisor(client: p.PoolClient, dtype: str, divisor: int) -> None:
    """A divisor of any size and sign gives torch's bits, for planes that a kernel would compute too."""
    x = values((4, 3, 64, 64), dtype, 0)
    layer = p.AvgPool2d(2, divisor_override=divisor)
    assert_same(client.pool(x, layer).output, reference(layer, x)[0], (dtype, divisor))
