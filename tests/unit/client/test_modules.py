"""Modules of torch.nn as layers."""

import subprocess
import sys
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import poolrpc
from poolrpc import LAYERS, AvgPool2d, InvalidArgumentError, MaxPool2d, Normalize, ToDtype
from poolrpc.chains import as_branches, as_chain

MAX = nn.MaxPool2d(3, stride=2, padding=1, dilation=1, return_indices=True, ceil_mode=True)
AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, ceil_mode=True, count_include_pad=False, divisor_override=7)


class Named(nn.MaxPool2d):
    """A pooling layer under another name, with another default."""

    def __init__(self, kernel_size=2, **parameters):
        super().__init__(kernel_size, **parameters)


class Doubled(nn.MaxPool2d):
    """A pooling layer that computes something else."""

    def forward(self, x):
        """Return twice the maxima."""
        return 2 * super().forward(x)


class Called(nn.MaxPool2d):
    """A pooling layer whose call does something else than its forward."""

    def __call__(self, x):
        """Return twice the maxima."""
        return 2 * super().__call__(x)


class Reversed(nn.Sequential):
    """A Sequential that computes something else."""

    def forward(self, x):
        """Apply the modules from the last to the first."""
        for each in reversed(self):
            x = each(x)
        return x


class Similar:
    """A class with the attributes of a pooling layer, which is not a module."""

    kernel_size = stride = 2
    padding = 0


def with_hook(module, register="register_forward_hook"):
    """Return the module with a hook."""
    getattr(module, register)(lambda *_: None)
    return module


