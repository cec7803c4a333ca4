"""Prepared requests, and the tensors of a call."""

import re

import numpy as np
import pytest
import torch

from poolrpc import AvgPool2d, InvalidArgumentError, MaxPool2d, MaxUnpool2d
from poolrpc._transport.request import PreparedRequest, Transfer
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from tests.unit.client.transport.peer import assert_same, call_stream, call_unary, make_transfer

X = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
BRANCHES = (MaxPool2d(2, return_indices=True), (AvgPool2d(2), MaxPool2d(2)))


def test_several_arrays_may_be_one_tensor(peer):
    """The arrays of a transfer may be several, whose concatenated bytes are the tensor."""
    prepared = PreparedRequest(Request(TensorSpec("float32", X.shape), ((MaxPool2d(2),),)))
    assert_same(call_unary(peer, Transfer(prepared, [X[0], X[1]])), call_unary(peer, make_transfer(X, MaxPool2d(2))))


@pytest.mark.parametrize("call", [call_unary, call_stream], ids=["unary", "stream"])
def test_outputs_are_written_to_the_arrays_of_out(peer, call):
    """An array of `out` is filled and returned; None in its place gives a new array."""
    out = [np.zeros((2, 3, 4, 4), np.float32), None, np.zeros((2, 3, 2, 2), np.float32)]
    results = call(peer, make_transfer(X, *BRANCHES, out=out))
    assert results[0].output is out[0]
    assert results[1].output is out[2]
    assert_same(results, call_unary(peer, make_transfer(X, *BRANCHES)))


def overlapping(folder):
    """Return pairs of an input and an output that share memory, or a part of a file."""
    buffer = np.ones(200, np.float32)
    path = folder / "numbers"
    path.write_bytes(bytes(800))
    link = folder / "link"
    link.symlink_to(path)

    def mapped(start, shape, file=path):
        return np.memmap(file, np.float32, "r+", 4 * start, shape)

    x, y = (1, 1, 8, 8), (1, 1, 4, 4)
    return {
        "begins before": (buffer[10:74].reshape(x), buffer[:16].reshape(y)),
        "ends after": (buffer[:64].reshape(x), buffer[63:79].reshape(y)),
        "within": (buffer[:64].reshape(x), buffer[20:36].reshape(y)),
        "file": (mapped(0, x), mapped(63, y)),
        "file as text": (mapped(0, x, str(path)), mapped(63, y)),
        "file by another name": (mapped(0, x), mapped(63, y, link)),
        "views of a file": (np.asarray(mapped(0, (100,)))[36:].reshape(x), mapped(80, (2, 1, 4, 4))[1:]),
    }


@pytest.mark.parametrize(
    "case",
    ["begins before", "ends after", "within", "file", "file as text", "file by another name", "views of a file"],
)
def test_an_output_that_shares_memory_with_an_input_is_rejected(tmp_path, case):
    """It would overwrite the input while that is sent."""
    x, y = overlapping(tmp_path)[case]
    with pytest.raises(InvalidArgumentError, match=r"^out: expected memory apart from the input, got float32"):
        make_transfer(x, MaxPool2d(2), out=[y])


def test_an_output_next_to_an_input_is_filled(peer, tmp_path):
    """Neither adjacent memory nor an adjacent part of a file is a reason to reject it."""
    buffer, path = np.arange(80, dtype=np.float32), tmp_path / "numbers"
    buffer.tofile(path)
    for before, after in (
        (buffer[:64], buffer[64:]),
        (np.memmap(path, np.float32, "r+", 0, (64,)), np.memmap(path, np.float32, "r+", 256, (16,))),
    ):
        x, y = before.reshape(1, 1, 8, 8), after.reshape(1, 1, 4, 4)
        call_stream(peer, make_transfer(x, MaxPool2d(2), out=[y]))
        assert np.array_equal(y.ravel(), [9, 11, 13, 15, 25, 27, 29, 31, 41, 43, 45, 47, 57, 59, 61, 63])


def test_outputs_that_share_memory_are_rejected():
    """Each would overwrite the other: the outputs of two branches, or an output and indices."""
    y = np.empty((2, 3, 4, 4), np.float32)
    with pytest.raises(InvalidArgumentError, match=r"^out: expected memory apart from the other arrays of out"):
        make_transfer(X, MaxPool2d(2), AvgPool2d(2), out=[y, y])


def test_an_output_that_shares_memory_with_indices_is_rejected():
    """Indices are an input as well."""
    buffer = np.zeros(40, np.int64)
    indices, output = buffer[:16].reshape(1, 1, 4, 4), buffer[8:].view(np.float32).reshape(1, 1, 8, 8)
    with pytest.raises(InvalidArgumentError, match=r"^out: expected memory apart from the input"):
        make_transfer(np.ones((1, 1, 4, 4), np.float32), MaxUnpool2d(2), indices=indices, out=[output])


def read_only():
    """Return an array of the output's shape and dtype that is not writable."""
    array = np.zeros((2, 3, 4, 4), np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("array", "received"),
    [
        (np.zeros((2, 3, 4, 5), np.float32), "float32 (2, 3, 4, 5)"),
        (np.zeros((2, 3, 16), np.float32), "float32 (2, 3, 16)"),
        (np.zeros((2, 3, 4, 4)), "float64 (2, 3, 4, 4)"),
        (np.zeros((2, 3, 4, 4), ">f4"), ">f4 (2, 3, 4, 4)"),
        (np.zeros((2, 3, 4, 8), np.float32)[..., ::2], "float32 (2, 3, 4, 4), strided"),
        (np.zeros((2, 3, 4, 4), np.float32).transpose(0, 1, 3, 2), "float32 (2, 3, 4, 4), strided"),
        (read_only(), "float32 (2, 3, 4, 4), read-only"),
        ([[1.0]], "'list'"),
        (torch.zeros(2, 3, 4, 4), "'Tensor'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_array_that_does_not_fit_is_rejected_before_anything_is_sent(array, received):
    """The error says which array was expected and which one was received."""
    expected = "out: expected a writable, C-contiguous array of float32 (2, 3, 4, 4), got "
    with pytest.raises(InvalidArgumentError, match=f"^{re.escape(expected + received)}$") as raised:
        make_transfer(X, MaxPool2d(2), out=[array])
    assert [each.field for each in raised.value.violations] == ["out"]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_out_has_an_array_for_each_output_tensor(count):
    """Fewer or more arrays than the outputs and indices of all branches are rejected."""
    with pytest.raises(InvalidArgumentError, match=rf"^out: expected 3 arrays, .*, got {count}$"):
        make_transfer(X, *BRANCHES, out=[None] * count)
