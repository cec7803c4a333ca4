"""ONNX's pooling nodes as layers: attributes, defaults and operator sets, without a server."""

from types import SimpleNamespace

import numpy as np
import pytest
from onnx import defs, helper

from poolrpc import (
    AvgPool2d,
    GlobalPool1d,
    GlobalPool2d,
    GlobalPool3d,
    InvalidArgumentError,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool2d,
    Norm,
    Pool1d,
    Pool2d,
    Pool3d,
    RoIAlign,
    RoIPool,
    UnsupportedError,
)
from poolrpc.onnx import OPERATORS, from_node

K = {"kernel_shape": [3, 2]}


@pytest.mark.parametrize(
    ("op_type", "attributes", "options", "layer"),
    [
        ("MaxPool", K, {}, MaxPool2d((3, 2), stride=1)),
        ("MaxPool", {**K, "pads": [1, 0, 1, 1]}, {}, MaxPool2d((3, 2), stride=1, padding=((1, 1), (0, 1)))),
        ("MaxPool", {**K, "pads": [1, 1, 1, 1]}, {}, MaxPool2d((3, 2), stride=1, padding=1)),
        (
            "MaxPool",
            {**K, "dilations": [2, 1]},
            {"indices": True},
            MaxPool2d((3, 2), 1, 0, (2, 1), return_indices=True),
        ),
        ("MaxPool", {"kernel_shape": (2,), "strides": np.array([2])}, {"opset": 1}, MaxPool1d(2, 2)),
        ("MaxPool", {"kernel_shape": [2, 2, 2], "ceil_mode": 1}, {"opset": 10}, MaxPool3d(2, 1, ceil_mode=True)),
        ("MaxPool", {**K, "auto_pad": "VALID"}, {}, MaxPool2d((3, 2), stride=1)),
        ("MaxPool", {**K, "auto_pad": b"SAME_LOWER", "ceil_mode": 1}, {}, MaxPool2d((3, 2), 1, padding="same_lower")),
        ("MaxPool", {**K, "auto_pad": "SAME_UPPER", "pads": [0] * 4}, {}, MaxPool2d((3, 2), 1, padding="same")),
        ("AveragePool", K, {}, AvgPool2d((3, 2), stride=1, count_include_pad=False)),
        ("AveragePool", {**K, "count_include_pad": 1}, {}, AvgPool2d((3, 2), stride=1)),
        ("AveragePool", {**K, "dilations": [1, 2]}, {"opset": 19}, Pool2d("mean", (3, 2), 1, dilation=(1, 2))),
        ("AveragePool", {"kernel_shape": [2, 2, 2]}, {}, Pool3d("mean", 2, 1)),
        ("MaxPool", {"kernel_shape": [3, 1], "dilations": [2, 2]}, {}, MaxPool2d((3, 1), 1, dilation=(2, 1))),
        ("LpPool", {"kernel_shape": [3], "strides": [2]}, {}, Pool1d(Norm(2), 3, 2)),
        ("LpPool", {"kernel_shape": [3], "p": 1.5}, {"opset": 1}, Pool1d(Norm(1.5), 3, 1)),
        ("GlobalMaxPool", {}, {"rank": 3}, GlobalPool1d("max")),
        ("GlobalAveragePool", {}, {"rank": 4}, GlobalPool2d("mean")),
        ("GlobalLpPool", {"p": 3}, {"rank": 5}, GlobalPool3d(Norm(3))),
        ("MaxUnpool", {**K, "strides": [2, 2]}, {}, MaxUnpool2d((3, 2), 2)),
        ("MaxUnpool", {**K, "pads": [1, 0, 1, 0]}, {}, MaxUnpool2d((3, 2), 1, (1, 0))),
        ("MaxRoiPool", {"pooled_shape": [2, 3], "spatial_scale": 0.5}, {}, RoIPool((2, 3), 0.5)),
        ("RoiAlign", {}, {}, RoIAlign(1, aligned=True)),
        ("RoiAlign", {"output_height": 2, "sampling_ratio": 2}, {"opset": 10}, RoIAlign((2, 1), sampling_ratio=2)),
        ("RoiAlign", {"coordinate_transformation_mode": "output_half_pixel"}, {}, RoIAlign(1)),
    ],
    ids=repr,
)
def test_a_node_is_a_layer(op_type, attributes, options, layer):
    """Each operator, with ONNX's defaults, is the layer with the same windows."""
    node = from_node(op_type, attributes, **options)
    assert (node.op_type, node.layer, node.storage_order, node.corners) == (op_type, layer, 0, None)


