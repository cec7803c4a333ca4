"""ONNX's backend tests of pooling operators, from the onnx package: single nodes, and models that PyTorch exported."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

from poolrpc.onnx import OPERATORS, from_node
from tests.conformance.cases import Case, assert_equal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from poolrpc import PoolClient

SUITES = {
    "node": "ONNX, nodes",
    "pytorch-converted": "ONNX, models from PyTorch",
    "pytorch-operator": "ONNX, models from PyTorch",
}
"""The name of the suite of each kind of cases."""

SKIPPED = {
    "test_maxunpool_export_with_output_shape": (
        "reads the indices in the default output shape and puts that in a corner of output_shape; torch and "
        "onnxruntime read them in output_shape, and onnxruntime leaves this case out as invalid (onnx issue 2398)"
    )
}
"""Why a case is skipped, by its name."""


def onnx_cases() -> Iterator[Case]:
    """Yield every case with a pooling node."""
    for kind, suite in SUITES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy, while the loader computes the cases of other operators
            cases = load_model_tests(kind=kind)
        for case in sorted(cases, key=lambda case: case.name):
            model = case.model or onnx.load(Path(case.model_dir) / "model.onnx")
            operators = [node.op_type for node in model.graph.node if node.op_type in OPERATORS]
            if operators:
                yield Case(suite, operators[0], case.name, partial(_run, model, case), SKIPPED.get(case.name, ""))


def _run(model: onnx.ModelProto, case: Any, client: PoolClient) -> None:
    data_sets = case.data_sets or [
        (_tensors(folder, "input"), _tensors(folder, "output"))
        for folder in Path(case.model_dir).glob("test_data_set_*")
    ]
    assert data_sets
    for inputs, outputs in data_sets:
        values = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
        values |= {each.name: value for each, value in zip(model.graph.input, inputs, strict=True)}
        evaluate(model, values, client)
        for each, expected in zip(model.graph.output, outputs, strict=True):
            assert_equal(values[each.name], expected, case.rtol, case.atol)


def _tensors(folder: Path, kind: str) -> list[np.ndarray[Any, Any]]:
    paths = [folder / f"{kind}_{i}.pb" for i in range(len(list(folder.glob(f"{kind}_*.pb"))))]
    return [numpy_helper.to_array(onnx.load_tensor(path)) for path in paths]


AXES = {"Squeeze": np.squeeze, "Unsqueeze": np.expand_dims}
"""What the models have besides pooling nodes, with the function of the axes."""


def evaluate(model: onnx.ModelProto, values: dict[str, np.ndarray[Any, Any]], client: PoolClient) -> None:
    """Add the value of every node of a model; those of the pooling nodes are from a server."""
    opset = next(each.version for each in model.opset_import if each.domain == "")
    for node in model.graph.node:
        inputs = [values[name] if name else None for name in node.input]
        if node.op_type in OPERATORS:
            outputs = from_node(node, opset=opset, rank=inputs[0].ndim).run(client, *inputs)
        else:
            (axes,) = (tuple(each.ints) for each in node.attribute)
            outputs = (AXES[node.op_type](inputs[0], axes),)
        values |= dict(zip(node.output, outputs, strict=True))
