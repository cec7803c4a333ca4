"""The pooling tests of other projects, through poolrpc.onnx and poolrpc.keras and a real server: report.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import poolrpc
from scripts.server_process import serving
from tests.installing import ROOT

if TYPE_CHECKING:
    from tests.conformance.report import Outcome

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    """The outcome of every case."""
    from tests.conformance.report import run_cases  # noqa: PLC0415 - imports onnx and onnxruntime

    with serving() as process, poolrpc.PoolClient(process.address) as client:
        return run_cases(client)


@pytest.mark.parametrize(
    ("suite", "passed", "skipped"),
    [
        ("ONNX, nodes", 55, 1),
        ("ONNX, models from PyTorch", 16, 0),
        ("onnxruntime, random nodes", 360, 0),
        ("Keras, its rules in NumPy", 176, 0),
        ("sentence-transformers, its formulas in NumPy", 20, 0),
    ],
)
def test_a_suite_passes(outcomes: list[Outcome], suite: str, passed: int, skipped: int) -> None:
    """Every case of a suite passes, except for those that are skipped for a reason, and none is missing."""
    of_suite = [each for each in outcomes if each.case.suite == suite]
    assert {each.case.name: each.error for each in of_suite if each.error} == {}
    found = [bool(each.case.skipped) for each in of_suite]
    assert (found.count(False), found.count(True)) == (passed, skipped)


def test_the_page_is_the_outcome(outcomes: list[Outcome]) -> None:
    """docs/conformance.md is what a run writes; `python -m scripts.conformance` writes it."""
    from tests.conformance.report import page  # noqa: PLC0415 - imports onnx and onnxruntime

    assert (ROOT / "docs/conformance.md").read_text() == page(outcomes)
