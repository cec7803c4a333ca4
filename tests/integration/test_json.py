"""The JSON protocol: what it takes, what it returns, and that its results are those of every other protocol."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from poolrpc import PoolClient
from poolrpc.layers import LAYERS, STEPS
from poolrpc.tensors import numpy_dtype
from poolrpc_server import Config, Server
from tests.integration.http_calls import PLANE, HttpAnswer, send

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Return a server with an explorer."""
    made = Server(Config(listen=("127.0.0.1:0",), explorer="127.0.0.1:0", metrics="127.0.0.1:0"))
    made.start()
    yield made
    made.stop(0)


def pool(server: Server, layer: object, x: object, **fields: object) -> HttpAnswer:
    """Call Pool."""
    return send(server.explorer_address, "/v1/pool", {"layer": layer, "input": x, **fields})


def as_base64(x: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return an array in the form with base64."""
    return {"data": base64.b64encode(x.tobytes()).decode(), "shape": x.shape, "dtype": x.dtype.name}


def from_base64(tensor: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return the array of an answer with base64."""
    data = base64.b64decode(tensor["data"])
    return np.frombuffer(data, numpy_dtype(tensor["dtype"])).reshape(tensor["shape"])


def test_a_plane_of_numbers(server: Server) -> None:
    """A nested list of two levels is a plane, and the output has as many: what curl's first call shows."""
    assert pool(server, "MaxPool2d(2)", PLANE).json == {
        "layer": "MaxPool2d(2)",
        "shapes": [[2, 2]],
        "shape": [2, 2],
        "dtype": "float32",
        "output": [[6, 8], [9, 3]],
    }


@pytest.mark.parametrize(
    ("layer", "canonical"),
    [
        ("MaxPool2d(2, return_indices=True)", "MaxPool2d(2, return_indices=True)"),
        ({"name": "MaxPool2d", "kernel_size": [2, 2], "return_indices": True}, "MaxPool2d(2, return_indices=True)"),
        (["MaxPool2d(1)", {"name": "MaxPool2d", "kernel_size": 2}], "[MaxPool2d(1), MaxPool2d(2)]"),
        ("[MaxPool2d(1), MaxPool2d(2)]", "[MaxPool2d(1), MaxPool2d(2)]"),
    ],
)
def test_layers_are_expressions_or_objects(server: Server, layer: object, canonical: str) -> None:
    """A layer is an expression or an object with its name, and a chain an expression or a list of both."""
    answer = pool(server, layer, PLANE).json
    assert (answer["layer"], answer["output"]) == (canonical, [[6, 8], [9, 3]])
    assert answer.get("indices") == ([[5, 6], [12, 14]] if "indices" in canonical else None)


def test_steps_are_the_outputs_of_all_layers(server: Server) -> None:
    """With steps, each layer's expression, shape, dtype, output and indices are there; the last's are the answer's."""
    answer = pool(
        server, "[ToDtype('float64'), MaxPool2d(2, return_indices=True), AvgPool2d(2)]", PLANE, steps=True
    ).json
    assert [(each["layer"], each["dtype"], each["shape"]) for each in answer["steps"]] == [
        ("ToDtype('float64')", "float64", [4, 4]),
        ("MaxPool2d(2, return_indices=True)", "float64", [2, 2]),
        ("AvgPool2d(2)", "float64", [1, 1]),
    ]
    assert answer["steps"][1]["indices"] == [[5, 6], [12, 14]]
    assert answer["steps"][2]["output"] == answer["output"] == [[6.5]]
    assert answer["shapes"] == [[4, 4], [2, 2], [1, 1]]


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "uint8", "uint16", "int8", "int16", "int32", "int64"]
)
@pytest.mark.parametrize("encoding", ["list", "base64"])
def test_outputs_have_every_bit(server: Server, dtype: str, encoding: str) -> None:
    """The output of either form, from either form, is the one that a gRPC client gets, bit for bit."""
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((2, 3, 6, 6)) * 100).astype(dtype)
    with PoolClient(server.addresses[0]) as client:
        expected = client.pool(x, "MaxPool2d(2)").output
    for given in (as_base64(x), x.tolist()):
        output = pool(server, "MaxPool2d(2)", given, dtype=dtype, encoding=encoding).json["output"]
        got = from_base64(output) if encoding == "base64" else np.array(output, dtype)
        assert (got.dtype, got.tobytes()) == (expected.dtype, expected.tobytes())


def test_float32_is_written_with_its_own_digits(server: Server) -> None:
    """0.1 in float32 is 0.1, not 0.10000000149011612."""
    assert b'"output":[[0.1,0.2]]' in pool(server, "MaxPool2d(1)", [[0.1, 0.2]]).content


