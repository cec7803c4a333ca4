"""A run of one layer on a torch tensor, for the tests of the engine on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.validate import Limits, check_request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from poolrpc import Layer
    from poolrpc.chains import Chain
    from poolrpc_server.compute.engine import Engine, Run

WIDE = Limits(2**40, 2**40, 2**40, 2**50)


def run_of(engine: Engine, layer: Layer | Chain, x: torch.Tensor, operand: torch.Tensor | None = None) -> Run:
    """Return a run of a layer or a chain, whose result is its outputs as tensors."""
    dtype = str(x.dtype).removeprefix("torch.")
    second = None
    if operand is not None:
        second = TensorSpec(str(operand.dtype).removeprefix("torch."), tuple(operand.shape))
    request = Request(TensorSpec(dtype, tuple(x.shape)), ((layer if isinstance(layer, tuple) else (layer,)),), second)
    checked = check_request(request, WIDE, engine.schedule)
    parts = [x] if operand is None else [x, operand]
    payload = b"".join(each.contiguous().view(torch.uint8).numpy().tobytes() for each in parts)

    def finish(outputs: Sequence[memoryview]) -> list[torch.Tensor]:
        return [
            torch.frombuffer(bytearray(data), dtype=getattr(torch, spec.dtype)).reshape(spec.shape)
            for data, spec in zip(outputs, checked.outputs, strict=True)
        ]

    return engine.run(checked.schedule, payload, finish)
