"""Each attack in a short form, next to a good client whose calls and probes must not notice it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.attacks.catalogue import ATTACKS
from fuzz.attacks.child import ATTACK, CALM
from fuzz.attacks.runner import run_attack
from fuzz.attacks.verdict import Verdict

ROOT = Path(__file__).parents[2]
SECONDS, CALM_SECONDS = 2.5, 1.0
TESTED_ELSEWHERE = ("stopped-worker",)
"""Attacks whose outcome depends on how quickly a process starts: tests/integration/test_watchdog.py has its test."""

QUICK = {"headers-without-body": "tcp"}
LOCAL = ("local-unread-answers", "local-packets-that-are-not-calls", "local-connections", "local-calls-that-are-left")
HTTP = ("http-half-requests", "http-unread-answers")
"""The attack of the quick tests, with its variant."""


def cases() -> list[object]:
    """Return the attacks of the issue's rows, whose variants take turns.

    `python -m fuzz attacks` runs those of their kinds too, each in every variant.
    """
    made = []
    rows = [each for each in ATTACKS.values() if "(row " in (each.run.__doc__ or "") or each.name in LOCAL + HTTP]
    for number, attack in enumerate(each for each in rows if each.name not in TESTED_ELSEWHERE):
        variant = QUICK.get(attack.name) or attack.variants[number % len(attack.variants)]
        marks = () if attack.name in QUICK else (pytest.mark.slow,)
        made.append(pytest.param(attack.name, variant, marks=marks, id=f"{attack.name}-{variant}"))
    return made


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "variant"), cases())
def test_an_attack_is_not_noticed(name: str, variant: str) -> None:
    """Calls are answered right and in time, so are probes, memory is bounded, and nothing is left behind."""
    verdict = run_attack(name, variant, SECONDS, calm=CALM_SECONDS, busy_machine=True)
    if verdict.skipped:
        pytest.skip(verdict.skipped)
    assert verdict.ok, json.dumps(verdict.row(), indent=1)


def test_every_attack_is_described() -> None:
    """A docstring has what is sent and what it aims at, and names the row of the issue, or the row of its kind."""
    assert len(ATTACKS) > 30
    for attack in ATTACKS.values():
        text = attack.run.__doc__ or ""
        assert "Sent: " in text, attack.name
        assert "Aims at: " in text, attack.name
        assert "row " in text or "of the kind of " in text, attack.name


def test_a_verdict_names_what_is_wrong() -> None:
    """Lost and wrong answers, waits, memory and counters each are a reason; on a busy machine waits are relative."""
    calm = {"count": 10, "wrong": 0, "lost": 0, "max_s": 1.0, "p99_s": 1.0}
    good = {CALM: calm, ATTACK: {**calm, "max_s": 3.0}, "errors": []}
    fine = {CALM: calm, ATTACK: calm, "errors": []}
    strict = Verdict("name", "tcp", 2.0, 1.0, 100, good=good, probes=fine, rss_mib=(1, 2, 3))
    strict.judge(busy_machine=False)
    assert [reason.partition(":")[0] for reason in strict.reasons] == ["good client"]
    busy = Verdict("name", "tcp", 2.0, 1.0, 100, good=good, probes=fine, rss_mib=(1, 2, 3))
    busy.judge(busy_machine=True)
    assert busy.ok
    bad = {CALM: calm, ATTACK: {**calm, "wrong": 1, "lost": 2}, "errors": ["one"]}
    worse = Verdict("name", "tcp", 2.0, 1.0, 100, good=bad, probes={}, rss_mib=(1, 200, 3), counters={"gauge": 1.0})
    worse.judge(busy_machine=True)
    assert [reason.partition(":")[0] for reason in worse.reasons] == ["good client", "probes", "memory", "counters"]


def test_the_command_lists_every_attack() -> None:
    """`--list` prints each attack with its variants and its summary."""
    command = [sys.executable, "-m", "fuzz", "attacks", "--list"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603 - our own
    lines = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(ATTACKS)
    assert all(attack.summary in line for attack, line in zip(ATTACKS.values(), lines, strict=True))
