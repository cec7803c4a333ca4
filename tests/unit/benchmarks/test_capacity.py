"""The simulation of replicas, compared with queueing theory and with measurements."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks import capacity
from benchmarks.capacity import Question
from benchmarks.fleet import Call, Fleet
from poolrpc_server.calls.queue import QueueLimits

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[3]
GOODPUT, MEDIAN, TAIL = 0.15, 1.5, 2.0
"""Tolerances for the measured curve, at each load: the relative goodput, and factors of the median and of the p99,
which at the lowest load is the slowest of about forty calls."""
UNLIMITED = QueueLimits(max_queue=10**9, max_queue_seconds=10**9)


def load(rate: float, seconds: Iterable[float], count: int = 20_000) -> list[Call]:
    """Draw calls at random times, each of a kind of its own."""
    drawn, kinds = np.random.default_rng(1), list(seconds)
    times = np.cumsum(drawn.exponential(1 / rate, count))
    return [Call(float(at), kinds[drawn.integers(len(kinds))], 0, None) for at in times]


def needed(question: Question) -> int:
    """Return the smallest sufficient number of replicas."""
    *_, last = capacity.answer(question)
    assert last["enough"]
    assert last["p99_ms"] <= question.p99 * 1000
    return last["replicas"]


@pytest.mark.parametrize(
    "row", [row for row in capacity.read("load") if row["transport"] == "grpc"], ids=lambda row: row["case"]
)
def test_the_simulation_matches_the_measured_curve(row: dict[str, Any]) -> None:
    """For the calls of the measured run, goodput and latencies are within the tolerances above."""
    ours = capacity.compared(row)
    assert ours["goodput"] == pytest.approx(row["goodput"], rel=GOODPUT)
    assert 1 / MEDIAN <= ours["p50_ms"] / row["accepted_p50_ms"] <= MEDIAN
    assert 1 / TAIL <= ours["p99_ms"] / row["accepted_p99_ms"] <= TAIL


@pytest.mark.slow
@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("seconds", [(0.01,), (0.001, 0.019)])
def test_waiting_times_match_theory(busy: float, seconds: tuple[float, ...]) -> None:
    """Without limits the mean wait is Pollaczek and Khinchine's, within a tenth, for equal and unequal calls."""
    average = mean(seconds)
    outcome = Fleet(1, UNLIMITED).serve(load(busy / average, seconds, 50_000))
    expected = busy / average * mean(each**2 for each in seconds) / (2 * (1 - busy))
    assert mean(outcome.latencies) - average == pytest.approx(expected, rel=0.1)
    assert outcome.busy / outcome.seconds == pytest.approx(busy, rel=0.03)


def test_calls_over_the_capacity_are_rejected() -> None:
    """At twice the capacity half of the calls are rejected, and the queue limits the latency of the others."""
    outcome = Fleet(1, QueueLimits(max_queue_seconds=0.25)).serve(load(200, [0.01]))
    assert outcome.goodput == pytest.approx(100, rel=0.02)
    assert outcome.rejections == sum(each == float("inf") for each in outcome.latencies)
    assert max(outcome.answered) <= 0.25 + 2 * 0.01 + 1e-9
    assert outcome.within(0.99) == float("inf")


def test_calls_with_the_same_key_share_a_batch() -> None:
    """Small calls of one kind that wait are computed together; others take turns with them."""
    small = [Call(0.001, 0.001, 1000, "small") for _ in range(4)]
    calls = [Call(0.0, 0.01, 0, None), small[0], Call(0.001, 0.01, 0, None), *small[1:]]
    outcome = Fleet(1, QueueLimits()).serve(calls)
    assert outcome.latencies == pytest.approx([0.01, *[0.013] * 4, 0.023])


def test_retries_are_answered_later() -> None:
    """A burst over the capacity of a replica is answered in the end if clients retry."""
    burst = [Call(0.0, 0.01, 0, None) for _ in range(40)]
    once, again = (Fleet(1, QueueLimits(max_queue_seconds=0.25), attempts=each).serve(burst) for each in (1, 5))
    assert len(once.answered) < len(again.answered) == len(burst)
    assert once.rejections == len(burst) - len(once.answered)


def test_least_request_is_better_than_round_robin() -> None:
    """For different calls the p99 is lower with least request than with many clients' round-robin."""
    calls = load(200, [0.001, 0.039])
    least, turns = (Fleet(8, UNLIMITED, least_request=each).serve(calls) for each in (True, False))
    assert least.within(0.99) < turns.within(0.99)


@pytest.mark.slow
def test_the_smallest_number_of_replicas_is_found() -> None:
    """One less is not enough; more load or a heavier layer needs more, the arena needs fewer."""
    question = Question(5000, [10**6], 0.005)
    found = needed(question)
    assert not {row["replicas"]: row["enough"] for row in capacity.answer(question)}.get(found - 1)
    assert needed(replace(question, rate=10_000)) > found
    assert needed(replace(question, layer_ms=1)) > found
    assert needed(replace(question, client_side=True)) >= found
    assert needed(replace(question, path="arena")) < found


def test_times_are_fitted_to_the_measurements() -> None:
    """Each transport's line is within a half of every measured time; a call and a byte both have a cost."""
    for path in ("unary", "stream", "arena"):
        fixed, each, off = capacity.seconds_of(path)
        assert fixed > 0
        assert each > 0
        assert off < 0.5


@pytest.mark.slow
def test_the_command() -> None:
    """The command prints the replicas; for a p99 below the time of a single call it says what a call takes."""
    command = [sys.executable, "-m", "benchmarks", "capacity", "--rate", "200", "--bytes", "1000000", "--p99"]
    done = subprocess.run([*command, "0.05"], capture_output=True, text=True, check=True, cwd=ROOT)  # noqa: S603 - our own command
    assert "replicas=1 enough=True" in done.stdout
    done = subprocess.run([*command, "0.00001"], capture_output=True, text=True, check=False, cwd=ROOT)  # noqa: S603 - the same
    assert done.returncode == 1
    assert "expected --p99 of more than" in done.stderr
