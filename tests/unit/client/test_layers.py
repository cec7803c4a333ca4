"""Layers as values: torch.nn's signatures, bounds, canonical forms, dtypes and windows."""

import copy
import inspect
import math
import pickle
import re
from dataclasses import FrozenInstanceError, fields, replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import poolrpc
from poolrpc import LAYERS, AvgPool2d, InvalidArgumentError, MaxPool1d, MaxPool2d
from poolrpc._shapes.limits import MAX_BINS, MAX_NUMEL, MAX_PARAMETER
from poolrpc._shapes.rules import adaptive_window
from poolrpc.layers import FLOATS, INTEGERS
from poolrpc.tensors import ITEM_BYTES
from tests.unit.strategies import CLASSES, layers, shapes

IN_TORCH = [cls for cls in CLASSES if hasattr(nn, cls.__name__)]
# Arguments that a class requires in addition to the parameter under test.
REQUIRED = {"lp_pool": {"norm_type": 2}, "fractional_max_pool": {"output_size": 2}, "pool": {"reduce": "mean"}}


def with_parameter(name):
    """Return the layers that have a parameter, and the other arguments that they require."""
    cases = []
    for cls in CLASSES:
        names = [each.name for each in fields(cls)]
        if name in names:
            others = {"kernel_size": 6} if "kernel_size" in names else {}
            others |= REQUIRED.get(cls.family, {}) | ({"output_size": 2} if cls.family.startswith("adaptive") else {})
            others.pop(name, None)
            cases.append(pytest.param(cls, others, id=f"{cls.__name__}-{name}"))
    return cases


@pytest.mark.parametrize("cls", IN_TORCH)
def test_a_signature_is_that_of_torch_nn(cls):
    """Parameters have torch.nn's names, order and defaults, but for seed and MaxUnpool's output_size."""
    expected = [
        ("seed", 0) if name == "_random_samples" else (name, parameter.default)
        for name, parameter in inspect.signature(getattr(nn, cls.__name__)).parameters.items()
    ]
    if cls.family == "max_unpool":
        expected.append(("output_size", None))
    parameters = inspect.signature(cls).parameters
    assert [(name, parameter.default) for name, parameter in parameters.items()] == expected


def test_every_pooling_layer_of_torch_nn_exists():
    """The layers are those of torch.nn, those that reduce windows and planes, segments and regions."""
    modules = nn.modules.pooling
    in_torch = {name for name in modules.__all__ if inspect.isclass(getattr(modules, name))}
    others = {f"{family}{dims}d" for family in ("GlobalPool", "Pool") for dims in (1, 2, 3)}
    assert set(LAYERS) == in_torch | others | {"BlurPool2d", "SegmentPool", "RoIPool", "RoIAlign"}
    assert all(LAYERS[name].__name__ == name and getattr(poolrpc, name) is LAYERS[name] for name in LAYERS)


@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation", "output_size"])
@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        2.0,
        np.float64(2),
        math.nan,
        "2",
        b"22",
        {2: 2},
        {2},
        ...,
        -1,
        2**31,
        2**63,
        (),
        (2, 2, 2, 2),
        (2, 2.0),
        (True,),
        ("2",),
        ((2,),),
        (-1,),
        np.array([2.0]),
        np.array([[2]]),
        np.array(2.0),
        np.array(True),
        np.array(-1),
        np.array("2"),
        torch.tensor(2.5),
        torch.tensor(True),
    ],
    ids=repr,
)
def test_an_invalid_size_is_rejected_by_name(name, value):
    """A bool, a float, a string, a wrong length, and a value out of bounds are rejected with the parameter's name."""
    if name == "stride" and isinstance(value, tuple) and not value:
        pytest.skip("torch reads an empty stride as none")
    for cls, others in (case.values for case in with_parameter(name)):
        with pytest.raises(InvalidArgumentError, match=f"^{name}: expected") as raised:
            cls(**others, **{name: value})
        assert [each.field for each in raised.value.violations] == [name]


