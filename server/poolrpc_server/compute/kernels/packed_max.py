"""Max pooling with indices: each cell and its index are packed into one integer, so that one maximum finds both."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from poolrpc_server.compute.kernels.blocks import Cells, Program, scratch
from poolrpc_server.compute.kernels.cost import CALL, STEP, Case, eager_max
from poolrpc_server.compute.kernels.plan import Plan, Row
from poolrpc_server.compute.kernels.separable_max import add_max, count_passes
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


def max_pool_indices(x: Tensor, windows: Windows, out: Tensor, indices: Tensor) -> list[tuple[int, int]]:
    """Pool the planes of x into out, and the maxima's int64 indices into indices.

    Returns:
        The ranges of planes that may contain NaN, whose results are not valid.

    """
    spatial, result = x.shape[1:], out.shape[1:]
    cells = prod(spatial)
    floating = x.dtype.is_floating_point
    short = x.element_size() <= 2 and cells <= 1 << 16
    packed = torch.int32 if short else torch.int64
    shift = 16 if short else 32
    program = Program(x.shape[0], cells * packed.itemsize)
    skipped: list[tuple[int, int]] = []

    source = Cells(program, x, reused=False)
    read = source.at()
    if floating:
        number = torch.int16 if x.element_size() == 2 else torch.int32
        rest = torch.iinfo(number).max
        bits = x.element_size() * 8 - 1
        values = scratch(program, x, spatial)
        signs = scratch(program, x, spatial, number).at()
        value = values.at()
        ordered = Cells(program, values.tensor.view(number), reused=True).at()
        program.calls += [
            # Any NaN makes the sum NaN. So may infinities: then the block is computed twice, which does no harm.
            lambda i: skipped.append(_range(program, i)) if read[i].sum().isnan() else None,
            # -0.0 becomes 0.0, since they are equal.
            lambda i: torch.add(read[i], 0.0, out=value[i]),
            # The other bits of negative floats are inverted, so that they have the same order as integers.
            lambda i: torch.bitwise_right_shift(ordered[i], bits, out=signs[i]),
            lambda i: signs[i].bitwise_and_(rest),
            lambda i: ordered[i].bitwise_xor_(signs[i]),
        ]
    else:
        ordered = read
    keys = scratch(program, x, spatial, packed)
    key = keys.at()
    # The first of equal cells has the largest key.
    countdown = torch.arange(cells - 1, -1, -1, dtype=packed).view(spatial)
    program.calls += [
        lambda i: key[i].copy_(ordered[i]),
        lambda i: torch.add(countdown, key[i], alpha=1 << shift, out=key[i]),
    ]
    best = scratch(program, x, result, packed)
    add_max(keys, windows, best)

    chosen, index = best.at(), Cells(program, indices, reused=False).at()
    low = scratch(program, x, result, packed).at()
    write = Cells(program, out.view(number) if floating else out, reused=False).at()
    program.calls += [
        lambda i: torch.bitwise_and(chosen[i], (1 << shift) - 1, out=low[i]),
        lambda i: torch.sub(cells - 1, low[i], out=index[i]) if low[i].dtype == torch.int64 else index[i].copy_(low[i]),
        lambda i: chosen[i].bitwise_right_shift_(shift),
        lambda i: write[i].copy_(chosen[i]),
    ]
    if low[0].dtype != torch.int64:
        program.calls.append(lambda i: index[i].neg_().add_(cells - 1))
    if floating:
        sign = scratch(program, x, result, number).at()
        program.calls += [
            lambda i: torch.bitwise_right_shift(write[i], bits, out=sign[i]),
            lambda i: sign[i].bitwise_and_(rest),
            lambda i: write[i].bitwise_xor_(sign[i]),
        ]
    program.run()
    return skipped


def _range(program: Program, number: int) -> tuple[int, int]:
    start = number * program.step
    return start, start + (program.step if number < program.full else program.tail)


def _run(plan: Plan, x: Tensor, out: Tensor, indices: Tensor) -> None:
    for start, stop in max_pool_indices(x, plan.windows, out, indices):
        # Which of several NaNs torch chooses is its own rule.
        output, chosen = plan.eager(x[start:stop].unsqueeze(0), None, 0, stop - start)
        out[start:stop] = output[0]
        indices[start:stop] = chosen[0]  # type: ignore[index]  # the layer returns them


def _fits(plan: Plan) -> bool:
    return plan.dtype in PACKED_DTYPES and not empty_windows(plan.plane, plan.windows, plan.output_plane)


def _pays(_: Plan, case: Case) -> bool:
    passes, width = count_passes(case.windows), case.plane[-1]
    short = case.dtype.itemsize <= 2 and prod(case.plane) <= 1 << 16
    cell = 1.5 + 12 / width + 0.12 * passes if short else 2.6 + 20 / width + 0.25 * passes
    eager = eager_max(case) / (2 if len(case.plane) == 1 else 1)
    return 3 * CALL + STEP * (passes + 14) + case.cells * cell < 0.95 * eager


PACKED_MAX = Row(
    "packed max",
    ("max_pool",),
    run=_run,
    pays=_pays,
    fits=_fits,
    passes=lambda windows: count_passes(windows) + 14,
    indices=True,
)
