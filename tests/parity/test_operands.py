"""Layers that take offsets, weights or boxes, through a real server, compared with their definitions and with torch."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import poolrpc as p
import poolrpc_server
from poolrpc.layers import FLOATS
from tests.operand_bytes import operand_for
from tests.parity import operands
from tests.parity.grid import cases, sampled
from tests.parity.reference import as_torch, assert_same, values
from tests.reduces import REDUCES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.parity.grid import Case

EXACT = ("max", "min", "median")
ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-18, "float64": 2.0**-44}
"""The bound of the relative error of a result, to the largest size of its cells: one rounding of half precision."""

EXAMPLES = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def client() -> Iterator[p.PoolClient]:
    """A client of an embedded server."""
    with poolrpc_server.embedded() as made:
        yield made


def assert_close(got: Any, expected: np.ndarray, x: torch.Tensor, reduce: object) -> None:
    """Compare an output with its definition: exactly if cells are chosen, and else within a bound of its dtype."""
    dtype = str(x.dtype).removeprefix("torch.")
    tensor = as_torch(np.ascontiguousarray(got))
    assert (str(tensor.dtype), tuple(tensor.shape)) == (str(x.dtype), expected.shape), reduce
    if reduce in EXACT:
        assert_same(tensor, torch.from_numpy(expected).to(x.dtype), reduce)
        return
    largest = max(1.0, float(x.double().abs().max()) if x.numel() else 1.0)
    limit = ROUNDING[dtype] * np.maximum(np.abs(expected), 4 * largest ** (1 + (reduce == "var")))
    cells, rounded = tensor.double().numpy(), torch.from_numpy(expected).to(x.dtype).double().numpy()
    with np.errstate(invalid="ignore"):
        fine = (np.abs(cells - expected) <= limit) | (np.isnan(rounded) & np.isnan(cells)) | (rounded == cells)
    assert fine.all(), (reduce, dtype, tensor, expected)


@cache
def finite(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """Return values without infinities and NaN."""
    return values(shape, dtype, 2 * seed)


@pytest.mark.parametrize("grid", [sampled, pytest.param(cases, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["SegmentPool", "RoIPool", "RoIAlign"])
def test_parity(client: p.PoolClient, name: str, grid: Callable[[str], Iterable[Case]]) -> None:
    """Every layer, dtype and size of the grid is its definition, batched and not, for one operand."""
    references = {"SegmentPool": operands.segments, "RoIPool": operands.roi_pool, "RoIAlign": operands.roi_align}
    for turn, (layer, shape, dtype) in enumerate(grid(name)):
        spec, contents = operand_for([(layer,)], shape)
        assert spec is not None
        operand = np.frombuffer(contents, spec.dtype).reshape(spec.shape)
        x = finite(shape, dtype, turn)
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).numpy()
        images = wide if name == "SegmentPool" or len(shape) == layer.spatial_dims + 2 else wide[None]
        expected = references[name](layer, images, operand)
        reduce = "max" if name == "RoIPool" else getattr(layer, "reduce", "mean")
        assert_close(client.pool(x, layer, **{layer.operand: operand}).output, expected, x, reduce)


@st.composite
def segmented(draw: Any) -> tuple[torch.Tensor, list[int], Any]:
    """Draw a tensor, offsets of segments of equal and of other lengths, empty ones too, and a reduction."""
    length = draw(st.integers(1, 40))
    lead = draw(st.sampled_from([(2, 3), (1, 1), (3,)]))
    if draw(st.booleans()):
        each = draw(st.integers(1, length))
        offsets = [*range(0, length + 1, each)]
        offsets = offsets if len(offsets) > 1 else [0, length]
    else:
        offsets = sorted(draw(st.lists(st.integers(0, length), min_size=2, max_size=12)))
    x = finite((*lead, length), draw(st.sampled_from(FLOATS)), draw(st.integers(0, 3)))
    return x, offsets, draw(st.sampled_from(REDUCES))


@EXAMPLES
@given(case=segmented())
def test_segments_are_their_definition(client: p.PoolClient, case: tuple[torch.Tensor, list[int], Any]) -> None:
    """Every segment of every plane is reduced as the definition says, in both layouts, empty ones too."""
    x, offsets, reduce = case
    layer = p.SegmentPool(reduce)
    result = client.pool(x, layer, offsets=offsets)
    expected = operands.segments(layer, x.double().numpy(), np.array(offsets))
    assert_close(result.output, expected, x, reduce)
    assert result.shape == layer.output_shape(tuple(x.shape), operand_shape=(len(offsets),))
    axis = x.ndim - 2
    last = client.pool(x.movedim(axis, -1), layer, offsets=offsets, layout="NHWC")
    assert_same(np.ascontiguousarray(np.moveaxis(last.output, -1, axis)), as_torch(result.output), "both layouts")


@EXAMPLES
@given(case=segmented())
def test_segments_are_those_of_torch_segment_reduce(
    client: p.PoolClient, case: tuple[torch.Tensor, list[int], Any]
) -> None:
    """Maxima and minima are torch.segment_reduce's, NaN included; sums and means are within its rounding."""
    x, offsets, reduce = case
    if reduce not in ("max", "min", "sum", "mean"):
        return
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, x.shape[-1])
    places = torch.tensor(offsets).expand(len(wide), -1).contiguous()
    expected = torch.segment_reduce(wide, reduce, offsets=places, axis=1).reshape(*x.shape[:-1], -1)
    got = client.pool(x, p.SegmentPool(reduce), offsets=offsets).output
    assert_close(got, expected.double().numpy(), x, reduce)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduce", REDUCES, ids=str)
