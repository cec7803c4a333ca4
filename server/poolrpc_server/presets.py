"""The models of the Open Inference door: `pool`, whose layer each request names, and the presets of the operator."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from poolrpc._shapes.rules import clip
from poolrpc.chains import spatial_dims
from poolrpc.errors import InvalidArgumentError
from poolrpc.expression import parse_branches

if TYPE_CHECKING:
    from collections.abc import Iterable

    from poolrpc.chains import Chain

POOL = "pool"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)

IMAGE_DIMS = 2
"""Spatial axes that a model is said to have whose layers take any number, or are told by each request."""


@dataclass(frozen=True, slots=True)
class Model:
    """Layers under a name.

    Attributes:
        name: The name.
        layer: Their expression. Empty: each request has its own.
        branches: What it says.

    """

    name: str
    layer: str = ""
    branches: tuple[Chain, ...] = ()

    @property
    def rank(self) -> int:
        """The axes of its tensors, with the batch's."""
        return (spatial_dims(self.branches) or IMAGE_DIMS) + 2

    @property
    def inputs(self) -> dict[str, str]:
        """What it takes: a name, and the first dtype of those that it may have."""
        taken = any(chain[0].takes_indices for chain in self.branches)
        return {"input": "float32"} | ({"indices": "int64"} if taken else {})

    @property
    def outputs(self) -> dict[str, str]:
        """What it gives, likewise."""
        if not self.branches:
            return {"output": "float32"}
        return {name: "int64" if name.startswith("indices") else "float32" for name in output_names(self.branches)}


def output_names(branches: Iterable[Chain]) -> list[str]:
    """Give the names of the outputs of branches: "output", and "indices" where there are any; "output_1" and so on."""
    names = []
    for i, chain in enumerate(branches):
        end = f"_{i}" if i else ""
        names.append(f"output{end}")
        if chain[-1].returns_indices:
            names.append(f"indices{end}")
    return names


def read_models(presets: Iterable[str], path: str = "") -> dict[str, Model]:
    """Give every model by its name.

    Args:
        presets: Models as "NAME=LAYER".
        path: A TOML file of such lines, with the layer in quotes. Empty: none.

    Raises:
        ValueError: A name or a layer is wrong, or the file can't be read; says which.

    """
    pairs: list[tuple[str, object]] = []
    for preset in presets:
        name, equals, text = preset.partition("=")
        if not equals:
            raise ValueError(f"model: expected NAME=LAYER, got {clip(preset)}")
        pairs.append((name.strip(), text.strip()))
    if path:
        try:
            pairs += tomllib.loads(Path(path).read_text(encoding="utf-8")).items()
        except (OSError, ValueError) as error:
            raise ValueError(f"models: expected a TOML file of NAME = 'LAYER', got {clip(path)}: {error}") from None
    models = {POOL: Model(POOL)}
    for name, layer in pairs:
        if not NAME.fullmatch(name):
            raise ValueError(f"model: expected a name of letters, digits, '_', '.' and '-', got {clip(name)}")
        if name in models:
            raise ValueError(f"model: expected names that differ, and from {POOL!r}, got {name!r} again")
        if not isinstance(layer, str):
            raise ValueError(f"model {name}: expected a layer in quotes, got {clip(layer)}")  # noqa: TRY004 - of a file
        try:
            branches = parse_branches(layer)
            spatial_dims(branches)
        except InvalidArgumentError as error:
            raise ValueError(f"model {name}: {error}") from None
        models[name] = Model(name, layer, branches)
    return models