@pytest.mark.parametrize("value", [np.array(2.5), np.array([2, 2]), torch.tensor(2.5), torch.tensor([2, 2])], ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        lambda value: poolrpc.FractionalMaxPool2d(2, 2, seed=value),
        lambda value: AvgPool2d(2, divisor_override=value),
        lambda value: MaxPool2d((2, value)),
        lambda value: MaxPool2d(2).output_shape((1, 1, 4, value)),
    ],
    ids=["seed", "divisor_override", "kernel_size", "shape"],
)
def test_an_array_is_rejected_as_an_integer(make, value):
    """An array has __index__ but is rejected unless it is an integer scalar."""
    with pytest.raises(InvalidArgumentError, match=r"expected an integer"):
        make(value)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("kernel_size", 1, MAX_PARAMETER),
        ("stride", 1, MAX_PARAMETER),
        ("dilation", 1, MAX_PARAMETER),
        ("padding", 0, 5),
        ("seed", 0, 2**64 - 1),
        ("divisor_override", -(2**63), 2**63 - 1),
        ("output_size", 1, MAX_NUMEL),
    ],
)
def test_bounds_are_inclusive(name, low, high):
    """An integer parameter accepts its smallest and its largest value, and none beyond."""
    cases = with_parameter(name)
    assert cases
    for cls, others in (case.values for case in cases):
        # MaxUnpool's padding is not limited by its kernel.
        highest = MAX_PARAMETER if name == "padding" and cls.operand else high
        if cls is poolrpc.BlurPool2d:
            highest = {"kernel_size": 127, "stride": 255}[name]
        highest = MAX_BINS if cls.operand == "boxes" else highest
        for value in (low, highest):
            assert set(np.atleast_1d(getattr(cls(**others, **{name: value}), name))) == {value}
        for value in (low - 1, highest + 1):
            with pytest.raises(InvalidArgumentError, match=f"^{name}: expected"):
                cls(**others, **{name: value})


@pytest.mark.parametrize(
    "cls", [MaxPool1d, MaxPool2d, poolrpc.MaxPool3d, poolrpc.AvgPool1d, AvgPool2d, poolrpc.AvgPool3d]
)
def test_padding_is_less_than_the_span_of_a_window(cls):
    """Padding is accepted if it is less than the span of a window, before and after an axis, for every small window."""
    dilations = range(1, 4) if cls.family == "max_pool" else [1]
    for kernel, padding, dilation in product(range(1, 6), range(16), dilations):
        arguments = {"kernel_size": kernel} | ({"dilation": dilation} if dilation > 1 else {})
        accepted = padding <= dilation * (kernel - 1)
        for value in (padding, ((0, padding),), ((padding, 0),)):
            if accepted:
                assert cls(padding=value, **arguments).geometry()[0][2:4] in {
                    (padding,) * 2,
                    (0, padding),
                    (padding, 0),
                }
            else:
                with pytest.raises(InvalidArgumentError, match=r"^padding: expected less than the span of a window"):
                    cls(padding=value, **arguments)


@pytest.mark.parametrize(
    ("value", "canonical"),
    [
        (1, 1),
        ((1, 1), 1),
        ((1, 2), (1, 2)),
        (((1, 1), (1, 1)), 1),
        (((1, 1), (2, 2)), (1, 2)),
        (((0, 1), (0, 1)), ((0, 1), (0, 1))),
        (((0, 1),), ((0, 1), (0, 1))),
        ((1, (0, 2)), ((1, 1), (0, 2))),
        ([[0, 1], [0, 1]], ((0, 1), (0, 1))),
        (np.array([[1, 1], [2, 2]]), (1, 2)),
        ("valid", 0),
        ("same", "same"),
        ("same_lower", "same_lower"),
    ],
    ids=repr,
)
def test_equal_paddings_are_one_value(value, canonical):
    """Layers with the same padding are equal, however it is written, and their expression has the shortest form."""
    layer = MaxPool2d(3, padding=value)
    assert layer == MaxPool2d(3, padding=canonical)
    assert type(layer.padding) is type(canonical)
    assert layer.padding == canonical
    assert repr(layer) == (f"MaxPool2d(3, padding={canonical!r})" if canonical else "MaxPool2d(3)")
    assert poolrpc.parse_layer(repr(layer)) == layer


