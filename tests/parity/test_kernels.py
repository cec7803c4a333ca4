"""Every row of the table of kernels, compared with torch.nn for random layers, planes and dtypes, and unusual cells.

The rows are called whether they pay or not, in blocks of one plane, of a few, and of all.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import poolrpc as p
from poolrpc_server.compute.kernels import blocks, plan_for, raster_average
from poolrpc_server.compute.kernels.eager import bind
from poolrpc_server.compute.kernels.table import TABLE
from tests.parity.reference import assert_same, reference, values
from tests.unit.strategies import steps

if TYPE_CHECKING:
    from poolrpc_server.compute.kernels.plan import Plan, Row

quick = settings(
    deadline=None, max_examples=int(os.environ.get("POOLRPC_EXAMPLES", "300")), derandomize="CI" in os.environ
)
at_length = settings(quick, max_examples=1000)
BLOCKS = st.sampled_from((1, 300, 1 << 20))
RANKS = (1, 2, 3)
LONGEST = {1: 24, 2: 9, 3: 4}
LARGEST = {1: 40, 2: 20, 3: 8}


@st.composite
def sliding(draw: st.DrawFn, family: str) -> tuple[p.Layer, tuple[int, ...]]:
    """Draw a layer whose windows slide, and a plane that it can pool: as small as possible, or larger."""
    dims = draw(st.sampled_from(RANKS))
    axes = []
    for _ in range(dims):
        kernel = draw(st.integers(1, LONGEST[dims]))
        stride = draw(st.one_of(st.integers(1, 5), st.integers(1, 17), st.just(kernel)))
        dilation = draw(st.sampled_from((1, 1, 2, 3))) if family == "MaxPool" else 1
        span = (kernel - 1) * dilation + 1
        halves = st.integers(0, kernel // 2).map(lambda half: (half, half))
        padding = (0, 0) if family == "LPPool" else draw(halves | st.tuples(*[st.integers(0, span - 1)] * 2))
        least = span if family != "MaxPool" and dims == 3 else max(1, span - sum(padding), dilation - sum(padding))
        axes.append((kernel, stride, padding, dilation, draw(st.integers(least, least + LARGEST[dims]))))
    kernel, stride, padding, dilation, plane = zip(*axes, strict=True)
    ceil = draw(st.booleans())
    cls = p.LAYERS[f"{family}{dims}d"]
    if family == "MaxPool":
        return cls(kernel, stride, padding, dilation, draw(st.booleans()), ceil), plane
    if family == "Pool":
        return cls(draw(st.sampled_from(("min", "sum"))), kernel, stride, padding, ceil_mode=ceil), plane
    if family == "LPPool":
        return cls(draw(st.sampled_from((1.0, 2.0, inf))), kernel, stride, ceil), plane
    more = {"divisor_override": draw(st.none() | st.integers(-9, 9).filter(bool))} if dims > 1 else {}
    return cls(kernel, stride, padding, ceil, draw(st.booleans()), **more), plane


@st.composite
def adaptive(draw: st.DrawFn, family: str) -> tuple[p.Layer, tuple[int, ...]]:
    """Draw an adaptive layer and a plane: with windows of one size, or of any size."""
    dims = draw(st.sampled_from(RANKS))
    cells = tuple(draw(st.integers(1, {1: 30, 2: 9, 3: 4}[dims])) for _ in range(dims))
    if draw(st.booleans()):
        plane = tuple(count * draw(st.integers(1, {1: 20, 2: 16, 3: 4}[dims])) for count in cells)
    else:
        plane = tuple(draw(st.integers(1, {1: 90, 2: 40, 3: 12}[dims])) for _ in range(dims))
    return p.LAYERS[f"{family}{dims}d"](cells), plane


def whole() -> st.SearchStrategy[tuple[p.Layer, tuple[int, ...]]]:
    """Draw a global max and a plane of any rank."""
    planes = st.sampled_from(RANKS).flatmap(lambda dims: st.tuples(*[st.integers(1, LARGEST[dims])] * dims))
    return planes.map(lambda plane: (p.LAYERS[f"GlobalPool{len(plane)}d"]("max"), plane))


@st.composite
def element_wise(draw: st.DrawFn) -> tuple[p.Layer, tuple[int, ...]]:
    """Draw an element-wise step and a plane of any rank; test_steps.py has numbers that depend on the channel."""
    step = draw(steps().filter(lambda step: step.period == 1))
    dims = draw(st.sampled_from(RANKS))
    return step, tuple(draw(st.integers(1, LARGEST[dims])) for _ in range(dims))


DRAWS = {
    "MaxPool": sliding("MaxPool"),
    "AvgPool": sliding("AvgPool"),
    "LPPool": sliding("LPPool"),
    "Pool": sliding("Pool"),
    "AdaptiveMaxPool": adaptive("AdaptiveMaxPool"),
    "AdaptiveAvgPool": adaptive("AdaptiveAvgPool"),
    "GlobalPool": whole(),
    "steps": element_wise(),
}


def test_every_row_is_drawn_for() -> None:
    """Every operation of the table is compared with torch here."""
    drawn = {"global_pool, max", *(each.family for each in p.STEPS.values())}
    drawn |= {p.LAYERS[f"{name}2d"].family for name in DRAWS if name != "steps"}
    drawn |= {"pool, min", "pool, sum"}
    drawn |= {"integer_average"}  # several steps, which test_integer_average.py compares
    assert {operation for row in TABLE for operation in row.operations} <= drawn


@pytest.mark.parametrize("name", DRAWS)
@quick
@given(data=st.data(), seed=st.integers(0, 2**30), size=BLOCKS)
def test_rows_return_torchs_result(name: str, data: st.DataObject, seed: int, size: int) -> None:
    """A kernel's output and indices are torch.nn's, with NaN, ties and infinities, in either layout and any block."""
    compare_rows(name, data, seed, size)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", DRAWS)
@at_length
@given(data=st.data(), seed=st.integers(0, 2**30), size=BLOCKS)
def test_rows_return_torchs_result_for_many_examples(name: str, data: st.DataObject, seed: int, size: int) -> None:
    """The same, for more layers and planes."""
    compare_rows(name, data, seed, size)


def program_of(
    row: Row, plan: Plan, x: torch.Tensor, output: torch.Tensor, indices: torch.Tensor | None
) -> blocks.Program:
    """Return a kernel's program for planes; each tensor is of (planes, *shape)."""
    program = blocks.Program(x.shape[0], row.plane_bytes(plan))
    chosen = None if indices is None else blocks.Cells(program, indices)
    row.add(plan, blocks.Cells(program, x), blocks.Cells(program, output), chosen)
    return program


