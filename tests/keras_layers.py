"""Objects with what a layer of Keras 3.15 has: its class, its module, its call and its attributes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def layer_of(name: str, **settings: object) -> Any:
    """Return an object with the class, the call and the attributes of a layer of Keras."""
    module = f"keras.src.layers.pooling.{name.lower()}"

    def call(self: object, inputs: object) -> object:
        """Stand for Keras' own call."""
        raise NotImplementedError

    call.__module__ = module
    cls = type(name, (SimpleNamespace,), {"__module__": module, "call": call})
    return cls(**settings)
