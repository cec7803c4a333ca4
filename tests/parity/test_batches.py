"""Batches: every request of a batch has the result that it has when it is computed alone, whatever the others are."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import poolrpc as p
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.engine import Engine, Run
from poolrpc_server.compute.schedule import CPU_BATCHED_BYTES
from tests.operand_bytes import operand_for
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


def a_run(engine: Engine, branches: Sequence[Chain], spec: TensorSpec, seed: int, *, optional: bool = False) -> Run:
    """Return a run with random values, and with a random operand if it takes one, whose result is its outputs."""
    unpool = next((chain[0] for chain in branches if chain[0].operand == "indices"), None)
    operand, contents = operand_for(branches, spec.shape, spec.layout, optional=optional, seed=seed)
    checked = check_request(Request(spec, tuple(branches), operand), LIMITS, engine.schedule)
    x = values(spec.shape, spec.dtype, seed)
    payload = x.contiguous().view(torch.uint8).numpy().tobytes()
    if unpool is not None:
        sizes = spec.shape[:-1] if spec.layout == "NHWC" else spec.shape
        cells = prod(unpool.output_plane(sizes[-unpool.spatial_dims :]))
        contents = np.random.default_rng(seed).integers(0, cells, spec.shape).tobytes()
    payload += contents

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
    # Boxes are of images, which have the same channels.
    leads: list[tuple[int, ...]] = [(2, 3), (1, 3), (3,)] if layer.operand == "boxes" else [(2, 3), (1, 1), (4,)]
    return [TensorSpec(dtype, (*lead, *plane)) for lead in leads]


@pytest.mark.parametrize("name", [name for name in GRID if "Fractional" not in name])
def test_a_batch_has_the_results_of_its_requests(engine: Engine, name: str) -> None:
    """Requests of one key have the same results in a batch, for each layer, dtype and layout, with any operand."""
    met = set()
    cases = [case for case in sampled(name) if case[0].splittable or case[0].operand == "boxes"]
    for turn, (layer, shape, dtype) in enumerate(cases):
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


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("reduce", ["max", "mean", "median", p.Softmax()])
def test_each_image_of_a_batch_has_its_weights(engine: Engine, reduce: Any, dtype: str, layout: str) -> None:
    """Requests with weights of their own have the same results in a batch, also with branches and layers without."""
    branches = [(p.GlobalPool1d(reduce),), (p.MaxPool1d(2), p.GlobalPool1d("max"))]
    shapes = [(2, 50, 3), (1, 50, 3), (50, 3)] if layout == "NHWC" else [(2, 3, 50), (1, 3, 50), (3, 50)]
    runs = [a_run(engine, branches, TensorSpec(dtype, each, layout), i, optional=True) for i, each in enumerate(shapes)]
    assert_batch_is_equal(engine, runs, (reduce, dtype, layout))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_layers_after_an_operand_are_those_of_a_batch(engine: Engine, layout: str) -> None:
    """Chains that begin with boxes or segments, some with other branches, have the same results in a batch."""
    shapes = (
        [(2, 12, 9, 3), (1, 12, 9, 3), (12, 9, 3)] if layout == "NHWC" else [(2, 3, 12, 9), (1, 3, 12, 9), (3, 12, 9)]
    )
    boxes: list[Chain] = [(p.RoIAlign(4), p.Normalize((1, 2, 3), (4, 5, 6)), p.MaxPool2d(2)), (p.AvgPool2d(2),)]
    segments: list[Chain] = [(p.SegmentPool("mean"), p.MaxPool1d(2)), (p.MaxPool1d(3),)]
    for branches, sizes in ((boxes, shapes), (segments, [each[:-1] for each in shapes])):
        runs = [a_run(engine, branches, TensorSpec("float32", each, layout), i) for i, each in enumerate(sizes)]
        assert_batch_is_equal(engine, runs, (branches, layout))


def test_requests_with_other_channels_have_other_keys(engine: Engine) -> None:
    """Images with weights or boxes share a batch if they have the same channels; segments, if there are as many."""
    two, three, four = (TensorSpec("float32", (1, channels, 8, 8)) for channels in (2, 3, 4))
    chain = (p.RoIPool(2),)
    assert a_run(engine, [chain], three, 0).key is a_run(engine, [chain], three, 1).key
    assert a_run(engine, [chain], three, 0).key is not a_run(engine, [chain], four, 0).key
    weighted = [a_run(engine, [(p.GlobalPool2d("max"),)], spec, 0, optional=True) for spec in (two, three)]
    assert weighted[0].key is not weighted[1].key
    numbered = [(p.RoIPool(2), p.Normalize((1, 2), (3, 4)))]  # the channels of an image
    assert a_run(engine, numbered, two, 0).key is not None
    longer = [a_run(engine, [(p.SegmentPool("max"),)], TensorSpec("float32", (1, 2, size)), 0).key for size in (8, 9)]
    assert longer[0] is not longer[1]


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
    placed = engine.run_in_place(run.schedule, engine.location([memoryview(bytes(256))], [memoryview(bytearray(64))]))
    assert run.key is not None
    assert placed.key is None
