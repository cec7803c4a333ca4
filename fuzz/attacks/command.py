"""`python -m fuzz attacks`: every attack in turn, or all at once, next to a good client; exits with 1 if it noticed."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fuzz.attacks.catalogue import ATTACKS
from fuzz.attacks.runner import run_all, run_attack
from fuzz.attacks.server import VARIANTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fuzz.attacks.verdict import Verdict

MIN_SECONDS = 3.0


def main(arguments: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    parser = argparse.ArgumentParser("python -m fuzz attacks", description=__doc__)
    parser.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        help="duration of all attacks together, without the starts and ends of their servers [default: 10]",
    )
    parser.add_argument("--only", action="append", choices=sorted(ATTACKS), help="an attack; repeatable [default: all]")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="a variant; repeatable [default: all]")
    parser.add_argument("--all-at-once", action="store_true", help="run all attacks at once, against one server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the rows to")
    parser.add_argument("--list", action="store_true", help="print the attacks with their variants, and run none")
    options = parser.parse_args(arguments)
    if options.list:
        for attack in ATTACKS.values():
            print(f"{attack.name:32} {','.join(attack.variants):36} {attack.summary}")
        return 0
    # So that a run that is ended takes its servers along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rows = []
    for verdict in _verdicts(options):
        rows.append(verdict.row())
        print(json.dumps(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(not all(row["ok"] for row in rows))


def _verdicts(options: argparse.Namespace) -> Iterator[Verdict]:
    names = options.only or list(ATTACKS)
    if options.all_at_once:
        yield run_all(60 * options.minutes, names)
        return
    pairs = [(name, each) for name in names for each in ATTACKS[name].variants if each in (options.variant or VARIANTS)]
    for name, variant in pairs:
        yield run_attack(name, variant, max(MIN_SECONDS, 60 * options.minutes / len(pairs)))
