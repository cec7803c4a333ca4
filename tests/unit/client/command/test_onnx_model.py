"""The command `poolrpc pool-onnx`: the pooling nodes of models as layers, with their shapes."""

import json
import sys

import pytest
from onnx import TensorProto, helper, save

from poolrpc.cli import main

FLOAT = TensorProto.FLOAT


def model_of(path, nodes, shape, *, opset=17, functions=()):
    """Write a model whose input is x and whose output is y, and return the path."""
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(each.domain, 1) for each in functions)]
    save(helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10), path)
    return str(path)


@pytest.fixture
def run(capsys):
    """Return a function that runs the command and returns its status and its lines."""

    def command(*arguments):
        status = main(["pool-onnx", *arguments])
        printed = capsys.readouterr()
        return status, printed.out.splitlines() + printed.err.splitlines()

    return command


def test_the_nodes_of_a_model_are_listed(run, tmp_path):
    """Each pooling node is listed as a layer, with the shapes before and after it; named sizes keep their names."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["a"], name="stem", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("AveragePool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["c"], ["y"]),
    ]
    status, lines = run(model_of(tmp_path / "model.onnx", nodes, ["N", 64, 56, 56]))
    assert status == 0
    assert lines == [
        "stem: MaxPool2d(3, stride=2, padding=((0, 1), (0, 1))): (N, 64, 56, 56) -> (N, 64, 28, 28)",
        "c: AvgPool2d(2, stride=2, count_include_pad=False): (N, 64, 28, 28) -> (N, 64, 14, 14)",
        "y: GlobalPool2d('mean'): (N, 64, 14, 14) -> (N, 64, 1, 1)",
    ]


def test_the_nodes_as_json(run, tmp_path):
    """--json prints a list of the nodes, with the order of indices; an unknown shape is null."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["y", "i"], name="pool", kernel_shape=[2, 2], storage_order=1),
        helper.make_node("MaxUnpool", ["y", "i", "s"], ["z"], kernel_shape=[2, 2]),
    ]
    status, lines = run(model_of(tmp_path / "model.onnx", nodes, [1, 2, 4, "W"]), "--json")
    assert status == 0
    assert json.loads(lines[0])[0] == {
        "node": "pool",
        "op_type": "MaxPool",
        "input": [1, 2, 4, "W"],
        "output": [1, 2, 3, "?"],
        "layer": "MaxPool2d(2, stride=1, return_indices=True)",
        "storage_order": 1,
    }
    assert json.loads(lines[0])[1]["output"] is None


def test_regions_and_their_largest_corners_are_listed(run, tmp_path):
    """Nodes with boxes are layers too, and the one that no layer computes is listed as what it is."""
    nodes = [
        helper.make_node("RoiAlign", ["x", "r", "b"], ["m"], mode="max"),
        helper.make_node("RoiAlign", ["x", "r", "b"], ["y"], output_height=7, output_width=7, spatial_scale=0.25),
    ]
    status, lines = run(model_of(tmp_path / "model.onnx", nodes, [1, 8, 32, 32]))
    assert status == 0
    assert lines[0].startswith(
        "m: RoiAlign with mode=max, which poolrpc.onnx computes in the client: (1, 8, 32, 32) -> "
    )
    assert lines[1].startswith("y: RoIAlign(7, spatial_scale=0.25, aligned=True): (1, 8, 32, 32) -> ")


def test_nodes_in_functions_and_branches_are_listed(run, tmp_path):
    """Nodes in the functions of a model, and in the bodies of its nodes, are found."""
    pool = helper.make_node("MaxPool", ["x"], ["p"], name="inner", kernel_shape=[2, 2])
    body = helper.make_graph([pool], "body", [], [helper.make_tensor_value_info("p", FLOAT, None)])
    stage = helper.make_function(
        "local",
        "Stage",
        ["s"],
        ["t"],
        [helper.make_node("GlobalMaxPool", ["s"], ["t"])],
        [helper.make_opsetid("", 17)],
    )
    nodes = [
        helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True])),
        helper.make_node("If", ["c"], ["q"], then_branch=body, else_branch=body),
        helper.make_node("Stage", ["x"], ["y"], domain="local"),
    ]
    status, lines = run(model_of(tmp_path / "model.onnx", nodes, [1, 3, 8, 8], functions=[stage]))
    assert status == 0
    assert lines == [
        "inner: MaxPool2d(2, stride=1): (1, 3, 8, 8) -> (1, 3, 7, 7)",
        "inner: MaxPool2d(2, stride=1): (1, 3, 8, 8) -> (1, 3, 7, 7)",
        "y: GlobalPool2d('max'): (1, 3, 8, 8) -> (1, 3, 1, 1)",
    ]


def test_a_node_that_is_no_layer_makes_the_status_1(run, tmp_path):
    """The reason is listed with the node, and the others are listed too."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["a"], kernel_shape=[2, 2, 2, 2]),
        helper.make_node("MaxPool", ["x"], ["b"], kernel_shape=[9, 9]),
        helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2]),
    ]
    status, lines = run(model_of(tmp_path / "model.onnx", nodes, [1, 1, 4, 4]))
    assert status == 1
    assert lines[0] == "a: MaxPool is not a layer: kernel_shape: expected 1 to 3 sizes, got 4"
    assert lines[1].startswith("b: MaxPool is not a layer: kernel_shape: expected an effective kernel of at most")
    assert lines[2] == "y: MaxPool2d(2, stride=1): (1, 1, 4, 4) -> (1, 1, 3, 3)"


def test_a_model_without_pooling(run, tmp_path):
    """The command says that there are none."""
    path = model_of(tmp_path / "model.onnx", [helper.make_node("Relu", ["x"], ["y"])], [1])
    assert run(path) == (0, ["no pooling nodes"])


@pytest.mark.parametrize("name", ["model.onnx", "model.json", "model.textproto"])
def test_a_file_that_is_no_model(run, tmp_path, name):
    """A file of something else, or none, is one line on stderr."""
    (tmp_path / name).write_bytes(b"not a model")
    status, lines = run(str(tmp_path / name))
    assert (status, len(lines)) == (1, 1)
    assert lines[0].startswith("poolrpc: model: expected a model of ONNX, got ")
    status, lines = run(str(tmp_path / "other.onnx"))
    assert (status, len(lines)) == (1, 1)
    assert "No such file" in lines[0]


def test_without_the_package_the_extra_is_named(run, tmp_path, monkeypatch):
    """Without onnx, the line says what to install."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert run(str(tmp_path / "model.onnx")) == (
        1,
        ["poolrpc: model: expected onnx to be installed, for models: pip install 'poolrpc[onnx]'"],
    )
