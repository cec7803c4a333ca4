"""Both clients return the same results through every transport, and choose the transport by the tensor's size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

import poolrpc
from poolrpc import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    FractionalMaxPool2d,
    FractionalMaxPool3d,
    GlobalPool2d,
    LPPool2d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool2d,
    Normalize,
    PoolClient,
    Round,
    ToDtype,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.conftest import Connect

RNG = np.random.default_rng(7)
X = RNG.standard_normal((3, 5, 11, 14), np.float32)
X[0, 1, 3:5] = np.nan
X[1, 2] = -np.inf
FINITE = np.nan_to_num(X, neginf=-9)
LARGE = RNG.standard_normal((64, 4, 128, 128), np.float32)
"""16 MiB, in planes of 64 KiB."""

TRANSPORTS: dict[str, dict[str, Any]] = {
    "unary": {"transport": "unary"},
    "stream": {"transport": "stream"},
    "arena": {"transport": "arena"},
    "arena without copy": {"transport": "arena", "copy": False},
    "local": {"transport": "local"},
    "local without copy": {"transport": "local", "copy": False},
}


@dataclass(frozen=True)
class Case:
    """A tensor, and what is computed of it."""

    x: np.ndarray
    branches: list[Any]
    options: dict[str, Any] = field(default_factory=dict)


def in_layout(x: np.ndarray, layout: str) -> np.ndarray:
    """Return a tensor of NCHW in a layout, as a view."""
    return x if layout == "NCHW" else np.moveaxis(x, -3, -1)


CHAINS: dict[str, list[poolrpc.Layer]] = {
    "max": [MaxPool2d(3, 2, 1, return_indices=True)],
    "max dilated": [MaxPool2d(2, 1, dilation=3, ceil_mode=True)],
    "max with padding": [MaxPool2d((2, 5), stride=(3, 1), padding=(1, 2))],
    "average": [AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)],
    "average with divisor": [AvgPool2d(2, divisor_override=3)],
    "lp": [LPPool2d(2.0, 3, ceil_mode=True)],
    "adaptive max": [AdaptiveMaxPool2d((4, 3), return_indices=True)],
    "adaptive average": [AdaptiveAvgPool2d((None, 5))],
    "fractional": [FractionalMaxPool2d(2, output_size=5, return_indices=True, seed=11)],
    "fractional ratio": [FractionalMaxPool2d(3, output_ratio=0.6, seed=2**63)],
    "steps": [ToDtype("float16"), Normalize((1, 2, 3, 4, 5), 3), AvgPool2d(2), Round(), ToDtype("int16")],
    "chain": [MaxPool2d(2), AvgPool2d(2, stride=1)],
    "chain with fractional": [AvgPool2d(2, 1), FractionalMaxPool2d(2, output_size=4, seed=3), MaxPool2d(2)],
}
CASES = {
    f"{name}, {layout}, {rank}": Case(
        in_layout(X, layout) if rank == "batched" else np.ascontiguousarray(in_layout(X[1], layout)),
        [chain],
        {"layout": layout},
    )
    for name, chain in CHAINS.items()
    for layout in ("NCHW", "NHWC")
    for rank in ("batched", "unbatched")
}
for each in ("NCHW", "NHWC"):
    everything = [*CHAINS.values(), GlobalPool2d("max"), [MaxPool2d(2), GlobalPool2d("mean")]]
    CASES[f"branches, {each}"] = Case(in_layout(X, each), everything, {"layout": each})
for each in ("float16", "float32", "float64", "uint8", "uint16", "int8", "int16", "int32", "int64", "bfloat16"):
    kind = ml_dtypes.bfloat16 if each == "bfloat16" else each
    layers = [MaxPool2d(2, return_indices=True), MaxPool2d(5, 3)]
    layers += [AvgPool2d(2), LPPool2d(2, 2), AdaptiveMaxPool2d(1)] if "float" in each else []
    CASES[each] = Case((FINITE * 5).astype(kind), layers)
CASES |= {
    "1d": Case(X.reshape(3, 5, -1), [MaxPool1d(3, return_indices=True), AvgPool1d(2)]),
    "3d": Case(X.reshape(1, 3, 5, 11, 14), [MaxPool3d(2, return_indices=True), AvgPool3d(3, 1)]),
    "3d fractional": Case(
        X.reshape(3, 1, 5, 11, 14), [FractionalMaxPool3d(2, output_size=3, return_indices=True, seed=5)]
    ),
    "empty batch": Case(X[:0], [MaxPool2d(2, return_indices=True), AvgPool2d(2)]),
    "one plane": Case(X[:1, :1], [MaxPool2d(2)]),
    "a few bytes": Case(X[:1, :1, :3, :3], [MaxPool2d(2)]),
    "strides": Case(X[:, :, ::2, ::-1], [MaxPool2d(2)]),
    "big-endian": Case(X.astype(">f4"), [MaxPool2d(2)]),
    "planes larger than a message": Case(LARGE[:1, :3], [MaxPool2d(2, return_indices=True)]),
    "outputs smaller than a message": Case(LARGE[:1, :2], [MaxPool2d(127, 1)]),
}


def bits(array: np.ndarray) -> bytes:
    """Return an array's bytes with one bit pattern for NaN: which one an operation returns depends on its vectors."""
    return np.where(array == array, array, np.array(np.nan if array.dtype.kind in "fV" else 0, array.dtype)).tobytes()  # noqa: PLR0124 - isnan, for every dtype


