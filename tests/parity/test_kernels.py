"""Every row of the kernels' table against torch.nn, over random layers, planes, dtypes and awkward cells.

The rows are called whether they pay or not, in blocks of one plane, of a few, and of all.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from math import inf, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import poolrpc as p
from poolrpc_server.compute.kernels import blocks, plan_for, separable_max
from poolrpc_server.compute.kernels.cost import Case
from poolrpc_server.compute.kernels.table import TABLE
from poolrpc_server.compute.kernels.windows import Windows
from tests.parity.reference import assert_same, reference, values

many = settings(
    deadline=None, max_examples=int(os.environ.get("POOLRPC_EXAMPLES", "300")), derandomize="CI" in os.environ
)
BLOCKS = st.sampled_from((1, 300, 1 << 20))
RANKS = (1, 2, 3)
LONGEST = {1: 24, 2: 9, 3: 4}
ROOM = {1: 40, 2: 20, 3: 8}


@st.composite
def sliding(draw: st.DrawFn, family: str) -> tuple[p.Layer, tuple[int, ...]]:
    """Draw a layer whose windows slide, and a plane that it can pool: just large enough, or with room."""
    dims = draw(st.sampled_from(RANKS))
    axes = []
    for _ in range(dims):
        kernel = draw(st.integers(1, LONGEST[dims]))
        stride = draw(st.one_of(st.integers(1, 5), st.integers(1, 17), st.just(kernel)))
        padding = draw(st.integers(0, kernel // 2)) if family != "LPPool" else 0
        dilation = draw(st.sampled_from((1, 1, 2, 3))) if family == "MaxPool" else 1
        span = (kernel - 1) * dilation + 1
        least = span if family != "MaxPool" and dims == 3 else max(1, span - 2 * padding, dilation - 2 * padding)
        axes.append((kernel, stride, padding, dilation, draw(st.integers(least, least + ROOM[dims]))))
    kernel, stride, padding, dilation, plane = zip(*axes, strict=True)
    ceil = draw(st.booleans())
    cls = p.LAYERS[f"{family}{dims}d"]
    if family == "MaxPool":
        return cls(kernel, stride, padding, dilation, draw(st.booleans()), ceil), plane
    if family == "LPPool":
        return cls(draw(st.sampled_from((1.0, 2.0, inf))), kernel, stride, ceil), plane
    more = {"divisor_override": draw(st.none() | st.integers(1, 9))} if dims > 1 else {}
    return cls(kernel, stride, padding, ceil, draw(st.booleans()), **more), plane


@st.composite
def adaptive(draw: st.DrawFn, family: str) -> tuple[p.Layer, tuple[int, ...]]:
    """Draw an adaptive layer and a plane: of whole windows, or of any size."""
    dims = draw(st.sampled_from(RANKS))
    cells = tuple(draw(st.integers(1, {1: 30, 2: 9, 3: 4}[dims])) for _ in range(dims))
    if draw(st.booleans()):
        plane = tuple(count * draw(st.integers(1, {1: 20, 2: 16, 3: 4}[dims])) for count in cells)
    else:
        plane = tuple(draw(st.integers(1, {1: 90, 2: 40, 3: 12}[dims])) for _ in range(dims))
    return p.LAYERS[f"{family}{dims}d"](cells), plane


def whole() -> st.SearchStrategy[tuple[p.Layer, tuple[int, ...]]]:
    """Draw a global max and a plane of any rank."""
    planes = st.sampled_from(RANKS).flatmap(lambda dims: st.tuples(*[st.integers(1, ROOM[dims])] * dims))
    return planes.map(lambda plane: (p.GlobalMaxPool(), plane))


DRAWS = {
    "MaxPool": sliding("MaxPool"),
    "AvgPool": sliding("AvgPool"),
    "LPPool": sliding("LPPool"),
    "AdaptiveMaxPool": adaptive("AdaptiveMaxPool"),
    "AdaptiveAvgPool": adaptive("AdaptiveAvgPool"),
    "GlobalMaxPool": whole(),
}


def test_every_row_is_drawn_for() -> None:
    """The table has no family that isn't held to torch here."""
    drawn = {p.LAYERS[name if name.startswith("Global") else f"{name}2d"].family for name in DRAWS}
    assert {family for row in TABLE for family in row.families} <= drawn


