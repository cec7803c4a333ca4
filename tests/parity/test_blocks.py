"""Blocks of planes: a branch that is computed block by block has the result of torch on the whole tensor."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from math import inf, prod
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch

import poolrpc as p
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec, split_tensors
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute import branch
from poolrpc_server.compute.engine import Engine
from poolrpc_server.compute.kernels import blocks, raster_average
from poolrpc_server.compute.kernels.eager import bind
from tests.parity.reference import assert_same, reference, values
from tests.reduces import REDUCES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from poolrpc.chains import Chain

LIMITS = Limits(2**30, 2**30, 2**10, 10**12)
SHAPES = {1: (3, 5, 333), 2: (3, 5, 23, 29), 3: (3, 5, 7, 11, 9)}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine of two threads, which may always use both."""
    made = Engine("cpu", 2)
    made.slots = Slots()
    yield made
    made.close()


class Slots:
    """Slots that are always free."""

    def borrow(self, count: int) -> int:
        """Return as many as are wanted."""
        return count

    def release(self, slots: int) -> None:
        """Take them back."""


@pytest.fixture(params=[1, 5], ids=["one plane", "some planes"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that lets blocks have one plane or a few, given a plane's bytes; threads share every branch."""
    monkeypatch.setattr(branch, "PROGRAM_BLOCKS", 2)
    monkeypatch.setattr(branch, "WHOLE_BYTES", 0)
    monkeypatch.setattr(branch, "PARALLEL_WORK", 1)
    monkeypatch.setattr(raster_average, "SUMS_BYTES", 1)
    count = request.param
    return lambda nbytes: monkeypatch.setattr(blocks, "TARGET_BYTES", 1 if count == 1 else count * nbytes)


def compute(  # noqa: PLR0913, PLR0917 - what an execution depends on
    engine: Engine,
    x: torch.Tensor,
    branches: Sequence[Chain],
    layout: str = "NCHW",
    indices: torch.Tensor | None = None,
    shift: int = 0,
    outputs: Sequence[tuple[int, ...]] = (),
) -> list[torch.Tensor]:
    """Return the outputs of an execution in blocks, whose input's address is `shift` bytes after an aligned one."""
    tensors = [
        each.movedim(1, -1).contiguous() if layout == "NHWC" else each for each in (x, indices) if each is not None
    ]
    specs = [TensorSpec(str(each.dtype).removeprefix("torch."), tuple(each.shape), layout) for each in tensors]
    request = Request(specs[0], tuple(branches), specs[1] if indices is not None else None, tuple(outputs))
    checked = check_request(request, LIMITS, engine.schedule)
    if blocks.TARGET_BYTES == 1:
        assert all(made.block == 1 for made in checked.schedule.branches)
    data = b"".join(each.view(torch.uint8).numpy().tobytes() for each in tensors)
    payload = memoryview(bytes(shift) + data)[shift:]
    assert len(split_tensors(payload, specs)) == len(specs)

    def finish(outputs: Sequence[memoryview]) -> list[torch.Tensor]:
        made = [
            torch.frombuffer(bytearray(output), dtype=getattr(torch, spec.dtype)).view(spec.shape)
            for output, spec in zip(outputs, checked.outputs, strict=True)
        ]
        return [each.movedim(-1, 1) if layout == "NHWC" else each for each in made]

    result: list[torch.Tensor] = engine.execute([engine.run(checked.schedule, payload, finish)])[0]
    return result


def layers(dims: int) -> list[p.Layer]:
    """Return layers of every family, computed by each kernel and by torch's operators."""
    made: dict[str, Any] = {
        "MaxPool": [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "return_indices": True}],
        "AvgPool": [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}],
        "LPPool": [{"norm_type": norm, "kernel_size": 2} for norm in (1.0, 2.0, inf, 3.0, 1.7, 0.5, 3.5)],
        "AdaptiveMaxPool": [{"output_size": 3}, {"output_size": 4, "return_indices": True}],
        "AdaptiveAvgPool": [{"output_size": 3}, {"output_size": 1}],
        "GlobalPool": [{"reduce": reduce} for reduce in REDUCES],
        "Pool": [{"reduce": reduce, "kernel_size": 3, "stride": 2, "padding": "same"} for reduce in REDUCES],
    }
    made["AvgPool"].append({"kernel_size": 3, "stride": 2, "padding": ((0, 2),)})
    made["MaxPool"].append({"kernel_size": 3, "stride": 2, "padding": ((2, 0),), "return_indices": True})
    if dims > 1:
        made["FractionalMaxPool"] = [
            {"kernel_size": 2, "output_size": 3, "seed": 7},
            {"kernel_size": 2, "output_ratio": 0.6, "seed": 2**64 - 1, "return_indices": True},
        ]
    return [p.LAYERS[f"{family}{dims}d"](**each) for family, each_one in made.items() for each in each_one]


