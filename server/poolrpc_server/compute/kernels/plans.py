"""Which kernel computes a layer: one plan for each layer, dtype, plane, layout and device, made once.

TABLE is the whole rule: the first row that fits and pays is taken, torch's own operators where none does. Every row
gives torch's answer bit for bit (the sign of a zero aside, among maxima), so the choice is one of speed alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import inf, prod
from typing import TYPE_CHECKING, Any

import torch

from poolrpc_server.compute.kernels import choice, tiny_max
from poolrpc_server.compute.kernels.adaptive import MOST_WINDOWS, adaptive_avg, adaptive_max, uniform
from poolrpc_server.compute.kernels.choice import Case
from poolrpc_server.compute.kernels.eager import Pooled, Run, bind
from poolrpc_server.compute.kernels.indexed_max import DTYPES as INDEXED
from poolrpc_server.compute.kernels.indexed_max import empty_windows, max_pool_indices
from poolrpc_server.compute.kernels.lp import NORMS, lp_pool
from poolrpc_server.compute.kernels.raster_average import MOST_TAPS, avg_pool, divisible, divisor
from poolrpc_server.compute.kernels.separable_max import max_pool
from poolrpc_server.compute.kernels.whole_plane import global_max
from poolrpc_server.compute.kernels.windows import Sizes, Windows
from poolrpc_server.telemetry.logs import log

if TYPE_CHECKING:
    from poolrpc.layers import Layer

MOST_CHOICES = 256
"""A plan remembers its choice for so many counts of planes."""

ParallelFor = Callable[[Callable[[int, int], None], int, int], None]
"""Calls a function on ranges (start, stop) that make up a number of planes, which are of so many bytes, in and out."""

EXPLAINED_PLANES = (1, 8, 64, 512, 4096)
"""For how many planes explain() says the choice."""


@dataclass(frozen=True)
class Plan:
    """How a layer is computed on planes of one size.

    Attributes:
        layer: The layer.
        dtype: Of the cells.
        plane: The spatial shape of the input.
        channels: How many there are where they are last in memory, None where they are first.
        device: The type of the device: "cpu", "cuda", "mps".
        output_plane: The spatial shape of the output, in the same dtype.

    """

    layer: Any  # a Layer; each row of TABLE knows the parameters of its family
    dtype: torch.dtype
    plane: Sizes
    channels: int | None
    device: str
    output_plane: Sizes

    @cached_property
    def memory(self) -> Sizes:
        """The shape of what kernels count as a plane: with its channels, where they are last."""
        return self.plane if self.channels is None else (*self.plane, self.channels)

    @cached_property
    def result(self) -> Sizes:
        """The shape of what comes of it."""
        return self.output_plane if self.channels is None else (*self.output_plane, self.channels)

    @cached_property
    def windows(self) -> Windows | None:
        """The sliding windows, over every axis of `memory`; None where they don't slide."""
        geometry = getattr(self.layer, "geometry", None)
        if geometry is None:
            return None
        windows = Windows.of(geometry())
        return windows if self.channels is None else windows.with_channels()

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows of TABLE that give this layer's answer."""
        if self.device != "cpu":
            return ()
        return tuple(
            row
            for row in TABLE
            if self.layer.family in row.families
            and (row.channels_last or self.channels is None)
            and row.indices == self.layer.returns_indices
            and row.fits(self)
        )

    def divisor(self) -> float | torch.Tensor:
        """Give what an average's sums are divided by."""
        if getattr(self.layer, "divisor_override", None) is not None:
            return float(self.layer.divisor_override)
        assert self.windows is not None  # noqa: S101 - averages slide
        return divisor(self.memory, self.windows, self.result, include_pad=self.layer.count_include_pad)

    def divides(self) -> bool:
        """Tell whether sums can be divided at once, and aren't of too many cells."""
        assert self.windows is not None  # noqa: S101 - averages slide
        include = getattr(self.layer, "count_include_pad", True)
        return prod(self.windows.kernel) <= MOST_TAPS and (
            getattr(self.layer, "divisor_override", None) is not None
            or divisible(self.memory, self.windows, self.result, include_pad=include)
        )

    @cached_property
    def eager(self) -> Run:
        """What computes the layer by torch's own operators."""
        return bind(self.layer, self.dtype, self.output_plane, channels_last=self.channels is not None)

    @cached_property
    def _cells(self) -> int:
        return prod(self.memory)

    @cached_property
    def _chosen(self) -> dict[int, Row | None]:
        return {}

    def choose(self, planes: int) -> Row | None:
        """Give the row to compute that many planes by; None for torch's own operators."""
        try:
            return self._chosen[planes]
        except KeyError:
            case = Case(self.dtype, planes, self.memory, self.result, self.windows)
            chosen = next((row for row in self.rows if row.pays(self, case)), None)
        if len(self._chosen) >= MOST_CHOICES:
            self._chosen.clear()
        self._chosen[planes] = chosen
        return chosen

    def work(self, planes: int) -> int:
        """Count the cells that computing that many planes visits: what the work budget bounds."""
        row = self.choose(planes)
        if row is None or row.passes is None:
            return planes * (self.channels or 1) * int(self.layer.work(self.plane))
        assert self.windows is not None  # noqa: S101 - passes are over windows that slide
        return planes * max(prod(self.memory), prod(self.result)) * row.passes(self.windows)

    def explain(self) -> str:
        """Say on one line what comes out and which kernel is taken for how many planes, and why not another."""
        shape, out = ("x".join(map(str, sizes)) for sizes in (self.plane, self.output_plane))
        layout = "NCHW" if self.channels is None else f"NHWC of {self.channels} channels"
        head = f"{self.layer!r} {str(self.dtype).removeprefix('torch.')} {shape} -> {out} {layout} on {self.device}: "
        if not self.rows:
            return head + (
                "torch's own kernels" if self.device != "cpu" else "eager torch, no kernel is known to equal it"
            )
        steps: list[tuple[str, int]] = []
        for planes in EXPLAINED_PLANES:
            row = self.choose(planes)
            name = row.name if row else "eager torch"
            if not steps or steps[-1][0] != name:
                steps.append((name, planes))
        return head + ", ".join(f"{name} from {planes}" for name, planes in steps) + " planes on, by estimate"

    def compute(
        self,
        x: torch.Tensor,
        indices: torch.Tensor | None,
        parallel_for: ParallelFor | None = None,
        output: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> Pooled:
        """Compute the layer.

        Args:
            x: Batched and contiguous, with no axis of 0, in the plan's layout: (N, C, *plane), or (N, *plane, C).
            indices: For MaxUnpool, of x's shape and in range.
            parallel_for: Calls what it is given on ranges that make up so many planes, perhaps on several threads.
            output: Where the output may go, contiguous.
            places: Where the indices may go.

        Returns:
            The output, batched and contiguous in the same layout, and the indices where the layer returns them: those
            that were given, or others, which the caller then copies.

        """
        planes = x.numel() // self._cells
        row = self.choose(planes)
        if row is None:
            return self.eager(x, indices)
        if output is None:
            output = x.new_empty((*x.shape[: x.ndim - len(self.memory)], *self.result))
        if places is None and row.indices:
            places = x.new_empty(output.shape, dtype=torch.int64)
        read, write = x.view(planes, *self.memory), output.view(planes, *self.result)
        place = None if places is None else places.view(planes, *self.result)

        def part(start: int, stop: int) -> None:
            row.run(self, read[start:stop], write[start:stop], None if place is None else place[start:stop])

        if parallel_for is None:
            part(0, planes)
        else:
            parallel_for(part, planes, x.nbytes + output.nbytes)
        return output, places

    def bind(self, x: torch.Tensor, output: torch.Tensor) -> Callable[[], None] | None:
        """Give what computes the layer from and to memory that stays where it is, where a kernel can settle that once.

        The tensors are as in compute.
        """
        planes = x.numel() // self._cells
        row = self.choose(planes)
        if row is None or row.bind is None:
            return None
        return row.bind(self, x.view(planes, *self.memory), output.view(planes, *self.result))


@lru_cache(maxsize=4096)
def plan(layer: Layer, dtype: torch.dtype, plane: Sizes, channels: int | None, device: str) -> Plan:
    """Make a plan, or give the one that was made."""
    made = Plan(layer, dtype, plane, channels, device, layer.output_plane(plane))
    if log.isEnabledFor(logging.DEBUG):
        log.debug("plan", plan=made.explain())
    return made


@dataclass(frozen=True)
class Row:
    """One kernel and where it serves.

    Attributes:
        name: What explain() calls it.
        families: The families of layers that it computes.
        run: Computes (plan, input, output, indices), each of (planes, *shape).
        pays: Tells whether it beats torch on a case.
        fits: Tells whether it gives the plan's answer.
        passes: How often it visits each cell, where that isn't once for each cell of a window.
        channels_last: Whether it takes (planes, *plane, C) too.
        indices: Whether it gives indices.
        bind: Gives what computes (plan, input, output) any number of times, where that can be made once.

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


def _indexed(plan: Plan, x: torch.Tensor, out: torch.Tensor, places: torch.Tensor) -> None:
    assert plan.windows is not None  # noqa: S101 - a max slides
    for start, stop in max_pool_indices(x, plan.windows, out, places):
        # Blocks with a NaN in them, whose choice among NaNs is torch's own.
        output, chosen = plan.eager(x[start:stop].unsqueeze(0), None)
        out[start:stop] = output[0]
        places[start:stop] = chosen[0]  # type: ignore[index]  # the layer returns them


def _tiny_max(plan: Plan, x: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
    assert plan.windows is not None  # noqa: S101 - a max slides
    return tiny_max.bind(plan.windows, x, out)


TABLE = (
    Row(
        "separable max",
        ("max_pool",),
        run=lambda plan, x, out, _: max_pool(x, plan.windows, out),  # type: ignore[arg-type]  # a max slides
        pays=lambda plan, case: (choice.max_last_pays if plan.channels else choice.max_pays)(case),
        passes=choice.steps,
        channels_last=True,
    ),
    Row(
        "max of a few cells by NumPy",
        ("max_pool",),
        run=lambda plan, x, out, _: _tiny_max(plan, x, out)(),
        pays=lambda _, case: choice.tiny_max_pays(case),
        fits=lambda plan: plan.dtype in tiny_max.DTYPES,
        channels_last=True,
        bind=_tiny_max,
    ),
    Row(
        "max of cells packed with their places",
        ("max_pool",),
        run=_indexed,
        pays=lambda _, case: choice.indexed_max_pays(case),
        passes=lambda windows: choice.steps(windows) + 14,
        fits=lambda plan: plan.dtype in INDEXED and not empty_windows(plan.plane, plan.windows, plan.result),  # type: ignore[arg-type]  # a max slides
        indices=True,
    ),
    Row(
        "average in raster order",
        ("avg_pool",),
        run=lambda plan, x, out, _: avg_pool(x, plan.windows, plan.divisor(), out),  # type: ignore[arg-type]  # an average slides
        pays=lambda plan, case: (choice.avg_last_pays if plan.channels else choice.avg_pays)(case),
        fits=Plan.divides,
        channels_last=True,
    ),
    Row(
        "power average in blocks",
        ("lp_pool",),
        run=lambda plan, x, out, _: lp_pool(x, plan.layer.norm_type, plan.windows, out),  # type: ignore[arg-type]  # it slides
        pays=lambda plan, case: choice.lp_pays(case, plan.layer.norm_type),
        fits=lambda plan: plan.layer.norm_type == inf or (plan.layer.norm_type in NORMS and plan.divides()),
    ),
    Row(
        "max of whole planes",
        ("global_max_pool", "adaptive_max_pool"),
        run=lambda _, x, out, __: global_max(x, out),
        pays=lambda _, case: choice.whole_max_pays(case),
        fits=lambda plan: prod(plan.result) == 1,
    ),
    Row(
        "max by windows",
        ("adaptive_max_pool",),
        run=lambda _, x, out, __: adaptive_max(x, out),
        pays=lambda _, case: choice.adaptive_max_pays(case),
        fits=lambda plan: prod(plan.result) > 1 and max(plan.result) <= MOST_WINDOWS,
    ),
    Row(
        "average of like windows in raster order",
        ("adaptive_avg_pool",),
        run=lambda _, x, out, __: adaptive_avg(x, out),
        pays=lambda _, case: choice.adaptive_avg_pays(case),
        fits=lambda plan: (
            prod(plan.result) > 1
            and (kernel := uniform(plan.plane, plan.result)) is not None
            and prod(kernel) <= MOST_TAPS
        ),
    ),
)
"""Every kernel beside torch's own, in the order in which they are tried."""