@pytest.mark.parametrize(
    "value", [((1, 2, 3),), ((1,), (1,)), "SAME", "full", (1, "same"), ((0, True),), ((0, -1),), (((0, 1),),)], ids=repr
)
def test_an_invalid_padding_is_rejected(value):
    """What is neither cells, nor pairs of cells, nor the name of a rule, is rejected as padding."""
    with pytest.raises(InvalidArgumentError, match=r"^padding: expected"):
        MaxPool2d(3, padding=value)


@pytest.mark.parametrize("padding", ["same", "same_lower"])
@pytest.mark.parametrize(
    ("size", "windows", "total"),
    [(5, (2, 2, 1), 1), (5, (3, 2, 1), 2), (6, (3, 2, 1), 1), (2, (1, 3, 1), 0), (5, (2, 1, 2), 2), (7, (4, 1, 1), 3)],
)
def test_same_padding_depends_on_the_size(padding, size, windows, total):
    """A rule pads as much as ceil(size / stride) windows need, and its odd cell is after the input, or before it."""
    kernel, stride, dilation = windows
    layer = MaxPool1d(kernel, stride, padding, dilation)
    more, less = total - total // 2, total // 2
    pair = (less, more) if padding == "same" else (more, less)
    assert layer.resolved((size,)) == MaxPool1d(kernel, stride, (pair,), dilation)
    assert layer.output_shape((1, 1, size)) == (1, 1, math.ceil(size / stride))


def test_a_rule_for_the_padding_excludes_ceil_mode():
    """A padding that covers the input has no partial windows, so that ceil_mode has no meaning."""
    for cls in (MaxPool2d, AvgPool2d):
        with pytest.raises(InvalidArgumentError, match=r"^ceil_mode: expected False with padding='same'"):
            cls(3, padding="same", ceil_mode=True)
        assert cls(3, padding="valid", ceil_mode=True).padding == 0


@pytest.mark.parametrize("name", ["ceil_mode", "return_indices", "count_include_pad"])
@pytest.mark.parametrize("value", [1, 0, None, "yes", 1.0, [True]], ids=repr)
def test_a_flag_is_a_bool(name, value):
    """A flag accepts only Python's and NumPy's bools."""
    for cls, others in (case.values for case in with_parameter(name)):
        with pytest.raises(InvalidArgumentError, match=f"^{name}: expected True or False"):
            cls(**others, **{name: value})
        assert getattr(cls(**others, **{name: np.True_}), name) is True


@pytest.mark.parametrize("cls", [poolrpc.LPPool1d, poolrpc.LPPool2d, poolrpc.LPPool3d])
@pytest.mark.parametrize("norm", [0, -1, -0.0, -math.inf, math.nan, True, "2", None, [2.0], 1j, 10**400], ids=repr)
def test_a_norm_is_above_0(cls, norm):
    """A norm that is not a positive number is rejected."""
    with pytest.raises(InvalidArgumentError, match=r"^norm_type: expected a"):
        cls(norm, 2)


def test_a_norm_may_be_infinite():
    """The infinite norm is a maximum, which in 3d accepts planes that an average rejects."""
    assert repr(poolrpc.LPPool2d(math.inf, 2)) == "LPPool2d(inf, 2)"
    assert poolrpc.LPPool3d(math.inf, 3, 2, ceil_mode=True).output_shape((1, 1, 2, 2, 2)) == (1, 1, 1, 1, 1)
    with pytest.raises(InvalidArgumentError, match="kernel_size"):
        poolrpc.LPPool3d(2, 3, 2, ceil_mode=True).output_shape((1, 1, 2, 2, 2))


