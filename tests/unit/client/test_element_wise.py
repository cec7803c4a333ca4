"""The element-wise steps: parameters, dtypes along a chain, shapes, and the errors that name what helps."""

import re

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given

import poolrpc
from poolrpc import (
    STEPS,
    AvgPool2d,
    AvgPool3d,
    GlobalPool2d,
    InvalidArgumentError,
    MaxPool1d,
    MaxPool2d,
    Normalize,
    Round,
    ToDtype,
    UnsupportedError,
    branch_shapes,
    parse_chain,
    parse_layer,
)
from poolrpc._wire.codec import Request
from poolrpc.layers import FLOATS, INTEGERS
from poolrpc.tensors import TensorSpec
from tests.unit.strategies import steps


@given(steps())
def test_repr_parses_back_to_its_step(step):
    """The repr of any step is an expression of it, also in a chain, after torchvision's prefix and with its name."""
    assert parse_layer(repr(step)) == step
    assert parse_layer(f"torchvision.transforms.v2.{step!r}") == parse_layer(f"v2.{step!r}") == step
    assert parse_chain(f"[{step!r}, MaxPool2d(2)]") == (step, MaxPool2d(2))


def test_every_step_is_exported():
    """STEPS has every step by its name, and no pooling layer is one."""
    assert {name: getattr(poolrpc, name) for name in ("ToDtype", "Normalize", "Round")} == STEPS
    assert not STEPS.keys() & poolrpc.LAYERS.keys()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("uint16", "uint16"),
        (np.float32, "float32"),
        (np.dtype("<i8"), "int64"),
        (np.dtype(">u2"), "uint16"),
        (torch.float16, "float16"),
        (torch.bfloat16, "bfloat16"),
        (ml_dtypes.bfloat16, "bfloat16"),
    ],
)
def test_a_dtype_may_be_that_of_numpy_or_torch(value, name):
    """The dtype of ToDtype is kept as its name."""
    assert ToDtype(value) == ToDtype(name)
    assert ToDtype(value).dtype == name


@pytest.mark.parametrize("value", ["bool", np.bool_, "float", float, None, 3, "uint32", np.complex64, "", ["uint8"]])
def test_another_dtype_is_rejected(value):
    """What is no dtype of an output is rejected with those that are."""
    with pytest.raises(InvalidArgumentError, match=r"^dtype: expected 'float16' or 'bfloat16' or") as raised:
        ToDtype(value)
    assert [each.field for each in raised.value.violations] == ["dtype"]


@pytest.mark.parametrize(
    ("mean", "std", "field"),
    [
        ((), 1, "mean"),
        (1, (), "std"),
        ((1,) * 65, 1, "mean"),
        (1, 0, "std"),
        (1, (1, 0.0), "std"),
        (1, (1, -0.0), "std"),
        ((1, 2), (1, 2, 3), "std"),
        (np.nan, 1, "mean"),
        (1, np.inf, "std"),
        (10**400, 1, "mean"),
        ("1", 1, "mean"),
        (True, 1, "mean"),
        ((1, "2"), 1, "mean"),
        (None, 1, "mean"),
        ({1: 2}, 1, "mean"),
    ],
    ids=repr,
)
def test_invalid_numbers_are_rejected_by_name(mean, std, field):
    """A number that is not finite, a std of 0 and unequal lengths are rejected with the parameter's name."""
    with pytest.raises(InvalidArgumentError, match=f"^{field}: expected") as raised:
        Normalize(mean, std)
    assert [each.field for each in raised.value.violations] == [field]


def test_equal_steps_are_equal():
    """Numbers may come in a list, an array or a tuple; one in a list is that of all channels."""
    assert Normalize([1, 2], np.array([3.0, 4.0])) == Normalize((1.0, 2.0), (3.0, 4.0))
    assert repr(Normalize([0.5], (2,))) == "Normalize(0.5, 2.0)"
    assert repr(Round()) == "Round()"
    assert repr(ToDtype("uint8", True)) == "ToDtype('uint8', scale=True)"


@pytest.mark.parametrize(
    ("step", "dtypes"),
    [
        (ToDtype("float32"), {*FLOATS, *INTEGERS, "bool"}),
        (ToDtype("int64"), {*FLOATS, *INTEGERS, "bool"}),
        (ToDtype("float32", scale=True), {*FLOATS, *INTEGERS, "bool"}),
        (ToDtype("uint8", scale=True), {*FLOATS, *INTEGERS}),
        (ToDtype("int32", scale=True), {*FLOATS, *INTEGERS} - {"float32"}),
        (ToDtype("int64", scale=True), {*FLOATS, *INTEGERS} - {"float32", "float64"}),
        (Normalize(1, 1), {*FLOATS}),
        (Round(), {*FLOATS, *INTEGERS}),
    ],
    ids=lambda each: repr(each) if isinstance(each, poolrpc.Layer) else None,  # a set has no order
)
def test_the_dtypes_of_a_step(step, dtypes):
    """A step takes the dtypes that torchvision takes, and the class those of any of its steps."""
    assert set(step.dtypes) == dtypes
    assert dtypes <= set(type(step).dtypes)


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 7), (2, 3, 7, 8), (2, 3, 7, 8, 9), (0, 3, 7)])
def test_a_step_keeps_the_shape(shape):
    """The output of a step has the shape of its input, for one to three spatial axes."""
    for step in (ToDtype("uint8"), Round(), Normalize((1, 2, 3), (1, 2, 3))):
        assert step.output_shape(shape) == shape


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3, 4, 5, 6), (2, -1), (2, 3.0)])
def test_a_shape_without_spatial_axes_is_rejected(shape):
    """A shape of no tensor with one to three spatial axes is rejected."""
    with pytest.raises(InvalidArgumentError, match=r"^shape: expected"):
        Round().output_shape(shape)


