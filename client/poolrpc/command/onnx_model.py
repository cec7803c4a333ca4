"""The command `poolrpc pool-onnx`: the pooling nodes of a model as layers, with their shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from poolrpc._onnx.attributes import with_names_of_onnx
from poolrpc.errors import InvalidArgumentError
from poolrpc.onnx import OPERATORS, OnnxPooling, from_node

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from poolrpc.layers import Layer

Sizes: TypeAlias = tuple[int | str, ...]
"""A shape whose sizes may be names, and "?" where the model does not say one."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A pooling node of a model.

    Attributes:
        name: The name of the node, or of its output if it has none.
        op_type: The operator.
        input: The shape of the input; None if the model does not say it.
        output: The shape of the output; None if it is not known.
        pooling: The node as a layer; None if it can't be one.
        error: Why it can't.

    """

    name: str
    op_type: str
    input: Sizes | None
    output: Sizes | None
    pooling: OnnxPooling | None
    error: str = ""

    @property
    def data(self) -> dict[str, Any]:
        """The node for JSON."""
        found: dict[str, Any] = {"node": self.name, "op_type": self.op_type, "input": self.input, "output": self.output}
        if self.pooling is None:
            return found | {"error": self.error}
        layer = self.pooling.layer
        return found | {"layer": None if layer is None else repr(layer), "storage_order": self.pooling.storage_order}

    def __str__(self) -> str:
        if self.pooling is None:
            return f"{self.name}: {self.op_type} is not a layer: {self.error}"
        layer = self.pooling.layer or f"{self.op_type} with mode=max, which poolrpc.onnx computes in the client"
        return f"{self.name}: {layer}: {_text(self.input)} -> {_text(self.output)}"


def pool_onnx(options: Namespace) -> tuple[object, Sequence[str], int]:
    """List the pooling nodes of a model; the status is 1 if one of them can't be a layer."""
    listed = list(pooling_nodes(options.model))
    text = [*map(str, listed)] or ["no pooling nodes"]
    return [each.data for each in listed], text, int(any(each.pooling is None for each in listed))


def pooling_nodes(path: Path) -> Iterator[Listed]:
    """Yield the pooling nodes of a model, with those in its functions and in the bodies of its loops and branches.

    Raises:
        InvalidArgumentError: The file is not a model of ONNX, or the onnx package is not installed.
        OSError: The file can't be read.

    """
    try:
        import onnx.inliner  # noqa: PLC0415 - optional, and only this command needs it
        import onnx.shape_inference  # noqa: PLC0415 - the same
        from google.protobuf.json_format import ParseError  # noqa: PLC0415 - the same
        from google.protobuf.message import DecodeError  # noqa: PLC0415 - the same
        from google.protobuf.text_format import ParseError as TextParseError  # noqa: PLC0415 - the same
    except ImportError:
        msg = "expected onnx to be installed, for models: pip install 'poolrpc[onnx]'"
        raise InvalidArgumentError(msg, field="model") from None
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ParseError, TextParseError) as error:
        raise InvalidArgumentError(f"expected a model of ONNX, got {path}: {error}", field="model") from None
    opset = next((each.version for each in model.opset_import if each.domain in {"", "ai.onnx"}), 1)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    model = onnx.shape_inference.infer_shapes(model)
    yield from _nodes(model.graph, opset, {})


def _nodes(graph: Any, opset: int, outer: Mapping[str, Sizes]) -> Iterator[Listed]:  # noqa: ANN401 - a GraphProto
    shapes = {**outer, **{each.name: tuple(each.dims) for each in graph.initializer}}
    for each in (*graph.input, *graph.value_info, *graph.output):
        if each.type.tensor_type.HasField("shape"):
            shapes[each.name] = tuple(map(_size, each.type.tensor_type.shape.dim))
    for node in graph.node:
        if node.op_type in OPERATORS and node.domain in {"", "ai.onnx"}:
            yield _listed(node, opset, shapes)
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _nodes(body, opset, shapes)


def _listed(node: Any, opset: int, shapes: Mapping[str, Sizes]) -> Listed:  # noqa: ANN401 - a NodeProto
    name, shape, declared = node.name or node.output[0], shapes.get(node.input[0]), shapes.get(node.output[0])
    try:
        pooling = from_node(node, opset=opset, rank=len(shape) if shape else None)
        output = _output(pooling.layer or pooling.corners, shape) if shape else None
    except InvalidArgumentError as error:
        return Listed(name, node.op_type, shape, declared, None, with_names_of_onnx(error).message)
    sized = node.op_type == "MaxUnpool" and any(node.input[2:])  # by its third input
    return Listed(name, node.op_type, shape, declared if sized or output is None else output, pooling)


def _output(layer: Layer | None, shape: Sizes) -> Sizes | None:
    """Return the shape of a layer's output, by its rule; None if it needs more than the shape of the input.

    Raises:
        InvalidArgumentError: The layer does not fit the shape.

    """
    if layer is None or layer.operand == "boxes" or any(isinstance(size, str) for size in shape[2:]):
        return None
    return shape[:2] + layer.output_shape((1, 1, *map(int, shape[2:])))[2:]


def _size(dim: Any) -> int | str:  # noqa: ANN401 - a dimension of a TensorShapeProto
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    # The inference of shapes names the sizes that it does not know.
    return "?" if dim.dim_param.startswith("unk__") else str(dim.dim_param) or "?"


def _text(shape: Sizes | None) -> str:
    return "?" if shape is None else f"({', '.join(map(str, shape))})"
