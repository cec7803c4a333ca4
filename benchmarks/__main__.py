"""Run a benchmark: python -m benchmarks NAME --json FILE."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

NAMES = ("batching", "kernels", "load", "memmap", "ray", "soak", "threads", "transport")


def main() -> int:
    """Run a benchmark, print its table, and write its rows."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows go")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds a case [default: 15]")
    parser.add_argument("--minutes", type=float, default=1, help="how long a soak lasts [default: 1]")
    given = parser.parse_args()
    rows = []
    much = given.minutes if given.name == "soak" else given.rounds
    for row in import_module(f"benchmarks.{given.name}").run(much):
        rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row.get("broken") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
