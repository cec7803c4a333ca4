"""Prepared requests, and the tensors of a call."""

import re

import numpy as np
import pytest
import torch

from poolrpc import AvgPool2d, InvalidArgumentError, MaxPool2d
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


def test_a_transfer_is_repeatable_unless_an_output_overlaps_an_input():
    """Only an output array that may share memory with an input prevents another attempt."""
    x = X.copy()
    layer = MaxPool2d(1)
    assert make_transfer(x, layer).repeatable
    assert make_transfer(x, layer, out=[np.empty_like(x)]).repeatable
    assert make_transfer(x, layer, layer, out=[np.empty_like(x), None]).repeatable
    assert not make_transfer(x, layer, layer, out=[None, x]).repeatable


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
