"""Write the tables of the docs that are derived from the code and the benchmarks' results: python -m scripts.tables.

A page has such a table between two comments. tests/docs/test_pages.py fails if a table is out of date.
"""

from __future__ import annotations

import html
import inspect
import json
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import yaml

import poolrpc_server.config
from poolrpc.command.explain import explain
from poolrpc.layers import FLOATS, INTEGERS, LAYERS, STEPS, WIDE_FLOATS, GlobalPool1d, Layer
from poolrpc.layers.reductions import NAMED, REDUCTIONS
from poolrpc_server.config import Config
from poolrpc_server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"(<!-- (\w+): written by python -m scripts\.tables -->\n).*?(<!-- end -->)", re.DOTALL)
SHAPE = re.compile(r"^Shape:\n(.*?)^\w+:$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"^ {8}(\S.*)$", re.MULTILINE)

KERNELS = ("max", "max with indices", "average", "adaptive max", "adaptive average", "power average")
TENSORS = ("MaxPool2d(2) 1x3x224x224", "MaxPool2d(2) 8x64x56x56", "MaxPool2d(2) 16x64x128x128")
FRONT_CALL = "MaxPool2d(2) 8x64x56x56"
GPU_WAYS = {
    "torch from pageable memory": "torch from pageable memory",
    "torch from pinned memory": "torch from page-locked memory",
    "the engine, in page-locked memory": "in page-locked memory",
    "a call, in place in the arena": "a call in place in the arena",
    "a call, through the arena": "a call through the arena",
    "a local call, in place": "a local call in place",
    "a local call": "a local call",
    "a call over TCP": "a call over TCP",
    "the engine": "bytes from the network",
    "the engine on the CPU": "one CPU thread",
}
NARROW_BASELINES = ("float32", "converted here", "torch", "NumPy", "layer alone")
PATHS = ("unary", "stream", "arena", "arena, no copies", "local", "local, no copies")

EXAMPLE_CELLS, EXAMPLE_PARAMETER = np.array([1, 2, 3, 4], np.float32), 2
"""The cells that the reductions of the front page reduce, and the value of a parameter without a default."""

MIB = 2**20
MEMORY_MIB = (384, 512, 1024, 2048, 4096, 8192, 16384)
CALL_BYTES = (12_288, 602_112, 6_422_528)
"""Inputs of calls whose number at a time is shown for each memory; larger ones are streams."""

BUSY_SHARE = 0.7
"""The utilization of the cores for which the sizing page plans."""

EXAMPLE_RATE, EXAMPLE_P99, EXAMPLE_BYTES, EXAMPLE_WORKERS = 1000, 0.05, 602_112, 2
"""The worked example of the sizing page."""


def main() -> None:
    """Write every table."""
    for page in pages():
        page.write_text(written(page))


def pages() -> list[Path]:
    """Return the pages that have tables."""
    return [
        page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if TABLE.search(page.read_text())
    ]


def written(page: Path) -> str:
    """Return the text of a page with its tables up to date."""
    return TABLE.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}", page.read_text())


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table in Markdown."""
    names = [*header]
    lines = [names, ["---"] * len(names), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def layers() -> str:
    """Every layer and element-wise step with its parameters, and its dtypes."""
    return table(("layer", "dtypes"), ((f"`{_call(each)}`", _dtypes(each)) for each in (LAYERS | STEPS).values()))


def vocabulary() -> str:
    """A row for each layer with its first sentence, those of other ranks in one; and one for each reduction."""
    families: dict[str, list[str]] = {}
    for name in LAYERS:
        families.setdefault(re.sub(r"\dd$", "", name), []).append(name)
    rows = []
    for family, names in families.items():
        shown = f"{family}2d" if f"{family}2d" in names else family
        others = [name.removeprefix(family) for name in names if name != shown]
        text = (inspect.getdoc(LAYERS[shown]) or "").splitlines()[0]
        rows.append((", ".join((f"`{shown}`", *others)), text))
    for name, cls in REDUCTIONS.items():
        required = [field for field in fields(cls) if field.default is MISSING] if is_dataclass(cls) else []
        reduction: Any = name if name in NAMED else cls(*[EXAMPLE_PARAMETER] * len(required))
        value = explain(GlobalPool1d(reduction), EXAMPLE_CELLS).output[0]
        rows.append((f"`{json.dumps(name) if name in NAMED else repr(reduction)}`", f"{value:.5g} of 1, 2, 3, 4"))
    return table(("layer, `reduce`", "what it is"), rows)


def _call(layer: type[Layer]) -> str:
    parameters = (
        each.name if each.default is MISSING else f"{each.name}={each.default!r}"
        for each in fields(layer)  # type: ignore[arg-type]  # every layer is a dataclass
    )
    return f"{layer.__name__}({', '.join(parameters)})"


def _dtypes(layer: type[Layer]) -> str:
    if layer.family in {"global_pool", "pool"}:
        return "floats; for 'max', 'min' and 'median' also integers, for 'sum' and 'mean' also int64"
    names = {
        FLOATS: "floats",
        FLOATS + INTEGERS: "floats, integers",
        (*FLOATS, *INTEGERS, "bool"): "floats, integers, bool",
        (*FLOATS, "int64"): "floats, int64",
        WIDE_FLOATS: ", ".join(WIDE_FLOATS),
        (*WIDE_FLOATS, "int64"): ", ".join((*WIDE_FLOATS, "int64")),
    }
    return names[layer.dtypes]


def shapes() -> str:
    """The shape rule of every family, from the Shape section of its first layer's docstring."""
    rules: dict[str, tuple[list[str], str]] = {}
    for name, layer in LAYERS.items():
        section = SHAPE.search(inspect.getdoc(layer) or "")
        rule = "; ".join(f"`{line}`" for line in FORMULA.findall(section[1])) if section else ""
        rules.setdefault(layer.family, ([], rule))[0].append(name)
    return table(("layers", "shape"), ((", ".join(names), rule) for names, rule in rules.values()))


