"""The public names belong to the package, whatever file defines them."""

import pickle
import pickletools
import typing

import numpy as np
import pytest

import poolrpc
from poolrpc import LAYERS, FieldViolation, Limit, MaxPool2d, PoolError, PoolResult, ServerInfo
from tests.unit.client.test_errors import ONE_OF_EACH

EXPORTS = [name for name in poolrpc.__all__ if callable(getattr(poolrpc, name))]
CLASSES = [name for name in EXPORTS if isinstance(getattr(poolrpc, name), type)]
VALUES = [
    MaxPool2d(3, stride=2),
    FieldViolation("stride", "expected 1, got 2"),
    Limit(4, "bytes"),
    ServerInfo("1", "2", "cpu", 4, {"MaxPool2d": ("float32",)}, {"layers": Limit(64, "layers")}),
    PoolResult(np.ones((1, 1)), ((1, 1),)),
    *ONE_OF_EACH,
]


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_belongs_to_the_package(name):
    """The module of every public class and function is "poolrpc", which reprs and tracebacks show."""
    assert getattr(poolrpc, name).__module__ == "poolrpc"
    assert name not in CLASSES or repr(getattr(poolrpc, name)) == f"<class 'poolrpc.{name}'>"


def test_a_traceback_names_the_package():
    """The last line of a traceback names the error by its public name."""
    with pytest.raises(PoolError) as raised:
        MaxPool2d(0)
    assert raised.exconly() == "poolrpc.InvalidArgumentError: kernel_size: expected 1 to 65535, got 0"


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_pickle_names_no_file(value):
    """A pickle refers to the package alone, so that it can be read after a module was moved."""
    data = pickle.dumps(value)
    names = {argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)}
    assert {name for name in names if name.partition(".")[0].startswith("poolrpc") and " " not in name} == {"poolrpc"}
    assert repr(pickle.loads(data)) == repr(value)  # noqa: S301 - made here


@pytest.mark.parametrize("name", CLASSES)
def test_type_hints_can_be_resolved(name):
    """typing.get_type_hints works on every public class, which is not in the module that its `__module__` names."""
    cls = getattr(poolrpc, name)
    assert set(typing.get_type_hints(cls)) >= set(vars(cls).get("__annotations__", ()))


def test_every_layer_has_hints_for_its_parameters():
    """The hints of a layer have the parameters of its signature."""
    assert "kernel_size" in typing.get_type_hints(LAYERS["MaxPool2d"])