def whole(layer: p.Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return torch.nn's result, or that of the operator for the whole tensor, which is near that of a definition."""
    if layer.family not in {"pool", "global_pool"}:
        return reference(layer, x)
    plane = tuple(x.shape[2:])
    resolved = layer.resolved(plane)
    return bind(resolved, x.dtype, resolved.output_plane(plane))(x, None, 0, x.shape[0] * x.shape[1])


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_layer_in_blocks(engine: Engine, small: Callable[[int], None], dims: int, layout: str) -> None:
    """Values and indices are torch's on the whole tensor, for every dtype, wherever the input's memory starts."""
    shape = SHAPES[dims]
    for turn, layer in enumerate(layers(dims)):
        for dtype in layer.dtypes:
            x = values(shape, dtype, turn)
            small(prod(shape[2:]) * x.element_size())
            expected = [each for each in whole(layer, x) if each is not None]
            for shift in (0, 1):
                got = compute(engine, x, [(layer,)], layout, shift=shift)
                for one, other in zip(got, expected, strict=True):
                    assert_same(one, other, (layer, dtype, layout, shift))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("norm", [1.7, 0.5, 3.0, 11.25])
def test_a_general_norm_in_blocks(engine: Engine, small: Callable[[int], None], norm: float, dtype: str) -> None:
    """Which cells torch's scalar code computes depends on the tensor's size and not on the blocks', also in chains."""
    for shape in ((1, 17, 31, 33), (2, 13, 16, 16), (1, 400, 3, 3), (1, 37, 8, 9)):
        x = values(shape, dtype, 0).abs()
        small(prod(shape[2:]) * x.element_size())
        chain = p.LPPool2d(norm, 2, stride=1), p.LPPool2d(norm, (2, 1))
        first, _ = reference(chain[0], x)
        outputs = compute(engine, x, [chain[:1], chain])
        assert_same(outputs[0], first, (norm, shape))
        assert_same(outputs[1], reference(chain[1], first)[0], (norm, shape))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_chains_and_branches_in_blocks(engine: Engine, small: Callable[[int], None], dtype: str, layout: str) -> None:
    """Every layer of a chain, of several branches, is computed on blocks with torch's results, seeds and norms too."""
    x = values((7, 6, 38, 41), dtype, 2)
    small(38 * 41 * x.element_size())
    branches: list[Chain] = [
        (p.MaxPool2d(3, 2, 1), p.AvgPool2d(2), p.LPPool2d(1.7, 2), p.GlobalPool2d("mean")),
        (p.FractionalMaxPool2d(2, 19, seed=3), p.MaxPool2d(2, return_indices=True)),
        (p.AvgPool2d(3, 1, 1), p.FractionalMaxPool2d(2, 9, seed=5, return_indices=True)),
        (p.AdaptiveMaxPool2d((7, 5), return_indices=True),),
        (p.AdaptiveAvgPool2d((19, 4)), p.LPPool2d(3.5, 2, 1)),
    ]
    expected = []
    for chain in branches:
        output, indices = x, None
        for layer in chain:
            output, indices = reference(layer, output)
        expected += [output] if indices is None else [output, indices]
    for one, other in zip(compute(engine, x, branches, layout), expected, strict=True):
        assert_same(one, other, (dtype, layout))


def random_chain(rng: Random, dims: int, plane: tuple[int, ...], dtype: str) -> tuple[Chain, tuple[int, ...]]:
    """Return a chain of 1 to 6 layers that fit a plane and a dtype, and the numbers of some of them."""
    chain: list[p.Layer] = []
    conversions = [p.ToDtype(each) for each in ("float32", "float16", "uint8", "uint16")]
    while not chain or len(chain) < rng.randint(1, 6):
        layer = rng.choice(layers(dims)) if rng.randrange(3) or not chain else rng.choice([*conversions, p.Round()])
        with suppress(p.InvalidArgumentError):
            if dtype in layer.dtypes:
                plane, dtype = layer.output_plane(plane), layer.output_dtype(dtype)
                chain.append(layer)
    steps = tuple(sorted(rng.sample(range(len(chain)), rng.randint(1, len(chain)))))
    silent = [
        replace(layer, return_indices=False) if layer.returns_indices and number not in steps else layer
        for number, layer in enumerate(chain)
    ]
    return tuple(silent), steps


def expected_steps(x: torch.Tensor, chain: Chain, steps: tuple[int, ...]) -> list[torch.Tensor]:
    """Return torch's output, and its indices, of some layers of a chain that are computed one after the other."""
    expected: list[torch.Tensor] = []
    for number, layer in enumerate(chain):
        x, indices = whole(layer, x)
        if number in steps:
            expected += [x] if indices is None else [x, indices]
    return expected


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_outputs_of_several_steps_in_blocks(
    engine: Engine, small: Callable[[int], None], dims: int, layout: str
) -> None:
    """Each returned step of random chains, of two branches, has torch's values and indices, step by step."""
    rng = Random(dims)  # noqa: S311 - reproducible chains
    for turn in range(12):
        dtype = rng.choice(["float32", "float64", "float16", "uint8", "uint16", "int16"])
        x = values(SHAPES[dims], dtype, turn)
        small(prod(x.shape[2:]) * x.element_size())
        drawn = [random_chain(rng, dims, tuple(x.shape[2:]), dtype) for _ in range(2)]
        expected = [each for chain, steps in drawn for each in expected_steps(x, chain, steps)]
        branches, outputs = zip(*drawn, strict=True)
        for shift in (0, 1):
            got = compute(engine, x, branches, layout, shift=shift, outputs=outputs)
            for one, other in zip(got, expected, strict=True):
                assert_same(one, other, (drawn, dtype, layout, shift))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unpooling_in_blocks(engine: Engine, small: Callable[[int], None], dims: int, layout: str) -> None:
    """Each block has its planes of the indices; one that is out of range, in any block, is rejected."""
    full = values(SHAPES[dims], "float32", 0)
    y, indices = torch.nn.__dict__[f"MaxPool{dims}d"](2, return_indices=True)(full)
    small(prod(y.shape[2:]) * 4)
    layer = p.LAYERS[f"MaxUnpool{dims}d"](2, output_size=full.shape[2:])
    for shift in (0, 1):
        (got,) = compute(engine, y, [(layer,)], layout, indices, shift)
        assert_same(got, reference(layer, y, indices)[0], (dims, layout))
    for bad in (-1, prod(full.shape[2:])):
        wrong = indices.clone()
        wrong[-1, -1] = bad
        with pytest.raises(p.InvalidArgumentError, match=rf"^indices: expected indices in 0\.\..* got .*{bad}"):
            compute(engine, y, [(layer,)], layout, wrong)