def flags() -> str:
    """Every flag of the server, its default and its help."""
    return table(("flag", "default", "meaning"), map(_flag, fields(Config)))


def _flag(setting: Any) -> tuple[str, str, str]:  # noqa: ANN401 - a dataclass's field
    default, unit = setting.default, setting.metadata["unit"]
    repeatable = isinstance(default, tuple)
    shown = (
        ""
        if isinstance(default, bool) or default in ("", ())
        else f"`{default[0] if repeatable else default}` {Config.unit(setting.name, default)}"
    )
    value = "" if isinstance(default, bool) else f" {(unit or setting.name.rpartition('_')[2]).upper()}"
    return f"`--{setting.name.replace('_', '-')}{value}`", shown.strip(), setting.metadata["help"]


def metrics() -> str:
    """Every metric, its type, and what it measures."""
    rows = (
        (f"`{each.name}{'_total' if each.type == 'counter' else ''}`", each.type, each.documentation)
        for each in Metrics().collect().collect()
    )
    return table(("metric", "type", "meaning"), rows)


def alerts() -> str:
    """Every alert: its severity, its condition, and how long the condition must hold."""
    groups = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    rows = (
        (
            f"[`{rule['alert']}`](runbook.md#{rule['alert'].lower()})",
            rule["labels"]["severity"],
            _code(" ".join(rule["expr"].split())),
            rule.get("for", "-"),
        )
        for group in groups
        for rule in group["rules"]
        if "alert" in rule
    )
    return table(("alert", "severity", "condition", "for"), rows)


def _code(text: str) -> str:
    """Return code for a cell: as HTML with references if it has a |, for which Markdown's code has no way."""
    if "|" not in text:
        return f"`{text}`"
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;').replace('*', '&#42;')}</code>"


