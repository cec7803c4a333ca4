"""Write docs/conformance.md from a run of other projects' pooling tests: python -m scripts.conformance."""

from __future__ import annotations

import sys
from pathlib import Path

import poolrpc
from scripts.server_process import serving
from tests.conformance.report import page, run_cases

PAGE = Path(__file__).parent.parent / "docs/conformance.md"


def main() -> int:
    """Run every case, print the failures, and write the page; the status is 1 if a case fails."""
    with serving() as server, poolrpc.PoolClient(server.address) as client:
        outcomes = run_cases(client)
    PAGE.write_text(page(outcomes))
    failed = [each for each in outcomes if each.error]
    for each in failed:
        print(f"{each.case.suite}, {each.case.operator}, {each.case.name}: {each.error}")
    print(f"{len(outcomes)} cases, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