def test_cells_that_are_not_finite_stay_in_their_segment(client: p.PoolClient, reduce: Any, dtype: str) -> None:
    """NaN and infinities affect their own segment alone, whose maximum and mean are NaN if it has one."""
    x = torch.ones(1, 2, 12, dtype=getattr(torch, dtype))
    x[0, 0, 4] = torch.nan
    x[0, 1, 5] = torch.inf
    output = as_torch(client.pool(x, p.SegmentPool(reduce), lengths=[4, 2, 6]).output)
    alone = as_torch(client.pool(x[..., 6:], p.SegmentPool(reduce), lengths=[6]).output)
    assert output[0, 0, 1].isnan() or reduce == "median"
    assert_same(output[..., 2:], alone, reduce)


def test_lengths_and_ids_are_offsets(client: p.PoolClient) -> None:
    """The three ways to name segments give one result; a number that no cell has is an empty segment."""
    x = finite((2, 3, 7), "float32", 1)
    layer = p.SegmentPool("max")
    expected = client.pool(x, layer, offsets=[0, 2, 2, 7]).output
    assert expected[0, 0, 1] == -np.inf
    assert np.array_equal(client.pool(x, layer, lengths=[2, 0, 5]).output, expected)
    assert np.array_equal(client.pool(x, layer, ids=[0, 0, 2, 2, 2, 2, 2]).output, expected)


@st.composite
def masked(draw: Any) -> tuple[torch.Tensor, np.ndarray, p.Layer]:
    """Draw a tensor, a mask or weights with zeros, and a global layer."""
    dims = draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), *(draw(st.integers(1, 6)) for _ in range(dims)))
    x = finite(shape, draw(st.sampled_from(FLOATS)), draw(st.integers(0, 3)))
    numbers = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 4, (shape[0], *shape[2:]))
    weights = draw(st.sampled_from([numbers > 1, numbers, numbers * 0.5, np.zeros_like(numbers)]))
    return x, weights, p.LAYERS[f"GlobalPool{dims}d"](draw(st.sampled_from(REDUCES)))


