"""Layers and paddings that torch.nn lacks, compared with their definitions in NumPy for random parameters."""

from __future__ import annotations

import os
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import poolrpc as p
from poolrpc_server.compute.kernels import plan_for
from tests.parity.reference import assert_result, reference, values
from tests.unit.strategies import layers

if TYPE_CHECKING:
    from collections.abc import Iterable

quick = settings(deadline=None, max_examples=int(os.environ.get("POOLRPC_EXAMPLES", "60")))
LONGEST = {1: 12, 2: 7, 3: 4}


def drawn(data: st.DataObject, names: Iterable[str]) -> tuple[p.Layer, tuple[int, ...], str]:
    """Draw a layer with windows of up to five cells a side, a plane that it can pool, and a dtype."""
    layer = data.draw(layers([p.LAYERS[name] for name in names], most=5))
    dims = layer.spatial_dims
    plane = tuple(data.draw(st.integers(1, LONGEST[dims])) for _ in range(dims))
    try:
        layer.output_plane(plane)
    except p.InvalidArgumentError:
        assume(False)
    return layer, plane, data.draw(st.sampled_from(layer.dtypes))


def computed(layer: p.Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what torch's operators compute for a layer, as the server resolves it."""
    plane = tuple(x.shape[2:])
    return plan_for(layer.resolved(plane), x.dtype, plane, None, "cpu").eager(x, None, 0, prod(x.shape[:2]))


@pytest.mark.parametrize("family", ["MaxPool", "AvgPool"])
@quick
@given(data=st.data(), seed=st.integers(0, 2**30))
def test_any_padding_has_the_values_of_the_definition(family: str, data: st.DataObject, seed: int) -> None:
    """Pairs, rules and paddings up to a window's span: maxima, their indices and means are those of the definition."""
    layer, plane, dtype = drawn(data, [f"{family}{dims}d" for dims in LONGEST])
    x = values((2, 3, *plane), dtype, seed)
    for ours, theirs in zip(computed(layer, x), reference(layer, x), strict=True):
        if ours is not None:
            assert_result(ours, theirs, layer, (layer, plane, dtype, seed))


@pytest.mark.parametrize("family", ["Pool", "GlobalPool"])
@quick
@given(data=st.data(), seed=st.integers(0, 2**30))
def test_a_reduction_has_the_value_of_its_definition(family: str, data: st.DataObject, seed: int) -> None:
    """Every reduction of windows and of planes: cells that are chosen are exact, and all else is within its bound."""
    layer, plane, dtype = drawn(data, [f"{family}{dims}d" for dims in LONGEST])
    x = values((2, 3, *plane), dtype, seed)
    output, _ = computed(layer, x)
    assert_result(output, reference(layer, x)[0], layer, (layer, plane, dtype, seed))


@quick
@given(data=st.data(), seed=st.integers(0, 2**30))
def test_sums_of_small_integers_are_exact(data: st.DataObject, seed: int) -> None:
    """Sums, and means rounded once, of floats that are small integers are exact, in half precision too."""
    layer, plane, _ = drawn(data, [f"Pool{dims}d" for dims in LONGEST])
    reduce = data.draw(st.sampled_from(("sum", "mean")))
    layer = replace(layer, reduce=reduce, count_include_pad=reduce == "mean" and data.draw(st.booleans()))  # type: ignore[call-arg]  # a Pool has them
    dtype = data.draw(st.sampled_from(layer.dtypes))
    x = torch.randint(-8, 9, (2, 3, *plane), generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
    # Each is a sum of integers, divided once, in float32 for half precision.
    wide = reference(layer, x.double() if x.is_floating_point() else x)[0]
    exact = wide.float().to(x.dtype) if dtype in {"float16", "bfloat16"} else wide.to(x.dtype)
    assert torch.equal(computed(layer, x)[0], exact), (layer, plane, dtype, seed)


@quick
@given(data=st.data(), seed=st.integers(0, 2**30))
def test_a_blur_has_the_value_of_its_definition(data: st.DataObject, seed: int) -> None:
    """A blur of any filter and stride is that of timm's padding and taps."""
    layer, plane, dtype = drawn(data, ["BlurPool2d"])
    x = values((2, 3, *plane), dtype, seed)
    assert_result(computed(layer, x)[0], reference(layer, x)[0], layer, (layer, plane, dtype, seed))
