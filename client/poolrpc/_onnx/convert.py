"""The layers of ONNX's pooling nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from poolrpc._shapes.limits import MAX_RANK
from poolrpc._shapes.parameters import integer
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers import LAYERS, Layer, Norm, RoIAlign, RoIPool

if TYPE_CHECKING:
    from poolrpc._onnx.attributes import Attributes

AUTO_PADS = {"NOTSET": None, "SAME_UPPER": "same", "SAME_LOWER": "same_lower", "VALID": "valid"}
"""The padding of each auto_pad; None is that of the attribute pads."""

HALF_PIXEL_OPSET = 16
"""The operator set that gave RoiAlign a shift by half a cell, and made it the default."""


def layer_of(op_type: str, values: Attributes, rank: int | None, *, indices: bool) -> Layer:
    """Return the layer of a node; for a RoiAlign of either mode, the one of the mean.

    Args:
        op_type: The operator, one of ATTRIBUTES.
        values: Its attributes.
        rank: Number of axes of the input; needed for operators without kernel_shape.
        indices: Whether the indices of a MaxPool are wanted.

    Raises:
        InvalidArgumentError: An attribute is missing, or no layer has its value.

    """
    if op_type == "RoiAlign":
        return _roi_align(values)
    if op_type == "MaxRoiPool":
        return RoIPool(values.integers("pooled_shape", 2, 1), values.number("spatial_scale", 1.0))
    if op_type.startswith("Global"):
        return _global(op_type, values, rank)
    return _windows(op_type, values, indices=indices)


def _layer(name: str, **parameters: Any) -> Layer:  # noqa: ANN401 - those of any layer
    return LAYERS[name](**parameters)


def _global(op_type: str, values: Attributes, rank: int | None) -> Layer:
    if rank is None:
        raise InvalidArgumentError(f"expected the number of axes of the input for {op_type}, got none", field="rank")
    dims = integer("rank", rank, 3, MAX_RANK) - 2
    reduce = {"GlobalMaxPool": "max", "GlobalAveragePool": "mean"}.get(op_type) or Norm(values.number("p", 2))
    return _layer(f"GlobalPool{dims}d", reduce=reduce)


def _windows(op_type: str, values: Attributes, *, indices: bool) -> Layer:
    dims = len(values.items("kernel_shape"))
    if not 1 <= dims <= MAX_RANK - 2:
        raise InvalidArgumentError(f"expected 1 to {MAX_RANK - 2} sizes, got {dims}", field="kernel_shape")
    kernel_size = values.integers("kernel_shape", dims, 1)
    stride = values.integers("strides", dims, 1, default=1)
    if op_type == "MaxUnpool":
        return _max_unpool(values, kernel_size, stride)
    dilations = zip(values.integers("dilations", dims, 1, default=1), kernel_size, strict=True)
    window: dict[str, Any] = {
        "kernel_size": kernel_size,
        "stride": stride,
        "dilation": tuple(1 if kernel == 1 else gap for gap, kernel in dilations),  # a single cell has no gaps
        **_padding(values, dims),
    }
    if op_type == "MaxPool":
        return _layer(f"MaxPool{dims}d", **window, return_indices=indices)
    if op_type == "LpPool":
        return _layer(f"Pool{dims}d", reduce=Norm(values.number("p", 2)), **window)
    window["count_include_pad"] = values.flag("count_include_pad")
    # As in torch, AvgPool3d has no half precision, and its kernel must fit the input without padding.
    if set(window["dilation"]) != {1} or dims == 3:  # noqa: PLR2004 - the 3d layer
        return _layer(f"Pool{dims}d", reduce="mean", **window)
    del window["dilation"]
    return _layer(f"AvgPool{dims}d", **window)


def _padding(values: Attributes, dims: int) -> dict[str, Any]:
    """Return the parameters padding and ceil_mode."""
    padding = AUTO_PADS[values.text("auto_pad", "NOTSET", tuple(AUTO_PADS))]
    pads = values.integers("pads", 2 * dims, 0, default=0)
    ceil_mode = values.flag("ceil_mode")
    if padding is None:
        return {"padding": tuple(zip(pads[:dims], pads[dims:], strict=True)), "ceil_mode": ceil_mode}
    if any(pads):
        raise InvalidArgumentError(f"expected no pads together with auto_pad, got {pads}", field="pads")
    # By the formulas of the operators, ceil_mode changes no shape that auto_pad says.
    return {"padding": padding}


def _max_unpool(values: Attributes, kernel_size: tuple[int, ...], stride: tuple[int, ...]) -> Layer:
    dims = len(kernel_size)
    pads = values.integers("pads", 2 * dims, 0, default=0)
    sums = [begin + end for begin, end in zip(pads[:dims], pads[dims:], strict=True)]
    # A MaxUnpool has no pairs. Its kernel and its padding say nothing but the size of the output, (L - 1)*stride -
    # 2*padding + kernel; so an odd sum of pads is the next even one, with a kernel that has one cell more.
    kernel = tuple(k + pads % 2 for k, pads in zip(kernel_size, sums, strict=True))
    padding = tuple((pads + 1) // 2 for pads in sums)
    return _layer(f"MaxUnpool{dims}d", kernel_size=kernel, stride=stride, padding=padding)


def _roi_align(values: Attributes) -> RoIAlign:
    default = "half_pixel" if values.opset >= HALF_PIXEL_OPSET else "output_half_pixel"
    return RoIAlign(
        (values.integer("output_height", 1, 1), values.integer("output_width", 1, 1)),
        values.number("spatial_scale", 1.0),
        values.integer("sampling_ratio", 0, 0),
        aligned=values.text("coordinate_transformation_mode", default, ("half_pixel", "output_half_pixel"))
        == "half_pixel",
    )
