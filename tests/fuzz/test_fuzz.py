"""Fuzzing in CI: a minute against a server process, a moment under atheris; docs/fuzzing.md has the rest."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from fuzz.mutate import encode_fields, fields_of, mutated, pack, unpack
from fuzz.seeds import SEEDS, SHARES, seeds

ROOT = Path(__file__).parents[2]


def run(report: Path, *flags: str) -> object:
    """Run the command, which must find nothing, and return its report."""
    command = [sys.executable, "-m", "fuzz", *flags, "--json", str(report)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-8000:]
    return json.loads(report.read_text())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_minute_of_fuzzing_finds_nothing(tmp_path: Path) -> None:
    """Each case ends with a response or a reasoned status; the server stays healthy and does not grow."""
    (row,) = run(tmp_path / "report.json", "--seconds", "60", "--seed", "1")
    assert row["findings"] == {}
    assert set(row["endings"]) == set(SHARES)
    for target, endings in row["endings"].items():
        assert endings["OK"] > 0, target
        assert len(endings) > 2, target


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("target", ["PoolStream", "attach"])
def test_atheris_extends_its_corpus(tmp_path: Path, target: str) -> None:
    """Under atheris cases that reach new code are kept and mutated further, and the report counts every case."""
    pytest.importorskip("atheris", reason="atheris has no wheel for this machine")
    row = run(tmp_path / "report.json", "--only", target, "--cases", "1000")
    assert (row["target"], row["cases"], row["findings"]) == (target, 1000, {})
    assert sum(row["endings"].values()) == 1000
    assert row["corpus"] > len(seeds(target, 1))


@pytest.mark.parametrize("target", SEEDS)
def test_a_seed_reproduces_its_case(target: str) -> None:
    """A finding can be reproduced by its seed, and kept as one string."""
    starts = seeds(target, 1)
    assert starts == seeds(target, 1)
    for number in range(200):
        case, again = (mutated(starts[number % len(starts)], starts, Random(number)) for _ in range(2))  # noqa: S311 - reproducible
        assert case == again == unpack(pack(case))


@pytest.mark.parametrize("target", ["Pool", "InferShape", "ModelInfer"])
def test_mutation_parses_messages_like_protobuf(target: str) -> None:
    """A valid message is the fields that it is split into."""
    for case in seeds(target):
        for message in case:
            assert encode_fields(fields_of(message)) == message
