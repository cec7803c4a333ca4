"""What the log line of a call says of it, whichever door it came by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poolrpc._shapes.rules import clip

if TYPE_CHECKING:
    from collections.abc import Sequence

    from poolrpc._wire.codec import BranchResult, Request

FACT_CHARS = 300
"""Of each fact."""


def asked(request: Request) -> dict[str, str]:
    """Give what was asked."""
    spec = request.input
    return {
        "layers": clip(request.branches, FACT_CHARS),
        "shape": clip(spec.shape, FACT_CHARS),
        "dtype": spec.dtype,
    }


def answered(results: Sequence[BranchResult]) -> dict[str, str]:
    """Give what comes of it."""
    return {"output": clip([each.output.shape for each in results], FACT_CHARS)}
