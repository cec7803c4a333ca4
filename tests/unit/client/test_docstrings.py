"""The docstrings of the public API: their examples run, and they have the sections that readers expect."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import poolrpc
import poolrpc_server
from poolrpc import LAYERS

SECTIONS = ("Args:", "Shape:", "Raises:", "Examples:")
MODULES = [
    info.name for info in pkgutil.walk_packages(poolrpc.__path__, "poolrpc.") if not info.name.startswith("poolrpc.v1")
]


@pytest.fixture(scope="module")
def address():
    """Return the address of a server."""
    with poolrpc_server.embedded() as client:
        yield client.address


@pytest.mark.parametrize("name", poolrpc.__all__)
def test_the_examples_of_a_public_name_run(name, address):
    """Every example in the docstrings of a public class, its methods, or a function prints what it says."""
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(getattr(poolrpc, name), name, module=False, globs={}):
        for example in test.examples:
            example.source = example.source.replace("127.0.0.1:50051", address)
        runner.run(test)
    assert runner.failures == 0


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    """Every example in a module's own docstrings prints what it says."""
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_a_shape_rule_and_an_example(name):
    """A layer's docstring states the shapes of its input and output, and has an example."""
    doc = inspect.getdoc(LAYERS[name])
    assert "Shape:\n    Input" in doc
    assert "Output" in doc
    (test,) = doctest.DocTestFinder(recurse=False).find(LAYERS[name], name)
    assert any(f"{name}(" in example.source for example in test.examples)


@pytest.mark.parametrize("name", [name for name in LAYERS if "2d" in name])
def test_the_2d_layers_are_documented_in_full(name):
    """A 2d layer's docstring has every section, and a line for every parameter; the 1d and 3d layers refer to it."""
    doc = inspect.getdoc(LAYERS[name])
    assert [section for section in SECTIONS if f"\n{section}\n" not in doc] == []
    args = doc.partition("Args:\n")[2].partition("Shape:")[0]
    parameters = list(inspect.signature(LAYERS[name]).parameters)
    assert [line.partition(":")[0].strip() for line in args.splitlines() if line[4:5].strip()] == parameters
    for other in (name.replace("2d", "1d"), name.replace("2d", "3d")):
        assert other not in LAYERS or f" of {name}" in inspect.getdoc(LAYERS[other])


@pytest.mark.parametrize("name", [each for each in poolrpc.__all__ if callable(getattr(poolrpc, each))])
def test_every_public_name_has_a_docstring(name):
    """Every public class and function has a docstring of its own whose first line is a sentence."""
    doc = vars(getattr(poolrpc, name)).get("__doc__", getattr(poolrpc, name).__doc__)
    assert doc.partition("\n")[0].endswith(".")