def test_numbers_that_json_lacks_are_strings(server: Server) -> None:
    """NaN and the infinities are strings, both ways; the answer is JSON for every parser."""
    x = [["NaN", 1.0], ["-Infinity", "Infinity"]]
    assert pool(server, "MaxPool2d(1)", x).json["output"] == x


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_layouts(server: Server, layout: str) -> None:
    """A tensor with channels last is pooled as such."""
    x = np.arange(48, dtype=np.float32).reshape(1, 4, 4, 3)
    given = x if layout == "NHWC" else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    answer = pool(server, "MaxPool2d(2)", as_base64(given), layout=layout).json
    assert answer["shape"] == ([1, 2, 2, 3] if layout == "NHWC" else [1, 3, 2, 2])


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_an_input_may_lack_leading_axes(server: Server, leading: tuple[int, ...]) -> None:
    """A plane, (C, H, W) and (N, C, H, W) are inputs; outputs and shapes have as many axes."""
    answer = pool(server, "MaxPool2d(2)", np.ones((*leading, 4, 4)).tolist()).json
    assert answer["shape"] == answer["shapes"][0] == [*leading, 2, 2]
    assert np.array(answer["output"]).shape == (*leading, 2, 2)


def test_an_empty_batch_has_an_empty_output(server: Server) -> None:
    """N of 0 is allowed, as in torch."""
    answer = pool(server, "MaxPool2d(2)", as_base64(np.empty((0, 1, 4, 4), np.float32))).json
    assert (answer["shape"], answer["output"]) == ([0, 1, 2, 2], [])


def test_bools_become_numbers(server: Server) -> None:
    """A list of true and false is an input of bool."""
    answer = pool(server, "[ToDtype('uint8'), MaxPool2d(2)]", [[True, False], [False, False]], dtype="bool").json
    assert answer["output"] == [[1]]


def test_unpooling_takes_indices(server: Server) -> None:
    """MaxUnpool takes the indices that a MaxPool returned."""
    pooled = pool(server, "MaxPool2d(2, return_indices=True)", PLANE).json
    answer = pool(server, "MaxUnpool2d(2)", pooled["output"], indices=pooled["indices"]).json
    assert answer["output"] == [[0, 0, 0, 0], [0, 6, 8, 0], [0, 0, 0, 0], [9, 0, 3, 0]]


def test_operands_of_other_shapes(server: Server) -> None:
    """Weights, offsets and boxes are lists under their names, and are rejected for a layer that takes another."""
    weights = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert pool(server, "GlobalPool2d('mean')", PLANE, weights=weights).json["output"] == [[8]]
    assert pool(server, "SegmentPool('max')", [[[1, 5, 2, 3]]], offsets=[0, 1, 4]).json["output"] == [[[1, 5]]]
    assert pool(server, "RoIPool(1)", [[PLANE]], boxes=[[0, 0, 0, 1, 1]]).json["output"] == [[[[6]]]]
    assert (
        pool(server, "SegmentPool('max')", [[[1, 5]]], boxes=[[0, 0, 0, 1, 1]]).error["fields"][0]["field"] == "boxes"
    )
    assert pool(server, "SegmentPool('max')", [[[1, 5]]]).error["fields"][0]["field"] == "offsets"


def test_boxes_of_a_plane(server: Server) -> None:
    """The output for a plane has no channel either, but an axis for the boxes."""
    boxes = [[0, 0, 0, 1, 1], [0, 2, 2, 3, 3]]
    answer = pool(server, "RoIPool((1, 2))", PLANE, boxes=boxes, steps=True).json
    assert answer["shape"] == answer["shapes"][0] == answer["steps"][0]["shape"] == [2, 1, 2]
    assert answer["output"] == [[[5, 6]], [[3, 2]]]


def test_branches_have_an_answer_each(server: Server) -> None:
    """Further chains on the same input are answered after the first, each with its steps, and share the operand."""
    branches = [["MaxPool2d(2)", {"name": "AvgPool2d", "kernel_size": 2}], "MaxPool2d(4, return_indices=True)"]
    answer = pool(server, "GlobalPool2d('mean')", PLANE, branches=branches, weights=[[1] * 4, *[[0] * 4] * 3]).json
    first, second = answer.pop("branches")
    assert (answer["layer"], answer["output"]) == ("GlobalPool2d('mean')", [[2.5]])
    assert (first["layer"], first["shapes"], first["output"]) == (
        "[MaxPool2d(2), AvgPool2d(2)]",
        [[2, 2], [1, 1]],
        [[6.5]],
    )
    assert (second["output"], second["indices"]) == ([[9]], [[12]])
    steps = pool(server, "MaxPool2d(4)", PLANE, branches=branches, steps=True).json
    assert [[each["output"] for each in branch["steps"]] for branch in (steps, *steps["branches"])] == [
        [[[9]]],
        [[[6, 8], [9, 3]], [[6.5]]],
        [[[9]]],
    ]


def test_bfloat16_is_base64(server: Server) -> None:
    """bfloat16 has no numbers in JSON's lists, but passes as bits."""
    x = {"data": base64.b64encode(b"\x80\x3f\x00\x40").decode(), "shape": [1, 2], "dtype": "bfloat16"}
    answer = pool(server, "MaxPool2d((1, 2))", x, encoding="base64").json
    assert base64.b64decode(answer["output"]["data"]) == b"\x00\x40"
    assert pool(server, "MaxPool2d((1, 2))", x).error["fields"][0]["field"] == "encoding"