@pytest.mark.parametrize("name", DRAWS)
@many
@given(data=st.data(), seed=st.integers(0, 2**30), size=BLOCKS)
def test_rows_give_torchs_answer(name: str, data: st.DataObject, seed: int, size: int) -> None:
    """A kernel's output and indices are torch.nn's, with NaN, ties and infinities, in either layout and any block."""
    layer, plane = data.draw(DRAWS[name])
    dtype = data.draw(st.sampled_from(layer.dtypes))
    channels = data.draw(st.sampled_from((None, 1, 3, 9)))
    x = values((2, channels or 3, *plane), dtype, seed)
    expected, places = reference(layer, x)
    made = plan_for(layer, x.dtype, plane, channels, "cpu")
    memory = (x if channels is None else x.movedim(1, -1)).reshape(-1, *made.plane_shape).contiguous()
    for row in made.rows:
        output = memory.new_full((memory.shape[0], *made.result_shape), 7)
        chosen = torch.full(output.shape, -1) if row.indices else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "TARGET_BYTES", size)
            row.run(made, memory, output, chosen)
        what = (row.name, layer, plane, dtype, channels, seed, size)
        for ours, theirs in ((output, expected), (chosen, places)):
            if ours is not None:
                moved = ours if channels is None else ours.movedim(-1, 1)
                assert_same(moved.reshape(theirs.shape), theirs, what)
    output, chosen = made.compute(x if channels is None else x.movedim(1, -1).contiguous(), None)
    assert_same(output if channels is None else output.movedim(-1, 1), expected, ("as chosen", layer, plane, dtype))
    assert (chosen is None) == (not layer.returns_indices)


def test_what_is_bound_computes_what_is_there_now() -> None:
    """A kernel that is bound to memory gives the answer to whatever lies there, each time that it is called."""
    for layer in (
        p.MaxPool2d(2),
        p.MaxPool2d(3, 2, 1),
        p.MaxPool2d(2, 1, 1, 3),
        p.MaxPool2d(1, 2),
        p.MaxPool2d(3, 3, 1),
    ):
        for dtype in ("float32", "int8"):
            made = plan_for(layer, getattr(torch, dtype), (6, 5), None, "cpu")
            memory = values((2, 3, 6, 5), dtype, 0)
            output = memory.new_empty(2, 3, *made.result_shape)
            run = made.bind(memory, output)
            assert run is not None
            for seed in range(3):
                memory.copy_(values((2, 3, 6, 5), dtype, seed))
                run()
                assert_same(output, reference(layer, memory)[0], (layer, dtype, seed))
    assert plan_for(p.MaxPool2d(2), torch.bfloat16, (6, 5), None, "cpu").bind(memory, output) is None


def test_averages_of_negative_zeros_are_zero() -> None:
    """Torch's sums start from 0.0, so that no average is -0.0, and ours are the same bits."""
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
        made.rows[0].run(made, x, output, None)
        assert not output.signbit().any()


def test_threads_share_nothing() -> None:
    """Ranges of planes may be computed at the same time."""
    x = values((64 * 3, 30, 30), "float32", 0)
    layers = [p.MaxPool2d(3, 2, 1), p.AvgPool2d(3, 2, 1), p.MaxPool2d(3, 2, 1, return_indices=True)]
    for layer, rows in zip(layers, (2, 1, 1), strict=True):
        made = plan_for(layer, x.dtype, (30, 30), None, "cpu")
        assert len(made.rows) == rows
        expected, places = reference(layer, x[None])
        for row in made.rows:
            output, chosen = torch.empty(expected.shape[1:]), torch.empty(expected.shape[1:], dtype=torch.int64)

            def part(start: int, row=row, made=made, output=output, chosen=chosen) -> None:
                cut = slice(start, start + 7)
                row.run(made, x[cut], output[cut], chosen[cut])

            with ThreadPoolExecutor(8) as threads:
                list(threads.map(part, range(0, x.shape[0], 7)))
            assert_same(output, expected[0], (row.name, layer))
            if places is not None:
                assert_same(chosen, places[0], (row.name, layer))


