"""Plans: how a layer is computed on planes of one size; and rows: what a plan needs to know of a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import torch

from poolrpc_server.compute.kernels.cost import Case
from poolrpc_server.compute.kernels.eager import IN_TORCH, OWN_BYTES, Operator, bind, eager_bytes, operation
from poolrpc_server.compute.kernels.eager_cost import eager_work
from poolrpc_server.compute.kernels.windows import Sizes, Windows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc_server.compute.kernels.blocks import Cells

MAX_GROWTH = 64
"""The most scratch memory of a kernel, as a multiple of its input and output: long windows on short axes need more."""

EXPLAINED_PLANES = (1, 8, 64, 512, 4096)
"""The plane counts for which explain() names the kernel."""


@dataclass(frozen=True)
class Row:
    """A kernel's row in the table of kernels: what it computes, when it applies, and when it pays.

    Attributes:
        name: The kernel's name in explain().
        operations: The operations that it computes, as `operation` names them.
        add: Appends the calls that compute (plan, source, target, indices) to the source's program.
        pays: Returns whether it is estimated to be faster than torch on a case.
        takes: Returns whether it computes cells of a dtype.
        fits: Returns whether it gives a plan's result.
        work: Returns its estimated work for a plane, in nanoseconds of one thread.
        scratch: Returns an upper bound of its scratch memory for each plane of a block, in bytes.
        plane_bytes: Returns the bytes of a plane, which determine how many are in a block.
        channels_last: Whether it also takes (planes, *plane, C).
        indices: Whether it returns the indices of the maxima.

    """

    name: str
    operations: tuple[str, ...]
    add: Callable[[Plan, Cells, Cells, Cells | None], None]
    pays: Callable[[Plan, Case], bool]
    work: Callable[[Plan], float]
    takes: Callable[[torch.dtype], bool] = lambda dtype: dtype != torch.uint16  # of which torch has no maximum
    fits: Callable[[Plan], bool] = lambda _: True
    scratch: Callable[[Plan], int] = lambda _: 0
    plane_bytes: Callable[[Plan], int] = lambda plan: plan.cells * plan.dtype.itemsize
    channels_last: bool = False
    indices: bool = False


@dataclass(frozen=True)
class Plan:
    """How a layer is computed on planes of one size.

    Attributes:
        layer: The layer.
        dtype: The dtype of the cells.
        plane: The spatial shape of the input.
        channels: The number of channels if they are last in memory, None if they are first.
        device: The type of the device: "cpu", "cuda", "mps".
        output_plane: The spatial shape of the output.
        table: The rows to choose from, in the order in which they are tried.

    """

    layer: Any  # a Layer; each row knows the parameters of its operations
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
    def output_dtype(self) -> torch.dtype:
        """The dtype of the output."""
        dtype: torch.dtype = getattr(torch, self.layer.output_dtype(str(self.dtype).removeprefix("torch.")))
        return dtype

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
            if operation(self.layer) in row.operations
            and row.takes(self.dtype)
            and (row.channels_last or self.channels is None)
            and row.indices == self.layer.returns_indices
            and row.fits(self)
            and row.scratch(self) <= MAX_GROWTH * (self.cells + prod(self.result_shape)) * self.dtype.itemsize
        )

    @cached_property
    def eager(self) -> Operator:
        """The layer computed by torch's own operators."""
        return bind(self.layer, self.dtype, self.output_plane, channels_last=self.channels is not None)

    @cached_property
    def is_one_operator(self) -> bool:
        """Whether one of torch's operators computes the layer, or a few that take no more memory than one."""
        return self.layer.family not in OWN_BYTES or operation(self.layer) in IN_TORCH

    @cached_property
    def cells(self) -> int:
        """The number of cells of an input plane, with the channels if they are last."""
        return prod(self.plane_shape)

    def choose(self, planes: int, *, bound: bool = False) -> Row | None:
        """Return the row to use for a number of planes; None for torch's own operators.

        Args:
            planes: The number of planes.
            bound: Whether the row's program will be kept, and run many times.

        """
        case = Case(self.dtype, planes, self.plane_shape, self.result_shape, self.windows, bound)
        return next((row for row in self.rows if row.pays(self, case)), None)

    def work(self, row: Row | None, planes: int) -> int:
        """Return the work of a kernel for so many planes, which the work budget limits.

        On a CPU the unit is about a nanosecond of one thread, which is what a cell of an ordinary max pooling costs; on
        another device it is a cell of a window.
        """
        if self.device != "cpu":
            return planes * (self.channels or 1) * int(self.layer.work(self.plane))
        if row is None:
            return ceil(planes * eager_work(self.layer, self.dtype, self.plane, self.output_plane, self.channels))
        return ceil(planes * row.work(self))

    def plane_bytes(self, row: Row | None) -> int:
        """Return the bytes of a plane, which determine how many are in a block."""
        if row is not None:
            return row.plane_bytes(self)
        return self.eager_scratch(1)

    def eager_scratch(self, planes: int) -> int:
        """Return an upper bound of the memory that torch's operators take for so many planes, with their output."""
        spanned = prod(self.windows.span(self.result_shape)) if hasattr(self.layer, "geometry") else 0
        outputs = prod(self.result_shape)
        return planes * eager_bytes(self.layer, self.dtype, self.cells, outputs, self.channels, spanned)

    def explain(self) -> str:
        """Return one line that says what the output is and which kernel is used for how many planes, in a workspace."""
        shape, out = ("x".join(map(str, sizes)) for sizes in (self.plane, self.output_plane))
        layout = "NCHW" if self.channels is None else f"NHWC of {self.channels} channels"
        head = f"{self.layer!r} {str(self.dtype).removeprefix('torch.')} {shape} -> {out} {layout} on {self.device}: "
        if self.device != "cpu":
            return head + "torch's own kernels"
        if not self.rows:
            return head + "eager torch, no kernel is known to equal it"
        choices: list[tuple[str, int]] = []
        for planes in EXPLAINED_PLANES:
            row = self.choose(planes, bound=True)
            name = row.name if row else "eager torch"
            if not choices or choices[-1][0] != name:
                choices.append((name, planes))
        return head + ", ".join(f"{name} from {planes}" for name, planes in choices) + " planes on, by estimate"

    def batched(self, planes: torch.Tensor) -> torch.Tensor:
        """Return a tensor of (planes, *plane_shape) as torch's operators take it."""
        return planes if self.channels is not None else planes.unsqueeze(0)

    def add_eager(  # noqa: PLR0913, PLR0917 - what the operator reads and writes
        self,
        source: Cells,
        target: Cells,
        chosen: Cells | None,
        operand: Callable[[int], torch.Tensor] | None,
        first: int,
        count: int,
    ) -> None:
        """Append the call that computes the layer by torch's own operators.

        Args:
            source: The planes.
            target: The output.
            chosen: The indices of the maxima. None: the layer returns none.
            operand: Returns the batched operand of the block of a number. None: the layer takes none.
            first: The number of the first of the source's planes in the whole tensor.
            count: The number of planes of the whole tensor.

        """
        step, channels = source.program.step, self.channels or 1
        read, writes = source.at(), [each.at() for each in (target, chosen) if each is not None]

        def call(i: int) -> None:
            given = None if operand is None else operand(i)
            results = self.eager(self.batched(read[i]), given, (first + i * step) * channels, count * channels)
            for write, result in zip(writes, results, strict=False):
                if result is not None:
                    self.batched(write[i]).copy_(result)

        source.program.calls.append(call)
