"""Requests that are computed together: each has the answer that it has alone, value by value, whatever is beside it."""

from __future__ import annotations

from itertools import islice
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
from tests.parity.reference import assert_same, values
from tests.parity.test_parity import GRID, cases

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from poolrpc.chains import Chain

LIMITS = Limits(2**24, 2**24, 2**10, 10**9)
MOST_CASES = 150
"""Of each layer."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine on the CPU."""
    made = Engine("cpu", 2)
    yield made
    made.close()


def a_run(engine: Engine, branches: Sequence[Chain], spec: TensorSpec, seed: int) -> Run:
    """Give a request with values, and with indices where a MaxUnpool takes them, whose answer is its outputs."""
    unpool = next((chain[0] for chain in branches if chain[0].takes_indices), None)
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


def assert_together_as_alone(engine: Engine, runs: Sequence[Run], what: object) -> None:
    """Compute requests alone, then at once, and compare."""
    assert len({run.key for run in runs}) == 1, what
    assert runs[0].key is not None, what
    alone = [engine.execute([run])[0] for run in runs]
    together = engine.execute(runs)
    for number, (got, expected) in enumerate(zip(together, alone, strict=True)):
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other, (what, number))


def specs(layer: p.Layer, shape: tuple[int, ...], dtype: str, turn: int) -> list[TensorSpec]:
    """Give tensors of one plane size: several images, one, one without N; channels last each third time."""
    dims = layer.spatial_dims or len(shape) - 2
    plane = shape[-dims:]
    if turn % 3 == 0:
        leads = [(2,), (1,), ()] if layer.spatial_dims else [(2,), (1,), (3,)]
        return [TensorSpec(dtype, (*lead, *plane, 3), "NHWC") for lead in leads]
    leads = [(2, 3), (1, 1), (4,)] if layer.spatial_dims else [(2, 3), (1, 1), (3, 2)]
    return [TensorSpec(dtype, (*lead, *plane)) for lead in leads]


GATHERING = [name for name in GRID if "Fractional" not in name]


@pytest.mark.parametrize("name", GATHERING)
def test_alike_requests_are_computed_together_as_alone(engine: Engine, name: str) -> None:
    """Over layers, planes, dtypes and both layouts: max with its indices, and unpooling, too."""
    every = [case for case in cases(name) if case[0].splittable]
    step = max(1, len(every) // MOST_CASES) | 1
    met = set()
    for turn, (layer, shape, dtype) in enumerate(islice(every, 0, None, step)):
        runs = [a_run(engine, [(layer,)], spec, turn + i) for i, spec in enumerate(specs(layer, shape, dtype, turn))]
        if max(run.nbytes for run in runs) > CPU_BATCHED_BYTES:
            continue
        assert_together_as_alone(engine, runs, (layer, shape, dtype))
        met.add(dtype)
    assert met == set(layer.dtypes)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
def test_chains_and_branches_are_computed_together_as_alone(engine: Engine, layout: str, dtype: str) -> None:
    """Each part of each answer is the caller's own: several outputs, indices between them, chains."""
    branches = [
        (p.MaxPool2d(2, return_indices=True),),
        (p.MaxPool2d(3, 2, 1), p.AvgPool2d(2, ceil_mode=True), p.LPPool2d(2, 2)),
        (p.AdaptiveMaxPool2d((3, 2), return_indices=True),),
        (p.GlobalAvgPool(),),
    ]
    for seed in range(4):
        shapes = [(2, 3, 17, 14), (1, 1, 17, 14), (5, 17, 14)]
        if layout == "NHWC":
            shapes = [(2, 17, 14, 3), (1, 17, 14, 3), (17, 14, 3)]
        runs = [a_run(engine, branches, TensorSpec(dtype, shape, layout), seed + i) for i, shape in enumerate(shapes)]
        assert_together_as_alone(engine, runs, (layout, dtype, seed))


@pytest.mark.parametrize("count", [2, 7, 64])
def test_any_number_is_computed_together(engine: Engine, count: int) -> None:
    """However many there are, of however many planes, each has its own."""
    runs = [
        a_run(engine, [(p.MaxPool2d(2, return_indices=True),)], TensorSpec("float32", (1, 1 + i % 5, 9, 8)), i)
        for i in range(count)
    ]
    assert_together_as_alone(engine, runs, count)


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
def test_what_depends_on_its_tensor_or_is_large_is_computed_alone(
    engine: Engine, layer: p.Layer, spec: TensorSpec
) -> None:
    """Layers that tell planes apart or whose last bit depends on what lies beside them, and what a copy would slow."""
    assert a_run(engine, [(layer,)], spec, 0).key is None
    assert a_run(engine, [(p.MaxPool2d(2),) if spec.nbytes < 1000 else (layer,), (layer,)], spec, 0).key is None


def test_what_differs_is_not_alike(engine: Engine) -> None:
    """Another layer, dtype, plane size, layout, or number of channels that are last is another key."""
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


def test_outputs_that_have_their_places_are_computed_alone(engine: Engine) -> None:
    """What an arena's caller is given lies where it says, and is gathered nowhere."""
    run = a_run(engine, [(p.MaxPool2d(2),)], TensorSpec("float32", (1, 1, 8, 8)), 0)
    placed = engine.run_in_place(run.schedule, [memoryview(bytes(256))], [memoryview(bytearray(64))])
    assert run.key is not None
    assert placed.key is None