@pytest.mark.parametrize("pads", [[0, 0, 1, 0], [2, 1, 1, 1]])
def test_an_unpooling_may_have_different_pads_on_both_sides(pads):
    """MaxUnpool has the size (L - 1)*stride - begin - end + kernel, also if begin + end is odd."""
    layer = from_node("MaxUnpool", {"kernel_shape": [4, 4], "strides": [1, 2], "pads": pads}).layer
    height = 5 * 1 - pads[0] - pads[2] + 4
    width = 5 * 2 - pads[1] - pads[3] + 4
    assert layer.output_shape((1, 1, 6, 6)) == (1, 1, height, width)


@pytest.mark.parametrize(
    ("op_type", "attributes", "options", "field", "message"),
    [
        ("Conv", {}, {}, "op_type", "expected one of MaxPool, AveragePool, .*, got 'Conv'"),
        ("MaxPool", {}, {}, "kernel_shape", "expected a list of integers, got none"),
        ("MaxPool", {"kernel_shape": 3}, {}, "kernel_shape", "expected a list of integers, got 3"),
        ("MaxPool", {"kernel_shape": [2] * 4}, {}, "kernel_shape", "expected 1 to 3 sizes, got 4"),
        ("MaxPool", {"kernel_shape": [0]}, {}, "kernel_shape", "expected 1 to 65535, got 0"),
        ("MaxPool", {**K, "strides": [1]}, {}, "strides", r"expected 2 integers, got \[1\]"),
        ("MaxPool", {**K, "pads": [1, 1]}, {}, "pads", r"expected 4 integers, got \[1, 1\]"),
        ("MaxPool", {**K, "pads": [0, 0, 0, -1]}, {}, "pads", "expected 0 to 65535, got -1"),
        ("MaxPool", {**K, "pads": [0, 0, 3, 0]}, {}, "pads", "3"),
        ("MaxPool", {**K, "pads": [0, 0, 1, 0], "auto_pad": "SAME_UPPER"}, {}, "pads", "expected no pads"),
        ("MaxPool", {**K, "auto_pad": "SAME"}, {}, "auto_pad", "expected 'NOTSET' or 'SAME_UPPER' or .*, got 'SAME'"),
        ("MaxPool", {**K, "ceil_mode": 2}, {}, "ceil_mode", "expected 0 to 1, got 2"),
        (
            "MaxPool",
            {**K, "ceil_mode": 1},
            {"opset": 9},
            "attributes",
            r"MaxPool in opset 9 \(auto_pad, .*, got 'ceil_mode'",
        ),
        ("AveragePool", {**K, "dilations": [1, 1]}, {"opset": 18}, "attributes", "opset 18 .*, got 'dilations'"),
        ("LpPool", {**K, "p": 0}, {}, "p", "expected a number above 0, got 0"),
        ("GlobalMaxPool", {}, {}, "rank", "expected the number of axes of the input for GlobalMaxPool, got none"),
        ("GlobalMaxPool", {}, {"rank": 2}, "rank", "expected 3 to 5, got 2"),
        ("GlobalMaxPool", {"p": 2}, {"rank": 3}, "attributes", r"\(none\), got 'p'"),
        ("MaxUnpool", K, {"opset": 8}, "opset", "expected at least 9 for MaxUnpool, got 8"),
        ("RoiAlign", {"mode": "min"}, {}, "mode", "expected 'avg' or 'max', got 'min'"),
        ("MaxPool", K, {"opset": 0}, "opset", "expected 1 to .*, got 0"),
        (K, None, {}, "node", "expected a NodeProto or the name of an operator, got {'kernel_shape': "),
    ],
    ids=repr,
)
def test_what_no_layer_has_is_rejected(op_type, attributes, options, field, message):
    """An error names the attribute as ONNX does, what was expected, and what was received."""
    with pytest.raises(InvalidArgumentError, match=message) as raised:
        from_node(op_type, attributes, **options)
    assert raised.value.violations[0].field == field


