"""Draw the kernels' results and write the tables of docs/kernels.md: python -m benchmarks.plot."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs" / "kernels.md"
MARK = "<!-- the table below is written by python -m benchmarks.plot -->"


def main() -> None:
    """Draw every case by its group, and write the table."""
    rows = json.loads((RESULTS / "kernels.json").read_text())
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
    head = DOCS.read_text().partition(MARK)[0]
    DOCS.write_text("\n".join([head + MARK, "", *means, "", *lines, ""]))


if __name__ == "__main__":
    main()
