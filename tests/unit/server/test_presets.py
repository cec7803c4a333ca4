"""Presets: their definitions, their reported inputs and outputs, and the names of outputs."""

import re
from pathlib import Path

import pytest

from poolrpc import AdaptiveAvgPool2d, MaxPool2d
from poolrpc_server.presets import Preset, output_names, read_presets

STEM = "MaxPool2d(3, stride=2, padding=1)"


def test_pool_exists_without_any_definition():
    """Without definitions, `pool` is the only preset, and it reports images as input."""
    assert read_presets([]) == {"pool": Preset("pool")}
    assert Preset("pool").rank == 4
    assert (Preset("pool").inputs, Preset("pool").outputs) == ({"input": "float32"}, {"output": "float32"})


def test_presets_are_read_from_flags_and_a_file():
    """A preset is defined as NAME=LAYER or as a line of a TOML file; the layer may be a chain or branches."""
    file = str(Path(__file__).with_name("presets.toml"))
    presets = read_presets([" a.b-1 = [MaxPool2d(2), MaxPool2d(kernel_size=3)]"], file)
    assert list(presets) == ["pool", "a.b-1", "stem", "pyramid"]
    assert presets["a.b-1"].branches == ((MaxPool2d(2), MaxPool2d(3)),)
    assert presets["stem"] == Preset("stem", STEM, ((MaxPool2d(3, stride=2, padding=1),),))
    assert presets["pyramid"].branches == tuple((AdaptiveAvgPool2d(size),) for size in (1, 2, 4))


@pytest.mark.parametrize(
    ("definitions", "words"),
    [
        (["stem"], "model: expected NAME=LAYER, got 'stem'"),
        ([f"pool={STEM}"], "expected a name that is neither 'pool' nor in use, got 'pool'"),
        ([f"a={STEM}", f"a={STEM}"], "nor in use, got 'a'"),
        ([f"={STEM}"], "expected a name of letters"),
        ([f"a/b={STEM}"], "expected a name of letters"),
        ([f"{'a' * 65}={STEM}"], "expected a name of letters"),
        (["a=MaxPool2d"], "model a: column 1: expected a layer"),
        (["a="], "model a: column 1: expected a layer"),
        (["a=[MaxPool2d(2), MaxPool1d(2)]"], "model a: .*expected a 2d layer"),
    ],
)
def test_invalid_definition_is_rejected(definitions, words):
    """An invalid name or layer is rejected with the preset's name and what was expected."""
    with pytest.raises(ValueError, match=words):
        read_presets(definitions)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stem = 3", "model stem: expected a layer in quotes, got 3"),
        ("[stem]", "model stem: expected a layer in quotes"),
        ("stem =", "expected a TOML file"),
        ("stem = '\xff'", "expected a TOML file"),
        (None, "expected a TOML file"),
    ],
)
def test_invalid_file_is_rejected(tmp_path, text, words):
    """A file that is missing, is not TOML or has values other than text is rejected."""
    path = tmp_path / "presets.toml"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=words):
        read_presets([], str(path))


@pytest.mark.parametrize(
    ("layer", "rank", "inputs", "outputs"),
    [
        ("MaxPool1d(2)", 3, {"input": "float32"}, {"output": "float32"}),
        ("AvgPool3d(2)", 5, {"input": "float32"}, {"output": "float32"}),
        ("GlobalPool2d('mean')", 4, {"input": "float32"}, {"output": "float32"}),
        ("MaxUnpool2d(2)", 4, {"input": "float32", "indices": "int64"}, {"output": "float32"}),
        (
            "[[AvgPool2d(2)], [AvgPool2d(2), MaxPool2d(2, return_indices=True)]]",
            4,
            {"input": "float32"},
            {"output": "float32", "output_1": "float32", "indices_1": "int64"},
        ),
        (
            "[[AvgPool2d(2), Round(), ToDtype('uint8')], [ToDtype('float64'), MaxPool2d(2, return_indices=True)]]",
            4,
            {"input": "float32"},
            {"output": "uint8", "output_1": "float64", "indices_1": "int64"},
        ),
    ],
)
def test_preset_reports_its_inputs_and_outputs(layer, rank, inputs, outputs):
    """The rank, inputs and outputs of a preset follow from its layers."""
    preset = read_presets([f"it={layer}"])["it"]
    assert (preset.rank, preset.inputs, preset.outputs) == (rank, inputs, outputs)


def test_output_names_have_the_number_of_the_branch():
    """The first branch has "output" and "indices"; the names of other branches end with the branch's number."""
    indices = MaxPool2d(2, return_indices=True)
    assert output_names([(MaxPool2d(2),), (indices,), (MaxPool2d(2), indices)]) == [
        "output", "output_1", "indices_1", "output_2", "indices_2",
    ]  # fmt: skip
    assert output_names([(indices,)]) == ["output", "indices"]
    assert all(re.fullmatch(r"(output|indices)(_[1-9])?", name) for name in output_names([(indices,)] * 9))