def test_a_nodeproto_has_its_own_attributes():
    """A NodeProto is read by its fields: attributes of every type, and whether it has the second output."""
    window = {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_LOWER", "storage_order": 1}
    node = from_node(helper.make_node("MaxPool", ["x"], ["y", "i"], **window))
    assert (node.layer, node.storage_order) == (MaxPool2d(2, 2, "same_lower", return_indices=True), 1)
    assert not from_node(helper.make_node("MaxPool", ["x"], ["y", ""], **window)).layer.return_indices
    roi = helper.make_node("MaxRoiPool", ["x", "r"], ["y"], pooled_shape=[2, 2], spatial_scale=0.25)
    assert from_node(roi).layer == RoIPool(2, 0.25)


def test_a_node_needs_no_onnx():
    """Any object with a NodeProto's fields is a node, such as one that another library parsed."""
    kernel = SimpleNamespace(name="kernel_shape", type=7, ints=[3])
    node = SimpleNamespace(op_type="MaxPool", domain="", attribute=[kernel], output=["y"])
    assert from_node(node).layer == MaxPool1d(3, stride=1)


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"domain": "com.microsoft"}, "domain", "expected ai.onnx, got 'com.microsoft'"),
        ({"attribute": [SimpleNamespace(name="body", type=5)]}, "body", "got type 5"),
        (
            {"attribute": [SimpleNamespace(name="p", type=2, i=0, ref_attr_name="q")]},
            "p",
            "got a reference to an attribute of a function",
        ),
    ],
    ids=["domain", "graph", "reference"],
)
def test_a_node_of_another_kind_is_rejected(changes, field, message):
    """A node of another domain, or with an attribute that has no value of its own, is rejected."""
    node = SimpleNamespace(**{"op_type": "MaxPool", "domain": "", "attribute": [], "output": ["y"]} | changes)
    with pytest.raises(InvalidArgumentError, match=message) as raised:
        from_node(node)
    assert raised.value.violations[0].field == field
    with pytest.raises(InvalidArgumentError, match="expected no attributes with a node"):
        from_node(node, {})


VALUES = {
    "auto_pad": "NOTSET",
    "ceil_mode": 0,
    "coordinate_transformation_mode": "half_pixel",
    "count_include_pad": 0,
    "dilations": [1, 1],
    "kernel_shape": [2, 2],
    "mode": "avg",
    "output_height": 1,
    "output_width": 1,
    "p": 2,
    "pads": [0, 0, 0, 0],
    "pooled_shape": [2, 2],
    "sampling_ratio": 0,
    "spatial_scale": 1.0,
    "storage_order": 0,
    "strides": [1, 1],
}


@pytest.mark.parametrize("op_type", OPERATORS)
def test_the_attributes_are_those_of_onnx(op_type):
    """In every operator set, a node has the attributes that onnx.defs has, with its defaults."""
    for opset in range(1, defs.onnx_opset_version() + 1):
        try:
            known = defs.get_schema(op_type, opset).attributes
        except defs.SchemaError:
            with pytest.raises(InvalidArgumentError, match="opset: expected at least"):
                from_node(op_type, opset=opset, rank=4)
            continue
        assert set(known) <= set(VALUES)
        required = {name: VALUES[name] for name in ("kernel_shape", "pooled_shape") if name in known}
        node = from_node(op_type, required, opset=opset, rank=4)
        for name, value in VALUES.items():
            if name not in known:
                with pytest.raises(InvalidArgumentError, match=f"in opset {opset} .*, got '{name}'"):
                    from_node(op_type, {**required, name: value}, opset=opset, rank=4)
            elif name not in required:
                default = helper.get_attribute_value(known[name].default_value) if has_default(known[name]) else value
                assert from_node(op_type, {**required, name: default}, opset=opset, rank=4) == node


def has_default(attribute):
    """Return whether an attribute of a schema has a default value."""
    return attribute.default_value.name != ""


def test_the_largest_of_weighted_corners_has_no_layer():
    """A RoiAlign with mode="max" has parameters, but no layer, and says so when one is needed."""
    node = from_node("RoiAlign", {"mode": "max", "output_height": 2, "output_width": 2})
    assert (node.layer, node.corners) == (None, RoIAlign(2, aligned=True))
    with pytest.raises(UnsupportedError, match=r'RoiAlign with mode="max" is computed by run'):
        node.arguments(np.zeros((1, 1, 8, 8)), np.zeros((1, 4)), np.zeros(1, int))
