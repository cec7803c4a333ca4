"""Calls with operands that wait at the same time: they are computed together, and each has its own result."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from poolrpc import (
    GlobalPool1d,
    GlobalPool2d,
    InvalidArgumentError,
    MaxPool2d,
    MaxUnpool2d,
    PoolClient,
    RoIAlign,
    RoIPool,
    SegmentPool,
)
from tests.integration.connections import until
from tests.integration.local_calls import HELD, X
from tests.scrape import Scrape

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc_server import Server
    from tests.integration.conftest import Gate

if sys.platform != "linux":
    pytest.skip("the arena socket needs Linux", allow_module_level=True)

CALLS = 8
RANDOM = np.random.default_rng(0)
Case = tuple[np.ndarray, Any, dict[str, Any]]


def cells(*shape: int) -> np.ndarray:
    """Return random cells."""
    return RANDOM.normal(size=shape).astype(np.float32)


def segments(number: int) -> Case:
    """Return a call with offsets of its own: each call has as many segments, of other lengths."""
    offsets = [0, *sorted(RANDOM.integers(0, 40, 3)), 40]
    return cells(1 + number % 3, 4, 40), SegmentPool("mean"), {"offsets": offsets}


def weights(number: int) -> Case:
    """Return a call with weights of its own."""
    images = 1 + number % 3
    return cells(images, 4, 40), GlobalPool1d("mean"), {"weights": RANDOM.random((images, 40))}


def boxes(layer: Any) -> Callable[[int], Case]:
    """Return what makes a call with boxes of its own, as many as its number."""

    def call(number: int) -> Case:
        images = 1 + number % 3
        corners = RANDOM.uniform(0, 12, (number, 4))
        given = np.concatenate([RANDOM.integers(0, images, (number, 1)), corners], 1)
        return cells(images, 3, 12, 10), layer, {"boxes": given.astype(np.float32)}

    return call


def indices(number: int) -> Case:
    """Return a call with indices of its own."""
    chosen = np.argsort(RANDOM.random((1 + number % 3, 4, 64)), -1)[..., :16].reshape(-1, 4, 4, 4)
    return cells(1 + number % 3, 4, 4, 4), MaxUnpool2d(2), {"indices": chosen}


def together(server: Server, gate: Gate, calls: list[Case]) -> list[Any]:
    """Return the result or the error of calls that are all queued before the first of them is computed."""
    with PoolClient(server.addresses[0]) as client, ThreadPoolExecutor(len(calls) + 1) as threads:
        held = threads.submit(client.pool, X, HELD)
        assert gate.entered.wait(60)
        waiting = [threads.submit(client.pool, x, layer, **operand) for x, layer, operand in calls]
        until(lambda: Scrape(server.metrics_address)("poolrpc_queue_length", priority="1") == len(calls))
        gate.opened.set()
        held.result(60)
        return [each.exception(60) or each.result() for each in waiting]


@pytest.mark.parametrize(
    "kind",
    [segments, weights, boxes(RoIPool(3)), boxes(RoIAlign(3, 0.5)), indices],
    ids=["offsets", "weights", "RoIPool", "RoIAlign", "indices"],
)
def test_waiting_calls_with_operands_are_one_batch(
    gate: Gate, local_server: Server, kind: Callable[[int], Case]
) -> None:
    """Calls with operands of their own that wait for the engine are computed at once, and have what each has alone."""
    calls = [kind(number) for number in range(CALLS)]
    results = together(local_server, gate, calls)
    shown = Scrape(local_server.metrics_address)
    assert (shown("poolrpc_executions_total"), shown("poolrpc_requests_total")) == (2, 1 + CALLS)
    assert shown("poolrpc_batch_requests_bucket", le="1.0") == 1  # the one that was held
    with PoolClient(local_server.addresses[0]) as client:
        for (x, layer, operand), result in zip(calls, results, strict=True):
            alone = client.pool(x, layer, **operand)
            assert np.array_equal(result.output, alone.output, equal_nan=True)
            assert result.shapes == alone.shapes


@pytest.mark.parametrize(
    ("kind", "bad", "message"),
    [
        (segments, {"offsets": [0, 5, 3, 20, 40]}, "offsets in ascending order"),
        (weights, {"weights": np.full((1, 40), -1.0)}, "finite weights of at least 0"),
        # The batch has an image of this number, which is another call's.
        (boxes(RoIPool(3)), {"boxes": [[1, 0, 0, 5, 5]]}, "the number of an image, 0..0, got 1"),
        (indices, {"indices": np.full((1, 4, 4, 4), 64)}, "indices in 0..63"),
    ],
    ids=["offsets", "weights", "boxes", "indices"],
)
def test_a_bad_operand_of_a_batch_fails_alone(
    gate: Gate, local_server: Server, kind: Callable[[int], Case], bad: dict[str, Any], message: str
) -> None:
    """The call with a bad operand has its error, and those that waited with it have their results."""
    calls = [kind(number) for number in range(CALLS)]
    x, layer, _ = calls[3]  # of one image
    calls[3] = x, layer, bad
    results = together(local_server, gate, calls)
    assert isinstance(results[3], InvalidArgumentError)
    assert message in str(results[3])
    with PoolClient(local_server.addresses[0]) as client:
        for (x, layer, operand), result in (
            pair for at, pair in enumerate(zip(calls, results, strict=True)) if at != 3
        ):
            assert np.array_equal(result.output, client.pool(x, layer, **operand).output, equal_nan=True)


def test_boxes_of_much_work_are_computed_one_call_after_the_other(
    gate: Gate, local_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls whose boxes are too much work for a batch have their results all the same, each computed alone."""
    monkeypatch.setattr("poolrpc_server.compute.engine.BATCHED_WORK", 1)
    results = together(local_server, gate, [boxes(RoIAlign(3))(2) for _ in range(3)])
    assert [result.output.shape for result in results] == [(2, 3, 3, 3)] * 3
    assert Scrape(local_server.metrics_address)("poolrpc_executions_total") == 1 + 3


def test_calls_without_operands_share_no_batch_with_them(gate: Gate, local_server: Server) -> None:
    """A mean with weights and one without, of equal tensors, are different batches."""
    x = cells(1, 3, 6, 6)
    mask = np.zeros((1, 6, 6))
    mask[0, 0, 0] = 1
    calls: list[Case] = [
        (x, GlobalPool2d("mean"), {}),
        (x, GlobalPool2d("mean"), {"weights": mask}),
        (x, MaxPool2d(2), {}),
    ]
    plain, masked, _ = together(local_server, gate, calls)
    np.testing.assert_allclose(plain.output[..., 0, 0], x.mean((2, 3)), rtol=1e-5)
    assert np.array_equal(masked.output[..., 0, 0], x[..., 0, 0])
    assert Scrape(local_server.metrics_address)("poolrpc_executions_total") == 1 + 3
