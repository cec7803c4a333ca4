"""sentence-transformers' Pooling modes, compared with its formulas, which are written here in NumPy.

The source is sentence_transformers/sentence_transformer/modules/pooling.py of version 6.2. cls and lasttoken are the
first and the last token that counts: a slice, which a client takes before it sends anything.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc import GlobalPool1d, SegmentPool
from tests.conformance.cases import Case, assert_equal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from poolrpc import PoolClient

    Array = np.ndarray[Any, Any]

SUITE = "sentence-transformers, its formulas in NumPy"
MODES = ("mean", "mean_sqrt_len_tokens", "weightedmean", "max")
LENGTHS = (1, 7, 12, 4)
"""The tokens of each sentence that count."""

STEPS, FEATURES = 12, 32


def embedding_cases() -> Iterator[Case]:
    """Yield the cases of every mode: sentences that are padded on either side, and sentences one after the other."""
    for mode, dtype, side in product(MODES, ("float32", "float16"), ("right", "left")):
        yield Case(SUITE, mode, f"padded on the {side}, {dtype}", partial(_padded, mode, dtype, side))
    for mode in MODES:
        yield Case(SUITE, mode, "one after the other, float32", partial(_flattened, mode))


def _padded(mode: str, dtype: str, side: str, client: PoolClient) -> None:
    x = np.random.default_rng(9).standard_normal((len(LENGTHS), STEPS, FEATURES)).astype(dtype)
    counts = np.arange(STEPS) < np.array(LENGTHS)[:, None]
    mask = counts if side == "right" else counts[:, ::-1]
    # The formulas of _forward_padded, in float64: the sums of half precision are exact to its last bits.
    wide, w = x.astype(np.float64), mask[..., None].astype(np.float64)
    positions = np.arange(1.0, STEPS + 1)[:, None]
    expected = {
        "mean": (wide * w).sum(1) / w.sum(1),
        "mean_sqrt_len_tokens": (wide * w).sum(1) / np.sqrt(w.sum(1)),
        "weightedmean": (wide * w * positions).sum(1) / (w * positions).sum(1),
        "max": np.where(w == 0, -np.inf, wide).max(1),
    }[mode].astype(dtype)
    weights = mask.astype(np.float32)
    if mode == "weightedmean":
        weights *= np.arange(1, STEPS + 1, dtype=np.float32)
    reduce = {"max": "max", "mean_sqrt_len_tokens": "sum"}.get(mode, "mean")
    output = client.pool(x, GlobalPool1d(reduce), weights=weights, layout="NHWC").output.squeeze(1)
    if mode == "mean_sqrt_len_tokens":
        output = (output / np.sqrt(weights.sum(1, keepdims=True))).astype(dtype)
    assert_equal(output, expected, {"float32": 1e-5, "float16": 2e-3}[dtype], {"float32": 1e-6, "float16": 1e-3}[dtype])


def _flattened(mode: str, client: PoolClient) -> None:
    offsets = np.cumsum([0, *LENGTHS])
    x = np.random.default_rng(10).standard_normal((offsets[-1], FEATURES), np.float32)
    # The formulas of _forward_flattened, sentence by sentence.
    expected = []
    for first, end in pairwise(offsets):
        tokens, positions = x[first:end].astype(np.float64), np.arange(1.0, end - first + 1)[:, None]
        formulas = {
            "mean": tokens.mean(0),
            "mean_sqrt_len_tokens": tokens.sum(0) / np.sqrt(end - first),
            "weightedmean": (tokens * positions).sum(0) / positions.sum(),
            "max": tokens.max(0),
        }
        expected.append(formulas[mode])
    sent = x
    lengths = np.array(LENGTHS, np.float32)[:, None]
    if mode == "weightedmean":
        positions = np.concatenate([np.arange(1, n + 1, dtype=np.float32) for n in LENGTHS])
        sent = x * positions[:, None]
    reduce = {"max": "max", "mean": "mean"}.get(mode, "sum")
    output = client.pool(sent[None], SegmentPool(reduce), offsets=offsets, layout="NHWC").output[0]
    output = output / {"mean_sqrt_len_tokens": np.sqrt(lengths), "weightedmean": lengths * (lengths + 1) / 2}.get(
        mode, 1
    )
    assert_equal(output, np.array(expected, np.float32), 1e-5, 1e-6)