@EXAMPLES
@given(case=masked())
def test_weighted_reductions_are_their_definition(
    client: p.PoolClient, case: tuple[torch.Tensor, np.ndarray, p.Layer]
) -> None:
    """Every plane is reduced with its image's weights as the definition says, in both layouts; 0 is no cell."""
    x, weights, layer = case
    result = client.pool(x, layer, weights=weights)
    assert_close(result.output, operands.weighted(layer, x.double().numpy(), weights), x, layer.reduce)
    assert result.shape == layer.output_shape(tuple(x.shape), operand_shape=weights.shape)
    last = client.pool(x.movedim(1, -1), layer, weights=weights, layout="NHWC")
    assert_same(np.ascontiguousarray(np.moveaxis(last.output, -1, 1)), as_torch(result.output), "both layouts")
    one = client.pool(x[0], layer, weights=weights[0])
    assert_same(one.output, as_torch(result.output[0]), "one image")


@pytest.mark.parametrize("reduce", REDUCES, ids=str)
def test_what_is_in_a_cell_of_weight_0_does_not_matter(client: p.PoolClient, reduce: Any) -> None:
    """NaN and infinities in cells of weight 0 leave the result as it is, bit for bit."""
    x = finite((2, 3, 9), "float32", 1).clone()
    mask = np.array([[1, 1, 0, 1, 0, 0, 1, 1, 0]] * 2)
    expected = client.pool(x, p.GlobalPool1d(reduce), weights=mask).output
    for value in (torch.nan, torch.inf, -torch.inf, 1e30):
        x[..., [2, 4, 5, 8]] = value
        assert np.array_equal(client.pool(x, p.GlobalPool1d(reduce), weights=mask).output, expected, equal_nan=True)


def test_weights_of_one_are_no_weights(client: p.PoolClient) -> None:
    """The maximum with a mask of ones is the maximum without one, and the mean is within a rounding."""
    x = finite((3, 5, 6, 7), "float32", 2)
    ones = np.ones((3, 6, 7), bool)
    for reduce in ("max", "mean"):
        plain = client.pool(x, p.GlobalPool2d(reduce)).output
        assert_close(client.pool(x, p.GlobalPool2d(reduce), weights=ones).output, plain.astype(np.float64), x, reduce)


MAP = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8)


@pytest.mark.parametrize(
    ("layer", "box", "expected"),
    [
        (p.RoIPool(2), (1, 1, 4, 4), [18, 20, 34, 36]),
        (p.RoIPool(2), (0.5, 0.5, 4.5, 4.5), [27, 29, 43, 45]),
        (p.RoIPool(2), (6, 6, 9, 9), [63, 0, 0, 0]),
        (p.RoIPool(2), (3, 3, 2, 2), [27, 27, 27, 27]),
        (p.RoIAlign(2, 1.0, 2, aligned=True), (1.2, 1.7, 5.1, 6.3), [20.475, 22.425, 38.875, 40.825]),
        (p.RoIAlign(2, 1.0, 2), (1.2, 1.7, 5.1, 6.3), [24.975, 26.925, 43.375, 45.325]),
    ],
    ids=str,
)
def test_regions_of_torchvision_and_onnxruntime(
    client: p.PoolClient, layer: p.Layer, box: tuple[float, ...], expected: list[float]
) -> None:
    """Boxes on a map of 0 to 63 give what torchvision and onnxruntime were seen to give."""
    got = client.pool(MAP, layer, boxes=[[0, *box]]).output.reshape(-1)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@st.composite
def regions(draw: Any) -> tuple[torch.Tensor, np.ndarray, float]:
    """Draw images, boxes inside of them, across their edges, outside, and the wrong way round, and a scale."""
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    x = finite(shape, draw(st.sampled_from(FLOATS)), draw(st.integers(0, 3)))
    # Multiples of an eighth: no result depends on how a coordinate is rounded.
    number = st.integers(-40, 120).map(lambda each: each / 8)
    box = st.tuples(st.integers(0, shape[0] - 1), number, number, number, number)
    return x, np.array(draw(st.lists(box, min_size=1, max_size=5)), np.float64), draw(st.sampled_from([1.0, 0.5, 0.25]))


SIZES = st.sampled_from([1, 2, 4, (1, 2), (2, 4)])


