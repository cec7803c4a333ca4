"""The max of a whole plane."""

import torch
from torch import Tensor

from poolrpc_server.compute.kernels.blocks import Cells, Program, scratch


def global_max(x: Tensor, out: Tensor) -> None:
    """Write the maximum of each plane of x (P, *spatial) into out (P, 1, ...), NaN where the plane holds one."""
    rows, result = x.view(x.shape[0], -1), out.view(-1, 1)
    if x.dtype not in (torch.float16, torch.bfloat16):
        torch.amax(rows, dim=1, keepdim=True, out=result)
        return
    # torch's amax of 16-bit floats takes three times as long as converting them first.
    program = Program(rows.shape[0], rows.shape[1] * 4)
    read, write = Cells(program, rows, reused=False).at(), Cells(program, result, reused=False).at()
    single = scratch(program, x, rows.shape[1:], torch.float32).at()
    best = scratch(program, x, (1,), torch.float32).at()
    program.calls += [
        lambda i: single[i].copy_(read[i]),
        lambda i: torch.amax(single[i], dim=1, keepdim=True, out=best[i]),
        lambda i: write[i].copy_(best[i]),
    ]
    program.run()
