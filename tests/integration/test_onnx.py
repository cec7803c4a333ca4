"""poolrpc.onnx on a server: inputs and outputs as ONNX has them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from poolrpc import AsyncPoolClient, InvalidArgumentError
from poolrpc.onnx import from_node

if TYPE_CHECKING:
    from poolrpc import PoolClient

WINDOW = {"kernel_shape": [2, 2], "strides": [2, 2]}
X = np.random.default_rng(3).permutation(2 * 3 * 4 * 6).astype(np.float32).reshape(2, 3, 4, 6)
IMAGE = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8)
BOX = np.array([[1.2, 1.7, 5.1, 6.3]], np.float32)


def test_indices_count_in_the_whole_tensor(client: PoolClient) -> None:
    """The index of a maximum is its offset in the flattened tensor."""
    output, indices = from_node("MaxPool", WINDOW, indices=True).run(client, X)
    np.testing.assert_array_equal(X.ravel()[indices], output)
    np.testing.assert_array_equal(output, X.reshape(2, 3, 2, 2, 3, 2).max((3, 5)))


def test_column_major_indices_keep_n_and_c(client: PoolClient) -> None:
    """With storage_order=1, the spatial axes count from the first to the last, in planes that are in order."""
    output, indices = from_node("MaxPool", {**WINDOW, "storage_order": 1}, indices=True).run(client, X)
    np.testing.assert_array_equal(X.swapaxes(2, 3).ravel()[indices], output)


def test_column_major_indices_of_three_axes(client: PoolClient) -> None:
    """The rule is the same for 3d windows."""
    x = np.random.default_rng(4).permutation(2 * 2 * 3 * 4 * 5).astype(np.float32).reshape(2, 2, 3, 4, 5)
    node = from_node("MaxPool", {"kernel_shape": [2, 2, 2], "storage_order": 1}, indices=True)
    output, indices = node.run(client, x)
    np.testing.assert_array_equal(x.transpose(0, 1, 4, 3, 2).ravel()[indices], output)


def test_a_window_of_padding_alone_has_the_index_minus_one(client: PoolClient) -> None:
    """A dilation can skip every cell; the index is then onnxruntime's, not one of the next plane."""
    attributes = {"kernel_shape": [2], "dilations": [2], "pads": [1, 1]}
    _, indices = from_node("MaxPool", attributes, indices=True).run(client, np.ones((1, 3, 1), np.float32))
    assert indices.tolist() == [[[-1], [-1], [-1]]]


def test_unpooling_inverts_pooling(client: PoolClient) -> None:
    """MaxUnpool takes the indices of MaxPool, also with the shape of the output as its third input."""
    output, indices = from_node("MaxPool", WINDOW, indices=True).run(client, X)
    expected = np.zeros_like(X)
    expected.ravel()[indices] = output
    unpool = from_node("MaxUnpool", WINDOW)
    for shape in (None, np.array(X.shape)):
        np.testing.assert_array_equal(*unpool.run(client, output, indices, shape), expected)
    # In torch and onnxruntime, the indices of a larger output count in that one.
    ones = np.ones((1, 2, 1, 1), np.float32)
    (larger,) = unpool.run(client, ones, np.array([8, 9 + 4]).reshape(ones.shape), [1, 2, 3, 3])
    assert larger.tolist() == [[[[0, 0, 0], [0, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 1, 0], [0, 0, 0]]]]


def test_regions_have_their_numbers_in_a_second_input(client: PoolClient) -> None:
    """RoiAlign's batch_indices become the first column of the boxes, which MaxRoiPool has itself."""
    attributes = {"output_height": 2, "output_width": 2, "sampling_ratio": 2}
    batch = np.concatenate([np.zeros_like(IMAGE), IMAGE])
    (aligned,) = from_node("RoiAlign", attributes).run(client, batch, BOX, np.array([1]))
    np.testing.assert_allclose(aligned.ravel(), [20.475, 22.425, 38.875, 40.825], rtol=1e-6)
    (shifted,) = from_node("RoiAlign", attributes, opset=10).run(client, batch, BOX, np.array([1]))
    np.testing.assert_allclose(shifted.ravel(), [24.975, 26.925, 43.375, 45.325], rtol=1e-6)
    rois = np.array([[1, 1, 1, 4, 4], [1, 6, 6, 9, 9]], np.float32)
    (pooled,) = from_node("MaxRoiPool", {"pooled_shape": [2, 2]}).run(client, batch, rois)
    assert pooled.reshape(2, 4).tolist() == [[18, 20, 34, 36], [63, 0, 0, 0]]


