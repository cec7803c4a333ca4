"""Power-average pooling for the norms whose powers torch computes alike wherever a cell lies: 1, 2 and infinity."""

from __future__ import annotations

from math import inf, prod
from typing import TYPE_CHECKING

import torch

from poolrpc_server.compute.kernels.blocks import Cells, Program, scratch
from poolrpc_server.compute.kernels.raster_average import add_average, divisor, sum_dtype
from poolrpc_server.compute.kernels.separable_max import add_max

if TYPE_CHECKING:
    from torch import Tensor

    from poolrpc_server.compute.kernels.windows import Windows

# Of most other powers torch's vectorised cells differ in the last bit from the cells left over at a tensor's end, so
# that the ends of blocks would show.
NORMS = (1.0, 2.0, inf)


def lp_pool(x: Tensor, norm: float, windows: Windows, out: Tensor) -> None:
    """Write the pooled planes of a floating x (P, *plane) into out (P, *output_plane); the norm is one of NORMS."""
    plane, result = x.shape[1:], out.shape[1:]
    sums = sum_dtype(x.dtype)
    program = Program(x.shape[0], prod(plane) * sums.itemsize)
    source, target = Cells(program, x, reused=False), Cells(program, out, reused=False)
    write = target.at()
    if norm != 1:
        powers = scratch(program, x, plane)
        read, power = source.at(), powers.at()
        if norm == inf:
            program.calls.append(lambda i: torch.abs(read[i], out=power[i]))
        else:
            program.calls.append(lambda i: torch.mul(read[i], read[i], out=power[i]))
        source = powers
    if norm == inf:
        add_max(source, windows, target)
    else:
        add_average(source, windows, [divisor(tuple(plane), windows, tuple(result), include_pad=True)], sums, target)
        # torch's sign(y) * relu(abs(y)) is y, but for -0.0, which becomes 0.0.
        program.calls.append(lambda i: write[i].add_(0.0))
        program.calls.append(lambda i: write[i].mul_(prod(windows.kernel)))
        if norm == 2:  # noqa: PLR2004 - the norm
            program.calls.append(lambda i: write[i].sqrt_())
    program.run()
