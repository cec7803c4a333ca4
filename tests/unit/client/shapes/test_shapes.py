"""Output shapes of every layer, compared with torch's, and the rules of one axis.

POOLRPC_SHAPE_CASES is the number of random cases over all layers together. For 100,000:

    POOLRPC_SHAPE_CASES=100000 pytest tests/unit/client/shapes -k torch
"""

import os
from dataclasses import fields
from functools import cache
from itertools import product
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.torch_version import TorchVersion

import poolrpc
from poolrpc import InvalidArgumentError
from poolrpc._shapes.limits import MAX_FRACTIONAL_AXIS, MAX_NUMEL, MAX_PARAMETER
from poolrpc._shapes.parameters import per_axis
from poolrpc._shapes.rules import (
    adaptive_window,
    check_shape,
    clip,
    fractional_size,
    last_window_starts_outside,
    pooled_size,
    unpooled_size,
)
from tests.unit.strategies import CLASSES, layers, parameters, shapes

CASES = -(-int(os.environ.get("POOLRPC_SHAPE_CASES", "300")) // len(CLASSES))

# Rules by which poolrpc rejects calls that torch accepts: the rule, its reason, and an example.
REJECTED = (
    (
        "an axis other than N is 0",
        "there is nothing to pool; torch accepts it in some layers and rejects it in others",
        (poolrpc.AdaptiveAvgPool2d, {"output_size": 2}, (1, 0, 4, 4)),
    ),
    (
        "an output size is 0, or a ratio comes to 0",
        "an output without elements is not intended, and has crashed torch",
        (poolrpc.FractionalMaxPool2d, {"kernel_size": 1, "output_ratio": 0.1}, (1, 1, 4, 4)),
    ),
    (
        "a fractional kernel is 0 or negative",
        "torch returns minus infinities",
        (poolrpc.FractionalMaxPool2d, {"kernel_size": 0, "output_size": 2}, (1, 1, 4, 4)),
    ),
    (
        "a norm is negative",
        "torch returns values that are not norms",
        (poolrpc.LPPool2d, {"norm_type": -1.0, "kernel_size": 2}, (1, 1, 4, 4)),
    ),
    (
        "a dilation is over input + 2*padding",
        "with a kernel of 1 torch accepts any dilation, and its CUDA kernels then read out of bounds",
        (poolrpc.MaxPool2d, {"kernel_size": 1, "dilation": 5}, (1, 1, 4, 4)),
    ),
    (
        "an unpool kernel, stride or padding is out of bounds",
        "torch only computes the default output size from them",
        (poolrpc.MaxUnpool2d, {"kernel_size": 2, "stride": 0}, (1, 1, 4, 4)),
    ),
    (
        "an unpool output has no cells",
        "as for an output size of 0",
        (poolrpc.MaxUnpool1d, {"kernel_size": 2, "padding": 1}, (1, 1, 1)),
    ),
    (
        "an adaptive output * input is over 2**31 - 1 on an axis",
        "the CUDA kernels overflow: PyTorch issue 176784",
        (poolrpc.AdaptiveAvgPool1d, {"output_size": 2**16}, (1, 2**15)),
    ),
    (
        "a fractional axis is over 2**22",
        "torch places the windows in float32, which is wrong by a cell from 2**23 on",
        (poolrpc.FractionalMaxPool2d, {"kernel_size": 1, "output_size": 1}, (1, 1, 2**22 + 1)),
    ),
)
# Rules by which poolrpc accepts calls that torch rejects.
ACCEPTED = (
    (
        "a 1d adaptive size of (None,)",
        "torch accepts None only in the 2d and 3d layers",
        (poolrpc.AdaptiveMaxPool1d, {"output_size": (None,)}, (1, 1, 4)),
    ),
    (
        "an LPPool1d with a kernel of one value in a tuple",
        "torch multiplies by the tuple",
        (poolrpc.LPPool1d, {"norm_type": 2, "kernel_size": (2,)}, (1, 1, 4)),
    ),
    (
        "a padding of more than half of the kernel",
        "every window has a cell of the input if it is less than a window's span",
        (poolrpc.MaxPool2d, {"kernel_size": 2, "padding": (0, 2), "dilation": 2}, (1, 1, 4, 4)),
    ),
    (
        "paddings before and after an axis, and those that are computed",
        "other frameworks have them",
        (poolrpc.MaxPool2d, {"kernel_size": 3, "padding": "same"}, (1, 1, 4, 4)),
    ),
)


def rejections(cls, arguments, shape):
    """Return the rules of REJECTED that apply to a call."""
    dims = cls.spatial_dims
    plane, batched = shape[-dims:], len(shape) == dims + 2

    def axes(name, default):
        value = arguments.get(name)
        return per_axis(default if value is None else value, dims)

    kernel, padding, sizes = axes("kernel_size", 1), axes("padding", 0), axes("output_size", 1)
    if not all(isinstance(each, int) for each in padding):  # which torch rejects
        padding = (0,) * dims
    stride, dilation = axes("stride", arguments.get("kernel_size", 1)), axes("dilation", 1)
    unpool = cls.family == "max_unpool"
    default = [unpooled_size(size, k, s, p) for size, k, s, p in zip(plane, kernel, stride, padding, strict=True)]
    ratios = arguments.get("output_ratio")
    holds = (
        0 in shape[batched:],
        0 in sizes
        or (ratios is not None and 0 in map(int, map(float.__mul__, map(float, plane), per_axis(ratios, dims)))),
        cls.family == "fractional_max_pool" and min(kernel) < 1,
        not arguments.get("norm_type", 1) > 0,
        any(d > size + 2 * p for d, size, p in zip(dilation, plane, padding, strict=True)),
        unpool and (min(kernel) < 1 or min(stride) < 1 or min(padding) < 0),
        unpool and arguments.get("output_size") is None and min(default) < 1,
        cls.family.startswith("adaptive")
        and any(size * (cells or size) > MAX_NUMEL for size, cells in zip(plane, sizes, strict=True)),
        cls.family == "fractional_max_pool" and max(plane) > MAX_FRACTIONAL_AXIS,
    )
    return [rule for rule, held in zip(REJECTED, holds, strict=True) if held]


def extensions(cls, arguments):
    """Return the rules of ACCEPTED that apply to a call."""
    dims = cls.spatial_dims
    kernel = per_axis(arguments.get("kernel_size", 1), dims)
    padding = per_axis(arguments.get("padding", 0), dims)
    in_torch = all(isinstance(each, int) for each in padding)
    slides = cls.family in {"max_pool", "avg_pool", "pool"}
    holds = (
        cls.family.startswith("adaptive") and cls.spatial_dims == 1 and arguments["output_size"] == (None,),
        cls is poolrpc.LPPool1d and isinstance(arguments["kernel_size"], tuple),
        slides and in_torch and any(p > k // 2 for p, k in zip(padding, kernel, strict=True)),
        slides and not in_torch,
    )
    return [rule for rule, held in zip(ACCEPTED, holds, strict=True) if held]


def shape_of_poolrpc(cls, arguments, shape):
    """Return the shape that poolrpc computes, or None if it rejects the call."""
    try:
        return cls(**arguments).output_shape(shape)
    except InvalidArgumentError:
        return None


def shape_of_torch(cls, arguments, shape, device):
    """Return the shape of torch.nn's output, or None if torch raises."""
    arguments = {name: value for name, value in arguments.items() if name != "seed"}
    x = torch.zeros(shape, device=device)
    # torch raises errors of at least six types for invalid arguments.
    try:
        if cls.family.startswith("global"):
            y = getattr(nn, f"AdaptiveMaxPool{cls.spatial_dims}d")(1)(x)
        elif cls.family == "blur_pool":
            kernel, stride = arguments.get("kernel_size", 3), arguments.get("stride", 2)
            padded = nn.functional.pad(x, ((stride + kernel - 2) // 2,) * 4, "reflect")
            y = nn.AvgPool2d(kernel, stride)(padded)
        elif cls.family == "pool":
            names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            windows = {name: arguments[name] for name in names if name in arguments}
            y = getattr(nn, f"MaxPool{cls.spatial_dims}d")(**windows)(x)
        elif cls.family == "max_unpool":
            size = arguments.pop("output_size", None)
            indices = torch.zeros(shape, dtype=torch.int64, device=device)
            y = getattr(nn, cls.__name__)(**arguments)(x, indices, output_size=size)
        else:
            y = getattr(nn, cls.__name__)(**arguments)(x)
    except Exception:  # noqa: BLE001
        return None
    return tuple((y[0] if isinstance(y, tuple) else y).shape)


def compare(cls, arguments, shape, devices):
    """Compare poolrpc's shape for a call with torch's."""
    computed = shape_of_poolrpc(cls, arguments, shape)
    for device in devices:
        expected = shape_of_torch(cls, arguments, shape, device)
        if computed is None and expected is not None:
            assert rejections(cls, arguments, shape)
        elif expected is None and computed is not None:
            older = torch.__version__ < TorchVersion("2.12")  # it has no LPPool3d of the norm infinity
            assert extensions(cls, arguments) or (older and arguments.get("norm_type") == inf)
        else:
            assert computed == expected


@cache
def calls(cls):
    """Draw a layer's arguments and a small shape, sometimes with an axis of 0."""
    return st.tuples(parameters(cls), shapes(cls.spatial_dims, zeros=True))


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.operand not in {"offsets", "boxes"}])
@settings(max_examples=CASES)
@given(data=st.data())
def test_torch_computes_the_same_shape_or_rejects_the_call(cls, data):
    """A layer's shape is torch's, on the meta device and the CPU, and both reject the same calls but for the rules."""
    compare(cls, *data.draw(calls(cls)), devices=("meta", "cpu"))


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.spatial_dims == 1 and cls.operand != "offsets"])
@settings(max_examples=CASES)
@given(data=st.data())
def test_torch_computes_the_same_shape_for_sizes_up_to_the_limits(cls, data):
    """A layer's shape is torch's for the largest parameters and axes too."""
    layer = data.draw(layers([cls]))
    size = st.integers(1, MAX_NUMEL) | st.integers(1, 2 * MAX_PARAMETER)
    arguments = {each.name: getattr(layer, each.name) for each in fields(layer)}
    compare(cls, arguments, (1, data.draw(size)), devices=["meta"])