@pytest.mark.parametrize("cls", [poolrpc.FractionalMaxPool2d, poolrpc.FractionalMaxPool3d])
@pytest.mark.parametrize(
    "ratio", [0, 1, 1.0, 0.0, -0.5, 2, math.nan, math.inf, True, "0.5", (), (0.5,) * 4, (0.5, None)]
)
def test_a_ratio_lies_between_0_and_1(cls, ratio):
    """A ratio that is not a number between 0 and 1, exclusive, is rejected."""
    with pytest.raises(InvalidArgumentError, match=r"^output_ratio: expected"):
        cls(2, output_ratio=ratio)


@pytest.mark.parametrize("cls", [poolrpc.FractionalMaxPool2d, poolrpc.FractionalMaxPool3d])
@pytest.mark.parametrize("arguments", [{}, {"output_size": 2, "output_ratio": 0.5}])
def test_a_fractional_layer_has_a_size_or_a_ratio(cls, arguments):
    """Neither or both of the output size and the ratio are rejected."""
    with pytest.raises(InvalidArgumentError, match=r"^output_size: expected either output_size or output_ratio, got"):
        cls(2, **arguments)


@pytest.mark.parametrize("size", [None, (None, None, None, None), (None, 0), (None, 2.0), (None, True)])
def test_an_adaptive_size_may_be_none_only_in_a_tuple(size):
    """None keeps the input's size on its axis, and the other values are still checked."""
    assert poolrpc.AdaptiveMaxPool2d((None, 3)).output_size == (None, 3)
    with pytest.raises(InvalidArgumentError, match=r"^output_size: expected"):
        poolrpc.AdaptiveAvgPool2d(size)


@pytest.mark.parametrize(
    "same",
    [
        (2, 2),
        [2, 2],
        (2,),
        [2],
        np.int64(2),
        np.uint8(2),
        np.array([2, 2]),
        np.array(2),
        np.array(2, np.uint8),
        (np.array(2), 2),
        torch.tensor(2),
        (np.int16(2), 2),
        torch.Size([2, 2]),
    ],
    ids=repr,
)
def test_equal_parameters_make_equal_layers(same):
    """A tuple of equal values, a list, an array and NumPy's integers become the same Python ints."""
    layer = MaxPool2d(same, stride=same, dilation=same)
    assert layer == MaxPool2d(2, stride=2, dilation=2)
    assert hash(layer) == hash(MaxPool2d(2, stride=2, dilation=2))
    assert [type(value) for value in (layer.kernel_size, layer.stride, layer.dilation)] == [int, int, int]


@pytest.mark.parametrize("array", [np.array, torch.tensor], ids=["NumPy", "torch"])
def test_a_parameter_may_be_an_array_without_axes(array):
    """Sizes, flags, ratios, norms and seeds become Python's numbers, so that layers stay equal and can be sent."""
    cases = [
        (poolrpc.AdaptiveMaxPool2d(array(3), return_indices=array(True)), poolrpc.AdaptiveMaxPool2d(3, True)),
        (poolrpc.AdaptiveAvgPool2d((None, array(3))), poolrpc.AdaptiveAvgPool2d((None, 3))),
        (AvgPool2d(4, padding=array(0), divisor_override=array(3)), AvgPool2d(4, divisor_override=3)),
        (poolrpc.LPPool2d(array(2.5), array(2)), poolrpc.LPPool2d(2.5, 2)),
        (
            poolrpc.FractionalMaxPool2d(2, output_ratio=array(0.5), seed=array(7)),
            poolrpc.FractionalMaxPool2d(2, output_ratio=0.5, seed=7),
        ),
        (
            poolrpc.FractionalMaxPool2d(2, output_ratio=(array(0.5), 0.25)),
            poolrpc.FractionalMaxPool2d(2, output_ratio=(0.5, 0.25)),
        ),
        (poolrpc.MaxUnpool2d(2, output_size=array(9)), poolrpc.MaxUnpool2d(2, output_size=9)),
    ]
    for layer, expected in cases:
        assert (layer, repr(layer), hash(layer)) == (expected, repr(expected), hash(expected))


