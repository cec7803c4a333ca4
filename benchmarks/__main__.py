"""Run a benchmark: python -m benchmarks NAME --json FILE."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

NAMES = (
    "batching",
    "callers",
    "capacity",
    "gpu",
    "kernels",
    "load",
    "memmap",
    "narrow",
    "pyramid",
    "ray",
    "recipes",
    "segments",
    "sizing",
    "soak",
    "threads",
    "transport",
)


def main() -> int:
    """Run a benchmark, print its table, and write its rows."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the rows to")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds per case [default: 15]")
    parser.add_argument("--minutes", type=float, default=1, help="duration of the soak [default: 1]")
    capacity = parser.add_argument_group("capacity", "the number of replicas for a load; see benchmarks/capacity.py")
    capacity.add_argument("--rate", type=float, help="calls per second; without it the measured curve is simulated")
    capacity.add_argument("--bytes", type=int, nargs="+", default=[602_112], help="sizes of an input [default: 602112]")
    capacity.add_argument(
        "--p99", type=float, default=0.1, help="seconds within which 99 of 100 calls are answered [default: 0.1]"
    )
    capacity.add_argument(
        "--path", choices=("unary", "stream", "arena"), help="transport of the tensors [default: the client's over TCP]"
    )
    capacity.add_argument(
        "--layer-ms", type=float, default=0, help="milliseconds that the layer takes more than MaxPool2d(2)"
    )
    capacity.add_argument(
        "--client-side", action="store_true", help="clients choose the replicas [default: least request]"
    )
    capacity.add_argument("--retry", action="store_true", help="rejected calls are retried, as by our client")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    argument = {"soak": options.minutes, "capacity": options}.get(options.name, options.rounds)
    try:
        for row in import_module(f"benchmarks.{options.name}").run(argument):
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    finally:  # after an interrupt too
        if options.json and rows:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row.get("broken") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