def test_shapes_of_chains_with_steps():
    """A step may be first, between layers and last; the spatial axes are those of the layers."""
    chain = [ToDtype("float32"), AvgPool2d(2), Round(), ToDtype("uint8"), MaxPool2d(2), Round()]
    shape, half, quarter = (2, 3, 8, 12), (2, 3, 4, 6), (2, 3, 2, 3)
    assert branch_shapes(shape, [chain]) == [(shape, half, half, half, quarter, quarter)]
    assert branch_shapes((3, 8, 12), [[Round(), MaxPool2d(2)]]) == [((3, 8, 12), (3, 4, 6))]
    assert branch_shapes(shape, [[Round()], [MaxPool2d(2)]]) == [(shape,), (half,)]


@pytest.mark.parametrize(
    ("branches", "words"),
    [
        ([[Round()]], "branches[0].layers[0].round: expected a pooling layer too"),
        ([[Round(), Round()], [ToDtype("uint8")]], "branches[0].layers[1].round: expected a pooling layer too"),
        ([[MaxPool2d(2), Round(), MaxPool1d(2)]], "expected a 2d layer like the ones before, got MaxPool1d"),
        (
            [[MaxPool2d(2), Normalize((1, 2), (1, 2))]],
            "branches[0].layers[1].normalize.mean: expected one number, or one per channel of 3, got 2",
        ),
        (
            [[Normalize(0, (1, 2, 3, 4)), MaxPool2d(2)]],
            "branches[0].layers[0].normalize.std: expected one number, or one per channel of 3, got 4",
        ),
    ],
)
def test_steps_that_do_not_fit(branches, words):
    """Steps without a layer, layers of other ranks around them, and other numbers of channels are rejected."""
    for shape, layout in (((2, 3, 8, 8), "NCHW"), ((3, 8, 8), "NCHW"), ((2, 8, 8, 3), "NHWC"), ((8, 8, 3), "NHWC")):
        with pytest.raises(InvalidArgumentError, match=re.escape(words)):
            branch_shapes(shape, branches, layout)


def request(dtype, *chains):
    """Return a request for an image."""
    return Request(TensorSpec(dtype, (1, 3, 8, 8)), tuple(map(tuple, chains)))


def test_the_dtype_of_each_step_follows_from_the_one_before():
    """The output has the dtype of the last conversion, and every layer is checked with the dtype that it gets."""
    results = request(
        "uint8",
        [ToDtype("float16"), AvgPool2d(2)],
        [ToDtype("float32"), AvgPool2d(2), Round(), ToDtype("uint8"), MaxPool2d(2, return_indices=True)],
        [MaxPool2d(2)],
        [ToDtype("float64")],
    ).check()
    assert [each.output.dtype for each in results] == ["float16", "uint8", "uint8", "float64"]
    assert results[1].indices.dtype == "int64"


@pytest.mark.parametrize(
    ("dtype", "chain", "words"),
    [
        ("uint8", [AvgPool2d(2)], "layers[0].avg_pool: AvgPool2d takes float16, bfloat16, float32, float64, int64, "),
        ("uint8", [AvgPool2d(2)], "got uint8; put ToDtype('float32') before it"),
        ("uint16", [MaxPool2d(2), GlobalPool2d("mean")], "layers[1].global_pool: GlobalPool2d takes float16, "),
        ("float16", [AvgPool3d(2)], "got float16; put ToDtype('float32') before it"),
        ("float32", [ToDtype("int16"), AvgPool2d(2)], "layers[1].avg_pool: "),
        ("float32", [ToDtype("int16"), AvgPool2d(2)], "got int16; put ToDtype('float32') before it"),
        ("uint8", [Normalize(1, 1), AvgPool2d(2)], "got uint8; put ToDtype('float32') before it"),
        ("bool", [MaxPool2d(2)], "got bool; put ToDtype('uint8') before it"),
        ("bool", [AvgPool2d(2)], "got bool; put ToDtype('float32') before it"),
        ("float32", [ToDtype("int64", scale=True), MaxPool2d(2)], "ToDtype takes float16, bfloat16, uint8"),
    ],
    ids=str,
)
def test_an_error_of_a_dtype_names_the_step_that_helps(dtype, chain, words):
    """A layer that does not take the dtype that it gets is named, with its dtypes and the conversion to put before."""
    with pytest.raises(UnsupportedError, match=re.escape(words)) as raised:
        request(dtype, chain).check()
    assert raised.value.reason == "DTYPE"


def test_the_planes_of_a_normalize_repeat():
    """A Normalize of three channels treats plane i as channel i, and all planes alike if it has one number."""
    step = Normalize((1, 2, 3), 4)
    assert (step.period, Normalize(1, 2).period, Round().period) == (3, 1, 1)
    assert step.at_plane(4) == Normalize((2, 3, 1), 4)
    assert step.at_plane(3) is step
    assert Normalize(1, 2).at_plane(5) == Normalize(1, 2)


def test_an_empty_stride_is_the_kernel_size():
    """As in torch, a stride of no values is the kernel size."""
    assert AvgPool2d(2, ()) == AvgPool2d(2, stride=[]) == AvgPool2d(2)
    assert MaxPool2d(3, stride=()) == MaxPool2d(3)


def test_a_divisor_of_zero_is_rejected():
    """Any other integer of 64 bits is a divisor."""
    with pytest.raises(InvalidArgumentError, match=r"^divisor_override: expected an integer other than 0, got 0$"):
        AvgPool2d(2, divisor_override=0)
    assert AvgPool2d(2, divisor_override=-3).divisor_override == -3
