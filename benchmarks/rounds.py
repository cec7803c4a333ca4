"""Interleaved rounds: contenders alternate within each round, so that a disturbance slows all of them."""

from __future__ import annotations

import time
from math import inf
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LEAST_ROUNDS = 3
"""The rounds of which a median says something."""


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, least: float = 0.01, seconds: float = inf
) -> dict[str, list[float]]:
    """Time contenders alternately.

    Args:
        contenders: The functions to run, by name.
        rounds: The number of rounds; each starts with another contender.
        least: Seconds that one timing should take at least; a fast contender runs several times in it.
        seconds: Seconds after which no round but the first LEAST_ROUNDS starts.

    Returns:
        Seconds per run, one value for each round.

    """
    repeats = {}
    for name, run in contenders.items():
        run()
        started = time.perf_counter()
        run()
        repeats[name] = max(1, round(least / max(time.perf_counter() - started, 1e-7)))
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            run = contenders[name]
            started = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - started) / repeats[name])
    return times


def row(case: str, baseline: str, contender: str, times: Mapping[str, list[float]], **more: Any) -> dict[str, Any]:  # noqa: ANN401 - any value of JSON
    """Return a row: how many times the baseline's speed the contender has, as the median of the rounds' ratios."""
    ratios = [base / ours for base, ours in zip(times[baseline], times[contender], strict=True)]
    return {
        "case": case,
        "contender": contender,
        "baseline": baseline,
        "ratio": round(median(ratios), 3),
        "ms": round(median(times[contender]) * 1000, 3),
        "baseline_ms": round(median(times[baseline]) * 1000, 3),
        **more,
    }
