"""The models of the Open Inference door: presets, what they are said to take and give, and the names of outputs."""

import re
from pathlib import Path

import pytest

from poolrpc import AdaptiveAvgPool2d, MaxPool2d
from poolrpc_server.presets import Model, output_names, read_models

STEM = "MaxPool2d(3, stride=2, padding=1)"


def test_there_is_always_the_model_of_any_layer():
    """Without presets there is `pool` alone, which is said to take images."""
    assert read_models([]) == {"pool": Model("pool")}
    assert Model("pool").rank == 4
    assert (Model("pool").inputs, Model("pool").outputs) == ({"input": "float32"}, {"output": "float32"})


def test_presets_are_flags_and_lines_of_a_file():
    """A preset is NAME=LAYER, blanks aside, or a line of a TOML file; the layer may be a chain or branches."""
    file = str(Path(__file__).with_name("presets.toml"))
    models = read_models([" a.b-1 = [MaxPool2d(2), MaxPool2d(kernel_size=3)]"], file)
    assert list(models) == ["pool", "a.b-1", "stem", "pyramid"]
    assert models["a.b-1"].branches == ((MaxPool2d(2), MaxPool2d(3)),)
    assert models["stem"] == Model("stem", STEM, ((MaxPool2d(3, stride=2, padding=1),),))
    assert models["pyramid"].branches == tuple((AdaptiveAvgPool2d(size),) for size in (1, 2, 4))


@pytest.mark.parametrize(
    ("presets", "words"),
    [
        (["stem"], "model: expected NAME=LAYER, got 'stem'"),
        ([f"pool={STEM}"], "names that differ, and from 'pool', got 'pool' again"),
        ([f"a={STEM}", f"a={STEM}"], "got 'a' again"),
        ([f"={STEM}"], "expected a name of letters"),
        ([f"a/b={STEM}"], "expected a name of letters"),
        ([f"{'a' * 65}={STEM}"], "expected a name of letters"),
        (["a=MaxPool2d"], "model a: column 1: expected a layer"),
        (["a="], "model a: column 1: expected a layer"),
        (["a=[MaxPool2d(2), MaxPool1d(2)]"], "model a: .*expected a 2d layer"),
    ],
)
def test_a_wrong_preset_is_refused(presets, words):
    """A name or a layer that is none is refused by the model's name, with what was expected."""
    with pytest.raises(ValueError, match=words):
        read_models(presets)


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
def test_a_wrong_file_is_refused(tmp_path, text, words):
    """A file that isn't there, isn't TOML, or says something else is refused."""
    path = tmp_path / "presets.toml"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=words):
        read_models([], str(path))


@pytest.mark.parametrize(
    ("layer", "rank", "inputs", "outputs"),
    [
        ("MaxPool1d(2)", 3, {"input": "float32"}, {"output": "float32"}),
        ("AvgPool3d(2)", 5, {"input": "float32"}, {"output": "float32"}),
        ("GlobalAvgPool()", 4, {"input": "float32"}, {"output": "float32"}),
        ("MaxUnpool2d(2)", 4, {"input": "float32", "indices": "int64"}, {"output": "float32"}),
        (
            "[[AvgPool2d(2)], [AvgPool2d(2), MaxPool2d(2, return_indices=True)]]",
            4,
            {"input": "float32"},
            {"output": "float32", "output_1": "float32", "indices_1": "int64"},
        ),
    ],
)
def test_a_preset_is_described(layer, rank, inputs, outputs):
    """What a preset takes and gives follows from its layers."""
    model = read_models([f"it={layer}"])["it"]
    assert (model.rank, model.inputs, model.outputs) == (rank, inputs, outputs)


def test_outputs_are_named_by_their_branch():
    """The first branch's are "output" and "indices"; the others' end in their number, whatever comes between."""
    indices = MaxPool2d(2, return_indices=True)
    assert output_names([(MaxPool2d(2),), (indices,), (MaxPool2d(2), indices)]) == [
        "output", "output_1", "indices_1", "output_2", "indices_2",
    ]  # fmt: skip
    assert output_names([(indices,)]) == ["output", "indices"]
    assert all(re.fullmatch(r"(output|indices)(_[1-9])?", name) for name in output_names([(indices,)] * 9))
