"""Keras' pooling layers as layers: recognised by their class, and read by their attributes. It does not import Keras.

The classes are MaxPooling1D to 3D and AveragePooling1D to 3D (pool_size, strides, padding, data_format),
GlobalMaxPooling1D to 3D and GlobalAveragePooling1D to 3D (data_format, keepdims), and AdaptiveMaxPooling1D to 3D and
AdaptiveAveragePooling1D to 3D (output_size, data_format), of Keras 3 and, as far as it has them, Keras 2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc._shapes.parameters import boolean, choice
from poolrpc._shapes.rules import clip
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers import LAYERS, GlobalPool1d, Layer, Pool3d
from poolrpc.tensors import Array, Layout, as_array

if TYPE_CHECKING:
    from poolrpc._transport.result import PoolResult
    from poolrpc.client import PoolClient

__all__ = ["KerasPooling", "from_layer"]

_POOLING_CLASS = re.compile(r"(Global|Adaptive|)(Max|Average)Pooling([123])D")
_DATA_FORMATS: dict[str, Layout] = {"channels_last": "NHWC", "channels_first": "NCHW"}


@dataclass(frozen=True, slots=True)
class KerasPooling:
    """A pooling layer of Keras as a layer of poolrpc.

    Attributes:
        layer: The layer that computes it on a server.
        layout: The layout of the input and the output: "NHWC" for channels_last, "NCHW" for channels_first.
        keepdims: Whether the output has the spatial axes of a global layer, each of length 1.

    """

    layer: Layer
    layout: Layout
    keepdims: bool = True

    def run(self, client: PoolClient, x: object, mask: object = None) -> Array:
        """Compute the layer on a server.

        Args:
            client: The client.
            x: The input with its batch axis: an array, or what PoolClient.pool takes.
            mask: For GlobalAveragePooling1D: whether each step counts, (N, L). Default: None, all do.

        Returns:
            The output.

        Raises:
            InvalidArgumentError: The input or the mask does not fit the layer.
            PoolError: As in PoolClient.pool.

        """
        return self.output(client.pool(**self.arguments(x, mask)))

    def arguments(self, x: object, mask: object = None) -> dict[str, Any]:
        """Return the arguments of PoolClient.pool, or AsyncPoolClient.pool, that compute the layer.

        Args:
            x: The input with its batch axis.
            mask: For GlobalAveragePooling1D: whether each step counts, (N, L). Default: None, all do.

        Raises:
            InvalidArgumentError: The input or the mask does not fit the layer.

        """
        array = as_array(x, self.layout)
        rank = self.layer.spatial_dims + 2
        if array.ndim != rank:
            raise InvalidArgumentError(f"expected a batched input with {rank} axes, got shape {array.shape}", field="x")
        arguments = {"x": array, "layers": self.layer, "layout": self.layout}
        if mask is None:
            return arguments
        if self.layer != GlobalPool1d("mean"):
            msg = f"expected a mask only for GlobalAveragePooling1D, got one for {self.layer!r}"
            raise InvalidArgumentError(msg, field="mask")
        return {**arguments, "weights": np.asarray(mask) != 0}

    def output(self, result: PoolResult) -> Array:
        """Return the output of the layer.

        Args:
            result: The result of the call.

        """
        spatial = range(2, result.output.ndim) if self.layout == "NCHW" else range(1, result.output.ndim - 1)
        return result.output if self.keepdims else result.output.squeeze(tuple(spatial))


def from_layer(layer: Any) -> KerasPooling:  # noqa: ANN401 - a keras.layers.Layer
    """Return a pooling layer of Keras as a layer of poolrpc.

    The mean does not count padding, "same" puts the odd cell at the end, and a global layer drops the spatial axes
    unless it has keepdims. Of classes that inherit from one of Keras', those that override `call` are rejected.

    Args:
        layer: A layer of keras.layers, or of tf_keras.

    Raises:
        InvalidArgumentError: The layer is not one of the pooling layers, computes something of its own, or has a
            setting that no layer has.

    """
    found = next(filter(None, map(_pooling_class, type(layer).__mro__)), None)
    if found is None:
        msg = f"expected a pooling layer of Keras, got {clip(type(layer).__name__)}"
        raise InvalidArgumentError(msg, field="layer")
    if not type(layer).call.__module__.startswith(("keras.", "tf_keras.")):
        msg = f"expected the call of Keras, got {type(layer).__qualname__} with one of its own"
        raise InvalidArgumentError(msg, field="layer")
    which, what, dims = found.groups()
    short = {"Max": "Max", "Average": "Avg"}[what]
    parameters: dict[str, Any]
    layout = _DATA_FORMATS[choice("data_format", layer.data_format, tuple(_DATA_FORMATS))]
    if which == "Global":
        parameters = {"reduce": "max" if what == "Max" else "mean"}
        return KerasPooling(LAYERS[f"GlobalPool{dims}d"](**parameters), layout, boolean("keepdims", layer.keepdims))
    if which == "Adaptive":
        parameters = {"output_size": layer.output_size}
        return KerasPooling(LAYERS[f"Adaptive{short}Pool{dims}d"](**parameters), layout)
    padding = choice("padding", str(layer.padding).lower(), ("valid", "same"))
    parameters = {"kernel_size": layer.pool_size, "stride": layer.strides, "padding": padding}
    if what == "Average" and dims == "3":
        # As in torch, AvgPool3d has no half precision, and its kernel must fit the input without padding.
        return KerasPooling(Pool3d("mean", **parameters), layout)
    if what == "Average":
        parameters["count_include_pad"] = False
    return KerasPooling(LAYERS[f"{short}Pool{dims}d"](**parameters), layout)


def _pooling_class(cls: type) -> re.Match[str] | None:
    """Return the match of a class's name if it is a pooling layer of Keras."""
    in_keras = cls.__module__.startswith(("keras.", "tf_keras."))
    return _POOLING_CLASS.fullmatch(cls.__name__) if in_keras else None
