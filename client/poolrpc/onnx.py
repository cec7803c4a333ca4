"""ONNX's pooling nodes as layers, and their indices as ONNX counts them. It does not need the onnx package.

The operators are MaxPool, AveragePool, LpPool, GlobalMaxPool, GlobalAveragePool, GlobalLpPool, MaxUnpool, MaxRoiPool
and RoiAlign, with the attributes and defaults of the operator set in which a model has them.

Examples:
    >>> from poolrpc.onnx import from_node
    >>> from_node("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}).layer
    MaxPool2d(3, stride=2, padding=((0, 1), (0, 1)))
    >>> from_node("AveragePool", {"kernel_shape": [2, 2]}).layer
    AvgPool2d(2, stride=1, count_include_pad=False)
    >>> from_node("LpPool", {"kernel_shape": [3], "auto_pad": "SAME_UPPER"}, opset=11).layer
    Pool1d(Norm(2.0), 3, stride=1, padding='same')

"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc._onnx.attributes import ATTRIBUTES, NEWEST_OPSET, Attributes, attributes_of, with_names_of_onnx
from poolrpc._onnx.convert import layer_of
from poolrpc._onnx.corners import max_of_corners
from poolrpc._onnx.indices import in_planes, in_tensor
from poolrpc._shapes.parameters import integer
from poolrpc._shapes.rules import clip
from poolrpc.errors import InvalidArgumentError, UnsupportedError
from poolrpc.layers import RoIAlign
from poolrpc.tensors import Array, as_array

if TYPE_CHECKING:
    from collections.abc import Mapping

    from poolrpc._transport.result import PoolResult
    from poolrpc.client import PoolClient
    from poolrpc.layers import Layer

__all__ = ["OPERATORS", "OnnxPooling", "from_node"]

OPERATORS = tuple(ATTRIBUTES)
"""The operators that `from_node` takes."""

_INPUT_COUNTS = {"MaxUnpool": (2, 3), "MaxRoiPool": (2, 2), "RoiAlign": (3, 3)}
"""The least and the largest number of inputs of the operators that have several."""


@dataclass(frozen=True, slots=True)
class OnnxPooling:
    """A pooling node of ONNX as a layer.

    Attributes:
        op_type: The operator, such as "MaxPool".
        layer: The layer that computes it on a server. None for a RoiAlign with mode="max", which `run` computes in this
            process.
        storage_order: How a MaxPool counts its indices in a plane: 0 for row-major, 1 for column-major.
        corners: The parameters of a RoiAlign with mode="max"; otherwise None.

    Examples:
        >>> import numpy as np
        >>> import poolrpc_server
        >>> from poolrpc.onnx import from_node
        >>> node = from_node("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}, indices=True)
        >>> x = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4)
        >>> with poolrpc_server.embedded() as client:
        ...     output, indices = node.run(client, x)
        >>> indices.tolist()  # in the whole tensor, where torch counts in each plane
        [[[[5, 7], [13, 15]], [[21, 23], [29, 31]]]]

    """

    op_type: str
    layer: Layer | None
    storage_order: int = 0
    corners: RoIAlign | None = None

    def run(self, client: PoolClient, *inputs: object) -> tuple[Array, ...]:
        """Compute the node on a server.

        Args:
            client: The client.
            inputs: The inputs of the node, in ONNX's order: arrays, or what PoolClient.pool takes. An input that is
                left out is None.

        Returns:
            The outputs of the node. The indices of a MaxPool are its second output.

        Raises:
            InvalidArgumentError: An input is missing, or does not fit the node.
            PoolError: As in PoolClient.pool.

        """
        x, *others = self._arrays(inputs)
        if self.corners is not None:
            boxes = _boxes(others)
            if not np.isfinite(boxes).all():
                raise InvalidArgumentError("expected finite numbers, got infinity or NaN", field="rois")
            numbers = boxes[:, 0]
            if numbers.size and not (numbers.min() >= 0 and numbers.max() < len(x)):
                msg = f"expected numbers from 0 to {len(x) - 1}, got {numbers.min():g} to {numbers.max():g}"
                raise InvalidArgumentError(msg, field="batch_indices")
            return (max_of_corners(x, boxes, self.corners),)
        return self.outputs(client.pool(**self.arguments(x, *others)), x.shape)

    def arguments(self, *inputs: object) -> dict[str, Any]:
        """Return the arguments of PoolClient.pool, or AsyncPoolClient.pool, that compute the node.

        Args:
            inputs: The inputs of the node, in ONNX's order.

        Raises:
            InvalidArgumentError: An input is missing, or does not fit the node.
            UnsupportedError: The node has no layer.

        """
        if self.layer is None:
            raise UnsupportedError('RoiAlign with mode="max" is computed by run, in this process, not by a server')
        x, *others = self._arrays(inputs)
        if self.op_type == "MaxUnpool":
            layer = self.layer if len(others) == 1 else _resized(self.layer, x.shape, others[1])
            return {"x": x, "layers": layer, "indices": in_planes(others[0], layer.output_shape(x.shape))}
        if self.layer.operand == "boxes":
            return {"x": x, "layers": self.layer, "boxes": _boxes(others)}
        return {"x": x, "layers": self.layer}

    def outputs(self, result: PoolResult, shape: tuple[int, ...]) -> tuple[Array, ...]:
        """Return the outputs of the node.

        Args:
            result: The result of the call.
            shape: The shape of the input, (N, C, spatial...).

        """
        if result.indices is None:
            return (result.output,)
        return result.output, in_tensor(result.indices, shape, self.storage_order)

    def _arrays(self, inputs: tuple[object, ...]) -> list[Array]:
        """Return the inputs as arrays, without those at the end that are None."""
        least, most = _INPUT_COUNTS.get(self.op_type, (1, 1))
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        if not least <= len(inputs) <= most or any(each is None for each in inputs):
            count = least if least == most else f"{least} to {most}"
            got = ", ".join("None" if each is None else "an array" for each in inputs) or "none"
            raise InvalidArgumentError(f"expected {count} inputs of {self.op_type}, got {got}", field="inputs")
        arrays = [as_array(each, "NCHW") for each in inputs]
        rank = 4 if self.layer is None else self.layer.spatial_dims + 2
        if arrays[0].ndim != rank:
            msg = f"expected a batched input with {rank} axes, got shape {arrays[0].shape}"
            raise InvalidArgumentError(msg, field="inputs[0]")
        return arrays


def from_node(
    node: object,
    attributes: Mapping[str, Any] | None = None,
    *,
    opset: int = NEWEST_OPSET,
    rank: int | None = None,
    indices: bool | None = None,
) -> OnnxPooling:
    """Return a pooling node of ONNX as a layer.

    These rules differ from torch's: strides are 1 by default, the mean does not count the padding by default, LpPool is
    the norm of absolute values, and indices count in the whole tensor. With auto_pad, ceil_mode has no effect, as the
    formulas of the operators say. Values are those of the layers: NaN is the maximum of a window that has one.

    Args:
        node: A NodeProto, or an object with its fields op_type, domain, attribute and output; or the name of an
            operator.
        attributes: The attributes by name, if `node` is a name. Lists may be tuples or arrays. Default: none.
        opset: The version of the operator set ai.onnx in the model. Default: 22, which is the last one that changed a
            pooling operator; later ones are read as 22.
        rank: Number of axes of the input, with N and C, 3 to 5. It is required for operators without a kernel_shape.
        indices: Whether the second output of a MaxPool is wanted. Default: None, which is whether the NodeProto has it.

    Raises:
        InvalidArgumentError: The operator is not one of OPERATORS, the operator set lacks it or one of the attributes,
            or an attribute or its value is something that no layer has.

    """
    if not isinstance(node, str):
        if attributes is not None:
            raise InvalidArgumentError("expected no attributes with a node, which has its own", field="attributes")
        op_type = _op_type(node)
        attributes = attributes_of(node)
        wanted = len(node.output) > 1 and bool(node.output[1]) if indices is None else indices  # type: ignore[attr-defined]  # checked by _op_type
    else:
        op_type, wanted = node, bool(indices)
    if op_type not in ATTRIBUTES:
        raise InvalidArgumentError(f"expected one of {', '.join(OPERATORS)}, got {clip(op_type)}", field="op_type")
    opset = integer("opset", opset, 1, 2**31 - 1)
    values = Attributes(op_type, attributes or {}, opset)
    try:
        layer = layer_of(op_type, values, rank, indices=wanted)
    except InvalidArgumentError as error:
        raise with_names_of_onnx(error) from None
    if isinstance(layer, RoIAlign) and values.text("mode", "avg", ("avg", "max")) == "max":
        return OnnxPooling(op_type, None, corners=layer)
    return OnnxPooling(op_type, layer, values.integer("storage_order", 0, 0, 1))


def _op_type(node: Any) -> str:  # noqa: ANN401 - anything with the fields of a NodeProto
    lacking = [name for name in ("op_type", "domain", "attribute", "output") if not hasattr(node, name)]
    if lacking:
        raise InvalidArgumentError(f"expected a NodeProto or the name of an operator, got {clip(node)}", field="node")
    if node.domain not in {"", "ai.onnx"}:
        raise InvalidArgumentError(f"expected ai.onnx, got {clip(node.domain)}", field="domain")
    return str(node.op_type)


def _boxes(inputs: list[Array]) -> Array:
    """Return the boxes of a MaxRoiPool, or those of a RoiAlign with their numbers of tensors, as (K, 5)."""
    rois = inputs[0]
    columns = 5 if len(inputs) == 1 else 4
    if rois.shape != (*rois.shape[:1], columns):
        raise InvalidArgumentError(f"expected shape (boxes, {columns}), got {rois.shape}", field="rois")
    if len(inputs) == 1:
        return rois
    numbers = inputs[1]
    if numbers.shape != rois.shape[:1]:
        raise InvalidArgumentError(f"expected shape {rois.shape[:1]}, got {numbers.shape}", field="batch_indices")
    # At least float32, in which the number of any image of a batch is exact, as in float16 it is not.
    return np.column_stack([numbers, rois]).astype(np.result_type(rois.dtype, np.float32))


def _resized(layer: Layer, shape: tuple[int, ...], output_shape: Array) -> Layer:
    """Return a MaxUnpool with the size of the output that the node's third input says."""
    sizes = tuple(output_shape.ravel().tolist())
    if len(sizes) != len(shape) or sizes[:2] != shape[:2]:
        msg = f"expected {(*shape[:2], '...')} with {len(shape)} sizes, got {clip(sizes)}"
        raise InvalidArgumentError(msg, field="output_shape")
    try:
        resized = replace(layer, output_size=sizes[2:])  # type: ignore[type-var]  # a MaxUnpool, which is a dataclass
        resized.output_shape(shape)
    except InvalidArgumentError as error:
        raise with_names_of_onnx(error) from None
    return resized