@pytest.mark.parametrize("rule", REJECTED, ids=[rule for rule, _, _ in REJECTED])
def test_a_call_that_only_poolrpc_rejects(rule):
    """PyTorch accepts the call of every rule of REJECTED, and poolrpc rejects it for that rule alone."""
    call = rule[2]
    assert shape_of_poolrpc(*call) is None
    assert shape_of_torch(*call, "meta") is not None
    assert rejections(*call) == [rule]


@pytest.mark.parametrize("rule", ACCEPTED, ids=[rule for rule, _, _ in ACCEPTED])
def test_a_call_that_only_poolrpc_accepts(rule):
    """The call of every rule of ACCEPTED is rejected by torch, and accepted by poolrpc."""
    cls, arguments, shape = rule[2]
    assert shape_of_poolrpc(cls, arguments, shape) is not None
    assert shape_of_torch(cls, arguments, shape, "meta") is None
    assert extensions(cls, arguments) == [rule]


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_pooled_size_is_torchs_for_every_small_axis(kernel, dilation, ceil_mode):
    """The rule of an axis computes torch's size, and less than 1 if no window fits."""
    for size, stride, padding in product(range(1, 10), range(1, 6), range(kernel // 2 + 1)):
        x = torch.empty((1, 1, size), device="meta")
        try:
            out = nn.functional.max_pool2d(
                x, (1, kernel), (1, stride), (0, padding), (1, dilation), ceil_mode=ceil_mode
            ).shape[-1]
        except RuntimeError:
            out = 0
        computed = pooled_size(size, kernel, stride, padding, dilation, ceil_mode=ceil_mode)
        assert max(computed, 0) == out, (size, stride, padding)


@pytest.mark.parametrize("cls", [poolrpc.AvgPool2d, poolrpc.AvgPool3d, poolrpc.LPPool2d, poolrpc.LPPool3d])
def test_only_3d_averages_must_fit_the_unpadded_input(cls):
    """As in torch, a kernel may extend into the padding in every layer but the 3d averages."""
    norm = {"norm_type": 2} if cls.family == "lp_pool" else {}
    for size, kernel, padding, ceil_mode in product(range(1, 6), range(1, 7), range(2), (False, True)):
        arguments = {"kernel_size": kernel, "ceil_mode": ceil_mode, **norm}
        arguments |= {} if norm else {"padding": min(padding, kernel // 2)}
        shape = (1, *[5] * (cls.spatial_dims - 1), size)
        assert shape_of_poolrpc(cls, arguments, shape) == shape_of_torch(cls, arguments, shape, "meta")


def test_ceil_mode_drops_a_last_window_that_starts_in_the_right_padding():
    """With 5 cells, kernel 2, padding 1 and stride 3, the third window would start at 5 and is dropped."""
    assert last_window_starts_outside(3, 5, 3, 1)
    assert not last_window_starts_outside(2, 5, 3, 1)
    assert pooled_size(5, 2, 3, 1, ceil_mode=True) == 2
    assert pooled_size(6, 2, 3, 1, ceil_mode=True) == 3


@pytest.mark.parametrize("size", range(1, 13))
def test_adaptive_windows_are_torchs(size):
    """Window i spans the cells whose maximum and minimum torch computes."""
    rising = torch.arange(size, dtype=torch.float64)[None]
    for out in range(1, 16):
        starts = -nn.functional.adaptive_max_pool1d(-rising, out)[0]
        ends = nn.functional.adaptive_max_pool1d(rising, out)[0] + 1
        expected = list(zip(starts.int().tolist(), ends.int().tolist(), strict=True))
        assert [adaptive_window(i, size, out) for i in range(out)] == expected


@pytest.mark.parametrize(("size", "ratio", "out"), [(10, 0.5, 5), (10, 0.29999, 2), (100, 0.29, 28), (3, 0.1, 0)])
def test_a_fractional_size_is_truncated(size, ratio, out):
    """The size is int(size * ratio), with the rounding error of floats: 100 * 0.29 is less than 29."""
    assert fractional_size(size, ratio) == out


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((), 1),
        ((3,), 1),
        ((1, 2, 3, 4), 1),
        ((4, 4), 2),
        ((1, 1, 1, 4, 4), 2),
        ((1, 4, 4), 3),
        ((1, 1, 1, 1, 1, 1), 3),
        ((1, 0, 4, 4), 2),
        ((1, 1, 0, 4), 2),
        ((0, 4, 4), 2),
        ((-1, 1, 4, 4), 2),
        ((1, 1, -4, -4), 2),
        ((1, 1, MAX_NUMEL + 1, 1), 2),
        ((2**32, 2**32, 1, 16), 2),
    ],
)
def test_an_invalid_shape_is_rejected(shape, dims):
    """A wrong rank, and an axis that is 0 (except N), negative or too large, are rejected with the shape."""
    with pytest.raises(InvalidArgumentError) as raised:
        check_shape(shape, dims)
    assert [each.field for each in raised.value.violations] == ["shape"]
    assert str(shape) in str(raised.value)


@pytest.mark.parametrize(
    ("shape", "dims", "expected"),
    [((0, 1, 4), 1, 1), ((2, 3, 4, 4), 2, 2), ((3, 4, 4), 2, 2), ((1, 4, 4, 4), 3, 3)],
)
def test_check_shape_returns_the_number_of_spatial_axes(shape, dims, expected):
    """A batched or unbatched shape has its number of spatial axes; N may be 0."""
    assert check_shape(shape, dims) == expected


@pytest.mark.parametrize("size", [True, 4.0, "4", None, -1, MAX_NUMEL + 1, 2**64])
def test_output_shape_rejects_an_invalid_axis(size):
    """A bool, a float, a string, and a negative or too large size are errors of the shape."""
    with pytest.raises(InvalidArgumentError, match=r"^shape: expected"):
        poolrpc.MaxPool2d(2).output_shape((1, 1, 4, size))


@given(st.text() | st.binary() | st.integers() | st.lists(st.integers()))
def test_clip_limits_the_length_of_a_value(value):
    """A value's repr is complete if it fits, and else cut with an ellipsis."""
    text = clip(value, 40)
    assert text == repr(value) or (len(text) == 40 and text == f"{repr(value)[:37]}...")


@pytest.mark.parametrize("value", [10**5000, -(10**5000), [10**5000], (1, 10**5000)], ids=["+", "-", "list", "tuple"])
def test_clip_accepts_integers_that_python_does_not_print(value):
    """An integer with more digits than Python prints has a text too."""
    assert 0 < len(clip(value)) <= 120


def test_a_parameter_above_its_bound_names_both():
    """A kernel above 65535 is rejected with the bound and the value."""
    with pytest.raises(InvalidArgumentError, match=f"kernel_size: expected 1 to {MAX_PARAMETER}, got 65536"):
        poolrpc.AvgPool2d(MAX_PARAMETER + 1)
