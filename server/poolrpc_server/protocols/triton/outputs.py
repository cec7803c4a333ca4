"""The names of outputs: those of the last layer of each branch, and with a number those of any of its layers.

"output" is the output of the first branch, "output_1" that of the second; "output.0" is the output of the first layer
of the first branch, "output_1.0" that of the second branch. "indices" in place of "output" names the indices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from poolrpc._wire.codec import Request
    from poolrpc.chains import Chain, Outputs

KINDS = ("output", "indices")


def requested_steps(branches: Sequence[Chain], names: Iterable[str]) -> tuple[Outputs, ...]:
    """Return, for each branch, the numbers of the layers whose outputs a request names; empty for the last of each."""
    wanted = set(names)
    if not any("." in name for name in wanted):
        return ()
    return tuple(
        tuple(step for step in range(len(chain)) if wanted & set(_names(i, step, chain))) or (len(chain) - 1,)
        for i, chain in enumerate(branches)
    )


def output_numbers(request: Request) -> dict[str, int]:
    """Return the position of each output of a request in its payload, by every name of it."""
    numbers: dict[str, int] = {}
    number = 0
    for i, (chain, steps) in enumerate(request.returned()):
        for step in steps:
            for kind in KINDS[: 1 + chain[step].returns_indices]:
                numbers |= dict.fromkeys(_names(i, step, chain, (kind,)), number)
                number += 1
    return numbers


def _names(branch: int, step: int, chain: Chain, kinds: Sequence[str] = KINDS) -> list[str]:
    suffix = f"_{branch}" if branch else ""
    ends = (f".{step}", "") if step == len(chain) - 1 else (f".{step}",)
    return [f"{kind}{suffix}{end}" for kind in kinds for end in ends]
