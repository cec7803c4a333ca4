"""The random samples of the fractional layers: a function of the seed and a plane's number, and of nothing else."""

from __future__ import annotations

import numpy as np
import torch

from poolrpc.layers import SEED_STEP

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), as a counter:
# sample k of a seed is the generator's k-th output, so that any range of planes can be drawn on its own.
GAMMA = np.uint64(SEED_STEP)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
FLOAT32_BITS = 24


def draw(seed: int, batch: int, channels: int, axes: int) -> torch.Tensor:
    """Draw torch's `_random_samples` for a tensor: plane n*channels + c has the samples (n*channels + c)*axes onwards.

    Args:
        seed: 0..2**64-1.
        batch: N.
        channels: C.
        axes: Spatial axes.

    Returns:
        Float64 of (batch, channels, axes), in [0, 1), each exact in float32 too.

    """
    counter = np.arange(1, batch * channels * axes + 1, dtype=np.uint64)
    state = np.uint64(seed) + counter * GAMMA  # wraps, as it is meant to
    state = (state ^ (state >> np.uint64(30))) * MIX_1
    state = (state ^ (state >> np.uint64(27))) * MIX_2
    state ^= state >> np.uint64(31)
    samples = (state >> np.uint64(64 - FLOAT32_BITS)).astype(np.float64) / 2**FLOAT32_BITS
    return torch.from_numpy(samples.reshape(batch, channels, axes))
