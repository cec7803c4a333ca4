"""Draw the results (figures.py) and write the tables of the docs: python -m benchmarks.plot."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

from benchmarks import capacity
from benchmarks.capacity import Question
from benchmarks.figures import FIGURES, read

DOCS = Path(__file__).parent.parent / "docs"
LOADS = (
    (500, 12_288, 0.01),
    (5000, 12_288, 0.01),
    (500, 10**6, 0.01),
    (5000, 10**6, 0.01),
    (50, 25_690_112, 0.1),
    (500, 25_690_112, 0.1),
)
BUSY = (0.3, 0.5, 0.7, 0.8, 0.9)
MARK = "written by python -m benchmarks.plot -->\n"
PATHS = ("unary", "stream", "unix unary", "unix stream", "arena", "arena, no copies", "local", "local, no copies")


def main() -> None:
    """Write every figure and table."""
    for name, draw in FIGURES.items():
        (DOCS / f"figures/{name}.svg").write_text(draw())
    kernels()
    transport()
    load()
    scaling()
    ray()


def write(name: str, *parts: list[str]) -> None:
    """Replace the tables of a page."""
    page = DOCS / f"{name}.md"
    head, mark, _ = page.read_text().partition(MARK)
    page.write_text("\n".join([head + mark, *("\n".join([*part, ""]) for part in parts)]))


def load() -> None:
    """Write the table of the load."""
    rows = [row for row in read("load") if row.get("transport", "grpc") == "grpc"]
    lines = [
        "| load | correct per second | relative goodput | p50, p99, p99.9 ms | rejected: p50, p99 ms | MiB | late ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['case'].removesuffix(' capacity')} | {row['goodput']} | {row['ratio']:.2f} "
            f"| {row['accepted_p50_ms']}, {row['accepted_p99_ms']}, {row['accepted_p99.9_ms']} "
            f"| {row['rejected_p50_ms'] or '-'}, {row['rejected_p99_ms'] or '-'} | {row['server_rss_mib']} "
            f"| {row['clients_late_ms']} |"
            for row in rows
        ),
    ]
    write("load", lines)


def scaling() -> None:
    """Write what follows from the measured times for more than one core."""
    calls = {
        (row["bytes"], row["contender"]): row["ms"]
        for row in read("transport")
        if row["case"].startswith("MaxPool2d") and row["baseline"] == "torch"
    }
    cores = [
        "What one core does, including its single client's work, and how many such cores' inputs fill a network:",
        "",
        "| bytes | TCP ms | calls per second | MB/s | cores for 10 Gbit/s | cores for 100 Gbit/s | arena ms | MB/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for nbytes in sorted({nbytes for nbytes, _ in calls}):
        tcp, arena = calls[nbytes, "auto"], calls[nbytes, "arena"]
        fill = " | ".join(f"{limit / (nbytes * 8 / tcp * 1000):,.1f}" for limit in (10e9, 100e9))
        cores.append(
            f"| {nbytes:,} | {tcp} | {1000 / tcp:,.0f} | {nbytes / tcp / 1000:,.1f} | {fill} "
            f"| {arena} | {nbytes / arena / 1000:,.1f} |"
        )
    lines = [
        "The time of a call in the simulation: a line fitted to the measured times:",
        "",
        "| transport | ms per call | ms per MB | largest error |",
        "| --- | --- | --- | --- |",
    ]
    for path in ("unary", "stream", "arena"):
        fixed, each, off = capacity.seconds_of(path)
        lines.append(f"| {path} | {fixed * 1000:.2f} | {each * 1e9:.2f} | {off:.0%} |")
    waits = [
        "The p99 divided by the time of a call alone, if all calls are alike:",
        "",
        f"| replicas | balancing, at a utilization of | {' | '.join(f'{busy:.0%}' for busy in BUSY)} |",
        "| --- " * (len(BUSY) + 2) + "|",
    ]
    for replicas, least in product((1, 2, 8, 32), (True, False)):
        if replicas > 1 or least:
            chosen = "-" if replicas == 1 else "least request" if least else "client-side"
            figures = " | ".join(f"{capacity.waiting(replicas, busy, least_request=least):.1f}" for busy in BUSY)
            waits.append(f"| {replicas} | {chosen} | {figures} |")
    loads = [
        "Number of replicas:",
        "",
        "| calls per second | bytes each | p99 | least request | client-side | least request, arena |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for rate, nbytes, p99 in LOADS:
        asked = Question(rate, [nbytes], p99)
        figures = []
        for each in (asked, replace(asked, client_side=True), replace(asked, path="arena")):
            *_, last = capacity.answer(each)
            figures.append(str(last["replicas"]))
        loads.append(f"| {rate:,} | {nbytes:,} | {p99 * 1000:g} ms | {' | '.join(figures)} |")
    checks = [
        "Simulated and measured values:",
        "",
        "| load | correct per second | measured | p50 ms | measured | p99 ms | measured |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['case'].removesuffix(' capacity')} | {row['goodput']} | {row['measured_goodput']} "
            f"| {row['p50_ms']} | {row['measured_p50_ms']} | {row['p99_ms']} | {row['measured_p99_ms']} |"
            for row in map(capacity.compared, (row for row in read("load") if row.get("transport", "grpc") == "grpc"))
        ),
    ]
    write("scaling", cores, lines, loads, waits, checks)


def ray() -> None:
    """Write the table of calls through Ray's proxy."""
    lines = [
        "| case | bytes | speed relative to poolrpc-server | ms | poolrpc-server ms |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['case']} | {row['bytes']:,} | {row['ratio']:.2f} | {row['ms']:.1f} | {row['baseline_ms']:.1f} |"
            for row in read("ray")
        ),
    ]
    write("ray", lines)