def with_own_forward(module):
    """Return the module with a forward of its own."""
    module.forward = lambda x: 2 * x
    return module


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        (nn.MaxPool1d(3), "MaxPool1d(3, stride=3)"),
        (
            nn.MaxPool1d((3,), (2,), (1,), (2,), return_indices=True, ceil_mode=True),
            "MaxPool1d(3, stride=2, padding=1, dilation=2, return_indices=True, ceil_mode=True)",
        ),
        (MAX, "MaxPool2d(3, stride=2, padding=1, return_indices=True, ceil_mode=True)"),
        (nn.MaxPool3d((1, 2, 2), stride=(1, 2, 3)), "MaxPool3d((1, 2, 2), stride=(1, 2, 3))"),
        (
            nn.AvgPool1d(3, 2, 1, ceil_mode=True, count_include_pad=False),
            "AvgPool1d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False)",
        ),
        (
            AVERAGE,
            "AvgPool2d(3, stride=1, padding=1, ceil_mode=True, count_include_pad=False, divisor_override=7)",
        ),
        (nn.AvgPool3d(2, divisor_override=3), "AvgPool3d(2, stride=2, divisor_override=3)"),
        (nn.LPPool1d(2, 3), "LPPool1d(2.0, 3)"),
        (
            nn.LPPool2d(float("inf"), (3, 2), stride=1, ceil_mode=True),
            "LPPool2d(inf, (3, 2), stride=1, ceil_mode=True)",
        ),
        (nn.LPPool3d(1.5, 2, stride=(1, 2, 2)), "LPPool3d(1.5, 2, stride=(1, 2, 2))"),
        (nn.AdaptiveMaxPool1d(5, return_indices=True), "AdaptiveMaxPool1d(5, return_indices=True)"),
        (nn.AdaptiveMaxPool2d((None, 7)), "AdaptiveMaxPool2d((None, 7))"),
        (nn.AdaptiveMaxPool3d([1, 2, 3], return_indices=True), "AdaptiveMaxPool3d((1, 2, 3), return_indices=True)"),
        (nn.AdaptiveAvgPool1d(torch.Size([4])), "AdaptiveAvgPool1d(4)"),
        (nn.AdaptiveAvgPool2d(1), "AdaptiveAvgPool2d(1)"),
        (nn.AdaptiveAvgPool3d((None, 1, 1)), "AdaptiveAvgPool3d((None, 1, 1))"),
        (nn.MaxUnpool1d(2), "MaxUnpool1d(2, stride=2)"),
        (nn.MaxUnpool2d(3, stride=2, padding=1), "MaxUnpool2d(3, stride=2, padding=1)"),
        (nn.MaxUnpool3d((1, 2, 2)), "MaxUnpool3d((1, 2, 2), stride=(1, 2, 2))"),
        (Named(ceil_mode=True), "MaxPool2d(2, stride=2, ceil_mode=True)"),
        (nn.MaxPool2d(np.int64(2), stride=torch.tensor(1)), "MaxPool2d(2, stride=1)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_module_is_the_layer_with_its_attributes(module, layer, training):
    """Every attribute is read, also those that the module's repr leaves out; pooling is the same in both modes."""
    assert repr(as_chain(module.train(training))) == f"({layer},)"


def test_every_pooling_class_of_torch_is_known():
    """A class of torch.nn's is a layer, or is rejected because its windows are random."""
    made = {
        name: cls(2, output_size=2) if "Fractional" in name else cls(2, 2) if "LP" in name else cls(2)
        for name in nn.modules.pooling.__all__
        if isinstance(cls := getattr(nn, name), type)
    }
    assert set(made) <= set(LAYERS)
    for name, module in made.items():
        if "Fractional" in name:
            with pytest.raises(InvalidArgumentError, match="without random windows"):
                as_chain(module)
        else:
            assert [layer.name for layer in as_chain(module)] == [name]


@pytest.mark.parametrize(
    ("module", "reason", "layer"),
    [
        (
            nn.FractionalMaxPool2d(3, output_ratio=0.5),
            "draws them in every call",
            "FractionalMaxPool2d(3, output_ratio=0.5)",
        ),
        (
            nn.FractionalMaxPool3d(2, (3, 4, 5), return_indices=True),
            "draws them in every call",
            "FractionalMaxPool3d(2, output_size=(3, 4, 5), return_indices=True)",
        ),
        (
            nn.FractionalMaxPool2d(2, output_size=3, _random_samples=torch.rand(1, 1, 2)),
            "has random samples",
            "FractionalMaxPool2d(2, output_size=3)",
        ),
    ],
    ids=["ratio", "3d", "samples"],
)
def test_random_windows_are_rejected_with_the_layer_to_use(module, reason, layer):
    """The server's windows follow from a seed, which torch's module lacks, so the outputs would differ."""
    with pytest.raises(InvalidArgumentError) as raised:
        as_chain(module)
    assert reason in str(raised.value)
    assert f"use poolrpc's {layer} with a seed" in str(raised.value)


def test_a_sequential_is_a_chain():
    """The modules are in order, also in nested ones; a module that occurs twice is applied twice."""
    expected = (MaxPool2d(2, stride=2), AvgPool2d(2, stride=2, count_include_pad=False), MaxPool2d(2, stride=2))
    half, mean = nn.MaxPool2d(2), nn.AvgPool2d(2, count_include_pad=False)
    for module in (
        nn.Sequential(half, mean, half),
        nn.Sequential(OrderedDict(first=half, second=mean, third=half)),
        nn.Sequential(half, nn.Sequential(mean, nn.Sequential(half))),
        [half, nn.Sequential(mean, half)],
        ["MaxPool2d(2, stride=2)", mean, MaxPool2d(2, stride=2)],
        nn.ModuleList([half, mean, half]),
    ):
        assert as_chain(module) == expected


def test_modules_are_branches():
    """A list of modules, or a ModuleList, is branches; a Sequential in it, or alone, is a chain."""
    half, mean = nn.MaxPool2d(2), nn.AvgPool2d(2)
    two = (MaxPool2d(2, stride=2), AvgPool2d(2, stride=2))
    assert as_branches([half, mean]) == as_branches(nn.ModuleList([half, mean])) == (two[:1], two[1:])
    assert as_branches([[half, mean], half]) == as_branches([nn.Sequential(half, mean), half]) == (two, two[:1])
    assert as_branches(nn.Sequential(half, mean)) == (two,)
    assert as_branches(half) == (two[:1],)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.ReLU(), "expected a pooling layer of torch.nn, got torch.nn.ReLU$"),
        (nn.Flatten(), "expected a pooling layer of torch.nn, got torch.nn.Flatten$"),
        (nn.Sequential(nn.MaxPool2d(2), nn.ReLU()), r"\[1\]: .* torch.nn.ReLU$"),
        (nn.Sequential(nn.MaxPool2d(2), nn.Sequential(nn.Dropout())), r"\[1\]\[0\]: .* torch.nn.Dropout$"),
        (nn.Sequential(nn.ModuleList([nn.MaxPool2d(2)])), r"\[0\]: .* torch.nn.ModuleList$"),
        (nn.ModuleDict({"a": nn.MaxPool2d(2)}), "got torch.nn.ModuleDict"),
        (nn.Sequential(), "expected at least one layer, got an empty Sequential"),
        (Doubled(2), r"expected the forward of torch.nn.MaxPool2d, got .*Doubled with one of its own"),
        (nn.Sequential(Doubled(2)), r"\[0\]: .*Doubled with one of its own"),
        (Called(2), "Called with one of its own"),
        (with_own_forward(nn.MaxPool2d(2)), "got torch.nn.MaxPool2d with one of its own"),
        (Reversed(nn.MaxPool2d(2)), "expected the forward of torch.nn.Sequential, got .*Reversed"),
        (with_hook(nn.MaxPool2d(2)), "expected a module without forward hooks, got torch.nn.MaxPool2d"),
        (with_hook(nn.MaxPool2d(2), "register_forward_pre_hook"), "without forward hooks"),
        (with_hook(nn.Sequential(nn.MaxPool2d(2))), "without forward hooks, got torch.nn.Sequential"),
        (
            nn.Sequential(with_hook(nn.MaxPool2d(2))),
            r"\[0\]: expected a module without forward hooks, got torch.nn.MaxPool2d",
        ),
        (Similar(), "expected a layer or a sequence of layers"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_computes_something_else_is_rejected(module, message):
    """Another module, a forward of its own and hooks are rejected by name, and with the position in a Sequential."""
    with pytest.raises(InvalidArgumentError, match=rf"^layers.*{message}"):
        as_chain(module)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # of another class since torch 2.14
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is not supported in Python 3.14:FutureWarning")
def test_a_scripted_module_is_rejected():
    """TorchScript's modules have neither the class nor the forward of torch.nn's."""
    with pytest.raises(
        InvalidArgumentError, match=r"expected a pooling layer of torch.nn, got torch\.jit.*ScriptModule"
    ):
        as_chain(torch.jit.script(nn.MaxPool2d(2)))


def test_a_forward_assigned_to_torchs_own_class_is_rejected(monkeypatch):
    """A library may replace the forward of a class of torch.nn."""
    monkeypatch.setattr(nn.MaxPool2d, "forward", lambda self, x: self.kernel_size * x)
    with pytest.raises(InvalidArgumentError, match="with one of its own"):
        as_chain(nn.MaxPool2d(2))


@pytest.mark.parametrize(
    ("module", "field"),
    [
        (nn.MaxPool2d(0), "layers.kernel_size"),
        (nn.AvgPool2d(2, divisor_override=0), "layers.divisor_override"),
        (nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(2, padding=2)), "layers[1].padding"),
    ],
)
def test_a_parameter_that_no_layer_has_names_its_field(module, field):
    """The error is that of the layer, with the position in a Sequential."""
    with pytest.raises(InvalidArgumentError) as raised:
        as_chain(module)
    assert [each.field for each in raised.value.violations] == [field]


