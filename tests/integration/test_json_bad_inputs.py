"""Invalid input by the JSON protocol: each case has its status and its field in bounded time, and the server goes on.

The cases are those of test_bad_inputs.py, as far as JSON can express them; JSON can express more, such as negative
numbers. A case's number, such as B01, only serves to name it.
"""

from __future__ import annotations

import base64
import math
from typing import TYPE_CHECKING, Any

import pytest

from scripts.server_process import ServerProcess, serving
from tests.integration.http_calls import PLANE, HttpAnswer, send

if TYPE_CHECKING:
    from collections.abc import Iterator

IM, LM = 2**31 - 1, 2**63 - 1
ITEM_BYTES = {"float64": 8, "int64": 8, "uint8": 1}
SIZES = {1: (8,), 2: (8, 8), 3: (8, 8, 8)}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """Return a server process for all cases, so that a crash fails every later case."""
    with serving("--explorer", "127.0.0.1:0") as made:
        yield made
        assert made.process.poll() is None
        assert made.lines("unexpected error") == []


@pytest.fixture(autouse=True)
def still_serving(server: ServerProcess) -> Iterator[None]:
    """Check after each case that a good call is answered."""
    yield
    assert pool(server, {"layer": "MaxPool2d(2)", "input": PLANE}).json["output"] == [[6, 8], [9, 3]]


def pool(server: ServerProcess, body: object, path: str = "/v1/pool") -> HttpAnswer:
    """Send a request of Pool."""
    return send(server.start_line["explorer"], path, body)


def zeros(*shape: int, dtype: str = "float32", nbytes: int | None = None) -> dict[str, Any]:
    """Return a tensor of zeros, or one with another number of bytes."""
    size = math.prod(shape) * ITEM_BYTES.get(dtype, 4) if nbytes is None else nbytes
    return {"data": base64.b64encode(bytes(size)).decode(), "shape": list(shape), "dtype": dtype}


def layer(name: str, x: dict[str, Any] | None = None, **parameters: object) -> dict[str, Any]:
    """Return a request of one layer, by default for zeros of a small batch of 3 channels."""
    x = x or zeros(1, 3, *SIZES[int(name[-2])])
    return {"layer": [{"name": name, **parameters}], "input": x}