def test_shapes_without_a_tensor(server: Server) -> None:
    """Shape returns the shape after each layer."""
    body = {"layer": "[MaxPool2d(3, stride=2), GlobalPool2d('mean')]", "shape": [8, 64, 56, 56]}
    assert send(server.explorer_address, "/v1/shape", body).json == {
        "layer": "[MaxPool2d(3, stride=2), GlobalPool2d('mean')]",
        "shapes": [[8, 64, 27, 27], [8, 64, 1, 1]],
    }


def test_an_explanation_has_every_window(server: Server) -> None:
    """Explain returns the windows' positions on each axis, the formula and, of an input, how each value is computed."""
    body = {"layer": "AvgPool2d(2, stride=3, padding=1)", "input": PLANE}
    answer = send(server.explorer_address, "/v1/explain", body).json
    assert answer == {
        "layer": "AvgPool2d(2, stride=3, padding=1)",
        "shape": [2, 2],
        "formulas": ["rows: floor((4 + 2*1 - 2) / 3) + 1 = 2", "columns: floor((4 + 2*1 - 2) / 3) + 1 = 2"],
        "windows": [[[-1, 0], [2, 3]], [[-1, 0], [2, 3]]],
        "unvisited": [[1], [1]],
        "values": answer["values"],
    }
    assert answer["values"][3] == "(1 + 0 + 3 + 2) / 4 = 1.5"
    by_shape = send(server.explorer_address, "/v1/explain", {"layer": body["layer"], "shape": [4, 4]}).json
    assert by_shape == {name: value for name, value in answer.items() if name != "values"}


def test_the_description_has_every_layer(server: Server) -> None:
    """Info describes the server and every layer and step; each layer can be called with the values to begin with."""
    info = send(server.explorer_address, "/v1/info").json
    assert (info["device"], info["threads"]) == (server.info.device, server.info.threads)
    assert info["addresses"] == list(server.addresses)
    assert {name: limit["value"] for name, limit in info["limits"].items()} == {
        name: limit.value for name, limit in server.info.limits.items()
    }
    assert [each["name"] for each in info["layers"]] == [*LAYERS, *STEPS]
    for layer in info["layers"]:
        if layer["operand"] and not layer["operand_optional"]:
            continue
        dims = layer["spatial_dims"] or 2
        chain = [{"name": layer["name"], **layer["example"]}]
        chain += [] if layer["spatial_dims"] else ["MaxPool2d(1)"]
        assert pool(server, chain, np.ones((1, *(8,) * dims)).tolist()).status == 200, layer
        assert layer["summary"]
        assert all(each["help"] for each in layer["parameters"]), layer


def test_the_load_of_an_idle_server(server: Server) -> None:
    """Load has the calls, the queue and the memory of this moment."""
    load = send(server.explorer_address, "/v1/load").json
    assert (load["queue"], load["calls"], load["streams"]) == ([0, 0, 0], 0, 0)
    assert load["memory_bytes"] > 2**20


def test_an_answer_has_the_time_of_its_stages(server: Server) -> None:
    """Server-Timing has receive, queue, compute and send, in milliseconds."""
    timing = pool(server, "MaxPool2d(2)", PLANE).headers["server-timing"]
    stages = dict(each.split(";dur=") for each in timing.split(", "))
    assert list(stages) == ["receive", "queue", "compute", "send"]
    assert all(float(each) >= 0 for each in stages.values())


def test_calls_are_counted_by_their_transport(server: Server) -> None:
    """The metrics have the calls by method and by transport, as they have those of gRPC."""

    def count(line: str) -> float:
        text = send(server.metrics_address, "/metrics").content.decode()
        return next(float(each.rpartition(" ")[2]) for each in text.splitlines() if each.startswith(line))

    lines = (
        'poolrpc_transport_calls_total{transport="http"}',
        'grpc_server_handled_total{grpc_code="OK",grpc_method="Pool",grpc_service="poolrpc.v1.JsonService"',
        'grpc_server_handled_total{grpc_code="InvalidArgument",grpc_method="Pool",grpc_service="poolrpc.v1.JsonService"',
    )
    pool(server, "MaxPool2d(0)", PLANE)  # so that the third line is there
    before = [count(line) for line in lines]
    pool(server, "MaxPool2d(2)", PLANE)
    pool(server, "MaxPool2d(0)", PLANE)
    assert [count(line) - old for line, old in zip(lines, before, strict=True)] == [2, 1, 1]


def test_json_is_compact_and_ends_with_a_line(server: Server) -> None:
    """An answer is one line, so that a terminal shows it well."""
    content = pool(server, "MaxPool2d(2)", PLANE).content
    assert content.endswith(b"}\n")
    assert content.count(b"\n") == 1
    assert json.loads(content)
