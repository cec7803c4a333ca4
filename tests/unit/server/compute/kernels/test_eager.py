"""The samples of the fractional layers: SplitMix64's outputs, plane by plane."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import FractionalMaxPool2d, FractionalMaxPool3d
from poolrpc_server.compute.kernels import eager
from poolrpc_server.compute.kernels.eager import draw_samples

SEEDS = st.integers(0, 2**64 - 1)
MASK = 2**64 - 1


def splitmix64(seed, count):
    """Return the first outputs of SplitMix64, as its authors' C code computes them."""
    state, outputs = seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def test_the_generator_is_splitmix64():
    """The samples of seed 0 are the upper 24 bits of SplitMix64's known outputs."""
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert splitmix64(0, 4) == known
    assert draw_samples(0, 1, 2, 2).flatten().tolist() == [(output >> 40) / 2**24 for output in known]


@given(SEEDS, st.integers(0, 3), st.integers(1, 4), st.integers(2, 3))
def test_samples_are_the_generators_outputs_for_any_seed(seed, batch, channels, axes):
    """Samples are the generator's outputs in the order of planes, for any seed, including the greatest."""
    samples = draw_samples(seed, batch, channels, axes)
    assert (samples.shape, samples.dtype) == ((batch, channels, axes), torch.float64)
    expected = [(output >> 40) / 2**24 for output in splitmix64(seed, batch * channels * axes)]
    assert samples.flatten().tolist() == expected


@given(SEEDS, st.integers(1, 3), st.integers(1, 5), st.integers(2, 3), st.integers(1, 4))
def test_a_planes_samples_depend_on_the_seed_and_its_number_alone(seed, batch, channels, axes, more):
    """A plane's samples are the same for any N and C, and whatever planes follow it."""
    samples = draw_samples(seed, batch, channels, axes).reshape(-1, axes)
    assert torch.equal(samples, draw_samples(seed, 1, batch * channels, axes)[0])
    assert torch.equal(samples, draw_samples(seed, batch + more, channels, axes).reshape(-1, axes)[: len(samples)])


@given(SEEDS, st.integers(0, 2**31), st.sampled_from([FractionalMaxPool2d, FractionalMaxPool3d]))
def test_samples_can_be_drawn_from_any_plane_on(seed, first, cls):
    """The layer for a tensor's planes from a number on has a seed whose first samples are these planes'."""
    layer = cls(2, output_size=1, seed=seed).at_plane(first)
    axes = cls.spatial_dims
    state = seed + first * axes * 0x9E3779B97F4A7C15
    expected = [(output >> 40) / 2**24 for output in splitmix64(state & MASK, 2 * axes)]
    assert draw_samples(layer.seed, 1, 2, axes).flatten().tolist() == expected
    if first < 100:
        assert torch.equal(draw_samples(layer.seed, 1, 2, axes)[0], draw_samples(seed, 1, first + 2, axes)[0, first:])


def test_samples_spread_over_0_to_1_and_are_exact_in_float32():
    """The samples of 10,000 planes are in [0, 1), evenly over its tenths, and are exact in float32."""
    samples = draw_samples(7, 100, 100, 2)
    assert samples.min() >= 0
    assert samples.max() < 1
    assert torch.equal(samples.float().double(), samples)
    tenths = np.bincount((samples.flatten().numpy() * 10).astype(int))
    assert len(tenths) == 10
    assert tenths.min() > 1800


@pytest.mark.parametrize(("one", "other"), [(0, 1), (0, 2**63), (2**64 - 1, 0)])
def test_seeds_differ(one, other):
    """Different seeds have different samples."""
    assert not torch.equal(draw_samples(one, 1, 4, 2), draw_samples(other, 1, 4, 2))


@pytest.mark.parametrize("indices", [False, True])
def test_planes_are_divided_on_a_gpu(monkeypatch, indices):
    """A GPU's operator accepts a limited number of planes; more are computed in several calls."""
    monkeypatch.setattr(eager, "GRID_PLANES", 3)
    layer, dtype = FractionalMaxPool2d(2, output_size=(3, 2), return_indices=indices), torch.float32
    x = torch.empty(2, 7, 8, 9, device="meta")  # any device but the CPU
    output, chosen = eager.bind(layer, dtype, (3, 2))(x, None, 0, 14)
    assert output.shape == (2, 7, 3, 2)
    assert (None if chosen is None else chosen.shape) == (output.shape if indices else None)
