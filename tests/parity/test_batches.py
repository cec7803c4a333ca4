"""Batches: every request of a batch has the result that it has when it is computed alone, whatever the others are."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import poolrpc as p
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.engine import Engine, Run
from poolrpc_server.compute.schedule import CPU_BATCHED_BYTES
from tests.parity.grid import GRID, sampled
from tests.parity.reference import assert_same, values

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from poolrpc.chains import Chain

LIMITS = Limits(2**24, 2**24, 2**10, 10**9)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine on the CPU."""
    made = Engine("cpu", 2)
    yield made
    made.close()


def a_run(engine: Engine, branches: Sequence[Chain], spec: TensorSpec, seed: int) -> Run:
    """Return a run with random values, and random indices if it has a MaxUnpool, whose result is its outputs."""
    unpool = next((chain[0] for chain in branches if chain[0].operand == "indices"), None)
    indices = TensorSpec("int64", spec.shape, spec.layout) if unpool is not None else None
    checked = check_request(Request(spec, tuple(branches), indices), LIMITS, engine.schedule)
    x = values(spec.shape, spec.dtype, seed)
    payload = x.contiguous().view(torch.uint8).numpy().tobytes()
    if unpool is not None:
        sizes = spec.shape[:-1] if spec.layout == "NHWC" else spec.shape
        cells = prod(unpool.output_plane(sizes[-unpool.spatial_dims :]))
        payload += np.random.default_rng(seed).integers(0, cells, spec.shape).tobytes()

    def finish(outputs: Sequence[memoryview]) -> list[torch.Tensor]:
        return [
            torch.frombuffer(bytearray(data), dtype=getattr(torch, each.dtype)).reshape(each.shape)
            for data, each in zip(outputs, checked.outputs, strict=True)
        ]

    return engine.run(checked.schedule, payload, finish)


def assert_batch_is_equal(engine: Engine, runs: Sequence[Run], what: object) -> None:
    """Compute requests one by one, then as one batch, and compare their results."""
    assert len({run.key for run in runs}) == 1, what
    assert runs[0].key is not None, what
    alone = [engine.execute([run])[0] for run in runs]
    batch = engine.execute(runs)
    for number, (got, expected) in enumerate(zip(batch, alone, strict=True)):
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other, (what, number))


def specs(layer: p.Layer, shape: tuple[int, ...], dtype: str, turn: int) -> list[TensorSpec]:
    """Return specs of one plane size: several images, one image, one without N; every third time with channels last."""
    dims = layer.spatial_dims
    plane = shape[-dims:]
    if turn % 3 == 0:
        return [TensorSpec(dtype, (*lead, *plane, 3), "NHWC") for lead in [(2,), (1,), ()]]
    return [TensorSpec(dtype, (*lead, *plane)) for lead in [(2, 3), (1, 1), (4,)]]


ALONE = {"offsets", "boxes"}
"""The operands with which a request is computed alone."""


@pytest.mark.parametrize(
    "name", [name for name in GRID if "Fractional" not in name and p.LAYERS[name].operand not in ALONE]
)
def test_a_batch_has_the_results_of_its_requests(engine: Engine, name: str) -> None:
    """Requests of one key have the same results in a batch, for each layer, dtype and layout, and with indices."""
    met = set()
    for turn, (layer, shape, dtype) in enumerate(case for case in sampled(name) if case[0].splittable):
        runs = [a_run(engine, [(layer,)], spec, turn + i) for i, spec in enumerate(specs(layer, shape, dtype, turn))]
        if max(run.nbytes for run in runs) > CPU_BATCHED_BYTES:
            continue
        assert_batch_is_equal(engine, runs, (layer, shape, dtype))
        met.add(dtype)
    assert met == set(type(layer).dtypes)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
def test_a_batch_of_chains_and_branches_has_their_results(engine: Engine, layout: str, dtype: str) -> None:
    """Requests with several outputs, with indices among them, and with chains have the same results in a batch."""
    branches = [
        (p.MaxPool2d(2, return_indices=True),),
        (p.MaxPool2d(3, 2, 1), p.AvgPool2d(2, ceil_mode=True), p.LPPool2d(2, 2)),
        (p.AdaptiveMaxPool2d((3, 2), return_indices=True),),
        (p.GlobalPool2d("mean"),),
    ]
    for seed in range(4):
        shapes = [(2, 3, 17, 14), (1, 1, 17, 14), (5, 17, 14)]
        if layout == "NHWC":
            shapes = [(2, 17, 14, 3), (1, 17, 14, 3), (17, 14, 3)]
        runs = [a_run(engine, branches, TensorSpec(dtype, shape, layout), seed + i) for i, shape in enumerate(shapes)]
        assert_batch_is_equal(engine, runs, (layout, dtype, seed))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "bool", "float16"])