def compare_rows(name: str, data: st.DataObject, seed: int, size: int) -> None:
    """Compare every row that applies to a random layer with torch."""
    layer, plane = data.draw(DRAWS[name])
    dtype = data.draw(st.sampled_from(layer.dtypes))
    channels = data.draw(st.sampled_from((None, 1, 3, 9)))
    x = values((2, channels or 3, *plane), dtype, seed)
    if name == "Pool":  # whose operator test_parity.py compares with the definition
        expected, indices = bind(layer, x.dtype, layer.output_plane(plane))(x, None, 0, 0)
    else:
        expected, indices = reference(layer, x)
    made = plan_for(layer, x.dtype, plane, channels, "cpu")
    memory = (x if channels is None else x.movedim(1, -1)).reshape(-1, *made.plane_shape).contiguous()
    for row in made.rows:
        output = torch.full((memory.shape[0], *made.result_shape), 7, dtype=made.output_dtype)
        chosen = torch.full(output.shape, -1) if row.indices else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "TARGET_BYTES", size)
            patch.setattr(raster_average, "SUMS_BYTES", -(-size // 8))
            # A program is kept: whatever memory held when it was run before has no effect.
            source = memory.clone().fill_(values((1,), dtype, seed + 1)[0])
            program = program_of(row, made, source, output, chosen)
            program.run()
            source.copy_(memory)
            program.run()
        what = (row.name, layer, plane, dtype, channels, seed, size)
        for ours, theirs in ((output, expected), (chosen, indices)):
            if ours is not None:
                moved = ours if channels is None else ours.movedim(-1, 1)
                assert_same(moved.reshape(theirs.shape), theirs, what)


def test_averages_of_negative_zeros_are_zero() -> None:
    """An average is never -0.0, since torch's sums start from 0.0."""
    x = torch.full((2, 6, 6), -0.0)
    for layer in (
        p.AvgPool2d(3, 1),
        p.AvgPool2d(3, 2),
        p.AvgPool2d(3, 1, 1),
        p.AdaptiveAvgPool2d(3),
        p.AdaptiveAvgPool2d(6),
    ):
        made = plan_for(layer, x.dtype, (6, 6), None, "cpu")
        output = x.new_empty(2, *made.result_shape)
        program_of(made.rows[0], made, x, output, None).run()
        assert not output.signbit().any()


def test_the_index_among_several_nans_is_torchs() -> None:
    """If a window has several NaNs, of either sign, the index is the one that torch returns."""
    x = values((2, 3, 9, 8), "float32", 0)
    x[0, 0, 2, 3:6] = torch.nan
    x[1, 2, 4:6, 2] = -torch.nan
    layer = p.MaxPool2d(3, 2, 1, return_indices=True)
    plan = plan_for(layer, x.dtype, (9, 8), None, "cpu")
    (row,) = plan.rows
    output, indices = torch.empty(6, *plan.result_shape), torch.empty(6, *plan.result_shape, dtype=torch.int64)
    program_of(row, plan, x.view(6, 9, 8), output, indices).run()
    for ours, theirs in zip((output, indices), reference(layer, x), strict=True):
        assert_same(ours.view(theirs.shape), theirs, layer)


def test_threads_share_nothing() -> None:
    """Several threads may compute ranges of planes of one plan at the same time."""
    x = values((64 * 3, 30, 30), "float32", 0)
    layers = [p.MaxPool2d(3, 2, 1), p.AvgPool2d(3, 2, 1), p.MaxPool2d(3, 2, 1, return_indices=True)]
    for layer, rows in zip(layers, (2, 1, 1), strict=True):
        made = plan_for(layer, x.dtype, (30, 30), None, "cpu")
        assert len(made.rows) == rows
        expected, indices = reference(layer, x[None])
        for row in made.rows:
            output, chosen = torch.empty(expected.shape[1:]), torch.empty(expected.shape[1:], dtype=torch.int64)

            def part(start: int, row=row, made=made, output=output, chosen=chosen) -> None:
                cut = slice(start, start + 7)
                program_of(row, made, x[cut], output[cut], chosen[cut] if row.indices else None).run()

            with ThreadPoolExecutor(8) as threads:
                list(threads.map(part, range(0, x.shape[0], 7)))
            assert_same(output, expected[0], (row.name, layer))
            if indices is not None:
                assert_same(chosen, indices[0], (row.name, layer))


def test_memory_need_not_be_aligned() -> None:
    """Planes whose address is not aligned to a wider integer have the same result."""
    x = values((1 + 5 * 8 * 8,), "float32", 0)[1:].view(5, 8, 8)
    for layer in (
        p.MaxPool2d((1, 2), 2),
        p.MaxPool2d(2),
        p.MaxPool2d(1, 2),
        p.AvgPool2d(2),
        p.AvgPool2d((1, 2), (1, 2)),
    ):
        made = plan_for(layer, x.dtype, (8, 8), None, "cpu")
        output = x.new_empty(5, *made.result_shape)
        program_of(made.rows[0], made, x, output, None).run()
        assert_same(output, reference(layer, x[None])[0][0], layer)
