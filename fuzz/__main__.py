"""Fuzz with `--cases 1000000` under atheris, or with `--seconds 60` against a server process without it.

`attacks` runs attacks on the server's resources instead; it has flags of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def run(target: str, cases: int, seed: int) -> dict[str, Any]:
    """Fuzz a target in a process of its own, and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        flags = ["--only", target, "--cases", str(cases), "--seed", str(seed), "--json", str(report)]
        ended = subprocess.run([sys.executable, "-m", "fuzz", *flags], capture_output=True, text=True, check=False)  # noqa: S603 - this module
        if ended.returncode or not report.exists():
            finding = {"count": 1, "text": ended.stderr[-3000:]}
            return {"target": target, "cases": 0, "findings": {f"{target}: ended with {ended.returncode}": finding}}
        row: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return row


def main() -> int:
    """Fuzz every target, print and write the rows, and return 1 if there are findings."""
    if sys.argv[1:2] == ["attacks"]:
        from fuzz.attacks import command  # noqa: PLC0415 - needs packages that fuzzing does not

        return command.main(sys.argv[2:])
    parser = argparse.ArgumentParser("python -m fuzz", description=__doc__)
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument(
        "--cases",
        type=int,
        help="number of cases of all targets, under atheris, with a process for each target",
    )
    amount.add_argument(
        "--seconds", type=float, help="duration of all targets together, without atheris, against a server process"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the mutations [default: 1]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the rows to")
    parser.add_argument("--jobs", type=int, default=1, help="number of targets to run at the same time [default: 1]")
    parser.add_argument("--only", metavar="TARGET", help="run this target alone, in this process; needs --cases")
    options = parser.parse_args()
    if options.only and not options.cases:
        parser.error("argument --only: expected --cases with it, got --seconds")
    if options.only:
        from fuzz.guided import fuzz  # noqa: PLC0415 - importing it instruments the packages

        fuzz(options.only, options.cases, options.seed, options.json or Path("/dev/stdout"))
        return 0
    if options.seconds:
        from fuzz import unguided  # noqa: PLC0415 - as above

        rows = [unguided.fuzz(options.seconds, options.seed)]
        print(json.dumps(rows[0]), flush=True)
    else:
        rows = _guided(options.cases, options.seed, options.jobs)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(row["findings"] for row in rows))


def _guided(cases: int, seed: int, jobs: int) -> list[dict[str, Any]]:
    from fuzz.seeds import SHARES  # noqa: PLC0415 - as above

    counts = {target: max(1, cases * share // 100) for target, share in SHARES.items()}
    rows = []
    with ThreadPoolExecutor(jobs) as threads:
        for row in threads.map(run, counts, counts.values(), [seed] * len(counts)):
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
