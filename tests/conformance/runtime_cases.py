"""Random nodes with N and C above 1, computed by onnxruntime too: explicit pads, ceil_mode, dilations, and indices."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from poolrpc.onnx import from_node
from tests.conformance.cases import Case, assert_equal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from poolrpc import PoolClient

    Attributes = dict[str, Any]
    Arrays = list[np.ndarray[Any, Any]]

SUITE = "onnxruntime, random nodes"
CASES = 40
"""Cases of each operator."""

IR_VERSION = 10
"""A format of models that every onnxruntime of the last years reads."""

onnxruntime.set_default_logger_severity(3)  # errors: otherwise it warns of RoiAlign's max


def runtime_cases() -> Iterator[Case]:
    """Yield the cases of every operator; they are the same in every run."""
    for operator, (make, rtol) in OPERATORS.items():
        random = np.random.default_rng([*operator.encode()])
        for i in range(CASES):
            attributes, inputs, opset = make(random, i)
            text = ", ".join(f"{name}={value}" for name, value in attributes.items())
            shape = "x".join(map(str, inputs[0].shape))
            name = f"opset {opset}, {inputs[0].dtype} {shape}: {text}"
            yield Case(SUITE, operator, name, partial(_run, operator, attributes, inputs, opset, rtol))


def _run(  # noqa: PLR0913, PLR0917 - a node
    operator: str, attributes: Attributes, inputs: Arrays, opset: int, rtol: float, client: PoolClient
) -> None:
    expected = compute(operator, attributes, inputs, opset)
    node = from_node(operator, attributes, opset=opset, rank=inputs[0].ndim, indices=len(expected) > 1)
    for output, reference in zip(node.run(client, *inputs), expected, strict=True):
        assert_equal(output, reference, rtol, rtol)


def compute(operator: str, attributes: Attributes, inputs: Arrays, opset: int) -> Arrays:
    """Return the outputs of a node by onnxruntime."""
    names = [f"input_{i}" for i in range(len(inputs))]
    outputs = ["output", "indices"] if operator == "MaxPool" and opset >= 8 else ["output"]
    node = helper.make_node(operator, names, outputs, **attributes)
    kinds = [helper.np_dtype_to_tensor_dtype(each.dtype) for each in inputs]
    types = [kinds[0], TensorProto.INT64]
    graph = helper.make_graph(
        [node],
        "node",
        [
            helper.make_tensor_value_info(name, kind, each.shape)
            for name, kind, each in zip(names, kinds, inputs, strict=True)
        ],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(outputs, types, strict=False)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results: Arrays = session.run(None, dict(zip(names, inputs, strict=True)))
    return results


def _window(random: np.random.Generator, *, dilated: bool, ceil: bool) -> tuple[Attributes, tuple[int, ...]]:
    """Return the attributes of a window and the shape of an input, such that each window has a cell of the input."""
    while True:
        dims = int(random.integers(1, 4))
        kernel = random.integers(1, 5, dims)
        stride = random.integers(1, 4, dims)
        dilation = random.integers(1, 3, dims) if dilated else np.ones(dims, int)
        begin, end = random.integers(0, kernel), random.integers(0, kernel)  # onnxruntime rejects more
        sizes = random.integers(1, 8, dims)
        ceil_mode = int(ceil and random.integers(2))
        axes = zip(sizes, kernel, stride, dilation, begin, end, strict=True)
        if all(_has_cells(*map(int, axis), ceil_mode) for axis in axes):
            break
    attributes: Attributes = {
        "kernel_shape": kernel.tolist(),
        "strides": stride.tolist(),
        "pads": [*begin.tolist(), *end.tolist()],
    }
    if dilated:
        attributes["dilations"] = dilation.tolist()
    if ceil:
        attributes["ceil_mode"] = ceil_mode
    return attributes, (2, 3, *sizes.tolist())


def _has_cells(n: int, k: int, s: int, d: int, begin: int, end: int, ceil_mode: int) -> bool:  # noqa: PLR0913, PLR0917 - an axis
    room = n + begin + end - (d * (k - 1) + 1)
    if room < 0:
        return False
    windows = -(-room // s) + 1 if ceil_mode else room // s + 1
    if ceil_mode and (windows - 1) * s >= n + begin:
        windows -= 1
    return all(any(0 <= o * s - begin + d * j < n for j in range(k)) for o in range(windows))


def _max_pool(random: np.random.Generator, i: int) -> tuple[Attributes, Arrays, int]:
    opset = (8, 10, 12, 17, 21)[i % 5]
    attributes, shape = _window(random, dilated=opset >= 10, ceil=opset >= 10)
    attributes["storage_order"] = i % 2
    dtype = (np.float32, np.float64, np.uint8, np.int8)[i % 4] if opset >= 12 else np.float32
    # Few values, so that many are equal: the first of them counts.
    return attributes, [random.integers(0, 6, shape).astype(dtype)], opset


def _average_pool(random: np.random.Generator, i: int) -> tuple[Attributes, Arrays, int]:
    opset = (7, 10, 11, 17, 19, 21)[i % 6]
    attributes, shape = _window(random, dilated=opset >= 19, ceil=opset >= 10)
    attributes["count_include_pad"] = int(random.integers(2))
    return attributes, [random.standard_normal(shape, np.float32)], opset


def _lp_pool(random: np.random.Generator, i: int) -> tuple[Attributes, Arrays, int]:
    opset = (2, 11, 18, 21)[i % 4]
    attributes, shape = _window(random, dilated=opset >= 18, ceil=opset >= 18)
    attributes["p"] = 1 + i % 3
    return attributes, [random.standard_normal(shape, np.float32)], opset


def _global(random: np.random.Generator, i: int) -> tuple[Attributes, Arrays, int]:
    shape = (2, 3, *random.integers(1, 8, 1 + i % 3))
    return {}, [random.standard_normal(shape, np.float32)], (1, 11, 21)[i % 3]


def _global_lp(random: np.random.Generator, i: int) -> tuple[Attributes, Arrays, int]:
    _, inputs, _ = _global(random, i)
    return {"p": 1 + i % 4}, inputs, (2, 11, 21)[i % 3]


def _max_unpool(random: np.random.Generator, i: int) -> tuple[Attributes, Arrays, int]:
    dims = 1 + i % 3
    kernel = random.integers(1, 4, dims)
    stride = kernel + random.integers(0, 2, dims)  # windows do not overlap, so that maxima are distinct cells
    sizes = (random.integers(1, 5, dims) - 1) * stride + kernel
    if i % 2:  # cells that are in no window: the third input has the shape of what was pooled
        sizes += random.integers(0, stride)
    attributes = {"kernel_shape": kernel.tolist(), "strides": stride.tolist()}
    shape = (2, 3, *sizes.tolist())
    x = random.permutation(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)
    inputs = compute("MaxPool", attributes, [x], 11)
    return attributes, [*inputs, np.array(shape)] if i % 2 else inputs, (9, 11)[i // 2 % 2]


def _max_roi_pool(random: np.random.Generator, i: int) -> tuple[Attributes, Arrays, int]:
    x = random.standard_normal((2, 3, *random.integers(4, 12, 2)), np.float32)
    scale = (1.0, 0.5)[i % 2]
    boxes = _boxes(random, x.shape, scale)
    rois = np.column_stack([random.integers(0, 2, len(boxes)), boxes]).astype(np.float32)
    return {"pooled_shape": random.integers(1, 4, 2).tolist(), "spatial_scale": scale}, [x, rois], 11


def _roi_align(random: np.random.Generator, i: int) -> tuple[Attributes, Arrays, int]:
    x = random.standard_normal((2, 3, *random.integers(4, 12, 2)), np.float32)
    scale = (1.0, 0.5)[i % 2]
    boxes = _boxes(random, x.shape, scale)
    height, width = map(int, random.integers(1, 4, 2))
    attributes: Attributes = {
        "output_height": height,
        "output_width": width,
        "spatial_scale": scale,
        "sampling_ratio": int(random.integers(0, 4)),
        "mode": ("avg", "max")[i // 2 % 2],
    }
    opset = (10, 16)[i // 4 % 2]
    if opset >= 16:
        attributes["coordinate_transformation_mode"] = ("half_pixel", "output_half_pixel")[i // 8 % 2]
    return attributes, [x, boxes, random.integers(0, 2, len(boxes))], opset


def _boxes(random: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray[Any, Any]:
    """Return boxes in the image and beyond its borders."""
    height, width = (size / scale for size in shape[2:])
    corners = random.uniform(-2, 2, (5, 2, 2)) + random.uniform(0, 1, (5, 2, 2)) * (width, height)
    return np.sort(corners, 1).reshape(5, 4).astype(np.float32)


OPERATORS: dict[str, tuple[Callable[[np.random.Generator, int], tuple[Attributes, Arrays, int]], float]] = {
    "MaxPool": (_max_pool, 0.0),
    "AveragePool": (_average_pool, 1e-5),
    "LpPool": (_lp_pool, 1e-4),
    "GlobalMaxPool": (_global, 0.0),
    "GlobalAveragePool": (_global, 1e-5),
    "GlobalLpPool": (_global_lp, 1e-4),
    "MaxUnpool": (_max_unpool, 0.0),
    "MaxRoiPool": (_max_roi_pool, 0.0),
    "RoiAlign": (_roi_align, 1e-4),
}
"""How a case of each operator is made, and the relative and absolute difference that is allowed; 0.0: none."""