def kernels() -> None:
    """Write the tables of the kernels."""
    rows = read("kernels")
    cases = [row for row in rows if "group" in row]
    lines = [
        "| case | kernel | eager ms | ms | speedup | clones of the input |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in cases:
        figures = f"{row['baseline_ms']} | {row['ms']} | {row['ratio']} | {row['clones']}"
        lines.append(f"| {row['case']} | {row['kernel']} | {figures} |")
    means = ["| group | cases | geometric mean of the speedup | smallest |", "| --- | --- | --- | --- |"]
    for row in rows:
        if "cases" in row:
            name = row["case"].removeprefix("geometric mean: ")
            means.append(f"| {name} | {row['cases']} | {row['ratio']} | {row['least']} |")
    write("kernels", means, lines)


def transport() -> None:
    """Write the tables of the transports."""
    rows = read("transport")
    cases = [row for row in rows if row["case"].startswith("MaxPool2d")]
    ratios = {(row["case"], row["contender"], row["baseline"]): row["ratio"] for row in cases}
    names = list(dict.fromkeys(row["case"] for row in cases))
    size = {row["case"]: row["bytes"] for row in cases}
    tables = []
    for baseline in ("torch", "echo", "plain server", "unix unary", "arena"):
        paths = [path for path in PATHS if (names[0], path, baseline) in ratios]
        table = [f"Speed relative to {baseline}:", "", f"| case | bytes | {' | '.join(paths)} |"]
        table.append("| --- " * (len(paths) + 2) + "|")
        for name in names:
            figures = " | ".join(f"{ratios[name, path, baseline]:.2f}" for path in paths)
            table.append(f"| {name} | {size[name]:,} | {figures} |")
        tables.append(table)
    even = ["Faster than local eager torch from:", "", "| transport | bytes |", "| --- | --- |"]
    for path in PATHS:
        # From the smallest size on from which it stays so.
        slower = [size[name] for name in names if ratios[name, path, "torch"] < 1]
        first = [size[name] for name in names if size[name] > max(slower, default=0)]
        even.append(f"| {path} | {f'{min(first):,}' if first else 'never'} |")
    rest = ["| case | transport | baseline | relative speed |", "| --- | --- | --- | --- |"]
    for row in (*(row for row in rows if row not in cases), *read("memmap")):
        grown = {"client": row.get("client_grew_bytes"), "server": row.get("server_grew_bytes")}
        note = "".join(f"; the {who} grew by {int(grew) >> 20} MiB" for who, grew in grown.items() if grew is not None)
        rest.append(f"| {row['case']}{note} | {row['contender']} | {row['baseline']} | {row['ratio']} |")
    write("transport-figures", even, *tables, rest)


if __name__ == "__main__":
    main()