def test_layers_of_different_classes_or_parameters_differ():
    """A layer is unequal to layers of other classes or parameters."""
    assert len({MaxPool1d(2), MaxPool2d(2), MaxPool2d((2, 3)), MaxPool2d((3, 2)), MaxPool2d(2, ceil_mode=True)}) == 5


@given(st.data(), layers([cls for cls in CLASSES if cls.operand not in {"offsets", "boxes"}], most=4, most_output=4))
def test_every_axis_of_an_output_has_a_cell(data, layer):
    """Of a plane that no window fits there is no output: the layer rejects it, and returns no size of 0."""
    plane = data.draw(st.tuples(*[st.integers(1, 6)] * layer.spatial_dims))
    try:
        out = layer.output_plane(plane)
    except InvalidArgumentError:
        return
    assert min(out, default=1) >= 1, (layer, plane)


def test_a_blur_needs_the_cells_of_its_filter():
    """Two cells with a stride of one are not padded, so that a plane of one row has no output."""
    assert poolrpc.BlurPool2d(2, 1).output_shape((1, 2, 2)) == (1, 1, 1)
    with pytest.raises(InvalidArgumentError, match=r"^kernel_size: expected at most the padded input, 1, got 2"):
        poolrpc.BlurPool2d(2, 1).output_shape((1, 1, 5))


@given(layers())
def test_a_layer_is_a_frozen_value(layer):
    """A layer equals its pickle and its copies, has their hash, and rejects assignment."""
    for other in (pickle.loads(pickle.dumps(layer)), copy.copy(layer), copy.deepcopy(layer)):  # noqa: S301 - ours
        assert (other, hash(other), type(other)) == (layer, hash(layer), type(layer))
    for each in fields(layer):
        with pytest.raises(FrozenInstanceError):
            setattr(layer, each.name, 1)


def run(cls, dtype, dims):
    """Run a layer of torch.nn on ones."""
    x = torch.ones((1, 1, *[4] * dims)).to(dtype)
    if cls.family in {"global_pool", "pool"}:
        return x.amax(tuple(range(2, dims + 2)), keepdim=True)
    if cls.family == "blur_pool":
        return x.mul(0.5)
    module = getattr(nn, cls.__name__)
    if cls.family == "max_unpool":
        return module(1)(x, torch.arange(4**dims).reshape(x.shape))
    arguments = {"norm_type": 2} if cls.family == "lp_pool" else {}
    names = [each.name for each in fields(cls)]
    arguments |= {"kernel_size": 2} if "kernel_size" in names else {}
    arguments |= {"output_size": 2} if "adaptive" in cls.family or "fractional" in cls.family else {}
    # torch's max_pool1d takes integers only with return_indices.
    arguments |= {"return_indices": True} if "return_indices" in names else {}
    y = module(**arguments)(x)
    return y[0] if isinstance(y, tuple) else y


def excluded(cls, dtype):
    """Return why a layer excludes a dtype that torch runs on the CPU, as the comment in layers/base.py explains."""
    if dtype == "bool":
        return "only ToDtype takes bool"
    if cls.family == "lp_pool" and dtype in INTEGERS:
        return "torch returns float32"
    return ""