def test_a_module_is_read_without_importing_torch():
    """A class of that name is enough: the client looks at names and attributes."""
    program = """
import sys, types
Module = type("Module", (), {"__module__": "torch.nn.modules.module", "__call__": lambda self, x: x})
def forward(self, x): return x
forward.__module__, forward.__qualname__ = "torch.nn.modules.pooling", "AdaptiveAvgPool2d.forward"
Pool = type("AdaptiveAvgPool2d", (Module,), {"__module__": "torch.nn.modules.pooling", "forward": forward})
pool = Pool()
pool.output_size, pool._forward_hooks, pool._forward_pre_hooks = 1, {}, {}
import poolrpc
print(poolrpc.branch_shapes((8, 64, 56, 56), [pool]), "torch" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603 - ours
    assert ended.stdout == "[((8, 64, 1, 1),)] False\n"


def test_torchs_repr_is_what_it_says():
    """The repr of a module leaves parameters out, so its text may be another layer than the module."""
    assert poolrpc.parse_layer(repr(AVERAGE)) == AvgPool2d(3, stride=1, padding=1)
    assert as_chain(AVERAGE) == (AvgPool2d(3, 1, 1, ceil_mode=True, count_include_pad=False, divisor_override=7),)
    assert not poolrpc.parse_layer(repr(MAX)).return_indices
    assert as_chain(MAX)[0].return_indices


TRANSFORM = """
from torch import nn

