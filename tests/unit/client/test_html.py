"""The HTML tables that Jupyter shows for results and for a server's description."""

from xml.etree import ElementTree as ET

import ml_dtypes
import numpy as np
import pytest

from poolrpc import Limit, PoolResult, ServerInfo


def rows(value):
    """Return the rows of a value's table by their heading: the text of the cell, and its values if it has some."""
    table = ET.fromstring(value._repr_html_())  # noqa: S314 - our own, which must be well-formed
    assert table.tag == "table"
    assert {each.tag for each in table.iter()} <= {"table", "tr", "th", "td", "pre"}
    return {row.findtext("th"): (row.find("td").text, "".join(pre.text for pre in row.iter("pre"))) for row in table}


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "uint8", "int64", ml_dtypes.bfloat16])
def test_a_small_output_is_shown_with_its_values(dtype):
    """The table has the dtype, the shape and the values of an output of at most 64 cells, and the transport."""
    output = np.arange(64).astype(dtype).reshape(1, 1, 8, 8)
    assert rows(PoolResult(output, (output.shape,), None, "arena")) == {
        "output": (f"{output.dtype.name} (1, 1, 8, 8)", str(output)),
        "transport": ("arena", ""),
    }


@pytest.mark.parametrize("shape", [(1, 1, 5, 13), (8, 64, 112, 112), (0, 3, 4, 4)], ids=repr)
def test_an_empty_or_large_output_is_shown_without_values(shape):
    """The table has the dtype and the shape alone if there are no cells, or more than 64."""
    result = PoolResult(np.zeros(shape, np.float32), (shape,))
    assert rows(result) == {"output": (f"float32 {shape}", ""), "transport": ("unary", "")}


def test_the_shapes_of_a_chain_and_indices_are_shown():
    """A chain's shapes are in order, and indices have their dtype, shape and values."""
    output, indices = np.array([[[np.nan, -np.inf]]], np.float32), np.array([[[5, 2**40]]])
    shown = rows(PoolResult(output, ((1, 1, 8), (1, 1, 2)), indices))
    assert list(shown) == ["output", "shapes", "indices", "transport"]
    assert shown["output"] == ("float32 (1, 1, 2)", "[[[ nan -inf]]]")
    assert shown["shapes"] == ("(1, 1, 8) → (1, 1, 2)", "")
    assert shown["indices"] == ("int64 (1, 1, 2)", str(indices))


def test_a_server_is_described():
    """The table has the versions, the device, features and limits, and the layers by their dtypes."""
    floats = ("float32", "float64")
    layers = {"MaxPool2d": (*floats, "uint8"), "AvgPool3d": floats, "LPPool3d": floats}
    info = ServerInfo("1.0", "2.13", "cuda:0", 4, layers, {"max_chain": Limit(64, "layers")}, {"tls": "off"})
    assert [(name, text) for name, (text, _) in rows(info).items()] == [
        ("version", "1.0"),
        ("torch", "2.13"),
        ("device", "cuda:0"),
        ("threads", "4"),
        ("tls", "off"),
        ("max_chain", "64 layers"),
        ("float32, float64, uint8", "MaxPool2d"),
        ("float32, float64", "AvgPool3d, LPPool3d"),
    ]


def test_whatever_a_server_sends_is_escaped():
    """Texts of a server are text in the table, and never markup."""
    hostile = "<script>alert('1')</script>&\"</table>"
    info = ServerInfo(
        hostile, hostile, hostile, 1, {hostile: (hostile,)}, {hostile: Limit(1, hostile)}, {f"{hostile} ": hostile}
    )
    shown = rows(info)
    assert [shown[each][0] for each in ("version", "torch", "device")] == [hostile] * 3
    assert shown[hostile + " "][0] == hostile
    assert "<script" not in info._repr_html_()
