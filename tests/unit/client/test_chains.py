"""Chains and branches: layouts, valid sequences, and the shape after every layer."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import (
    AdaptiveMaxPool2d,
    AvgPool1d,
    AvgPool2d,
    GlobalPool1d,
    GlobalPool2d,
    InvalidArgumentError,
    LimitExceededError,
    MaxPool2d,
    MaxUnpool2d,
    branch_shapes,
)
from poolrpc.chains import Planes, as_chain, from_channels_first, to_channels_first
from poolrpc.tensors import ITEM_BYTES, TensorSpec
from tests.unit.strategies import classes, layers, shapes


@pytest.mark.parametrize("shape", [[8, 64, 56, 56], np.array([8, 64, 56, 56])], ids=["list", "array"])
def test_the_shape_is_any_sequence_of_integers(shape):
    """As for a layer's own output_shape; floats are not rounded."""
    assert branch_shapes(shape, [MaxPool2d(2)]) == [((8, 64, 28, 28),)]
    assert MaxPool2d(2).output_shape(shape) == (8, 64, 28, 28)
    for function in (lambda other: branch_shapes(other, MaxPool2d(2)), MaxPool2d(2).output_shape):
        with pytest.raises(InvalidArgumentError, match="expected an integer"):
            function((8, 64, 56.5, 56))


@given(st.integers(1, 3).flatmap(lambda dims: st.tuples(st.just(dims), shapes(dims))))
def test_layouts_convert_as_moveaxis(case):
    """Channels last is NumPy's moveaxis of channels first, batched or not, and converts back."""
    dims, shape = case
    last = np.moveaxis(np.empty(shape, np.int8), -dims - 1, -1).shape
    assert from_channels_first(shape, dims, "NHWC") == last
    assert to_channels_first(last, dims, "NHWC") == shape
    assert from_channels_first(shape, dims, "NCHW") == to_channels_first(shape, dims, "NCHW") == shape


