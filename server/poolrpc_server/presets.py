"""Presets: layers that the operator has named, and `pool`, whose layers each request specifies.

The Open Inference Protocol serves each of them as a model.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from poolrpc._shapes.operands import OPERAND_DTYPES
from poolrpc._shapes.rules import clip
from poolrpc._wire.codec import Request
from poolrpc.chains import operand_name, spatial_dims
from poolrpc.errors import InvalidArgumentError
from poolrpc.expression import parse_branches
from poolrpc.tensors import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from poolrpc.chains import Chain

POOL_PRESET = "pool"
PRESET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)

OPERAND_AXES = {"offsets": 1, "boxes": 2}
"""Number of axes of the operands that have others than the input."""

IMAGE_DIMS = 2
"""Number of spatial axes that the metadata reports for `pool`."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Named layers.

    Attributes:
        name: The name.
        layer: The layers' expression. Empty: each request has its own.
        branches: The parsed layers.

    """

    name: str
    layer: str = ""
    branches: tuple[Chain, ...] = ()

    @property
    def rank(self) -> int:
        """The number of axes of the input, including batch and channels."""
        return (spatial_dims(self.branches) if self.branches else IMAGE_DIMS) + 2

    @property
    def inputs(self) -> dict[str, str]:
        """The names of the inputs, each with one of its possible dtypes."""
        operand = operand_name(self.branches, given=False)
        return {"input": "float32"} | ({operand: OPERAND_DTYPES[operand][0]} if operand else {})

    def axes(self, name: str) -> int:
        """Return the number of axes of an input or an output."""
        return OPERAND_AXES.get(name, self.rank) if name in self.inputs else self.rank

    @property
    def outputs(self) -> dict[str, str]:
        """The names of the outputs, each with the dtype that it has for an input of float32."""
        request = Request(TensorSpec("float32", ()), self.branches)
        dtypes = [
            dtype
            for chain in self.branches
            for dtype in [request.dtypes(chain)[-1], *["int64"] * chain[-1].returns_indices]
        ]
        return dict(zip(output_names(self.branches), dtypes, strict=True)) or {"output": "float32"}


def output_names(branches: Iterable[Chain]) -> list[str]:
    """Return the names of the outputs of branches, in order.

    The first branch has "output", and "indices" if it returns indices; the second has "output_1", and so on.
    """
    names = []
    for i, chain in enumerate(branches):
        suffix = f"_{i}" if i else ""
        names.append(f"output{suffix}")
        if chain[-1].returns_indices:
            names.append(f"indices{suffix}")
    return names


def read_presets(definitions: Iterable[str], path: str = "") -> dict[str, Preset]:
    """Return all presets by name, including `pool`.

    Args:
        definitions: Presets as "NAME=LAYER".
        path: A TOML file of presets as NAME = "LAYER". Empty: there is no file.

    Raises:
        ValueError: A name or a layer is invalid, or the file cannot be read.

    """
    pairs: list[tuple[str, object]] = []
    for definition in definitions:
        name, equals, text = definition.partition("=")
        if not equals:
            raise ValueError(f"model: expected NAME=LAYER, got {clip(definition)}")
        pairs.append((name.strip(), text.strip()))
    if path:
        try:
            pairs += tomllib.loads(Path(path).read_text(encoding="utf-8")).items()
        except (OSError, ValueError) as error:
            raise ValueError(f"models: expected a TOML file of NAME = 'LAYER', got {clip(path)}: {error}") from None
    presets = {POOL_PRESET: Preset(POOL_PRESET)}
    for name, layer in pairs:
        if not PRESET_NAME.fullmatch(name):
            raise ValueError(f"model: expected a name of letters, digits, '_', '.' and '-', got {clip(name)}")
        if name in presets:
            raise ValueError(f"model: expected a name that is neither {POOL_PRESET!r} nor in use, got {name!r}")
        if not isinstance(layer, str):
            raise ValueError(f"model {name}: expected a layer in quotes, got {clip(layer)}")  # noqa: TRY004 - invalid content of a file
        try:
            branches = parse_branches(layer)
            spatial_dims(branches)
            operand_name(branches, given=False)
        except InvalidArgumentError as error:
            raise ValueError(f"model {name}: {error}") from None
        presets[name] = Preset(name, layer, branches)
    return presets
