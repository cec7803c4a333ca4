"""Keras' pooling layers, compared with its rules in NumPy: TensorFlow is not needed, and neither is Keras.

The rules are those of tf.nn.max_pool and tf.nn.avg_pool, which Keras' layers call with TensorFlow: with padding "same"
there are ceil(n / stride) windows, the odd cell of padding is at the end, and the mean never counts the padding.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc.keras import from_layer
from tests.conformance.cases import Case, assert_equal
from tests.keras_layers import layer_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from poolrpc import PoolClient

    Array = np.ndarray[Any, Any]

SUITE = "Keras, its rules in NumPy"
SIZES = ((5,), (7, 4), (5, 6, 3))
WINDOWS = ((2, 2), (3, 2), (3, 1), (2, 3), (1, 3), (5, 4))
"""Sizes and strides of windows."""


def keras_cases() -> Iterator[Case]:
    """Yield the cases of every layer."""
    for kind, size, data_format in product(("Max", "Average"), SIZES, ("channels_last", "channels_first")):
        dims = len(size)
        name = f"{kind}Pooling{dims}D"
        for (k, s), padding in product(WINDOWS, ("same", "valid")):
            if padding == "same" or k <= min(size):
                settings = {"pool_size": (k,) * dims, "strides": (s,) * dims, "padding": padding}
                yield _case(name, size, {**settings, "data_format": data_format}, _windows(size, k, s, padding))
        for keepdims in (False, True):
            settings = {"data_format": data_format, "keepdims": keepdims}
            yield _case(f"Global{name}", size, settings, [[(0, n)] for n in size])
        cells = [[(i * n // 2, -(-(i + 1) * n // 2)) for i in range(2)] for n in size]
        yield _case(f"Adaptive{name}", size, {"output_size": (2,) * dims, "data_format": data_format}, cells)
    for data_format, keepdims in product(("channels_last", "channels_first"), (False, True)):
        settings = {"data_format": data_format, "keepdims": keepdims}
        yield Case(SUITE, "GlobalAveragePooling1D", f"with a mask, {settings}", partial(_run_masked, settings))


def _windows(size: tuple[int, ...], k: int, s: int, padding: str) -> list[list[tuple[int, int]]]:
    """Return the first cell and the end of every window on every axis, without the padding."""
    windows = []
    for n in size:
        count = -(-n // s) if padding == "same" else (n - k) // s + 1
        begin = max((count - 1) * s + k - n, 0) // 2 if padding == "same" else 0
        windows.append([(max(o * s - begin, 0), min(o * s - begin + k, n)) for o in range(count)])
    return windows


def _case(name: str, size: tuple[int, ...], settings: dict[str, Any], windows: list[list[tuple[int, int]]]) -> Case:
    text = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    run = partial(_run, name, size, settings, windows)
    return Case(SUITE, name, f"{'x'.join(map(str, size))}: {text}", run)


def _run(
    name: str, size: tuple[int, ...], settings: dict[str, Any], windows: list[list[tuple[int, int]]], client: PoolClient
) -> None:
    x = np.random.default_rng(7).standard_normal((2, 3, *size), np.float32)
    reduce = np.max if "Max" in name else partial(np.mean, dtype=np.float64)
    expected = np.empty((2, 3, *map(len, windows)), np.float32)
    for at in np.ndindex(expected.shape[2:]):
        cells = tuple(slice(*axis[o]) for axis, o in zip(windows, at, strict=True))
        expected[(..., *at)] = reduce(x[(..., *cells)], axis=tuple(range(2, x.ndim)))
    if settings.get("keepdims") is False:
        expected = expected.squeeze(tuple(range(2, x.ndim)))
    if settings["data_format"] == "channels_last":
        x, expected = np.moveaxis(x, 1, -1), np.moveaxis(expected, 1, -1)
    output = from_layer(layer_of(name, **settings)).run(client, x)
    assert_equal(output, expected, 0.0 if "Max" in name else 1e-5, 1e-6)


def _run_masked(settings: dict[str, Any], client: PoolClient) -> None:
    x = np.random.default_rng(8).standard_normal((3, 4, 6), np.float32)
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]], bool)
    x[1, :, 2] = np.nan  # of a step that does not count
    expected = np.stack([each[:, row].mean(1, dtype=np.float64) for each, row in zip(x, mask, strict=True)])
    expected = expected.astype(np.float32)
    if settings["keepdims"]:
        expected = expected[..., None]
    if settings["data_format"] == "channels_last":
        x, expected = np.moveaxis(x, 1, -1), np.moveaxis(expected, 1, -1)
    layer = from_layer(layer_of("GlobalAveragePooling1D", **settings))
    assert_equal(layer.run(client, x, mask), expected, 1e-5, 1e-6)