@st.composite
def calls(draw):
    """Draw a shape and branches that mostly fit it."""
    dims = draw(st.integers(1, 3))
    among = [cls for cls in classes(dims) if not cls.operand]
    layer = layers(among, most=2, most_output=5, indices=False)
    branches = draw(st.lists(st.lists(layer, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3))
    return draw(shapes(dims, most=9).filter(lambda shape: len(shape) == dims + 2)), branches


@given(calls(), st.sampled_from(["NCHW", "NHWC"]))
def test_branch_shapes_apply_each_layer_in_turn(call, layout):
    """Each shape is its layer's output shape for the one before, from the input on, in either layout."""
    shape, branches = call
    dims = len(shape) - 2
    expected, failed = [], None
    for i, chain in enumerate(branches):
        step, steps = shape, []
        for j, layer in enumerate(chain):
            try:
                step = layer.output_shape(step)
            except InvalidArgumentError:
                failed = failed or f"branches[{i}].layers[{j}].{layer.family}."
                break
            steps.append(from_channels_first(step, dims, layout))
        expected.append(tuple(steps))
    shape_in_layout = from_channels_first(shape, dims, layout)
    if failed:
        with pytest.raises(InvalidArgumentError) as raised:
            branch_shapes(shape_in_layout, branches, layout)
        assert raised.value.violations[0].field.startswith(failed)
    else:
        assert branch_shapes(shape_in_layout, branches, layout) == expected


SQUARE = (2, 3, 8, 8)
WITH_INDICES = MaxPool2d(2, return_indices=True)


@pytest.mark.parametrize(
    ("branches", "field", "description"),
    [
        (
            [[MaxPool2d(2)], [AvgPool2d(2), MaxPool2d(5)]],
            "branches[1].layers[1].max_pool.kernel_size",
            "effective kernel",
        ),
        ([[MaxPool2d(1, dilation=9)]], "branches[0].layers[0].max_pool.dilation", "at most the padded input"),
        ([[AdaptiveMaxPool2d(2**31 - 1)]], "branches[0].layers[0].adaptive_max_pool.output_size", "output * input"),
        ([[WITH_INDICES, AvgPool2d(2)]], "branches[0].layers[0].max_pool.return_indices", "last layer of a chain"),
        ([[AvgPool2d(2), MaxUnpool2d(2)]], "branches[0].layers[1].max_unpool", "first in its chain"),
        ([[AvgPool2d(2)], [AvgPool1d(2)]], "branches[1].layers[0].avg_pool", "expected a 2d layer"),
        (
            [[GlobalPool2d("max"), AvgPool2d(1), GlobalPool1d("max")]],
            "branches[0].layers[2].global_pool",
            "expected a 2d layer",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("branches") else "",
)
def test_an_error_names_the_layer_and_the_parameter(branches, field, description):
    """An error has the path of the layer and the parameter in the request."""
    with pytest.raises(InvalidArgumentError, match=re.escape(description)) as raised:
        branch_shapes(SQUARE, branches)
    assert [each.field for each in raised.value.violations] == [field]


def test_indices_are_returned_last_and_taken_first():
    """A chain may end with return_indices and begin with MaxUnpool, in every branch."""
    branches = [[MaxUnpool2d(2), MaxPool2d(2), WITH_INDICES], [WITH_INDICES]]
    assert branch_shapes(SQUARE, branches) == [
        ((2, 3, 16, 16), (2, 3, 8, 8), (2, 3, 4, 4)),
        ((2, 3, 4, 4),),
    ]


def test_indices_of_steps_that_are_returned():
    """With `outputs`, the layers whose outputs are returned may return indices, and no others."""
    chain = [WITH_INDICES, AvgPool2d(2), WITH_INDICES]
    shapes = [((2, 3, 4, 4), (2, 3, 2, 2), (2, 3, 1, 1))]
    for outputs in ([(0, 2)], [(0, 1, 2)], [(0,)]):  # what follows the last output is not computed
        assert branch_shapes(SQUARE, [chain], outputs=outputs) == shapes
    for outputs, number in (([(1, 2)], 0), ([(1,)], 0), ([()], 0)):
        with pytest.raises(InvalidArgumentError, match="expected return_indices only on") as raised:
            branch_shapes(SQUARE, [chain], outputs=outputs)
        assert raised.value.violations[0].field == f"branches[0].layers[{number}].max_pool.return_indices"


@pytest.mark.parametrize("numbers", [(2,), (0, 2), (-1,), (1, 0), (0, 0), (0, 1, 1), (2**32 - 1,)], ids=repr)
def test_outputs_that_a_branch_does_not_have(numbers):
    """Numbers of layers are in their range and in ascending order, so that none is repeated."""
    with pytest.raises(InvalidArgumentError, match=r"in ascending order, each in 0..1, got") as raised:
        branch_shapes(SQUARE, [[MaxPool2d(2)], [MaxPool2d(2), AvgPool2d(2)]], outputs=[(), numbers])
    assert raised.value.violations[0].field == "branches[1].outputs"


def test_a_request_has_a_limited_number_of_outputs():
    """Two branches may return every step of 64 layers; with a third there are too many outputs."""
    chain, steps = [MaxPool2d(1)] * 64, tuple(range(64))
    assert len(branch_shapes(SQUARE, [chain] * 2, outputs=[steps] * 2)) == 2
    with pytest.raises(LimitExceededError, match="at most 128 outputs in all, got 129") as raised:
        branch_shapes(SQUARE, [chain] * 3, outputs=[steps, steps, ()])
    assert raised.value.reason == "TOO_MANY_OUTPUTS"
    assert raised.value.metadata == {"limit": "128", "actual": "129"}


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (8, 8, 3)])
def test_channels_last_shapes_stay_channels_last(shape):
    """The shapes of a channels-last input are channels last after every layer."""
    steps = branch_shapes(shape, [[MaxPool2d((2, 4)), AvgPool2d((2, 1))]], "NHWC")[0]
    lead = shape[:-3]
    assert steps == ((*lead, 4, 2, 3), (*lead, 2, 2, 3))


def test_a_global_layer_pools_one_image_or_several():
    """One image and a batch of them are pooled over their spatial axes, in either layout, alone and in a chain."""
    mean = GlobalPool2d("mean")
    assert branch_shapes((3, 8, 9), [[mean], [MaxPool2d(2), mean]]) == [((3, 1, 1),), ((3, 4, 4), (3, 1, 1))]
    assert branch_shapes((8, 9, 3), [[mean]], "NHWC") == [((1, 1, 3),)]
    assert branch_shapes((2, 3, 8, 9), [[mean]]) == [((2, 3, 1, 1),)]
    assert branch_shapes((2, 8, 9, 3), [[mean]], "NHWC") == [((2, 1, 1, 3),)]
    assert branch_shapes((5, 3, 8), [[GlobalPool1d("max")]]) == [((5, 3, 1),)]


@pytest.mark.parametrize("layout", ["nchw", "NWHC", "", None, 1, "x" * 10_000])
def test_an_unknown_layout_is_rejected(layout):
    """The error names both layouts, and has only the beginning of a long value."""
    with pytest.raises(InvalidArgumentError, match=r"^layout: expected one of NCHW, NHWC, got") as raised:
        branch_shapes(SQUARE, [[MaxPool2d(2)]], layout)
    assert len(str(raised.value)) < 200


ONE, TWO = MaxPool2d(2), AvgPool2d(2)


@pytest.mark.parametrize("value", [ONE, [ONE], (ONE,), iter([ONE]), "MaxPool2d(2)", "[MaxPool2d(2)]", ["MaxPool2d(2)"]])
def test_as_chain_accepts_a_layer(value):
    """A layer, an expression, and a sequence of one of these are the same chain."""
    assert as_chain(value) == (ONE,)


@pytest.mark.parametrize(
    "value",
    [[ONE, TWO], iter([ONE, TWO]), "[MaxPool2d(2), AvgPool2d(2)]", ["MaxPool2d(2)", TWO], ["[MaxPool2d(2)]", TWO]],
)
def test_as_chain_accepts_several_layers(value):
    """Layers and expressions may be mixed, and an expression may be a list."""
    assert as_chain(value) == (ONE, TWO)


@pytest.mark.parametrize("value", [[], (), None, 2, MaxPool2d, [MaxPool2d], [[ONE]], [None], [ONE, [TWO]], b"x"])
def test_as_chain_rejects_everything_else(value):
    """Nothing, a class and a nested list are rejected, with what was received."""
    with pytest.raises(InvalidArgumentError, match=r"^layers: expected a layer or a sequence of layers, got"):
        as_chain(value)


def test_a_nested_list_is_not_a_chain():
    """The error says which call takes several branches."""
    with pytest.raises(InvalidArgumentError, match=r"got \[\[MaxPool2d\(2\)\]\]; pool_each takes several branches$"):
        as_chain([[ONE]])


@pytest.mark.parametrize(
    ("value", "branches"),
    [
        (ONE, [[ONE]]),
        ("MaxPool2d(2)", [[ONE]]),
        ([ONE, TWO], [[ONE], [TWO]]),
        ([ONE, [ONE, TWO]], [[ONE], [ONE, TWO]]),
        (["MaxPool2d(2)", "[MaxPool2d(2), AvgPool2d(2)]"], [[ONE], [ONE, TWO]]),
        ("[[MaxPool2d(2)], [MaxPool2d(2), AvgPool2d(2)]]", [[ONE], [ONE, TWO]]),
        ("[[MaxPool2d(2), AvgPool2d(2)]]", [[ONE, TWO]]),
        (iter([["MaxPool2d(2)", TWO]]), [[ONE, TWO]]),
    ],
)
def test_branch_shapes_accepts_branches_in_any_form(value, branches):
    """Branches are layers, expressions, and lists of them; an expression may also be all branches."""
    assert branch_shapes(SQUARE, value) == branch_shapes(SQUARE, branches)


@pytest.mark.parametrize("value", ["[MaxPool2d(2), AvgPool2d(2)]", "MaxPool2d(2), AvgPool2d(2)"])
def test_an_expression_that_may_be_a_chain_or_branches_is_rejected(value):
    """As a list it would be two branches, and as an expression it is a chain; the error says how to write either."""
    with pytest.raises(
        InvalidArgumentError, match=r"^branches: expected \[\[...\]\] for a chain, or \[\[...\], \[...\]\]"
    ):
        branch_shapes(SQUARE, value)


@pytest.mark.parametrize("value", [[], (), None, 3])
def test_no_branches_are_rejected(value):
    """A call has at least one branch."""
    with pytest.raises(InvalidArgumentError, match=r"^branches: expected at least one branch, got"):
        branch_shapes(SQUARE, value)


@pytest.mark.parametrize(
    ("shape", "axes", "count", "cells", "three"),
    [
        ((2, 3, 5, 7), (2, "NCHW"), 6, 35, (1, 3, 5, 7)),
        ((3, 5, 7), (2, "NCHW"), 3, 35, (1, 3, 5, 7)),
        ((2, 5, 7, 3), (2, "NHWC"), 2, 105, (3, 5, 7, 3)),
        ((5, 7, 3), (2, "NHWC"), 1, 105, (3, 5, 7, 3)),
        ((2, 3, 9), (1, "NCHW"), 6, 9, (1, 3, 9)),
        ((2, 9, 3), (1, "NHWC"), 2, 27, (3, 9, 3)),
        ((2, 3, 4, 5, 6), (3, "NCHW"), 6, 120, (1, 3, 4, 5, 6)),
        ((0, 3, 5, 7), (2, "NCHW"), 0, 35, (1, 3, 5, 7)),
        ((0, 5, 7, 3), (2, "NHWC"), 0, 105, (3, 5, 7, 3)),
    ],
)
def test_planes_of_a_tensor(shape, axes, count, cells, three):
    """Planes have a count, a size and a spec, in either layout, batched or not."""
    dims, layout = axes
    planes = Planes(TensorSpec("float16", shape, layout), dims)
    assert (planes.count, planes.plane_bytes) == (count, 2 * cells)
    assert planes.spec_for(3) == TensorSpec("float16", three, layout)


@given(
    st.integers(1, 3).flatmap(lambda dims: st.tuples(st.just(dims), shapes(dims))),
    st.sampled_from(["NCHW", "NHWC"]),
    st.sampled_from(list(ITEM_BYTES)),
)
def test_all_planes_make_the_tensor(case, layout, dtype):
    """The spec of all planes has the tensor's bytes and planes of the same size."""
    dims, shape = case
    planes = Planes(TensorSpec(dtype, from_channels_first(shape, dims, layout), layout), dims)
    whole = planes.spec_for(planes.count)
    assert whole.nbytes == planes.spec.nbytes == planes.count * planes.plane_bytes
    assert (Planes(whole, dims).count, Planes(whole, dims).plane_bytes) == (planes.count, planes.plane_bytes)
    assert to_channels_first(whole.shape, dims, layout)[-dims:] == shape[-dims:]