def added(cls, dtype):
    """Return why a layer has a dtype that torch does not run."""
    if cls.family == "max_unpool" and dtype in INTEGERS:
        return "torch unpools floats alone, but its max pooling returns integers too"
    if dtype == "uint16":
        return "images and frames have it; its maxima are those of the same numbers in a wider dtype"
    return ""


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls in IN_TORCH or cls.family == "global_pool"])
def test_the_dtypes_are_those_that_torch_runs(cls, dtype):
    """PyTorch runs every dtype of a layer and returns it; others are excluded, or added, for a reason."""
    try:
        runs = run(cls, getattr(torch, dtype), cls.spatial_dims).dtype == getattr(torch, dtype)
    except (RuntimeError, NotImplementedError):
        runs = False
    if dtype in cls.dtypes:
        assert runs or added(cls, dtype)
    elif runs:
        assert excluded(cls, dtype)


@pytest.mark.parametrize("cls", [poolrpc.GlobalPool1d, poolrpc.GlobalPool2d, poolrpc.GlobalPool3d])
def test_the_dtypes_of_a_global_layer_depend_on_its_reduction(cls):
    """What chooses a cell takes integers too, a sum and a mean those of 64 bits; the class has the dtypes of any."""
    assert cls.dtypes == FLOATS + INTEGERS
    assert all(cls(reduce).dtypes == FLOATS + INTEGERS for reduce in ("max", "min", "median"))
    assert all(cls(reduce).dtypes == (*FLOATS, "int64") for reduce in ("sum", "mean"))
    assert all(cls(reduce).dtypes == FLOATS for reduce in ("std", "var", poolrpc.Norm(2), poolrpc.Softmax()))


@pytest.mark.parametrize(
    "value", ["avg", "MAX", "", None, 1, True, b"max", ["max"], ("max", "mean"), "x" * 1000], ids=str
)
@pytest.mark.parametrize("cls", [poolrpc.GlobalPool1d, poolrpc.GlobalPool2d, poolrpc.GlobalPool3d])
def test_an_invalid_reduction_is_rejected_with_the_valid_ones(cls, value):
    """The error has the parameter's name, the valid values and what was received, cut if it is long."""
    with pytest.raises(InvalidArgumentError, match=r"^reduce: expected one of 'max', 'min'.* Norm\(p\), ") as raised:
        cls(value)
    assert [each.field for each in raised.value.violations] == ["reduce"]
    assert repr(value)[:100] in str(raised.value)
    assert len(str(raised.value)) < 300


def test_a_reduction_is_positional_or_named():
    """The reduction may be given by position or by name, and as NumPy's string; equal layers are equal."""
    layer = poolrpc.GlobalPool2d("mean")
    assert layer == poolrpc.GlobalPool2d(reduce="mean") == poolrpc.GlobalPool2d(np.str_("mean"))
    assert type(poolrpc.GlobalPool2d(np.str_("mean")).reduce) is str
    assert len({layer, poolrpc.GlobalPool2d("max"), poolrpc.GlobalPool3d("mean")}) == 3


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (poolrpc.GlobalPool1d("max"), (2, 3, 4, 5)),
        (poolrpc.GlobalPool2d("mean"), (3, 4)),
        (poolrpc.GlobalPool2d("mean"), (1, 2, 3, 4, 5)),
        (poolrpc.GlobalPool3d("max"), (3, 4, 5)),
    ],
    ids=repr,
)
def test_a_global_layer_rejects_another_rank(layer, shape):
    """A shape that is neither batched nor one image of the layer's rank is rejected with both forms."""
    dims = layer.spatial_dims
    words = f"shape: expected {dims + 2} dims (N, C, spatial...) or {dims + 1} dims (C, spatial...) for a {dims}d layer"
    with pytest.raises(InvalidArgumentError, match=re.escape(f"{words}, got shape {shape}")):
        layer.output_shape(shape)


