"""Plans: how a layer is computed on planes of one size; and rows: what a plan needs to know of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch

from poolrpc_server.compute.kernels.cost import Case
from poolrpc_server.compute.kernels.eager import Operator, Pooled, bind
from poolrpc_server.compute.kernels.windows import Sizes, Windows

EXPLAINED_PLANES = (1, 8, 64, 512, 4096)
"""The plane counts for which explain() names the kernel."""

@dataclass(frozen=True)
class Row:
    """A kernel's row in the table of kernels: what it computes, when it applies, and when it pays.

    Attributes:
        name: The kernel's name in explain().
        families: The families of layers that it computes.
        run: Computes (plan, input, output, indices); each tensor is of (planes, *shape).
        pays: Returns whether it is estimated to be faster than torch on a case.
        fits: Returns whether it gives a plan's result.
        passes: Returns how often it visits each cell. None: once for each cell of a window.
        channels_last: Whether it also takes (planes, *plane, C).
        indices: Whether it returns the indices of the maxima.
        bind: Prepares computing (plan, input, output) in fixed memory many times. None: the kernel has no such form.

    """

    name: str
    families: tuple[str, ...]
    run: Callable[[Plan, torch.Tensor, torch.Tensor, Any], object]
    pays: Callable[[Plan, Case], bool]
    fits: Callable[[Plan], bool] = lambda _: True
    passes: Callable[[Windows], int] | None = None
    channels_last: bool = False
    indices: bool = False
    bind: Callable[[Plan, torch.Tensor, torch.Tensor], Callable[[], None]] | None = None


@dataclass(frozen=True)
class Plan:
    """How a layer is computed on planes of one size.

    Attributes:
        layer: The layer.
        dtype: The dtype of the cells.
        plane: The spatial shape of the input.
        channels: The number of channels if they are last in memory, None if they are first.
        device: The type of the device: "cpu", "cuda", "mps".
        output_plane: The spatial shape of the output, in the same dtype.
        table: The rows to choose from, in the order in which they are tried.

    """

    layer: Any  # a Layer; each row knows the parameters of its families
    dtype: torch.dtype
    plane: Sizes
    channels: int | None
    device: str
    output_plane: Sizes
    table: Sequence[Row] = field(repr=False, compare=False)

    @cached_property
    def plane_shape(self) -> Sizes:
        """The shape of what kernels take as an input plane: with the channels, if they are last."""
        return self.plane if self.channels is None else (*self.plane, self.channels)

    @cached_property
    def result_shape(self) -> Sizes:
        """The shape of an output plane, likewise."""
        return self.output_plane if self.channels is None else (*self.output_plane, self.channels)

    @cached_property
    def windows(self) -> Windows:
        """The windows over every axis of `plane_shape`; for an adaptive or global layer, an approximation."""
        geometry = getattr(self.layer, "geometry", None)
        if geometry is None:
            return Windows.dividing(self.plane_shape, self.result_shape) or Windows.tiling(self.plane_shape)
        windows = Windows.of(geometry())
        return windows if self.channels is None else windows.with_channels()

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows of the table that give this layer's result."""
        if self.device != "cpu":
            return ()
        return tuple(
            row
            for row in self.table
            if self.layer.family in row.families
            and (row.channels_last or self.channels is None)
            and row.indices == self.layer.returns_indices
            and row.fits(self)
        )

    @cached_property
    def eager(self) -> Operator:
        """The layer computed by torch's own operators."""
        return bind(self.layer, self.dtype, self.output_plane, channels_last=self.channels is not None)

    @cached_property
    def cells(self) -> int:
        """The number of cells of an input plane, with the channels if they are last."""
        return prod(self.plane_shape)

    def choose(self, planes: int) -> Row | None:
        """Return the row to use for a number of planes; None for torch's own operators."""
        case = Case(self.dtype, planes, self.plane_shape, self.result_shape, self.windows)
        return next((row for row in self.rows if row.pays(self, case)), None)

    def work(self, row: Row | None, planes: int) -> int:
        """Return the number of cells that a kernel visits on so many planes, which the work budget limits."""
        if row is None or row.passes is None:
            return planes * (self.channels or 1) * int(self.layer.work(self.plane))
        return planes * max(self.cells, prod(self.result_shape)) * row.passes(self.windows)

    def scratch(self, row: Row | None, planes: int) -> int:
        """Return an upper bound of the memory that a kernel takes for so many planes, in addition to its output."""
        return 0

    def explain(self) -> str:
        """Return one line that says what the output is and which kernel is used for how many planes."""
        shape, out = ("x".join(map(str, sizes)) for sizes in (self.plane, self.output_plane))
        layout = "NCHW" if self.channels is None else f"NHWC of {self.channels} channels"
        head = f"{self.layer!r} {str(self.dtype).removeprefix('torch.')} {shape} -> {out} {layout} on {self.device}: "
        if self.device != "cpu":
            return head + "torch's own kernels"
        if not self.rows:
            return head + "eager torch, no kernel is known to equal it"
        choices: list[tuple[str, int]] = []
        for planes in EXPLAINED_PLANES:
            row = self.choose(planes)
            name = row.name if row else "eager torch"
            if not choices or choices[-1][0] != name:
                choices.append((name, planes))
        return head + ", ".join(f"{name} from {planes}" for name, planes in choices) + " planes on, by estimate"

    def compute(
        self,
        row: Row | None,
        x: torch.Tensor,
        indices: torch.Tensor | None = None,
        *,
        outputs: Sequence[torch.Tensor] = (),
        first: int = 0,
        count: int | None = None,
    ) -> Pooled:
        """Compute the layer on some planes of a tensor.

        Args:
            row: The kernel, one of `rows`; None for torch's own operators.
            x: The planes, batched and contiguous, with no axis of 0, in the plan's layout: (N, C, *plane), or
                (N, *plane, C).
            indices: The indices for MaxUnpool, of x's shape and in range.
            outputs: Contiguous memory that the output, and the indices of the maxima, may be written to.
            first: The number of the first of the planes; of images, if channels are last.
            count: The number of the tensor's planes or images. None: x has all of them.

        Returns:
            The output, batched and contiguous in the same layout, and the indices if the layer returns them: either the
            given tensors, or others, which the caller then copies.

        """
        planes = x.numel() // self.cells
        if row is None:
            channels = self.channels or 1
            return self.eager(x, indices, first * channels, (planes if count is None else count) * channels)
        if outputs:
            output, output_indices = outputs[0], outputs[1] if row.indices else None
        else:
            output = x.new_empty((*x.shape[: x.ndim - len(self.plane_shape)], *self.result_shape))
            output_indices = x.new_empty(output.shape, dtype=torch.int64) if row.indices else None
        chosen = None if output_indices is None else output_indices.view(planes, *self.result_shape)
        row.run(self, x.view(planes, *self.plane_shape), output.view(planes, *self.result_shape), chosen)
        return output, output_indices

    def bind(self, x: torch.Tensor, output: torch.Tensor) -> Callable[[], None] | None:
        """Return a function that computes the layer from and to fixed memory; None if the kernel has no such form.

        The tensors are as for compute.
        """
        planes = x.numel() // self.cells
        row = self.choose(planes)
        if row is None or row.bind is None:
            return None
        return row.bind(self, x.view(planes, *self.plane_shape), output.view(planes, *self.result_shape))