class Transform(nn.Module):
    def forward(self, *inputs):
        return self.transform(*inputs)
"""
MISC = """
class ToDtype(Transform):
    def __init__(self, dtype, scale=False):
        super().__init__()
        self.dtype, self.scale = dtype, scale

    def transform(self, inpt):
        return inpt

class Normalize(Transform):
    def __init__(self, mean, std, inplace=False):
        super().__init__()
        self.mean, self.std, self.inplace = list(mean), list(std), inplace

    def transform(self, inpt):
        return inpt
"""
CONTAINER = """
class Compose(Transform):
    def __init__(self, transforms):
        super().__init__()
        self.transforms = transforms

    def forward(self, *inputs):
        for each in self.transforms:
            inputs = (each(*inputs),)
        return inputs[0]
"""


@pytest.fixture(scope="module")
def v2():
    """Classes with the modules, names and attributes of torchvision 0.29's, which needs another build of torch."""
    names = {}
    for module, source in (("_transform", TRANSFORM), ("_misc", MISC), ("_container", CONTAINER)):
        names["__name__"] = f"torchvision.transforms.v2.{module}"
        exec(source, names)  # noqa: S102 - the classes above
    return SimpleNamespace(**names)


def test_transforms_of_torchvision_are_steps(v2):
    """ToDtype and Normalize, alone, in a Sequential or in a Compose, become the steps of the same parameters."""
    scaled, normalized = v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5, 0.25, 1], [1, 2, 4])
    steps = ToDtype("float32", scale=True), Normalize((0.5, 0.25, 1), (1, 2, 4))
    for modules in ([scaled, normalized], [v2.Compose([scaled, normalized])], [v2.Compose([scaled]), normalized]):
        assert as_chain(nn.Sequential(*modules, nn.AvgPool2d(2))) == (*steps, AvgPool2d(2, 2))
    assert as_chain([scaled, "MaxPool2d(2)"]) == (steps[0], MaxPool2d(2))


def test_another_transform_is_rejected(v2):
    """A transform with another arithmetic, dtypes by class, or a dtype of no output is rejected with its path."""
    own = type("Own", (v2.ToDtype,), {"transform": lambda _, inpt: inpt})(torch.float32)
    with pytest.raises(
        InvalidArgumentError, match=r"layers\[1\]: expected the transform of torchvision\..*ToDtype, got"
    ):
        as_chain(nn.Sequential(nn.MaxPool2d(2), own))
    forward = type("Own", (v2.Compose,), {"forward": lambda _, inpt: inpt})([])
    with pytest.raises(
        InvalidArgumentError, match=r"expected the forward of torchvision\.transforms\.v2\.Compose, got"
    ):
        as_chain(forward)
    for dtype in ({torch.Tensor: torch.float32}, torch.complex64, torch.bool):
        with pytest.raises(InvalidArgumentError, match=r"^layers\.dtype: expected 'float16' or"):
            as_chain(v2.ToDtype(dtype))
    with pytest.raises(InvalidArgumentError, match=r"^layers\.std: expected numbers other than 0"):
        as_chain(v2.Normalize([0.5], [0]))
