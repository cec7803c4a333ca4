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

MAX_CHOICES = 256
"""The number of plane counts for which a plan remembers its choice."""

EXPLAINED_PLANES = (1, 8, 64, 512, 4096)
"""The plane counts for which explain() names the kernel."""

ParallelFor = Callable[[Callable[[int, int], None], int, int], None]
"""Calls a function on ranges (start, stop) that cover a number of planes, which have a number of bytes, in and out."""


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
    def _cells(self) -> int:
        return prod(self.plane_shape)

    @cached_property
    def _chosen(self) -> dict[int, Row | None]:
        return {}

    def choose(self, planes: int) -> Row | None:
        """Return the row to use for a number of planes; None for torch's own operators."""
        try:
            return self._chosen[planes]
        except KeyError:
            case = Case(self.dtype, planes, self.plane_shape, self.result_shape, self.windows)
            chosen = next((row for row in self.rows if row.pays(self, case)), None)
        if len(self._chosen) >= MAX_CHOICES:
            self._chosen.clear()
        self._chosen[planes] = chosen
        return chosen

    def work(self, planes: int) -> int:
        """Return the number of cells that computing so many planes visits, which the work budget limits."""
        row = self.choose(planes)
        if row is None or row.passes is None:
            return planes * (self.channels or 1) * int(self.layer.work(self.plane))
        return planes * max(self._cells, prod(self.result_shape)) * row.passes(self.windows)

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
        x: torch.Tensor,
        indices: torch.Tensor | None,
        parallel_for: ParallelFor | None = None,
        output: torch.Tensor | None = None,
        output_indices: torch.Tensor | None = None,
    ) -> Pooled:
        """Compute the layer.

        Args:
            x: The input, batched and contiguous, with no axis of 0, in the plan's layout: (N, C, *plane), or
                (N, *plane, C).
            indices: The indices for MaxUnpool, of x's shape and in range.
            parallel_for: Calls a function on ranges of planes, on one thread or several. None: on all planes, once.
            output: Contiguous memory that the output may be written to.
            output_indices: The same for the indices of the maxima.

        Returns:
            The output, batched and contiguous in the same layout, and the indices if the layer returns them: either the
            given tensors, or others, which the caller then copies.

        """
        planes = x.numel() // self._cells
        row = self.choose(planes)
        if row is None:
            return self.eager(x, indices)
        if output is None:
            output = x.new_empty((*x.shape[: x.ndim - len(self.plane_shape)], *self.result_shape))
        if output_indices is None and row.indices:
            output_indices = x.new_empty(output.shape, dtype=torch.int64)
        read, write = x.view(planes, *self.plane_shape), output.view(planes, *self.result_shape)
        write_indices = None if output_indices is None else output_indices.view(planes, *self.result_shape)

        def part(start: int, stop: int) -> None:
            chosen = None if write_indices is None else write_indices[start:stop]
            row.run(self, read[start:stop], write[start:stop], chosen)

        if parallel_for is None:
            part(0, planes)
        else:
            parallel_for(part, planes, x.nbytes + output.nbytes)
        return output, output_indices

    def bind(self, x: torch.Tensor, output: torch.Tensor) -> Callable[[], None] | None:
        """Return a function that computes the layer from and to fixed memory; None if the kernel has no such form.

        The tensors are as for compute.
        """
        planes = x.numel() // self._cells
        row = self.choose(planes)
        if row is None or row.bind is None:
            return None
        return row.bind(self, x.view(planes, *self.plane_shape), output.view(planes, *self.result_shape))
