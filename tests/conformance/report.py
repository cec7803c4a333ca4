"""The cases of all suites, run against a server, and the page of the docs with their outcome."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from scripts.tables import table
from tests.conformance.embedding_cases import embedding_cases
from tests.conformance.keras_cases import keras_cases
from tests.conformance.onnx_cases import onnx_cases
from tests.conformance.runtime_cases import runtime_cases

if TYPE_CHECKING:
    from collections.abc import Iterable

    from poolrpc import PoolClient
    from tests.conformance.cases import Case

SUITES = (onnx_cases, runtime_cases, keras_cases, embedding_cases)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case.

    Attributes:
        case: The case.
        error: Why it failed; empty if it passed or was skipped.

    """

    case: Case
    error: str = ""


def run_cases(client: PoolClient) -> list[Outcome]:
    """Run every case."""
    return [_run(case, client) for suite in SUITES for case in suite()]


def _run(case: Case, client: PoolClient) -> Outcome:
    if case.skipped:
        return Outcome(case)
    try:
        case.run(client)
    except Exception as error:  # noqa: BLE001 - whatever a case raises is its outcome
        return Outcome(case, f"{type(error).__name__}: {error}")
    return Outcome(case)


COMPARED = {
    "ONNX, nodes": (
        "the backend tests in onnx {onnx}, by its own loader: every node with a pooling operator",
        "with the outputs there, within the tolerance of each case",
    ),
    "ONNX, models from PyTorch": ("the same, of models that PyTorch exported", "likewise"),
    "onnxruntime, random nodes": (
        (
            "onnxruntime {onnxruntime}: random windows with explicit pads, dilations and ceil_mode in several opsets; "
            "N is 2 and C is 3, so that indices count in the whole tensor"
        ),
        "maxima and indices exactly, means within 1e-5, norms and RoiAlign within 1e-4",
    ),
    "Keras, its rules in NumPy": (
        'windows with padding "same" and "valid", global and adaptive layers, in both data formats',
        "maxima exactly, means within 1e-5",
    ),
    "sentence-transformers, its formulas in NumPy": (
        "the modes of its Pooling module, with masks as weights, and with sentences one after the other as segments",
        "float32 within 1e-5, float16 within 2e-3",
    ),
}
"""Where the cases of each suite are from, and how they are compared."""

PAGE = """\
# Conformance

This page is written by `python -m scripts.conformance`, which runs the tests of other projects against a server,
through `poolrpc.onnx` and `poolrpc.keras`, and compares each result with theirs. `pytest -m conformance
tests/conformance` fails if one of them fails, or if this page is out of date. [ONNX and Keras](frameworks.md) has the
rules.

{suites}

## Outcome

{outcomes}

## Skipped

{skipped}
"""


def page(outcomes: Iterable[Outcome]) -> str:
    """Return the text of the page."""
    counts: dict[tuple[str, str], list[int]] = {}
    skipped: dict[str, list[str]] = {}
    for outcome in outcomes:
        case = outcome.case
        row = counts.setdefault((case.suite, case.operator), [0, 0, 0])
        row[2 if case.skipped else 1 if outcome.error else 0] += 1
        if case.skipped:
            skipped.setdefault(case.skipped, []).append(f"`{case.name}`")
    suites = dict.fromkeys(suite for suite, _ in counts)
    rows: list[tuple[object, ...]] = []
    for suite in suites:
        of_suite = {operator: row for (name, operator), row in sorted(counts.items()) if name == suite}
        rows += [(suite, operator, *row) for operator, row in of_suite.items()]
        rows.append((suite, "all", *map(sum, zip(*of_suite.values(), strict=True))))
    versions = {name: version(name) for name in ("onnx", "onnxruntime")}
    return PAGE.format(
        suites=table(
            ("suite", "cases", "compared"),
            ((suite, source.format(**versions), compared) for suite, (source, compared) in COMPARED.items()),
        ),
        outcomes=table(("suite", "operator or layer", "passed", "failed", "skipped"), rows),
        skipped="\n".join(f"- {', '.join(names)}: it {reason}." for reason, names in skipped.items()),
    )