def test_a_batch_of_steps_has_their_results(engine: Engine, layout: str, dtype: str) -> None:
    """Whole images share a batch although a Normalize treats their channels differently."""
    numbers = p.Normalize((0.1, 0.5, 3.0), (1, 2, 3))
    branches = [
        (p.ToDtype("float32"), numbers, p.AvgPool2d(2)),
        (p.ToDtype("float64"), numbers, p.Round(), p.ToDtype("int16"), p.MaxPool2d(3, 2, return_indices=True)),
    ]
    shapes = [(2, 3, 17, 14), (1, 3, 17, 14), (3, 17, 14)]
    if layout == "NHWC":
        shapes = [(2, 17, 14, 3), (1, 17, 14, 3), (17, 14, 3)]
    runs = [a_run(engine, branches, TensorSpec(dtype, shape, layout), seed) for seed, shape in enumerate(shapes)]
    assert_batch_is_equal(engine, runs, (layout, dtype))


def test_a_part_of_an_image_shares_no_batch(engine: Engine) -> None:
    """The planes of a stream's block need not be whole images: what follows them in a batch would begin elsewhere."""
    chain = p.ToDtype("float32"), p.Normalize((0.1, 0.5, 3.0), (1, 2, 3)), p.AvgPool2d(2)
    for count, shares in ((1, False), (2, False), (3, True), (6, True)):
        request = Request(TensorSpec("uint8", (1, count, 8, 8)), (chain,), is_block=True)
        schedule = check_request(request, LIMITS, engine.schedule).schedule
        assert (schedule.key is not None) == shares


@pytest.mark.parametrize("count", [2, 7, 64])
def test_a_batch_may_have_any_number_of_requests(engine: Engine, count: int) -> None:
    """Batches of 2 to 64 requests, of different numbers of planes, have the results of their requests."""
    runs = [
        a_run(engine, [(p.MaxPool2d(2, return_indices=True),)], TensorSpec("float32", (1, 1 + i % 5, 9, 8)), i)
        for i in range(count)
    ]
    assert_batch_is_equal(engine, runs, count)


@pytest.mark.parametrize(
    ("layer", "spec"),
    [
        (p.FractionalMaxPool2d(2, 3), TensorSpec("float32", (1, 1, 8, 8))),
        (p.FractionalMaxPool3d(2, 3), TensorSpec("float32", (1, 1, 8, 8, 8))),
        (p.LPPool2d(3.5, 2), TensorSpec("float32", (1, 1, 8, 8))),
        (p.MaxPool2d(2), TensorSpec("float32", (1, 64, 32, 32))),
        (p.MaxPool2d(2), TensorSpec("float32", (0, 3, 8, 8))),
    ],
    ids=["fractional 2d", "fractional 3d", "general norm", "large", "empty"],
)
def test_some_requests_have_no_batch_key(engine: Engine, layer: p.Layer, spec: TensorSpec) -> None:
    """Layers whose result depends on the other planes, large requests, and empty ones are computed alone."""
    assert a_run(engine, [(layer,)], spec, 0).key is None
    assert a_run(engine, [(p.MaxPool2d(2),) if spec.nbytes < 1000 else (layer,), (layer,)], spec, 0).key is None


def test_different_requests_have_different_keys(engine: Engine) -> None:
    """Requests that differ in layer, dtype, plane size, layout, or the number of last channels have different keys."""
    base = TensorSpec("float32", (1, 3, 8, 6))
    others = [
        a_run(engine, [(p.MaxPool2d(2),)], base, 0),
        a_run(engine, [(p.MaxPool2d(2, ceil_mode=True),)], base, 0),
        a_run(engine, [(p.MaxPool2d(2), p.MaxPool2d(2))], base, 0),
        a_run(engine, [(p.MaxPool2d(2),), (p.MaxPool2d(2),)], base, 0),
        a_run(engine, [(p.MaxPool2d(2),)], TensorSpec("int32", base.shape), 0),
        a_run(engine, [(p.MaxPool2d(2),)], TensorSpec("float32", (1, 3, 6, 8)), 0),
        a_run(engine, [(p.MaxPool2d(2),)], TensorSpec("float32", (1, 8, 6, 3), "NHWC"), 0),
        a_run(engine, [(p.MaxPool2d(2),)], TensorSpec("float32", (1, 8, 6, 4), "NHWC"), 0),
    ]
    assert len({run.key for run in others}) == len(others)


def test_a_run_in_place_has_no_key(engine: Engine) -> None:
    """A run that writes to its caller's memory is computed alone."""
    run = a_run(engine, [(p.MaxPool2d(2),)], TensorSpec("float32", (1, 1, 8, 8)), 0)
    placed = engine.run_in_place(run.schedule, [memoryview(bytes(256))], [memoryview(bytearray(64))])
    assert run.key is not None
    assert placed.key is None
