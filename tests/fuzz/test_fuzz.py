"""Fuzzing, as CI has it: a minute against a server process, a moment under atheris; docs/fuzzing.md has the rest."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from fuzz.mutate import fields_of, mutated, pack, unpack, written
from fuzz.seeds import SEEDS, SHARES, seeds

ROOT = Path(__file__).parents[2]


def run(report: Path, *flags: str) -> object:
    """Run the command and give its report; it must find nothing."""
    command = [sys.executable, "-m", "fuzz", *flags, "--json", str(report)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-8000:]
    return json.loads(report.read_text())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_minute_of_fuzzing_finds_nothing(tmp_path: Path) -> None:
    """Whatever bytes come, calls end by an answer or a status that says why; the server stays well and doesn't grow."""
    (row,) = run(tmp_path / "report.json", "--seconds", "60", "--seed", "1")
    assert row["findings"] == {}
    assert set(row["endings"]) == set(SHARES)
    for target, endings in row["endings"].items():
        assert endings["OK"] > 0, target
        assert len(endings) > 3, target


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("target", ["PoolStream", "attach"])
def test_atheris_finds_its_way(tmp_path: Path, target: str) -> None:
    """Under atheris cases that reach new code are kept and changed further, and the report counts every case."""
    pytest.importorskip("atheris", reason="atheris has no wheel for this machine")
    row = run(tmp_path / "report.json", "--only", target, "--cases", "1000")
    assert (row["target"], row["cases"], row["findings"]) == (target, 1000, {})
    assert sum(row["endings"].values()) == 1000
    assert row["corpus"] > len(seeds(target, 1))


@pytest.mark.parametrize("target", SEEDS)
def test_a_number_gives_the_same_case_again(target: str) -> None:
    """What was found can be had again by its seed, and kept as one string."""
    starts = seeds(target, 1)
    assert starts == seeds(target, 1)
    for number in range(200):
        case, again = (mutated(starts[number % len(starts)], starts, Random(number)) for _ in range(2))  # noqa: S311 - to be had again
        assert case == again == unpack(pack(case))


@pytest.mark.parametrize("target", ["Pool", "InferShape", "ModelInfer"])
def test_mutation_takes_messages_apart_as_protobuf_does(target: str) -> None:
    """A valid message is the fields that it is taken apart into."""
    for case in seeds(target):
        for message in case:
            assert written(fields_of(message)) == message
