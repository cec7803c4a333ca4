"""Max pooling with indices: each cell and its index are packed into one integer, so that one maximum finds both."""

from collections.abc import Sequence
from math import prod

import torch

from poolrpc_server.compute.kernels.blocks import Cells, padded_axes, scratch
from poolrpc_server.compute.kernels.cost import Case, Cost, eager_max
from poolrpc_server.compute.kernels.plan import Plan, Row
from poolrpc_server.compute.kernels.separable_max import add_max, count_passes, scratch_cells
from poolrpc_server.compute.kernels.windows import Windows

PACKED_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)


def empty_windows(plane: Sequence[int], windows: Windows, result: Sequence[int]) -> bool:
    """Return whether a dilated window may read only padding: the index that torch returns for it isn't a cell's."""
    geometry = zip(windows.kernel, windows.stride, windows.padding, windows.dilation, strict=True)
    for n, (k, s, p, d), length in zip(plane, geometry, result, strict=True):
        # A window that starts in the input reads a cell of it. Only those that start before it may not.
        for start in range(-p, min(0, (length - 1) * s - p + 1), s):
            first = start % d  # the first cell in the input that is a multiple of the dilation after the start
            if first >= min(n, start + (k - 1) * d + 1):
                return True
    return False


def add_max_indices(plan: Plan, source: Cells, target: Cells, indices: Cells | None) -> None:
    """Append the calls that pool the source's cells into the target, and write the maxima's int64 indices."""
    assert indices is not None  # noqa: S101 - the row says that it returns them
    program, dtype = source.program, plan.dtype
    spatial, result, cells = plan.plane, plan.output_plane, plan.cells
    floating, packed = dtype.is_floating_point, _packed(plan)
    shift = packed.itemsize * 4
    skipped: set[int] = set()
    read = source.at()
    if floating:
        number = torch.int16 if dtype.itemsize == 2 else torch.int32
        rest = torch.iinfo(number).max
        bits = dtype.itemsize * 8 - 1
        values = scratch(program, spatial, dtype)
        signs = scratch(program, spatial, number).at()
        value = values.at()
        ordered = Cells(program, values.tensor.view(number), reused=True).at()
        program.calls += [
            # Any NaN makes the sum NaN. So may infinities: then the block is computed twice, which does no harm.
            lambda i: skipped.add(i) if read[i].sum().isnan() else skipped.discard(i),
            # -0.0 becomes 0.0, since they are equal.
            lambda i: torch.add(read[i], 0.0, out=value[i]),
            # The other bits of negative floats are inverted, so that they have the same order as integers.
            lambda i: torch.bitwise_right_shift(ordered[i], bits, out=signs[i]),
            lambda i: signs[i].bitwise_and_(rest),
            lambda i: ordered[i].bitwise_xor_(signs[i]),
        ]
    else:
        ordered = read
    keys = scratch(program, spatial, packed)
    key = keys.at()
    # The first of equal cells has the largest key.
    countdown = torch.arange(cells - 1, -1, -1, dtype=packed).view(spatial)
    program.calls += [
        lambda i: key[i].copy_(ordered[i]),
        lambda i: torch.add(countdown, key[i], alpha=1 << shift, out=key[i]),
    ]
    best = scratch(program, result, packed)
    add_max(keys, plan.windows, best)

    chosen, index = best.at(), indices.at()
    low = scratch(program, result, packed).at()
    output = target.at()
    write = Cells(program, target.tensor.view(number), reused=target.reused).at() if floating else output
    program.calls += [
        lambda i: torch.bitwise_and(chosen[i], (1 << shift) - 1, out=low[i]),
        lambda i: torch.sub(cells - 1, low[i], out=index[i]) if low[i].dtype == torch.int64 else index[i].copy_(low[i]),
        lambda i: chosen[i].bitwise_right_shift_(shift),
        lambda i: write[i].copy_(chosen[i]),
    ]
    if low[0].dtype != torch.int64:
        program.calls.append(lambda i: index[i].neg_().add_(cells - 1))
    if floating:
        sign = scratch(program, result, number).at()
        program.calls += [
            lambda i: torch.bitwise_right_shift(write[i], bits, out=sign[i]),
            lambda i: sign[i].bitwise_and_(rest),
            lambda i: write[i].bitwise_xor_(sign[i]),
        ]

        def compute_eagerly(i: int) -> None:
            # Which of several NaNs torch chooses is its own rule.
            maxima, chosen = plan.eager(read[i].unsqueeze(0), None, 0, read[i].shape[0])
            output[i].copy_(maxima[0])
            index[i].copy_(chosen[0])  # type: ignore[index]  # the layer returns them

        program.calls.append(lambda i: compute_eagerly(i) if i in skipped else None)


def _scratch(plan: Plan) -> int:
    item, packed = plan.dtype.itemsize, _packed(plan).itemsize
    keys = (scratch_cells(plan.plane, plan.windows, plan.output_plane) + 2 * plan.cells) * packed
    outputs = prod(plan.output_plane)
    # The values, their signs and keys; the packed maxima, what is below, and signs; torch's output where NaN is.
    return 2 * plan.cells * item + keys + outputs * (2 * packed + item) + outputs * (item + 8)


def _packed(plan: Plan) -> torch.dtype:
    """Return the dtype of a cell with its index."""
    return torch.int32 if plan.dtype.itemsize <= 2 and plan.cells <= 1 << 16 else torch.int64


def _fits(plan: Plan) -> bool:
    return plan.dtype in PACKED_DTYPES and not empty_windows(plan.plane, plan.windows, plan.output_plane)


def _pays(_: Plan, case: Case) -> bool:
    passes, width = count_passes(case.windows), case.plane[-1]
    short = case.dtype.itemsize <= 2 and prod(case.plane) <= 1 << 16
    cell = 1.5 + 12 / width + 0.12 * passes if short else 2.6 + 20 / width + 0.25 * passes
    eager = eager_max(case) / (2 if len(case.plane) == 1 else 1)
    return 3 * case.call + case.step * (passes + 14) + case.cells * cell < 0.95 * eager


PACKED_COST = Cost(5.5, 1.1, 1.2, 0.08)
"""The visited cells are those of a padded plane, in each pass."""


def _work(plan: Plan) -> float:
    cells = max(prod(padded_axes(plan.plane, plan.windows, plan.output_plane)), prod(plan.output_plane))
    return PACKED_COST.of(plan.dtype, cells, prod(plan.output_plane), cells * count_passes(plan.windows))


PACKED_MAX = Row(
    "packed max",
    ("max_pool",),
    add=add_max_indices,
    scratch=_scratch,
    plane_bytes=lambda plan: plan.cells * _packed(plan).itemsize,
    pays=_pays,
    fits=_fits,
    work=_work,
    indices=True,
)
