"""Averages of four small integers, which are computed in integers: equal to torch's steps for every sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import poolrpc as p
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.engine import Engine
from poolrpc_server.compute.kernels import blocks, integer_average
from tests.parity.reference import assert_same, values

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from poolrpc_server.compute.schedule import Schedule

LIMITS = Limits(2**30, 2**30, 2**10, 2**40)
LARGEST = {"uint8": 255, "uint16": 65_535}
FUSED = "integer average"


@pytest.fixture(params=[2**28, 0], ids=["kept", "made each time"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine that keeps programs, or none."""
    made = Engine("cpu", 1, workspace_limit=request.param)
    yield made
    made.close()


def level(dtype: str, pool: p.Layer | None = None) -> tuple[p.Layer, ...]:
    """Return the steps of one level of a pyramid."""
    return (p.ToDtype("float32"), pool or p.AvgPool2d(2), p.Round(), p.ToDtype(dtype))


def schedule(
    engine: Engine,
    x: torch.Tensor,
    chain: Sequence[p.Layer],
    outputs: Sequence[int] = (),
    layout: str = "NCHW",
) -> Schedule:
    """Return the schedule of a chain."""
    spec = TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape), layout)
    request = Request(spec, (tuple(chain),), None, (tuple(outputs),) if outputs else ())
    return check_request(request, LIMITS, engine.schedule).schedule


def compute(engine: Engine, made: Schedule, x: torch.Tensor, shift: int = 0) -> list[torch.Tensor]:
    """Return the outputs of a schedule, whose input's address is `shift` bytes after an aligned one."""
    payload = memoryview(bytes(shift) + x.contiguous().view(torch.uint8).numpy().tobytes())[shift:]
    parts = engine.execute([engine.run(made, payload, lambda parts: [bytearray(part) for part in parts])])[0]
    return [
        torch.frombuffer(part, dtype=getattr(torch, spec.dtype)).view(spec.shape)
        for part, spec in zip(parts, made.outputs, strict=True)
    ]


def names(made: Schedule) -> list[str]:
    """Return the names of the kernels of a chain's steps."""
    return [row.name if row else "eager" for _, row in made.branches[0].steps]


def torch_steps(x: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs of the steps to the next level, computed by torch one by one."""
    wide = x.to(torch.float32)
    average = torch.nn.functional.avg_pool2d(wide, 2)
    return [wide, average, average.round(), average.round().to(x.dtype)]


@pytest.mark.parametrize("dtype", LARGEST)
def test_every_sum_is_rounded_as_torch_rounds_it(engine: Engine, dtype: str) -> None:
    """Every sum of four cells, of cells that are as equal and as different as that sum allows."""
    largest = LARGEST[dtype]
    sums = torch.arange(4 * largest + 1)
    even = (sums[:, None] + torch.arange(4)) // 4
    uneven = (sums[:, None] - largest * torch.arange(4)).clamp(0, largest)
    for cells in (even, uneven, uneven.flip(1), uneven[:, [1, 0, 3, 2]]):
        assert torch.equal(cells.sum(1), sums)
        x = cells.to(getattr(torch, dtype)).view(1, -1, 2, 2)
        made = schedule(engine, x, level(dtype))
        assert names(made) == [FUSED]
        (output,) = compute(engine, made, x)
        assert_same(output, torch_steps(x)[-1], dtype)
        quotients, rests = sums // 4, sums % 4
        nearest = quotients + ((rests == 3) | ((rests == 2) & (quotients % 2 == 1)))
        assert torch.equal(output.view(-1).to(torch.int64), nearest)
        made = schedule(engine, x, level(dtype)[:2])
        assert names(made) == [FUSED]
        (output,) = compute(engine, made, x)
        assert_same(output, torch.nn.functional.avg_pool2d(x.to(torch.float32), 2), dtype)
        assert torch.equal(output.view(-1).to(torch.float64), sums / 4)


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("shape", [(1, 5, 32, 64), (2, 3, 33, 32), (3, 1, 34, 48), (1, 7, 17, 36)])
@pytest.mark.parametrize("block", [1, 3000, 2**21])
def test_pyramids_equal_torchs(
    engine: Engine, dtype: str, shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Levels of even and odd sizes, rounded or not, in blocks and parts of any size, of inputs that aren't aligned."""
    monkeypatch.setattr(blocks, "TARGET_BYTES", block)
    monkeypatch.setattr(integer_average, "PART_BYTES", -(-block // 8))
    for outputs in ((3, 7, 11), (11,), (1, 3, 6, 11), (0, 5, 11)):
        for seed in range(2):
            x = values(shape, dtype, seed)
            made = schedule(engine, x, level(dtype) * 3, outputs)
            assert names(made)[0] == ("element-wise" if 0 in outputs else FUSED)
            expected = [x]
            for _ in range(3):
                expected += torch_steps(expected[-1])
            for shift in (0, 1):
                got = compute(engine, made, x, shift)
                for number, output in zip(outputs, got, strict=True):
                    assert_same(output, expected[number + 1], (dtype, shape, number, seed, shift, block))


def test_only_these_steps_become_one(engine: Engine) -> None:
    """Other dtypes, windows, divisors, layouts and steps, and outputs in between, stay steps of their own."""
    small, odd = torch.zeros(1, 2, 8, 8, dtype=torch.uint8), torch.zeros(1, 2, 9, 8, dtype=torch.uint8)
    to_float, average, whole, back = level("uint8")
    for x, chain, outputs, layout in (
        (small.to(torch.int16), level("int16"), (), "NCHW"),
        (small, level("uint8"), (), "NHWC"),
        (small, level("uint8"), (0, 3), "NCHW"),
        (small, (p.ToDtype("float32", scale=True), average, whole, back), (), "NCHW"),
        (small, (p.ToDtype("float16"), average, whole, back), (), "NCHW"),
        (small, (to_float, p.MaxPool2d(2), whole, back), (), "NCHW"),
        (odd.movedim(-1, -2), level("uint8"), (), "NCHW"),
        (odd, level("uint8", p.AvgPool2d(2, ceil_mode=True)), (), "NCHW"),
        *(
            (small, level("uint8", pool), (), "NCHW")
            for pool in (
                p.AvgPool2d(3),
                p.AvgPool2d(2, 1),
                p.AvgPool2d(2, padding=1),
                p.AvgPool2d((2, 1)),
                p.AvgPool2d(2, divisor_override=3),
                p.AvgPool2d(2, divisor_override=-4),
            )
        ),
    ):
        assert FUSED not in names(schedule(engine, x, chain, outputs, layout)), (chain, outputs, layout)
    for chain, outputs in (
        (level("uint16"), ()),
        (level("uint8"), (1, 3)),
        (level("uint8"), (2, 3)),
        (level("uint8")[:3], ()),
        ((to_float, average, whole, p.ToDtype("uint8", scale=True)), ()),
        ((to_float, average, p.Normalize(0.5, 2.0), back), ()),
    ):  # the first two are one
        assert names(schedule(engine, small, chain, outputs)) == [FUSED, *["element-wise"] * (len(chain) - 2)]
    for x, pool in (
        (small, p.AvgPool2d(2, ceil_mode=True)),
        (odd, p.AvgPool2d((2, 2), 2)),
        (small, p.AvgPool2d(2, divisor_override=4)),
    ):
        assert names(schedule(engine, x, (*level("uint8", pool), p.MaxPool2d(2)))) == [FUSED, "tiny max"]
