"""Fuzz: python -m fuzz --cases 1000000 --json FILE under atheris, or --seconds 60 without, of a server process."""

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
    """Fuzz a target in a process of its own and give what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        flags = ["--only", target, "--cases", str(cases), "--seed", str(seed), "--json", str(report)]
        made = subprocess.run([sys.executable, "-m", "fuzz", *flags], capture_output=True, text=True, check=False)  # noqa: S603 - this module
        if made.returncode or not report.exists():
            died = {"count": 1, "text": made.stderr[-3000:]}
            return {"target": target, "cases": 0, "findings": {f"{target}: died with {made.returncode}": died}}
        row: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return row


def main() -> int:
    """Fuzz every target, print and write what came of it; 1 where something was found."""
    parser = argparse.ArgumentParser("python -m fuzz", description=__doc__)
    much = parser.add_mutually_exclusive_group(required=True)
    much.add_argument(
        "--cases", type=int, help="cases of all targets together, under atheris, a process for each target"
    )
    much.add_argument(
        "--seconds", type=float, help="time for all targets in turn, without atheris, of a server process"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the mutations [default: 1]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows go")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time [default: 1]")
    parser.add_argument("--only", metavar="TARGET", help="run this target alone, in this process")
    given = parser.parse_args()
    if given.only:
        from fuzz.guided import fuzz  # noqa: PLC0415 - what it fuzzes is instrumented as it is imported

        fuzz(given.only, given.cases, given.seed, given.json or Path("/dev/stdout"))
        return 0
    if given.seconds:
        from fuzz import plain  # noqa: PLC0415 - as above

        rows = [plain.fuzz(given.seconds, given.seed)]
        print(json.dumps(rows[0]), flush=True)
    else:
        rows = _guided(given.cases, given.seed, given.jobs)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
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