def assert_same(results: list[poolrpc.PoolResult], expected: list[poolrpc.PoolResult]) -> None:
    """Check that results have the same shapes, dtypes and bits."""
    assert len(results) == len(expected)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.shapes == theirs.shapes
        assert (ours.output.dtype, ours.output.shape) == (theirs.output.dtype, theirs.output.shape)
        assert bits(ours.output) == bits(theirs.output)
        assert (ours.indices is None) == (theirs.indices is None)
        if ours.indices is not None:
            np.testing.assert_array_equal(ours.indices, theirs.indices)


@pytest.fixture(params=TRANSPORTS)
def pool_each(
    request: pytest.FixtureRequest, connect: Connect, addresses: list[str], stream_in: Callable[..., None]
) -> Callable[..., list[poolrpc.PoolResult]]:
    """Return pool_each of either client, through each transport."""
    options = TRANSPORTS[request.param]
    stream_in(1900, 500)  # two or three planes of X in a block, and less than a plane in a message
    used = connect(addresses[options["transport"] in ("arena", "local")])

    def call(x: np.ndarray, branches: list[Any], **more: Any) -> list[poolrpc.PoolResult]:
        results = used.pool_each(x, branches, **options, **more)
        assert not np.size(x) or {result.transport for result in results} == {options["transport"]}
        return results

    return call


@pytest.mark.parametrize("case", CASES)
def test_results_have_the_same_bits(
    pool_each: Callable[..., list[poolrpc.PoolResult]], client: PoolClient, case: str
) -> None:
    """Every client and transport returns what a PoolClient receives in one message."""
    asked = CASES[case]
    expected = client.pool_each(asked.x, asked.branches, transport="unary", **asked.options)
    assert_same(pool_each(asked.x, asked.branches, **asked.options), expected)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if len(case.branches) == 1])
def test_map_results_have_the_same_bits(connect: Connect, address: str, client: PoolClient, case: str) -> None:
    """Map returns the same for each tensor."""
    asked = CASES[case]
    expected = client.pool_each(asked.x, asked.branches, transport="unary", **asked.options)
    assert_same(list(connect(address).map([asked.x] * 2, asked.branches[0], **asked.options)), expected * 2)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_unpool_takes_indices(
    pool_each: Callable[..., list[poolrpc.PoolResult]], client: PoolClient, layout: str
) -> None:
    """The indices of a MaxUnpool are sent together with the input by every transport."""
    options: dict[str, Any] = {"layout": layout}
    (pooled,) = pool_each(in_layout(FINITE, layout), [MaxPool2d(2, return_indices=True)], **options)
    branches = [MaxUnpool2d(2), [MaxUnpool2d(2, output_size=(11, 14)), AvgPool2d(2)]]
    options["indices"] = pooled.indices
    expected = client.pool_each(pooled.output, branches, transport="unary", **options)
    assert_same(pool_each(pooled.output, branches, **options), expected)


def test_powers_differ_by_rounding_alone(
    pool_each: Callable[..., list[poolrpc.PoolResult]], client: PoolClient
) -> None:
    """Torch rounds other powers than 1, 2 and inf by where its tensor ends, so a stream's last bit may differ."""
    (result,) = pool_each(X, [LPPool2d(3.5, 2)])
    expected = client.pool(X, LPPool2d(3.5, 2), transport="unary")
    np.testing.assert_allclose(result.output, expected.output, rtol=2.0**-22)
    if result.transport != "stream":
        assert_same([result], [expected])


def test_errors_are_the_same(pool_each: Callable[..., list[poolrpc.PoolResult]]) -> None:
    """A wrong layer, dtype or index raises the same class with the same field through every transport."""
    x = np.zeros((1, 1, 256, 256), np.float32)
    with pytest.raises(poolrpc.InvalidArgumentError) as caught:
        pool_each(x, [MaxPool2d(500)])
    assert caught.value.violations[0].field == "branches[0].layers[0].max_pool.kernel_size"
    with pytest.raises(poolrpc.UnsupportedError):
        pool_each(x.astype(np.int32), [AvgPool2d(2)])
    with pytest.raises(poolrpc.InvalidArgumentError, match=r"expected indices in 0\.\.262143"):
        pool_each(x, [MaxUnpool2d(2)], indices=np.full(x.shape, 2**40))
    assert pool_each(x, [MaxPool2d(2)])[0].shape == (1, 1, 128, 128)


def test_the_transport_is_chosen_by_size(connect: Connect, address: str, unix_address: str) -> None:
    """Over TCP a large tensor is streamed; on a unix socket calls are local, whatever the size."""
    tcp, unix = connect(address), connect(unix_address)
    (small,), (large,) = tcp.pool_each(X, [MaxPool2d(2)]), tcp.pool_each(LARGE, [MaxPool2d(2)])
    assert (small.transport, large.transport) == ("unary", "stream")
    assert_same([large], tcp.pool_each(LARGE, [MaxPool2d(2)], transport="unary"))
    for side in (4, 255, 256, 2048):
        assert unix.pool(np.ones((1, 1, side, side), np.float32), MaxPool2d(2)).transport == "local"


def test_map_uses_the_arena(connect: Connect, unix_address: str, client: PoolClient) -> None:
    """Groups of small tensors are put into the arena end to end, whatever their sizes."""
    given = [RNG.standard_normal((n, 3, 9, 7), np.float32) for n in range(1, 120)]
    layer = MaxPool2d(2, return_indices=True)
    results = list(connect(unix_address).map(given, layer))
    assert {result.transport for result in results} == {"local"}
    assert_same(results, [client.pool(each, layer, transport="unary") for each in given])


def test_an_unknown_transport_is_rejected(connect: Connect, address: str) -> None:
    """The error names the transports that there are."""
    with pytest.raises(
        poolrpc.InvalidArgumentError, match=r"expected one of unary, stream, arena, local.*, got 'pigeon'"
    ):
        connect(address).pool(X, MaxPool2d(2), transport="pigeon")  # type: ignore[arg-type]
