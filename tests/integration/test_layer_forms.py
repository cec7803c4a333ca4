"""Every call takes layers, expressions, torch.nn's modules, and lists of them, by either client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from poolrpc import AvgPool2d, InvalidArgumentError, MaxPool2d

if TYPE_CHECKING:
    from poolrpc import PoolClient
    from tests.integration.conftest import Connect

X = np.random.default_rng(3).standard_normal((2, 3, 9, 11), np.float32)

ONE = MaxPool2d(2), "MaxPool2d(2)", nn.MaxPool2d(2), [MaxPool2d(2)], ["MaxPool2d(2)"], [nn.MaxPool2d(2)]
TWO = (
    [MaxPool2d(2), AvgPool2d(2)],
    "[MaxPool2d(2), AvgPool2d(2)]",
    ["MaxPool2d(2)", nn.AvgPool2d(2)],
    nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2)),
    [nn.Sequential(nn.MaxPool2d(2)), "AvgPool2d(2)"],
)
SHAPES = [((2, 3, 4, 5),), ((2, 3, 4, 5), (2, 3, 2, 2))]


@pytest.fixture
def client(connect: Connect, address: str) -> PoolClient:
    """Return either client of the server."""
    return connect(address)


@pytest.mark.parametrize(
    ("layers", "shapes"), [(each, SHAPES[0]) for each in ONE] + [(each, SHAPES[1]) for each in TWO], ids=repr
)
def test_a_chain_in_any_form(client: PoolClient, layers: Any, shapes: Any) -> None:
    """Pool, map and output_shape return the same for a chain in any form."""
    expected = client.pool(X, [MaxPool2d(2), AvgPool2d(2)][: len(shapes)])
    assert expected.shapes == shapes
    for result in (client.pool(X, layers), client.pool_each(X, [layers])[0], *client.map([X, X], layers)):
        assert result.shapes == shapes
        np.testing.assert_array_equal(result.output, expected.output)
    assert client.output_shape(X.shape, layers) == shapes[-1]


@pytest.mark.parametrize(
    "branches",
    [
        "[[MaxPool2d(2)], [MaxPool2d(2), AvgPool2d(2)]]",
        ["MaxPool2d(2)", nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2))],
        [[nn.MaxPool2d(2)], ["MaxPool2d(2)", AvgPool2d(2)]],
    ],
    ids=repr,
)
def test_branches_in_any_form(client: PoolClient, branches: Any) -> None:
    """pool_each takes branches as one expression, or as a list of chains in any form."""
    assert [each.shapes for each in client.pool_each(X, branches)] == SHAPES


def test_an_average_of_torch_is_the_one_that_torch_computes(client: PoolClient) -> None:
    """Parameters that the module's repr leaves out reach the server."""
    module = nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False, divisor_override=5)
    expected = module(torch.from_numpy(X)).numpy()
    np.testing.assert_array_equal(client.pool(X, module).output, expected)
    assert not np.array_equal(client.pool(X, "AvgPool2d(3, stride=2, padding=1, ceil_mode=True)").output, expected)


@pytest.mark.parametrize(
    ("layers", "field"),
    [
        (nn.Sequential(nn.MaxPool2d(2), nn.Sigmoid()), r"layers\[1\]: .*torch.nn.Sigmoid"),
        ("MaxPool2d(0)", "column 11"),
        ("nonsense", "column 1"),
        ([[MaxPool2d(2)]], "layers: .*pool_each"),
    ],
)
def test_what_is_not_a_layer_is_rejected_by_every_call(client: PoolClient, layers: Any, field: str) -> None:
    """The error is the same by every call."""
    for call in (
        lambda: client.pool(X, layers),
        lambda: client.pool_each(X, [layers]),
        lambda: [*client.map([X], layers)],
        lambda: client.output_shape(X.shape, layers),
    ):
        with pytest.raises(InvalidArgumentError, match=f"^{field}"):
            call()


def test_an_image_is_pooled_in_its_layout(client: PoolClient) -> None:
    """Every call takes an image of Pillow as NHWC, and rejects it as NCHW."""
    image = Image.fromarray(np.arange(9 * 11 * 3, dtype=np.uint8).reshape(9, 11, 3))
    expected = client.pool(np.asarray(image), MaxPool2d(2), layout="NHWC").output
    assert expected.shape == (4, 5, 3)
    results = [
        client.pool(image, MaxPool2d(2), layout="NHWC"),
        *client.pool_each(image, [MaxPool2d(2)], layout="NHWC"),
        *client.map([image, image], MaxPool2d(2), layout="NHWC"),
    ]
    assert all(np.array_equal(each.output, expected) for each in results)
    for call in (
        lambda: client.pool(image, MaxPool2d(2)),
        lambda: client.pool([image], MaxPool2d(2)),
        lambda: [*client.map([image], MaxPool2d(2))],
    ):
        with pytest.raises(InvalidArgumentError, match=r"^layout: expected NHWC for an image"):
            call()
