"""Run a benchmark: python -m benchmarks NAME --json FILE."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

NAMES = ("batching", "capacity", "gpu", "kernels", "load", "memmap", "ray", "soak", "threads", "transport")


def main() -> int:
    """Run a benchmark, print its table, and write its rows."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows go")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds a case [default: 15]")
    parser.add_argument("--minutes", type=float, default=1, help="how long a soak lasts [default: 1]")
    capacity = parser.add_argument_group("capacity", "how many replicas a load needs; see benchmarks/capacity.py")
    capacity.add_argument("--rate", type=float, help="calls a second; without it, the measured curve is simulated")
    capacity.add_argument("--bytes", type=int, nargs="+", default=[602_112], help="of an input [default: 602112]")
    capacity.add_argument("--p99", type=float, default=0.1, help="seconds for 99 of 100 calls [default: 0.1]")
    capacity.add_argument(
        "--path", choices=("unary", "stream", "arena"), help="how tensors travel [default: as the client does over TCP]"
    )
    capacity.add_argument("--layer-ms", type=float, default=0, help="what the layer takes more than MaxPool2d(2)")
    capacity.add_argument("--client-side", action="store_true", help="clients choose replicas [default: least request]")
    capacity.add_argument("--retry", action="store_true", help="calls that are refused come again, as our client's do")
    given = parser.parse_args()
    rows = []
    much = {"soak": given.minutes, "capacity": given}.get(given.name, given.rounds)
    for row in import_module(f"benchmarks.{given.name}").run(much):
        rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row.get("broken") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