def _results(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    return rows


def front() -> str:
    """The three figures of the front page: a kernel, a call, and overload."""
    (mean,) = (row for row in _results("kernels") if row["case"] == "geometric mean: max")
    (call,) = (
        row
        for row in _results("transport")
        if (row["case"], row["contender"], row["baseline"]) == (FRONT_CALL, "local", "torch")
    )
    load = next(row for row in _results("load") if row["case"] == "10 times capacity")
    times = (
        f"{mean['ratio']:.0f} times the speed of eager torch: the mean of {mean['cases']} cases, of which the least has"
    )
    rows = (
        ("max pooling on a CPU, one thread each", f"{times} {mean['least']:.1f}"),
        (
            f"a call of {call['bytes'] / 1e6:.1f} MB to a server on the same machine",
            f"{call['ratio']:.1f} times the speed of torch in the caller's own process",
        ),
        (
            "calls at ten times the server's capacity",
            f"{load['ratio']:.0%} of its highest throughput; what is too much is rejected at once",
        ),
    )
    return table(("what", "result"), rows)


def kernels() -> str:
    """Speedups over eager torch: geometric means of a few groups of layers."""
    means = {row["case"].removeprefix("geometric mean: "): row for row in _results("kernels") if "cases" in row}
    rows = ((name, means[name]["cases"], means[name]["ratio"], means[name]["least"]) for name in KERNELS)
    return table(("layers", "cases", "times eager torch, geometric mean", "lowest"), rows)


def paths() -> str:
    """The speed of each transport relative to each baseline, for a few tensors."""
    rows = _results("transport")
    measured = [path for path in PATHS if any(row["contender"] == path for row in rows)]

    def ratio(case: str, path: str, baseline: str) -> str:
        key = (case, path, baseline)
        return next(f"{row['ratio']:.2f}" for row in rows if (row["case"], row["contender"], row["baseline"]) == key)

    def lines() -> Iterator[tuple[str, ...]]:
        for case in TENSORS:
            for baseline in ("torch", "echo", "plain server"):
                yield (case, baseline, *(ratio(case, path, baseline) for path in measured))

    return table(("tensor", "times the speed of", *measured), lines())


def narrow() -> str:
    """How many times the speed of each baseline a call from integers has, and the engine's steps alone."""
    ratios: dict[tuple[str, str], dict[str, float]] = {}
    for row in _results("narrow"):
        ratios.setdefault((row["case"], row["contender"]), {})[row["baseline"]] = row["ratio"]
    rows = (
        (case, way, *(f"{found[each]:.2f}" if each in found else "-" for each in NARROW_BASELINES))
        for (case, way), found in ratios.items()
    )
    return table(("steps and input", "by", *NARROW_BASELINES), rows)


def recipes() -> str:
    """The recipes' speed, compared with their usual code in torch."""
    rows = ((row["case"], row["baseline_ms"], row["ms"], row["ratio"]) for row in _results("recipes"))
    return table(("recipe, input", "torch, ms", "engine, ms", "times torch's speed"), rows)


def rest() -> str:
    """Many small tensors, a memory-mapped file, and a load of ten times the capacity."""
    ratios = {row["contender"]: row["ratio"] for row in _results("transport") if row["baseline"] == "one call each"}
    file = _results("memmap")[0]
    load = {row["case"]: row for row in _results("load")}
    rows = [(f"20,000 tensors of 3x32x32, {name}", f"{ratio} times one call each") for name, ratio in ratios.items()]
    rows += [
        (f"{file['case']}, {file['bytes'] / 2**30:.1f} GiB", f"{file['ratio']} times local torch"),
        ("ten times the load of its capacity", f"{load['10 times capacity']['ratio']:.2f} of its highest throughput"),
    ]
    return table(("case", "result"), rows)


def gpu() -> str:
    """How many times as long as the bare upload each way of a call takes on a GPU."""
    times: dict[str, dict[str, float]] = {}
    for row in _results("gpu"):
        if row["baseline"] == "pinned upload":
            case = times.setdefault(row["case"], {"upload": row["baseline_ms"]})
            case[row["contender"]] = 1 / row["ratio"]
    measured = {way: shown for way, shown in GPU_WAYS.items() if all(way in ways for ways in times.values())}
    rows = ((case, ways["upload"], *(f"{ways[way]:.1f}" for way in measured)) for case, ways in times.items())
    return table(("case", "upload, ms", *measured.values()), rows)


def processes() -> str:
    """The memory of idle processes and connections."""
    idle, connections = _sizing("idle"), _sizing("connections")
    rows = [
        (
            f"`{row['case']}`",
            f"{row['started_mib']:.0f} MiB",
            f"{row['served_mib']:.0f} MiB",
            f"{row['served_mib'] / row['workers']:.0f} MiB",
        )
        for row in idle
    ]
    files = max(row["files_mib"] for row in idle)
    rows.append(("files of libraries, once for all processes", "", f"{files:.0f} MiB", "-"))
    rows += [(row["case"], "", "", f"{row['kib_each']:.0f} KiB") for row in connections]
    return table(("what", "after its start", "after calls", "each"), rows)


def calls() -> str:
    """What calls of each size take, by transport."""
    rows = (
        (
            f"{row['bytes']:,}",
            f"{row['transport']}, {row['way']}",
            row["concurrency"],
            f"{row['server_cpu_ms']:.2f}",
            f"{row['bytes'] / 1e3 / row['server_cpu_ms']:,.0f}",
            f"{row['grew_mib']:.0f}",
            f"{row['grew_times']:.1f}" if row["bytes"] >= CALL_BYTES[1] else "-",
        )
        for row in _sizing("calls")
    )
    header = ("bytes", "transport", "at a time", "CPU ms each", "MB per CPU second", "MiB more", "times their bytes")
    return table(header, rows)


def memory() -> str:
    """What a server of one process takes at a time by default, for each memory."""
    rows = []
    for mib in MEMORY_MIB:
        with patch.object(poolrpc_server.config, "memory_bytes", return_value=mib * MIB):
            config = Config()
        at_a_time = (min(config.call_threads, config.max_inflight_bytes // reserved(nbytes)) for nbytes in CALL_BYTES)
        sizes = (config.max_inflight_bytes, config.max_arena_bytes, config.max_message_bytes)
        rows.append((f"{mib:,} MiB", *(f"{each // MIB:,} MiB" for each in sizes), *at_a_time, config.max_streams))
    counts = (f"calls of {nbytes:,} bytes" for nbytes in CALL_BYTES)
    return table(("memory", "in flight", "arenas", "message", *counts, "streams"), rows)


def reserved(nbytes: int) -> int:
    """Return the bytes that a call with MaxPool2d(2) reserves: while it arrives, and while it is computed."""
    return max(2 * nbytes, nbytes + 2 * nbytes // 4)


def example() -> str:
    """The worked example of the sizing page."""
    cpu = next(
        row["server_cpu_ms"]
        for row in _sizing("calls")
        if (row["bytes"], row["transport"], row["concurrency"]) == (EXAMPLE_BYTES, "unary", 4)
    )
    busy = EXAMPLE_RATE * cpu / 1000
    at_a_time = EXAMPLE_RATE * EXAMPLE_P99
    in_flight = at_a_time * reserved(EXAMPLE_BYTES) / MIB
    own = EXAMPLE_WORKERS * poolrpc_server.config.PROCESS_BYTES / MIB
    rows = (
        ("cores that are busy", f"{EXAMPLE_RATE:,} x {cpu:.2f} ms", f"{busy:.2f}"),
        (f"cores, {BUSY_SHARE:.0%} of which are busy", f"{busy:.2f} / {BUSY_SHARE}", f"{busy / BUSY_SHARE:.1f}"),
        ("calls at a time", f"{EXAMPLE_RATE:,} x {EXAMPLE_P99 * 1000:g} ms", f"{at_a_time:.0f}"),
        ("bytes in flight", f"{at_a_time:.0f} x {reserved(EXAMPLE_BYTES):,}", f"{in_flight:.0f} MiB"),
        ("processes", f"{EXAMPLE_WORKERS} x {own / EXAMPLE_WORKERS:.0f} MiB", f"{own:.0f} MiB"),
        ("memory", f"{own:.0f} + 2 x {in_flight:.0f} MiB", f"{own + 2 * in_flight:.0f} MiB"),
    )
    return table(("what", "from", "result"), rows)


def _sizing(kind: str) -> list[dict[str, Any]]:
    return [row for row in _results("sizing") if row["kind"] == kind]


TABLES: dict[str, Callable[[], str]] = {
    each.__name__: each
    for each in (
        layers,
        vocabulary,
        shapes,
        flags,
        metrics,
        alerts,
        front,
        kernels,
        paths,
        narrow,
        recipes,
        rest,
        gpu,
        processes,
        calls,
        memory,
        example,
    )
}
"""The function that writes each table, by the name in the page's comment."""


if __name__ == "__main__":
    main()
