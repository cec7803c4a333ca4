"""Layers with the operand of a request: what the plans and the operators of such a layer know of the request."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from poolrpc_server.compute.kernels.windows import Sizes

WHOLE_OPERANDS = ("weights", "offsets", "boxes")
"""The operands that are not divided with the planes of the input."""


@dataclass(frozen=True, slots=True)
class WithOperand:
    """A layer with an operand of another shape than the input's.

    Attributes:
        layer: The layer.
        size: The number of segments or of boxes; 0 for weights.
        channels: The number of planes that share a row of the weights.
        start: The number of the first plane among those that share a row.

    """

    layer: Any  # a Layer
    size: int
    channels: int
    start: int = 0

    returns_indices: ClassVar[bool] = False
    operand_optional: ClassVar[bool] = False

    @property
    def operand(self) -> str:
        """The name of the operand."""
        return str(self.layer.operand)

    @property
    def family(self) -> str:
        """The name of what is computed, which no kernel computes without the operand."""
        return f"{self.layer.family}, {self.operand}"

    @property
    def spatial_dims(self) -> int:
        """The number of spatial axes."""
        return int(self.layer.spatial_dims)

    def resolved(self, _: Sizes) -> WithOperand:
        """Return the layer itself: nothing of it depends on a plane."""
        return self

    def output_dtype(self, dtype: str) -> str:
        """Return the name of the output's dtype."""
        return str(self.layer.output_dtype(dtype))

    def output_plane(self, plane: Sizes) -> Sizes:
        """Return the spatial shape of the output."""
        return (self.size,) if self.operand == "offsets" else tuple(self.layer.output_plane(plane))

    def work(self, plane: Sizes) -> int:
        """Return the number of cells that are visited on a plane."""
        return int(self.layer.work(plane)) if self.operand == "boxes" else prod(plane)


def takes_operand(layer: Any) -> bool:  # noqa: ANN401 - a Layer, or what stands for one in a plan
    """Return whether the operator of a layer takes an operand."""
    return bool(layer.operand) and not layer.operand_optional
