"""The reference page has every public name."""

import re

import poolrpc
import poolrpc.keras
import poolrpc.onnx
import poolrpc.torch
import poolrpc_server
from tests.docs.blocks import ROOT


def test_the_reference_page_has_every_public_name() -> None:
    """The page documents every export once, and names those without a docstring."""
    page = (ROOT / "docs/reference.md").read_text()
    documented = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    plain = {"poolrpc.LAYERS", "poolrpc.STEPS", "poolrpc.__version__", "poolrpc.onnx.OPERATORS"}
    packages = (poolrpc, poolrpc.keras, poolrpc.onnx, poolrpc.torch, poolrpc_server)
    public = {f"{package.__name__}.{name}" for package in packages for name in package.__all__}
    assert sorted(documented) == sorted(public - plain)
    assert all(f"`{name}`" in page for name in plain)