INVALID: dict[str, tuple[object, str]] = {
    "B01 stride 0": (layer("MaxPool2d", kernel_size=2, stride=0), "layer[0].stride"),
    "B02 avg stride 0": (
        layer("AvgPool2d", zeros(10, 3, 20, 20, dtype="float64"), kernel_size=4, stride=0),
        "layer[0].stride",
    ),
    "B04 stride -1": (layer("MaxPool2d", kernel_size=2, stride=-1), "layer[0].stride"),
    "B05 kernel 0": (layer("MaxPool2d", kernel_size=0), "layer[0].kernel_size"),
    "B06 kernel -1": (layer("MaxPool2d", kernel_size=-1), "layer[0].kernel_size"),
    "B07 one kernel 0": (layer("MaxPool3d", zeros(3, 4, 10, 11, 12), kernel_size=[2, 2, 0]), "layer[0].kernel_size"),
    "B08 avg kernel -1": (layer("AvgPool2d", kernel_size=-1), "layer[0].kernel_size"),
    "B09 dilation 0": (layer("MaxPool2d", kernel_size=2, dilation=0), "layer[0].dilation"),
    "B09 dilation -1": (layer("MaxPool2d", kernel_size=2, dilation=-1), "layer[0].dilation"),
    "B10 max padding": (layer("MaxPool2d", kernel_size=2, padding=2), "layer[0].padding"),
    "B10 avg padding": (layer("AvgPool2d", kernel_size=2, padding=2), "layer[0].padding"),
    "B11 padding -1": (layer("MaxPool2d", kernel_size=2, padding=-1), "layer[0].padding"),
    "B12 kernel over input": (layer("MaxPool2d", kernel_size=9), "layer[0].kernel_size"),
    "B13 kernel 2^31": (layer("MaxPool2d", kernel_size=2**31), "layer[0].kernel_size"),
    "B14 kernel 2^63": (layer("MaxPool2d", kernel_size=2**63), "layer[0].kernel_size"),
    "B15 dilation of a 1x1 kernel": (
        layer("MaxPool2d", zeros(5, 10, 24, 24), kernel_size=1, dilation=IM, ceil_mode=True),
        "layer[0].dilation",
    ),
    "B15 dilation in range, over the input": (
        layer("MaxPool2d", zeros(5, 10, 24, 24), kernel_size=1, dilation=65535, ceil_mode=True),
        "layer[0].dilation",
    ),
    "B16 3d dilation": (layer("MaxPool3d", kernel_size=1, dilation=IM), "layer[0].dilation"),
    "B19 segfault of max_pool1d": (
        layer(
            "MaxPool1d",
            zeros(1, 2, 3, dtype="float64"),
            kernel_size=8608480567731124087,
            stride=[],
            padding=1250999896764,
            dilation=1250999896764,
            ceil_mode=True,
        ),
        "layer[0].kernel_size",
    ),
    "B21 silent wrong result": (
        layer("MaxPool1d", zeros(1, 2, 8), kernel_size=5, stride=1, dilation=2**62),
        "layer[0].dilation",
    ),
    "B22 wrong and slow": (
        layer("MaxPool1d", zeros(1, 2, 8), kernel_size=2**32 + 1, stride=1, dilation=2**32),
        "layer[0].kernel_size",
    ),
    "B23 3d overflow": (
        layer("MaxPool3d", zeros(1, 1, 1, 1, 1), kernel_size=[536870912] * 3, dilation=[1879048192] * 3),
        "layer[0].kernel_size",
    ),
    "B25 SIGFPE": (
        layer(
            "AvgPool2d",
            zeros(8, 2, 1, 1, dtype="int64"),
            kernel_size=[LM, 5868783964474102731],
            stride=[-1, 3010182406857593769],
            ceil_mode=True,
            divisor_override=33554427,
        ),
        "layer[0].kernel_size",
    ),
    "B26 SIGFPE of avg1d": (
        layer("AvgPool1d", zeros(0, 1, dtype="float64"), kernel_size=LM, stride=-1, ceil_mode=True),
        "layer[0].kernel_size",
    ),
    "B27 divisor 0": (layer("AvgPool2d", kernel_size=2, divisor_override=0), "layer[0].divisor_override"),
    "B31 avg3d over the input": (
        layer("AvgPool3d", zeros(1, 1, 2, 2, 2), kernel_size=3, padding=1),
        "layer[0].kernel_size",
    ),
    "B33 adaptive -2": (layer("AdaptiveAvgPool2d", output_size=-2), "layer[0].output_size"),
    "B34 adaptive huge": (
        layer("AdaptiveAvgPool2d", output_size=[576460752303423488, -274877906944]),
        "layer[0].output_size",
    ),
    "B35 adaptive 0": (layer("AdaptiveMaxPool2d", output_size=0), "layer[0].output_size"),
    "B35 adaptive (0, 3)": (layer("AdaptiveAvgPool2d", output_size=[0, 3]), "layer[0].output_size"),
    "B37 adaptive overflow": (layer("AdaptiveAvgPool2d", output_size=9132760301568586890), "layer[0].output_size"),
    "B48 fractional 0": (
        layer("FractionalMaxPool2d", kernel_size=2, output_size=[0, 1]),
        "layer[0].output_size",
    ),
    "B50 fractional kernel -100": (
        layer("FractionalMaxPool2d", kernel_size=-100, output_size=2),
        "layer[0].kernel_size",
    ),
    "B52 fractional too large": (
        layer("FractionalMaxPool2d", zeros(1, 1, 4, 4), kernel_size=3, output_size=4),
        "layer[0].kernel_size",
    ),
    "B53 fractional empty": (
        layer("FractionalMaxPool2d", kernel_size=2, output_ratio=[1e-9, 1e-9]),
        "layer[0].output_ratio",
    ),
    "B55 ratio over 1": (layer("FractionalMaxPool2d", kernel_size=2, output_ratio=1.5), "layer[0].output_ratio"),
    "B56 samples": (layer("FractionalMaxPool2d", kernel_size=2, _random_samples=[]), "layer[0]._random_samples"),
    "fractional without a size": (layer("FractionalMaxPool2d", kernel_size=2), "layer[0].output_size"),
    "B57 norm 0": (layer("LPPool2d", norm_type=0.0, kernel_size=2), "layer[0].norm_type"),
    "B57 norm -inf": (layer("LPPool2d", norm_type="-Infinity", kernel_size=2), "layer[0].norm_type"),
    "B60 unpool -1": (
        {"layer": "MaxUnpool2d(2)", "input": [[1, 2], [3, 4]], "indices": [[-1, 0], [1, 2]]},
        "indices",
    ),
    "B60 unpool 16": (
        {"layer": "MaxUnpool2d(2)", "input": [[1, 2], [3, 4]], "indices": [[16, 0], [1, 2]]},
        "indices",
    ),
    "B61 unpool 2^32+3": (
        {"layer": "MaxUnpool2d(2)", "input": [[1, 2], [3, 4]], "indices": [[0, 1], [2, 2**32 + 3]]},
        "indices",
    ),
    "B62 unpool int32": (
        {"layer": "MaxUnpool2d(2)", "input": [[1, 2], [3, 4]], "indices": zeros(2, 2, dtype="int32")},
        "indices.dtype",
    ),
    "B62 unpool shape": (
        {"layer": "MaxUnpool2d(2)", "input": [[1, 2], [3, 4]], "indices": [[0, 1]]},
        "indices.shape",
    ),
    "unpool without indices": ({"layer": "MaxUnpool2d(2)", "input": [[1, 2], [3, 4]]}, "indices"),
    "B65 C = 0": (layer("MaxPool2d", zeros(1, 0, 8, 8), kernel_size=2), "input.shape"),
    "B65 H = 0": (layer("MaxPool2d", zeros(1, 3, 0, 8), kernel_size=2), "input.shape"),
    "negative N": (layer("MaxPool2d", zeros(-1, 3, 8, 8, nbytes=0), kernel_size=2), "input.shape"),
    "B67 rank 0": (layer("MaxPool2d", zeros(nbytes=0), kernel_size=2), "input.data"),
    "B67 a number": ({"layer": "MaxPool2d(2)", "input": 5}, "input"),
    "B67 rank 1": ({"layer": "MaxPool2d(2)", "input": [1, 2, 3]}, "input.shape"),
    "B67 rank 6": (
        layer("MaxPool2d", zeros(12, 2, 2, 2, 0, 4634247419717959497, nbytes=0), kernel_size=2),
        "input.shape",
    ),
    "rank 6 of lists": ({"layer": "MaxPool2d(2)", "input": [[[[[[1]]]]]]}, "input"),
    "B68 product that wraps to 0": (
        layer("MaxPool2d", zeros(2**32, 2**32, 1, 16, nbytes=0), kernel_size=2),
        "input.data",
    ),
    "shape of floats": ({"layer": "MaxPool2d(2)", "input": zeros(2, 2) | {"shape": [2.0, 2.0]}}, "input.shape"),
    "shape of bools": ({"layer": "MaxPool2d(2)", "input": zeros(2, 2) | {"shape": [True, 4]}}, "input.shape"),
    "data short": (layer("MaxPool2d", zeros(1, 3, 8, 8, nbytes=8), kernel_size=2), "input.data"),
    "data long": (layer("MaxPool2d", zeros(1, 3, 8, 8, nbytes=4 * 192 + 1), kernel_size=2), "input.data"),
    "data not base64": ({"layer": "MaxPool2d(2)", "input": zeros(2, 2) | {"data": "!!"}}, "input.data"),
    "data not ASCII": ({"layer": "MaxPool2d(2)", "input": zeros(2, 2) | {"data": "é"}}, "input.data"),
    "data a number": ({"layer": "MaxPool2d(2)", "input": zeros(2, 2) | {"data": 5}}, "input.data"),
    "object without data": ({"layer": "MaxPool2d(2)", "input": {"shape": [2, 2]}}, "input"),
    "B70 unknown dtype": ({"layer": "MaxPool2d(2)", "input": PLANE, "dtype": "complex64"}, "dtype"),
    "B70 unknown dtype of data": ({"layer": "MaxPool2d(2)", "input": zeros(2, 2) | {"dtype": "fp8"}}, "input.dtype"),
    "dtype a list": ({"layer": "MaxPool2d(2)", "input": PLANE, "dtype": ["float32"]}, "dtype"),
    "B71 kernel of length 0": (layer("MaxPool2d", kernel_size=[]), "layer[0].kernel_size"),
    "B71 kernel of length 3": (layer("MaxPool2d", kernel_size=[2, 2, 2]), "layer[0].kernel_size"),
    "B71 kernel true": (layer("MaxPool2d", kernel_size=True), "layer[0].kernel_size"),
    "B71 kernel 2.0": (layer("MaxPool2d", kernel_size=2.0), "layer[0].kernel_size"),
    "B71 kernel text": (layer("MaxPool2d", kernel_size="2"), "layer[0].kernel_size"),
    "B71 kernel null": (layer("MaxPool2d", kernel_size=None), "layer[0].kernel_size"),
    "B71 kernel an object": (layer("MaxPool2d", kernel_size={"x": 2}), "layer[0].kernel_size"),
    "B71 kernel of lists": (layer("MaxPool2d", kernel_size=[[2], [2]]), "layer[0].kernel_size"),
    "B71 ceil_mode 1": (layer("MaxPool2d", kernel_size=2, ceil_mode=1), "layer[0].ceil_mode"),
    "B71 dilation on avg": (layer("AvgPool2d", kernel_size=2, dilation=2), "layer[0].dilation"),
    "no kernel": (layer("MaxPool2d"), "layer[0].kernel_size"),
    "unknown layer": ({"layer": {"name": "SumPool2d"}, "input": PLANE}, "layer[0].name"),
    "a layer without a name": ({"layer": {"kernel_size": 2}, "input": PLANE}, "layer[0].name"),
    "a name that is a list": ({"layer": {"name": ["MaxPool2d"]}, "input": PLANE}, "layer[0].name"),
    "an expression that does not parse": ({"layer": "MaxPool2d(2", "input": PLANE}, "layer"),
    "an expression of Python": ({"layer": "__import__('os').abort()", "input": PLANE}, "layer"),
    "branches": ({"layer": "[[MaxPool2d(2)], [AvgPool2d(2)]]", "input": PLANE}, "layer"),
    "branches that are not a list": ({"layer": "MaxPool2d(2)", "branches": "MaxPool2d(2)", "input": PLANE}, "branches"),
    "a branch that is not a layer": (
        {"layer": "MaxPool2d(2)", "branches": ["Round()", 1], "input": PLANE},
        "branches[1]",
    ),
    "an empty branch": ({"layer": "MaxPool2d(2)", "branches": [[]], "input": PLANE}, "branches[0]"),
    "a parameter of a branch": (
        {"layer": "MaxPool2d(2)", "branches": [["Round()", {"name": "MaxPool2d", "kernel_size": 0}]], "input": PLANE},
        "branches[0][1].kernel_size",
    ),
    "a branch that does not fit the input": (
        {"layer": "MaxPool2d(2)", "branches": ["MaxPool2d(2)", "[MaxPool2d(2), MaxPool2d(3)]"], "input": PLANE},
        "branches[1][1].kernel_size",
    ),
    "a branch of other dims": (
        {"layer": "MaxPool2d(2)", "branches": ["MaxPool1d(2)"], "input": PLANE},
        "branches[0][0]",
    ),
    "branches with different operands": (
        {"layer": "MaxUnpool2d(2)", "branches": ["RoIPool(1)"], "input": PLANE, "indices": PLANE},
        "branches",
    ),
    "an operand that no layer takes": ({"layer": "MaxPool2d(2)", "input": PLANE, "weights": PLANE}, "weights"),
    "weights of -1": ({"layer": "GlobalPool2d('mean')", "input": [[1, 2]], "weights": [[1, -1]]}, "weights"),
    "weights of another shape": ({"layer": "GlobalPool2d('mean')", "input": [[1, 2]], "weights": [1]}, "weights.shape"),
    "offsets that descend": ({"layer": "SegmentPool('max')", "input": [1, 2, 3], "offsets": [0, 2, 1]}, "offsets"),
    "offsets over the end": ({"layer": "SegmentPool('max')", "input": [1, 2, 3], "offsets": [0, 4]}, "offsets"),
    "a box of another image": ({"layer": "RoIPool(1)", "input": PLANE, "boxes": [[1, 0, 0, 1, 1]]}, "boxes"),
    "a box that is not finite": ({"layer": "RoIAlign(1)", "input": PLANE, "boxes": [[0, 0, 0, 1, "NaN"]]}, "boxes"),
    "boxes of four numbers": ({"layer": "RoIPool(1)", "input": PLANE, "boxes": [[0, 0, 1, 1]]}, "boxes.shape"),
    "no layer": ({"input": PLANE}, "layer"),
    "a layer of null": ({"layer": None, "input": PLANE}, "layer"),
    "an empty chain": ({"layer": [], "input": PLANE}, "layer"),
    "steps alone": ({"layer": "Round()", "input": PLANE}, "layer[0]"),
    "layers of other dims": ({"layer": "[MaxPool2d(2), MaxPool1d(2)]", "input": PLANE}, "layer[1]"),
    "no input": ({"layer": "MaxPool2d(2)"}, "input"),
    "an input of null": ({"layer": "MaxPool2d(2)", "input": None}, "input"),
    "a ragged input": ({"layer": "MaxPool2d(2)", "input": [[1, 2], [3]]}, "input"),
    "a list next to a number": ({"layer": "MaxPool2d(2)", "input": [[1, 2], [3, [4]]]}, "input"),
    "a number next to a list": ({"layer": "MaxPool2d(2)", "input": [[1, 2], 3]}, "input"),
    "text in the input": ({"layer": "MaxPool2d(2)", "input": [[1, "2"]]}, "input"),
    "null in the input": ({"layer": "MaxPool2d(2)", "input": [[1, None]]}, "input"),
    "a bool in the input": ({"layer": "MaxPool2d(2)", "input": [[1, True]]}, "input"),
    "an object in the input": ({"layer": "MaxPool2d(2)", "input": [[1, {}]]}, "input"),
    "a float for integers": ({"layer": "MaxPool2d(2)", "input": [[1, 2.5]], "dtype": "uint8"}, "input"),
    "256 for uint8": ({"layer": "MaxPool2d(2)", "input": [[1, 256]], "dtype": "uint8"}, "input"),
    "-1 for uint8": ({"layer": "MaxPool2d(2)", "input": [[1, -1]], "dtype": "uint8"}, "input"),
    "2^63 for int64": ({"layer": "MaxPool2d(2)", "input": [[1, 2**63]], "dtype": "int64"}, "input"),
    "10^400 for float64": ({"layer": "MaxPool2d(2)", "input": [[1, 10**400]], "dtype": "float64"}, "input"),
    "numbers for bool": ({"layer": "MaxPool2d(2)", "input": [[1, 0]], "dtype": "bool"}, "input"),
    "lists of bfloat16": ({"layer": "MaxPool2d(2)", "input": PLANE, "dtype": "bfloat16"}, "input"),
    "an unknown layout": ({"layer": "MaxPool2d(2)", "input": PLANE, "layout": "NCWH"}, "layout"),
    "a plane with channels last": ({"layer": "MaxPool2d(2)", "input": PLANE, "layout": "NHWC"}, "layout"),
    "an unknown encoding": ({"layer": "MaxPool2d(2)", "input": PLANE, "encoding": "hex"}, "encoding"),
    "steps of 1": ({"layer": "MaxPool2d(2)", "input": PLANE, "steps": 1}, "steps"),
    "an unknown field": ({"layer": "MaxPool2d(2)", "input": PLANE, "inputs": 1}, "body"),
    "not an object": ([1, 2], "body"),
    "not JSON": ("{", "body"),
    "nothing": ("", "body"),
    "NaN without quotes": ('{"layer": "MaxPool2d(1)", "input": [[NaN]]}', "body"),
    "one of many fields twice": ("{" + ",".join(f'"{i}":0' for i in (*range(100_000), 99_999)) + "}", "body"),
    "the same field twice": ('{"layer": "MaxPool2d(1)", "input": [[1]], "input": [[2]]}', "body"),
    "bytes that are not UTF-8": (b'{"layer": "\xff"}', "body"),
    "UTF-16": ('{"layer": "MaxPool2d(1)", "input": [[1]]}'.encode("utf-16"), "body"),
    "a thousand levels": ('{"input": ' + "[" * 100_000 + "]" * 100_000 + "}", "body"),
    "a number of ten thousand digits": ('{"layer": "MaxPool2d(1)", "input": [[' + "1" * 10_000 + "]]}", "body"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_requests(server: ServerProcess, case: str) -> None:
    """A wrong parameter, shape or value is 400 INVALID_ARGUMENT, with the field's path and what was expected."""
    body, field = INVALID[case]
    answer = pool(server, body)
    assert (answer.status, answer.error["code"]) == (400, "INVALID_ARGUMENT"), answer.content
    (first, *_) = answer.error["fields"]
    assert first["field"] == field
    assert "expected" in first["message"]
    assert "got" in first["message"] or case == "an expression that does not parse"
    assert len(answer.content) < 4096


LIMITED: dict[str, tuple[object, str]] = {
    "B64 of an average": (
        layer("AvgPool2d", zeros(1, 11, 256, 256), kernel_size=255, stride=1, padding=127),
        "WORK_BUDGET",
    ),
    "B41 adaptive 100000": (layer("AdaptiveAvgPool2d", zeros(1, 1, 4, 4), output_size=100000), "OUTPUT_TOO_LARGE"),
    "B42 adaptive 4000": (layer("AdaptiveMaxPool2d", zeros(1, 1, 4, 4), output_size=4000), "AMPLIFICATION"),
    "B43 adaptive row": (
        layer("AdaptiveAvgPool2d", zeros(1, 3, 1, 40), output_size=[1, 45000000]),
        "OUTPUT_TOO_LARGE",
    ),
    "B44 adaptive column": (
        layer("AdaptiveMaxPool2d", zeros(8812, 1, 1, 2), output_size=[262143, 1]),
        "OUTPUT_TOO_LARGE",
    ),
    "an output of 32 MiB": (
        {
            "layer": "[ToDtype('float64'), MaxPool2d(1)]",
            "input": zeros(1, 1700, 1700, dtype="uint8"),
            "encoding": "base64",
        },
        "JSON_BYTES",
    ),
    "a chain of 65 layers": ({"layer": ["MaxPool2d(1)"] * 65, "input": PLANE}, "TOO_MANY_LAYERS"),
    "a chain of 65 layers in two": (
        {"layer": [f"[{', '.join(['MaxPool2d(1)'] * 40)}]"] * 2, "input": PLANE},
        "TOO_MANY_LAYERS",
    ),
    "64 branches": ({"layer": "MaxPool2d(1)", "branches": ["MaxPool2d(1)"] * 64, "input": PLANE}, "TOO_MANY_LAYERS"),
    "a branch of 65 layers": (
        {"layer": "MaxPool2d(1)", "branches": [["MaxPool2d(1)"] * 65], "input": PLANE},
        "TOO_MANY_LAYERS",
    ),
    "lists of a million numbers": ({"layer": "MaxPool2d(2)", "input": [[1] * 1000] * 1000}, "JSON_ELEMENTS"),
    "a million empty lists": ('{"input": [' + "[]," * 1_000_000 + "[]]}", "JSON_ELEMENTS"),
    "a list of an image": ({"layer": "MaxPool2d(1)", "input": zeros(3, 256, 256)}, "JSON_ELEMENTS"),
    "5 MiB": ({"layer": "MaxPool2d(1)", "input": "x" * (5 * 2**20)}, "MESSAGE_TOO_LARGE"),
}


@pytest.mark.parametrize("case", LIMITED)
def test_over_a_limit(server: ServerProcess, case: str) -> None:
    """A request over a fixed limit is 413 RESOURCE_EXHAUSTED with the limit and the actual value, and no delay."""
    body, reason = LIMITED[case]
    answer = pool(server, body)
    assert (answer.status, answer.error["code"], answer.error["reason"]) == (413, "RESOURCE_EXHAUSTED", reason)
    assert int(answer.error["metadata"]["actual"]) > int(answer.error["metadata"]["limit"])
    assert "retry-after" not in answer.headers
    assert "retry_seconds" not in answer.error


@pytest.mark.parametrize("dtype", ["uint8", "bool", "int32"])
def test_a_dtype_that_a_layer_lacks(server: ServerProcess, dtype: str) -> None:
    """B70: a dtype that the layer lacks is 501 UNIMPLEMENTED with those that it has, and the layer's place."""
    x = [[True]] if dtype == "bool" else [[1]]
    answer = pool(server, {"layer": "LPPool2d(2, 1)", "input": x, "dtype": dtype})
    assert (answer.status, answer.error["code"]) == (501, "UNIMPLEMENTED")
    assert answer.error["message"].startswith("layer[0]: LPPool2d takes ")
    assert answer.error["metadata"]["dtypes"].split(", ") == ["float16", "bfloat16", "float32", "float64"]


EXPLANATIONS: dict[str, tuple[object, int, str]] = {
    "a chain": ({"layer": "[MaxPool2d(2), MaxPool2d(2)]", "shape": [8, 8]}, 400, "layer"),
    "neither": ({"layer": "MaxPool2d(2)"}, 400, "input"),
    "both": ({"layer": "MaxPool2d(2)", "shape": [4, 4], "input": PLANE}, 400, "input"),
    "another rank": ({"layer": "MaxPool2d(2)", "shape": [4, 4, 4]}, 400, "input"),
    "a layer without fixed windows": ({"layer": "FractionalMaxPool2d(2, 2)", "shape": [4, 4]}, 400, "layer"),
    "a step": ({"layer": "Round()", "shape": [4, 4]}, 400, "layer"),
    "a kernel that does not fit": ({"layer": "MaxPool2d(9)", "shape": [4, 4]}, 400, "kernel_size"),
    "an axis of 2^31": ({"layer": "GlobalPool2d('max')", "shape": [1, 2**31]}, 400, "shape"),
    "many positions": ({"layer": "MaxPool2d(100, stride=1)", "shape": [60000, 60000]}, 413, "JSON_WINDOWS"),
    "many cells": ({"layer": "MaxPool2d(9, stride=1)", "input": [[1] * 40] * 40}, 413, "JSON_WINDOWS"),
}


@pytest.mark.parametrize("case", EXPLANATIONS)
def test_invalid_explanations(server: ServerProcess, case: str) -> None:
    """An explanation that has no windows, or too many, is an error at once."""
    body, status, where = EXPLANATIONS[case]
    answer = pool(server, body, "/v1/explain")
    assert answer.status == status, answer.content
    assert where == (answer.error["fields"][0]["field"] if status == 400 else answer.error["reason"])


def test_what_torch_computes_is_computed(server: ServerProcess) -> None:
    """B30, B66 and B72: odd but valid input has torch's results."""
    ceil = pool(
        server, layer("AvgPool2d", zeros(1, 16, 4, 4), kernel_size=[1, 2], stride=2, padding=[0, 1], ceil_mode=True)
    )
    assert ceil.json["shape"] == [1, 16, 2, 3]
    nan = pool(server, {"layer": "MaxPool2d(2)", "input": [["NaN", 1], ["-Infinity", 2]]})
    assert nan.json["output"] == [["NaN"]]
    infinite = pool(server, {"layer": "MaxPool2d(2, padding=1)", "input": [["-Infinity"]]})
    assert infinite.json["output"] == [["-Infinity"]]


def test_a_call_has_a_log_line(server: ServerProcess) -> None:
    """A call is logged as those of gRPC are: its method, status, layers, shapes, stages and peer; a probe is not."""
    trace = "ab" * 16
    headers = {"traceparent": f"00-{trace}-{'cd' * 8}-01"}
    for name in ("MaxPool2d(2)", "MaxPool2d(0)"):
        send(server.start_line["explorer"], "/v1/pool", {"layer": name, "input": PLANE}, headers=headers)
    send(server.start_line["explorer"], "/v1/load", headers=headers)
    send(server.start_line["explorer"], "/v1/info", headers=headers)
    while not (lines := [each for each in server.log if each.get("trace_id") == trace])[2:]:
        pass  # the log is written by a thread
    good, bad, info = lines
    assert info["method"] == "/poolrpc.v1.JsonService/Info"
    assert (good["method"], good["status"]) == ("/poolrpc.v1.JsonService/Pool", "OK")
    assert (good["layers"], good["shape"], good["dtype"]) == ("((MaxPool2d(2),),)", [1, 4, 4], "float32")
    assert good["output"] == [[1, 2, 2]]
    assert good["peer"].startswith("127.0.0.1:")
    assert {"ms", "queue_ms", "compute_ms"} <= good.keys()
    assert (bad["status"], bad["reason"]) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")