def test_the_reasons_for_excluded_dtypes_hold():
    """PyTorch returns float32 for the power average of integers."""
    ones = torch.tensor([[[1, 2]]])
    assert nn.LPPool1d(2.0, 2)(ones).dtype == torch.float32
    assert all(set(cls.dtypes) <= {*FLOATS, *INTEGERS} for cls in CLASSES)


@given(st.data(), layers([cls for cls in CLASSES if "adaptive" in cls.family], most_output=9))
def test_an_adaptive_window_has_the_largest_size(data, layer):
    """An adaptive layer's window has the size of its largest on each axis, or one more cell."""
    plane = data.draw(shapes(layer.spatial_dims))[-layer.spatial_dims :]
    out, window = layer.output_plane(plane), layer.window(plane)
    for size, cells, most in zip(plane, out, window, strict=True):
        spans = [end - start for start, end in (adaptive_window(i, size, cells) for i in range(cells))]
        assert max(spans) <= most <= min(size, max(spans) + 1)


@pytest.mark.parametrize(
    ("layer", "plane", "window"),
    [
        (MaxPool2d((3, 2), dilation=4), (20, 20), (3, 2)),
        (poolrpc.AvgPool3d(3), (9, 9, 9), (3, 3, 3)),
        (poolrpc.LPPool1d(2, 5), (9,), (5,)),
        (poolrpc.FractionalMaxPool2d((2, 3), 1), (9, 9), (2, 3)),
        (poolrpc.GlobalPool3d("max"), (4, 5, 6), (4, 5, 6)),
        (poolrpc.GlobalPool1d("mean"), (4,), (4,)),
    ],
    ids=repr,
)
def test_a_window_counts_cells(layer, plane, window):
    """A window's size is the kernel without the gaps of a dilation, or the whole plane."""
    assert layer.window(plane) == window


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (MaxPool2d(2), "MaxPool2d(2)"),
        (MaxPool2d(3, 2, 1, 1, return_indices=True, ceil_mode=True), None),
        (MaxPool2d((3, 2), stride=(2, 1)), "MaxPool2d((3, 2), stride=(2, 1))"),
        (poolrpc.LPPool1d(2, 3), "LPPool1d(2.0, 3)"),
        (poolrpc.AdaptiveAvgPool2d((None, 7)), "AdaptiveAvgPool2d((None, 7))"),
        (AvgPool2d(2, count_include_pad=False, divisor_override=3), None),
        (poolrpc.FractionalMaxPool2d(2, output_ratio=0.5, seed=7), "FractionalMaxPool2d(2, output_ratio=0.5, seed=7)"),
        (poolrpc.GlobalPool2d(reduce="mean"), "GlobalPool2d('mean')"),
    ],
    ids=repr,
)
def test_a_repr_has_the_parameters_that_differ_from_defaults(layer, text):
    """A repr has the required parameters in order, and the others if they differ from their defaults."""
    texts = {
        "MaxPool2d": "MaxPool2d(3, stride=2, padding=1, return_indices=True, ceil_mode=True)",
        "AvgPool2d": "AvgPool2d(2, count_include_pad=False, divisor_override=3)",
    }
    assert repr(layer) == (text or texts[layer.name])


def test_layers_that_return_or_take_indices():
    """A layer with return_indices returns indices, MaxUnpool takes them, and other layers do neither."""
    assert MaxPool2d(2, return_indices=True).returns_indices
    assert not MaxPool2d(2).returns_indices
    assert not AvgPool2d(2).returns_indices
    taken = {cls.__name__: cls.operand for cls in CLASSES if cls.operand and not cls.operand_optional}
    assert taken == {
        "MaxUnpool1d": "indices",
        "MaxUnpool2d": "indices",
        "MaxUnpool3d": "indices",
        "SegmentPool": "offsets",
        "RoIPool": "boxes",
        "RoIAlign": "boxes",
    }


