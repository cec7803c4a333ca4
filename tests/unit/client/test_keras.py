"""Keras' pooling layers as layers, by their attributes, without a server and without Keras."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from poolrpc import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool1d,
    AvgPool2d,
    GlobalPool1d,
    GlobalPool2d,
    InvalidArgumentError,
    MaxPool1d,
    MaxPool2d,
    Pool3d,
)
from poolrpc.keras import KerasPooling, from_layer
from tests.keras_layers import layer_of

LAST, FIRST = {"data_format": "channels_last"}, {"data_format": "channels_first"}
WINDOW = {"pool_size": (3, 2), "strides": (2, 2)}


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("MaxPooling2D", {**WINDOW, "padding": "valid", **LAST}, KerasPooling(MaxPool2d((3, 2), 2), "NHWC")),
        ("MaxPooling2D", {**WINDOW, "padding": "SAME", **FIRST}, KerasPooling(MaxPool2d((3, 2), 2, "same"), "NCHW")),
        (
            "MaxPooling1D",
            {"pool_size": (2,), "strides": (1,), "padding": "same", **LAST},
            KerasPooling(MaxPool1d(2, 1, "same"), "NHWC"),
        ),
        (
            "AveragePooling2D",
            {**WINDOW, "padding": "same", **LAST},
            KerasPooling(AvgPool2d((3, 2), 2, "same", count_include_pad=False), "NHWC"),
        ),
        (
            "AveragePooling3D",
            {"pool_size": (2, 2, 2), "strides": (2, 2, 2), "padding": "valid", **LAST},
            KerasPooling(Pool3d("mean", 2, 2), "NHWC"),
        ),
        ("GlobalMaxPooling2D", {"keepdims": False, **LAST}, KerasPooling(GlobalPool2d("max"), "NHWC", keepdims=False)),
        ("GlobalAveragePooling1D", {"keepdims": True, **FIRST}, KerasPooling(GlobalPool1d("mean"), "NCHW")),
        ("AdaptiveMaxPooling1D", {"output_size": (4,), **LAST}, KerasPooling(AdaptiveMaxPool1d(4), "NHWC")),
        ("AdaptiveAveragePooling2D", {"output_size": (4, 3), **LAST}, KerasPooling(AdaptiveAvgPool2d((4, 3)), "NHWC")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layer_of_keras_is_a_layer(name, settings, expected):
    """Each class is the layer with the same windows; the mean does not count padding; data_format is the layout."""
    assert from_layer(layer_of(name, **settings)) == expected


def test_a_class_that_inherits_from_one_of_keras_is_one():
    """A subclass with the call of Keras is taken, one with a call of its own is not."""
    base = type(layer_of("MaxPooling2D"))
    settings = {**WINDOW, "padding": "valid", **LAST}
    named = type("Stem", (base,), {"__module__": "model"})
    assert from_layer(named(**settings)).layer == MaxPool2d((3, 2), 2)

    class Doubled(base):
        def call(self, inputs):
            return 2 * inputs

    with pytest.raises(
        InvalidArgumentError, match=r"layer: expected the call of Keras, got .*Doubled with one of its own"
    ):
        from_layer(Doubled(**settings))


@pytest.mark.parametrize(
    ("layer", "field", "message"),
    [
        (SimpleNamespace(**WINDOW), "layer", "expected a pooling layer of Keras, got 'SimpleNamespace'"),
        (layer_of("Conv2D", **LAST), "layer", "expected a pooling layer of Keras, got 'Conv2D'"),
        (
            layer_of("MaxPooling2D", **WINDOW, padding="causal", **LAST),
            "padding",
            "expected 'valid' or 'same', got 'causal'",
        ),
        (layer_of("MaxPooling2D", **WINDOW, padding="same", data_format="NHWC"), "data_format", "got 'NHWC'"),
        (layer_of("MaxPooling2D", pool_size=(0, 2), strides=None, padding="same", **LAST), "kernel_size", "got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_pooling_layer_is_rejected(layer, field, message):
    """Another class or a setting that no layer has is rejected, with what was expected."""
    with pytest.raises(InvalidArgumentError, match=message) as raised:
        from_layer(layer)
    assert raised.value.violations[0].field == field


def test_inputs_that_do_not_fit_are_rejected():
    """Keras' inputs have a batch axis, and only the global mean of sequences takes a mask."""
    layer = from_layer(layer_of("MaxPooling2D", **WINDOW, padding="valid", **LAST))
    with pytest.raises(InvalidArgumentError, match=r"x: expected a batched input with 4 axes, got shape \(8, 8, 3\)"):
        layer.arguments(np.zeros((8, 8, 3)))
    with pytest.raises(InvalidArgumentError, match="mask: expected a mask only for GlobalAveragePooling1D"):
        layer.arguments(np.zeros((1, 8, 8, 3)), np.ones((1, 8)))


def test_keras_is_not_imported():
    """Neither Keras nor TensorFlow is needed."""
    assert not {"keras", "tf_keras", "tensorflow"} & set(sys.modules)
