"""The result of a call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from poolrpc._transport.options import Transport
from poolrpc._wire import codec
from poolrpc.chains import Shape
from poolrpc.tensors import Array

Progress: TypeAlias = Callable[[int, int], object]
"""A function that is called with the number of planes that are done and the number of all planes."""


@dataclass(frozen=True, slots=True, eq=False)
class PoolResult:
    """The result of a layer or a chain, or of one step of a chain.

    Attributes:
        output: The output, of the input's dtype and layout.
        shapes: The shape after every layer of the chain, up to the one of the output.
        indices: The indices of the maxima (int64, the output's shape) if that layer has return_indices, as torch
            counts them: in its flattened channels-first input plane. Otherwise None.
        transport: How the tensors were sent: "local", "unary", "stream" or "arena".

    """

    output: Array
    shapes: tuple[Shape, ...]
    indices: Array | None = None
    transport: Transport = "unary"

    @property
    def shape(self) -> Shape:
        """The shape of the output."""
        return self.shapes[-1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:  # noqa: ANN401, FBT001 - NumPy's protocol
        """Return the output, as numpy.asarray(result) does."""
        return np.asarray(self.output, dtype) if copy is None else np.array(self.output, dtype, copy=copy)

    def __repr__(self) -> str:
        """Describe the result without its contents."""
        indices = "" if self.indices is None else ", with indices"
        return f"<PoolResult {self.output.dtype.name} {' -> '.join(map(str, self.shapes))}{indices}>"

    def _repr_html_(self) -> str:
        # Jupyter's protocol.
        from poolrpc._html import result_table  # noqa: PLC0415 - keeps `import poolrpc` fast

        return result_table(self)


def make_results(
    branches: Sequence[codec.BranchResult], arrays: Sequence[Array], transport: Transport
) -> list[PoolResult]:
    """Return the results of all branches, given their output tensors in order."""
    if len(arrays) == len(branches):
        return [PoolResult(array, each.shapes, None, transport) for each, array in zip(branches, arrays, strict=True)]
    remaining = iter(arrays)
    return [
        PoolResult(next(remaining), each.shapes, None if each.indices is None else next(remaining), transport)
        for each in branches
    ]