def test_memory_may_start_anywhere() -> None:
    """Planes that don't start where a wider integer could give the same answer."""
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
        made.rows[0].run(made, x, output, None)
        assert_same(output, reference(layer, x[None])[0][0], layer)


def test_blocks_cover_the_planes() -> None:
    """Blocks follow each other over all planes, none of them empty."""
    for planes in (1, 7, 100):
        for size in (0, 1, blocks.TARGET_BYTES // 3, blocks.TARGET_BYTES * 5):
            program = blocks.Program(planes, size)
            assert program.step * program.full + program.tail == planes
            assert program.step >= 1
            assert program.tail < program.step


def test_passes_grow_with_the_logarithm_of_the_kernel() -> None:
    """A window of 63 cells is joined from others in six passes, with any stride."""
    assert separable_max.run_shifts(63, 1) == (1, 2, 4, 8, 16, 31)
    assert sum(len(stage.offsets) - 1 for stage in separable_max.axis_passes(63, 1, 31, 1, 256)) == 6
    assert len(separable_max.axis_passes(3, 2, 1, 1, 56)) == 1


def test_the_work_of_a_plan_is_that_of_its_kernel() -> None:
    """Work counts passes where a kernel doubles, and every window's cells where torch computes."""
    large = plan_for(p.MaxPool2d(63, 1, 31), torch.float32, (256, 256), None, "cpu")
    assert large.choose(16).name == "separable max"
    assert large.work(16) < 16 * 256 * 256 * 20
    eager = plan_for(p.AvgPool2d(63, 1, 31), torch.float32, (256, 256), None, "cuda")
    assert eager.work(16) == 16 * 256 * 256 * 63 * 63


def test_a_plan_explains_itself_on_one_line() -> None:
    """A plan says what comes out, and which kernel is taken from how many planes on, or why none."""
    made = plan_for(p.MaxPool2d(2), torch.float32, (112, 112), None, "cpu")
    head = "MaxPool2d(2) float32 112x112 -> 56x56 NCHW on cpu: "
    assert made.explain() == head + "eager torch from 1, separable max from 8 planes on, by estimate"
    assert "eager torch, no kernel" in plan_for(p.LPPool2d(3, 2), torch.float32, (8, 8), None, "cpu").explain()
    assert plan_for(p.MaxPool2d(2), torch.float32, (8, 8), 3, "cuda").explain().endswith("on cuda: torch's own kernels")


def test_plans_are_made_once_and_choose_by_the_number_of_planes() -> None:
    """The same key gives the same plan; a small call is torch's, and a large one a kernel's."""
    made = plan_for(p.MaxPool2d(2), torch.float32, (56, 56), None, "cpu")
    assert plan_for(p.MaxPool2d((2, 2)), torch.float32, (56, 56), None, "cpu") is made
    assert made.choose(1) is None
    assert made.choose(512).name == "separable max"
    assert plan_for(p.MaxPool2d(2), torch.float32, (56, 56), None, "cuda").choose(512) is None


def test_windows_of_channels_last_leave_channels_alone() -> None:
    """With channels last, each channel is a window of its own."""
    windows = Windows.of(p.MaxPool2d(3, 2, 1, 2).geometry()).with_channels()
    assert windows == Windows((3, 3, 1), (2, 2, 1), (1, 1, 0), (2, 2, 1))
    assert Case(torch.float32, 2, (4, 4, 3), (2, 2, 3), windows).cells == prod((2, 4, 4, 3))
