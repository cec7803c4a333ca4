"""Requests in terms of planes: blocks, steps, and the range of indices."""

import numpy as np
import pytest

from poolrpc import AvgPool2d, FractionalMaxPool2d, InvalidArgumentError, MaxPool2d, MaxUnpool2d
from poolrpc._wire.codec import Request
from poolrpc.chains import Planes
from poolrpc.tensors import TensorSpec
from poolrpc_server.compute.planes import block_of, check_indices, steps

SPEC = TensorSpec("float32", (2, 3, 8, 6))


def test_a_block_is_a_request_for_some_planes():
    """A block has its planes' spec, its indices', and the layers for the planes' numbers."""
    request = Request(SPEC, ((MaxPool2d(2),), (FractionalMaxPool2d(2, 3, seed=5),)))
    block = block_of(request, Planes(SPEC, 2), 4, 2)
    assert np.prod(block.input.shape) == 4 * 8 * 6
    assert block.branches == ((MaxPool2d(2),), (FractionalMaxPool2d(2, 3, seed=5).at_plane(2),))
    assert block.operand is None
    unpool = Request(SPEC, ((MaxUnpool2d(2),),), TensorSpec("int64", SPEC.shape))
    assert block_of(unpool, Planes(SPEC, 2), 4, 0).operand == TensorSpec("int64", block.input.shape)


def test_a_block_of_images_counts_their_channels():
    """If channels are last, planes are numbered through all channels of the images before them."""
    spec = TensorSpec("float32", (4, 8, 6, 3), "NHWC")
    layer = FractionalMaxPool2d(2, 3, seed=5)
    block = block_of(Request(spec, ((layer,),)), Planes(spec, 2), 2, 1)
    assert block.branches == ((layer.at_plane(3),),)


@pytest.mark.parametrize(("shape", "layout"), [((2, 3, 8, 6), "NCHW"), ((2, 8, 6, 3), "NHWC")])
def test_the_steps_of_a_branch(shape, layout):
    """Each layer comes with the spec of its input and the shape of that tensor's planes."""
    request = Request(TensorSpec("float32", shape, layout), ((MaxPool2d(2), AvgPool2d(2)),))
    (chain,) = steps(request, 2, request.results())
    found = [(layer, spec.shape, plane) for layer, spec, plane in chain]
    halved = (2, 3, 4, 3) if layout == "NCHW" else (2, 4, 3, 3)
    assert found == [(MaxPool2d(2), shape, (8, 6)), (AvgPool2d(2), halved, (4, 3))]


def test_indices_must_be_in_the_range_of_an_output_plane():
    """The error names the range and what was received."""
    check_indices(np.array([0, 47]), 48)
    check_indices(np.array([], np.int64), 48)
    for bad in (-1, 48):
        with pytest.raises(
            InvalidArgumentError, match=rf"expected indices in 0..47, .*got {min(bad, 3)}..{max(bad, 3)}$"
        ):
            check_indices(np.array([3, bad]), 48)