@given(layers(), st.integers(0, 2**40))
def test_at_plane_changes_only_fractional_layers(layer, first):
    """Only a fractional layer depends on the index of a plane, through its seed."""
    moved = layer.at_plane(first)
    if layer.family != "fractional_max_pool":
        assert moved is layer
        return
    assert replace(moved, seed=layer.seed) == layer
    assert (moved.seed == layer.seed) == (first == 0)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "BlurPool2d"])
def test_a_missing_parameter_is_reported_with_the_name_of_the_class(name):
    """Python's error has the class that the user wrote, not a private base class of it."""
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) missing \d required positional argument"):
        LAYERS[name]()


@pytest.mark.parametrize("cls", [poolrpc.Pool1d, poolrpc.Pool2d, poolrpc.Pool3d])
def test_only_a_mean_counts_the_padding(cls):
    """count_include_pad is rejected with other reductions, for which it has no meaning."""
    assert cls("mean", 3, count_include_pad=True).count_include_pad
    for reduce in ("max", "sum", "std", poolrpc.PowerMean(3)):
        with pytest.raises(InvalidArgumentError, match=r"^count_include_pad: expected False unless reduce is 'mean'"):
            cls(reduce, 3, count_include_pad=True)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: poolrpc.Norm(0), "p"),
        (lambda: poolrpc.Norm(-1), "p"),
        (lambda: poolrpc.Norm(10**5), "p"),
        (lambda: poolrpc.Norm(True), "p"),
        (lambda: poolrpc.PowerMean(0), "p"),
        (lambda: poolrpc.PowerMean(math.inf), "p"),
        (lambda: poolrpc.PowerMean(3, eps=0), "eps"),
        (lambda: poolrpc.PowerMean(3, eps=math.inf), "eps"),
        (lambda: poolrpc.LogSumExp(0), "r"),
        (lambda: poolrpc.LogSumExp(math.inf), "r"),
        (lambda: poolrpc.LogSumExp("1"), "r"),
        (lambda: poolrpc.Softmax(math.nan), "t"),
        (lambda: poolrpc.Softmax(None), "t"),
    ],
)
def test_an_invalid_parameter_of_a_reduction_is_rejected_by_name(make, field):
    """A parameter of a reduction that is not a number in its range is rejected with its name."""
    with pytest.raises(InvalidArgumentError, match=f"^{field}: expected") as raised:
        make()
    assert [each.field for each in raised.value.violations] == [field]


@pytest.mark.parametrize(
    ("layer", "resolved"),
    [
        (poolrpc.Pool2d("max", 3, 2, "same"), MaxPool2d(3, 2, 1)),
        (poolrpc.Pool1d("max", 2, 1, 1, 2, ceil_mode=True), MaxPool1d(2, 1, 1, 2, ceil_mode=True)),
        (poolrpc.Pool2d("mean", 2), AvgPool2d(2, count_include_pad=False)),
        (poolrpc.Pool2d("mean", 3, 1, 1, count_include_pad=True), AvgPool2d(3, 1, 1)),
        (poolrpc.Pool3d("sum", 2, 1, ((0, 1),)), poolrpc.AvgPool3d(2, 1, ((0, 1),), divisor_override=1)),
        (poolrpc.Pool2d("mean", 2, dilation=2), poolrpc.Pool2d("mean", 2, dilation=2)),
        (poolrpc.Pool3d("mean", 6, 1, 1), poolrpc.Pool3d("mean", 6, 1, 1)),
        (poolrpc.Pool2d("std", 2, 1, "same"), poolrpc.Pool2d("std", 2, 1, ((0, 1),))),
    ],
    ids=repr,
)
def test_a_reduction_that_torch_has_is_resolved_to_its_layer(layer, resolved):
    """A layer that is one of torch.nn on a plane is resolved to that, so that it has the same kernels and bits."""
    plane = (5, 5, 5)[: layer.spatial_dims]
    assert layer.resolved(plane) == resolved
    assert layer.resolved(plane).output_plane(plane) == layer.output_plane(plane)