def test_the_largest_of_weighted_corners(client: PoolClient) -> None:
    """RoiAlign with mode="max" takes the largest product of a corner and its weight, and 0 if there is no sample."""
    node = from_node("RoiAlign", {"output_height": 2, "output_width": 2, "sampling_ratio": 2, "mode": "max"})
    (output,) = node.run(client, IMAGE, BOX, np.array([0]))
    assert output.dtype == np.float32
    np.testing.assert_allclose(output.ravel(), [20.1419, 22.9863, 27.2606, 30.2638], rtol=1e-5)
    without_samples = from_node("RoiAlign", {"output_height": 2, "output_width": 2, "mode": "max"})
    (output,) = without_samples.run(client, IMAGE, np.array([[4, 4, 4, 4]], np.float32), np.array([0]))
    assert output.tolist() == [[[[0, 0], [0, 0]]]]


@pytest.mark.parametrize("attributes", [{}, {"mode": "max"}], ids=["avg", "max"])
def test_boxes_are_checked(client: PoolClient, attributes: dict[str, Any]) -> None:
    """A number of an image beyond the batch is rejected, and so are boxes that are not finite."""
    with pytest.raises(InvalidArgumentError, match="finite"):
        from_node("RoiAlign", attributes).run(client, IMAGE, BOX * np.inf, np.array([0]))
    with pytest.raises(InvalidArgumentError, match=r"expected .*0.*, got .*1"):
        from_node("RoiAlign", attributes).run(client, IMAGE, BOX, np.array([1]))


@pytest.mark.parametrize(
    ("op_type", "inputs", "field", "message"),
    [
        ("MaxPool", [X[0]], "inputs[0]", r"expected a batched input with 4 axes, got shape \(3, 4, 6\)"),
        ("MaxPool", [X, X], "inputs", "expected 1 inputs of MaxPool, got an array, an array"),
        ("MaxUnpool", [X], "inputs", "expected 2 to 3 inputs of MaxUnpool, got an array"),
        ("MaxUnpool", [X, None, [2, 3, 8, 12]], "inputs", "MaxUnpool, got an array, None, an array"),
        ("MaxUnpool", [X, np.zeros((2, 3, 4), int)], "indices", r"expected 4 axes, the first of them \(2, 3\)"),
        ("MaxUnpool", [X, np.zeros(X.shape, int)], "indices", r"expected offsets of plane \(0, 1\), 96 to 191, got 0"),
        ("MaxUnpool", [X, np.zeros(X.shape, int), [2, 2, 8, 12]], "output_shape", r"got \(2, 2, 8, 12\)"),
        ("MaxUnpool", [X, np.zeros(X.shape, int), [2, 3, 8, 99]], "output_shape", r"expected less than a stride of 2"),
        ("RoiAlign", [IMAGE, BOX], "inputs", "expected 3 inputs of RoiAlign, got an array, an array"),
        ("RoiAlign", [IMAGE, BOX[0], [0]], "rois", r"expected shape \(boxes, 4\), got \(4,\)"),
        ("RoiAlign", [IMAGE, BOX, [0, 0]], "batch_indices", r"expected shape \(1,\), got \(2,\)"),
        ("MaxRoiPool", [IMAGE, BOX], "rois", r"expected shape \(boxes, 5\), got \(1, 4\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inputs_that_do_not_fit_are_rejected(
    client: PoolClient, op_type: str, inputs: list[Any], field: str, message: str
) -> None:
    """An error names the input as ONNX does, before anything is sent."""
    attributes = {"RoiAlign": {}, "MaxRoiPool": {"pooled_shape": [1, 1]}}.get(op_type, WINDOW)
    with pytest.raises(InvalidArgumentError, match=message) as raised:
        from_node(op_type, attributes).run(client, *inputs)
    assert raised.value.violations[0].field == field


def test_a_node_on_an_asyncio_client(address: str) -> None:
    """`arguments` and `outputs` are what `run` is made of, for a client whose calls are awaited."""
    node = from_node("MaxPool", WINDOW, indices=True)

    async def run() -> tuple[Any, ...]:
        async with AsyncPoolClient(address) as client:
            return node.outputs(await client.pool(**node.arguments(X)), X.shape)

    output, indices = asyncio.run(run())
    np.testing.assert_array_equal(X.ravel()[indices], output)