@EXAMPLES
@given(case=regions(), size=SIZES)
def test_roi_pool_is_its_definition(
    client: p.PoolClient, case: tuple[torch.Tensor, np.ndarray, float], size: int | tuple[int, int]
) -> None:
    """RoIPool is torchvision's, exactly, for boxes anywhere, in both layouts."""
    x, boxes, scale = case
    layer = p.RoIPool(size, scale)
    wide = x.float().numpy() if x.dtype.itemsize == 2 else x.numpy()
    expected = operands.roi_pool(layer, wide, boxes)
    result = client.pool(x, layer, boxes=boxes)
    assert_close(result.output, expected, x, "max")
    assert result.shape == layer.output_shape(tuple(x.shape), operand_shape=boxes.shape)
    last = client.pool(x.movedim(1, -1), layer, boxes=boxes, layout="NHWC")
    assert_same(np.ascontiguousarray(np.moveaxis(last.output, -1, 1)), as_torch(result.output), "both layouts")


@EXAMPLES
@given(case=regions(), size=SIZES, ratio=st.integers(0, 3), aligned=st.booleans())
def test_roi_align_is_its_definition(
    client: p.PoolClient,
    case: tuple[torch.Tensor, np.ndarray, float],
    size: int | tuple[int, int],
    ratio: int,
    aligned: bool,  # noqa: FBT001 - drawn by hypothesis
) -> None:
    """RoIAlign is the C++ operator of torchvision within a rounding, for boxes anywhere, in both layouts."""
    x, boxes, scale = case
    layer = p.RoIAlign(size, scale, ratio, aligned)
    expected = operands.roi_align(layer, x.double().numpy(), boxes)
    result = client.pool(x, layer, boxes=boxes)
    assert_close(result.output, expected, x, "mean")
    assert result.shape == layer.output_shape(tuple(x.shape), operand_shape=boxes.shape)
    last = client.pool(x.movedim(1, -1), layer, boxes=boxes, layout="NHWC")
    assert_same(np.ascontiguousarray(np.moveaxis(last.output, -1, 1)), as_torch(result.output), "both layouts")


def test_many_boxes_are_computed_in_blocks(client: p.PoolClient) -> None:
    """Each box of thousands has the result that it has alone, and a box much larger than the image is only longer."""
    x = finite((2, 4, 40, 30), "float32", 1)
    random = np.random.default_rng(0)
    boxes = np.concatenate([random.integers(0, 2, (3000, 1)), random.uniform(-10, 60, (3000, 4))], 1)
    boxes[7, 1:] = (-1e6, -1e6, 1e6, 1e6)
    for layer in (p.RoIAlign(7, 0.5, aligned=True), p.RoIAlign(7, 0.5, 4), p.RoIPool(7, 0.5)):
        together = client.pool(x, layer, boxes=boxes).output
        for at in (0, 7, 1500, 2999):
            assert np.array_equal(client.pool(x, layer, boxes=boxes[at : at + 1]).output[0], together[at]), (layer, at)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layer", [p.AdaptiveAvgPool2d((None, None)), p.LPPool2d(2, 1), p.MaxPool2d(1), p.RoIAlign(1)])
def test_no_boxes_next_to_any_branch_give_an_empty_output(
    client: p.PoolClient, layer: p.Layer, dtype: str, layout: Literal["NCHW", "NHWC"]
) -> None:
    """A branch without boxes has an empty output, however the branch next to it is computed."""
    x = np.ones((1, 1, 2, 1), dtype)
    for branches in ([layer, p.RoIPool(1)], [p.RoIPool(1), layer]):
        results = client.pool_each(x, branches, layout=layout, boxes=np.zeros((0, 5)))
        shapes = [each.shape[0] for each in results]
        assert shapes == [0 if each.operand == "boxes" else 1 for each in branches]


def test_no_boxes_give_an_empty_output(client: p.PoolClient) -> None:
    """A call with no boxes has an output of the right shape without elements, and so have the layers after it."""
    x = finite((2, 3, 8, 8), "float32", 0)
    results = client.pool_steps(x, [p.RoIAlign(4), p.MaxPool2d(2), p.GlobalPool2d("mean")], boxes=np.zeros((0, 5)))
    assert [result.output.shape for result in results] == [(0, 3, 4, 4), (0, 3, 2, 2), (0, 3, 1, 1)]
