"""Draw the results and write the tables of the docs: python -m benchmarks.plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
MARK = "written by python -m benchmarks.plot -->\n"
PATHS = ("unary", "stream", "unix unary", "unix stream", "arena", "arena, no copies")


def main() -> None:
    """Draw what there are results of."""
    kernels()
    transport()


def read(name: str) -> list[dict[str, Any]]:
    """Give the rows of a benchmark."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())
    return rows


def write(name: str, *parts: list[str]) -> None:
    """Put tables in place of those of a page."""
    page = DOCS / f"{name}.md"
    head, mark, _ = page.read_text().partition(MARK)
    page.write_text("\n".join([head + mark, *("\n".join([*part, ""]) for part in parts)]))


def kernels() -> None:
    """Draw every case of the kernels by its group, and write the tables."""
    rows = read("kernels")
    cases = [row for row in rows if "group" in row]
    groups = list(dict.fromkeys(row["group"] for row in cases))
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    for place, group in enumerate(groups):
        for row in (each for each in cases if each["group"] == group):
            torchs = row["kernel"] == "eager torch"
            axis.plot(row["ratio"], place, "x" if torchs else "o", color="grey" if torchs else "tab:blue", alpha=0.7)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(groups)), groups)
    axis.invert_yaxis()
    axis.set_xlabel("times the speed of eager torch, one thread (cross: the plan chose eager torch itself)")
    figure.savefig(RESULTS / "kernels.png", dpi=110)

    lines = [
        "| case | kernel | eager ms | ms | times eager | clones of the input |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in cases:
        figures = f"{row['baseline_ms']} | {row['ms']} | {row['ratio']} | {row['clones']}"
        lines.append(f"| {row['case']} | {row['kernel']} | {figures} |")
    means = ["| group | cases | geometric mean | least |", "| --- | --- | --- | --- |"]
    for row in rows:
        if "cases" in row:
            name = row["case"].removeprefix("geometric mean: ")
            means.append(f"| {name} | {row['cases']} | {row['ratio']} | {row['least']} |")
    write("kernels", means, lines)


def transport() -> None:
    """Draw latency against size for each path, and write the tables."""
    rows = read("transport")
    cases = [row for row in rows if row["case"].startswith("MaxPool2d")]
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    for path in PATHS:
        of = [row for row in cases if row["contender"] == path and row["baseline"] == "torch"]
        axis.plot([row["bytes"] for row in of], [row["ms"] for row in of], "o-", label=path, markersize=3)
    for baseline in ("torch", "echo", "plain server"):
        of = [row for row in cases if row["contender"] == "unary" and row["baseline"] == baseline]
        axis.plot([row["bytes"] for row in of], [row["baseline_ms"] for row in of], "--", label=baseline, color=None)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("bytes of the input, float32, MaxPool2d(2)")
    axis.set_ylabel("milliseconds")
    axis.legend()
    figure.savefig(RESULTS / "transport.png", dpi=110)

    ratios = {(row["case"], row["contender"], row["baseline"]): row["ratio"] for row in cases}
    names = list(dict.fromkeys(row["case"] for row in cases))
    size = {row["case"]: row["bytes"] for row in cases}
    tables = []
    for baseline in ("torch", "echo", "plain server"):
        table = [f"Times the speed of {baseline}:", "", f"| case | bytes | {' | '.join(PATHS)} |"]
        table.append("| --- " * (len(PATHS) + 2) + "|")
        for name in names:
            figures = " | ".join(f"{ratios[name, path, baseline]:.2f}" for path in PATHS)
            table.append(f"| {name} | {size[name]:,} | {figures} |")
        tables.append(table)
    even = ["Faster than local eager torch from:", "", "| path | bytes |", "| --- | --- |"]
    for path in PATHS:
        # From the smallest size on from which it stays so.
        slower = [size[name] for name in names if ratios[name, path, "torch"] < 1]
        first = [size[name] for name in names if size[name] > max(slower, default=0)]
        even.append(f"| {path} | {f'{min(first):,}' if first else 'never'} |")
    rest = ["| case | contender | baseline | times its speed |", "| --- | --- | --- | --- |"]
    for row in (*(row for row in rows if row not in cases), *read("memmap")):
        grown = {"client": row.get("client_grew_bytes"), "server": row.get("server_grew_bytes")}
        note = "".join(f"; the {who} grew by {int(grew) >> 20} MiB" for who, grew in grown.items() if grew is not None)
        rest.append(f"| {row['case']}{note} | {row['contender']} | {row['baseline']} | {row['ratio']} |")
    write("transport", even, *tables, rest)


if __name__ == "__main__":
    main()
