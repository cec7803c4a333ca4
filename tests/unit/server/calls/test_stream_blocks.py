"""A tensor in blocks: how many planes may come, what each block is a request for, and when all are there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import (
    AvgPool2d,
    FractionalMaxPool2d,
    GlobalAvgPool,
    InvalidArgumentError,
    LimitExceededError,
    MaxPool2d,
    MaxUnpool2d,
)
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls import stream_blocks as streams
from poolrpc_server.calls.stream_blocks import Stream
from poolrpc_server.calls.validate import Limits, check_request, check_stream

WIDE = Limits(2**60, 2**60, 2**60, 2**60)
PLANE = 64  # bytes of 4 x 4 cells of float32
SPEC = TensorSpec("float32", (2, 3, 4, 4))


def begin(*layers, spec=SPEC, indices=None, limits=WIDE, seen=None):
    """Begin a stream, each layer a branch of its own; what is checked is added to `seen`."""
    request = Request(spec, tuple((layer,) for layer in layers), indices)
    planes, results = check_stream(request, limits)

    def check(block):
        if seen is not None:
            seen.append(block)
        return check_request(block, limits)

    return Stream(request, planes, results, check)


def test_a_block_is_a_request_for_its_planes():
    """Planes come in any number of blocks, each of which is the same layers on so many planes."""
    stream = begin(MaxPool2d(2))
    assert (stream.planes.count, stream.plane_bytes, stream.most) == (6, PLANE, 6)
    for count in (1, 3, 2):
        checked = stream.take(count * PLANE)
        assert checked.request == Request(TensorSpec("float32", (1, count, 4, 4)), ((MaxPool2d(2),),))
        assert checked.outputs == (TensorSpec("float32", (1, count, 2, 2)),)
    stream.finish()


@given(st.lists(st.integers(1, 6), max_size=8))
def test_planes_are_counted(counts):
    """Blocks are taken until there are more planes than the request says, and the end is where all have come."""
    stream, done = begin(MaxPool2d(2)), 0
    for count in counts:
        if done + count > 6:
            with pytest.raises(InvalidArgumentError, match=rf"^payload: expected 6 planes, .*got {done + count}$"):
                stream.take(count * PLANE)
            return
        assert stream.take(count * PLANE).request.input.shape == (1, count, 4, 4)
        done += count
    if done == 6:
        stream.finish()
    else:
        with pytest.raises(InvalidArgumentError, match=rf"^payload: expected 6 planes, .*got {done}$"):
            stream.finish()


@pytest.mark.parametrize("nbytes", [0, 1, PLANE - 1, PLANE + 1, 2 * PLANE - 1, 7 * PLANE, 2**40])
def test_a_block_of_no_whole_planes_is_refused(nbytes):
    """Nothing, a cut plane, and more planes than there are in all: what may come is said, and what came."""
    message = rf"^payload: expected a block of 1 to 6 planes of {PLANE} bytes, got {nbytes} bytes$"
    with pytest.raises(InvalidArgumentError, match=message):
        begin(MaxPool2d(2)).take(nbytes)


def test_a_block_has_at_most_so_many_bytes_or_one_plane(monkeypatch):
    """Blocks hold as many planes as go into BLOCK_BYTES; a plane that is larger comes alone."""
    for size, most in ((PLANE * 3 - 1, 2), (PLANE * 3, 3), (PLANE - 1, 1), (1, 1)):
        monkeypatch.setattr(streams, "BLOCK_BYTES", size)
        stream = begin(MaxPool2d(2))
        assert stream.most == most
        assert stream.take(most * PLANE).request.input.shape == (1, most, 4, 4)
        with pytest.raises(InvalidArgumentError, match=rf"expected a block of 1 to {most} planes"):
            stream.take((most + 1) * PLANE)


def test_blocks_of_a_size_are_checked_once():
    """What was found of a block holds for the next one of as many planes."""
    seen = []
    stream = begin(MaxPool2d(2), AvgPool2d(2), seen=seen)
    first, other, again = (stream.take(count * PLANE) for count in (2, 1, 2))
    assert first is again is not other
    assert len(seen) == 2


@pytest.mark.parametrize(("layout", "first", "count"), [("NCHW", 1, 4), ("NHWC", 3, 1)])
def test_a_fractional_layers_blocks_start_at_their_plane(layout, first, count):
    """Each block has the layer for the planes that it starts at; with channels last those of whole images count."""
    layer = FractionalMaxPool2d(2, 2, seed=2**64 - 1)
    spec = SPEC if layout == "NCHW" else TensorSpec("float32", (2, 4, 4, 3), layout)
    stream = begin(layer, MaxPool2d(2), spec=spec)
    assert stream.take(stream.plane_bytes).request.branches == ((layer,), (MaxPool2d(2),))
    assert stream.take(count * stream.plane_bytes).request.branches == ((layer.at_plane(first),), (MaxPool2d(2),))


def test_an_image_with_channels_last_is_one_plane():
    """Where channels lie together, so do an image's planes, and a block has whole images."""
    stream = begin(MaxPool2d(2), spec=TensorSpec("float32", (5, 4, 4, 3), "NHWC"))
    assert (stream.planes.count, stream.plane_bytes) == (5, 3 * PLANE)
    assert stream.take(6 * PLANE).outputs == (TensorSpec("float32", (2, 2, 2, 3), "NHWC"),)
    with pytest.raises(InvalidArgumentError, match="expected a block of 1 to 5 planes of 192 bytes"):
        stream.take(2 * PLANE)


def test_indices_come_with_their_planes():
    """A block has its planes of the input, then those of the indices."""
    stream = begin(MaxUnpool2d(2), indices=TensorSpec("int64", SPEC.shape))
    assert stream.plane_bytes == 3 * PLANE
    checked = stream.take(2 * 3 * PLANE)
    assert checked.request.specs == (TensorSpec("float32", (1, 2, 4, 4)), TensorSpec("int64", (1, 2, 4, 4)))


@pytest.mark.parametrize("shape", [(3, 4, 4), (0, 3, 4, 4)])
def test_a_tensor_without_a_batch_or_with_an_empty_one_is_streamed(shape):
    """Planes are those of one image, or none: then all have come at once."""
    stream = begin(MaxPool2d(2), spec=TensorSpec("float32", shape))
    assert stream.results[0].shapes == ((*shape[:-2], 2, 2),)
    if stream.planes.count:
        assert stream.take(3 * PLANE).request.input.shape == (1, 3, 4, 4)
    else:
        with pytest.raises(InvalidArgumentError, match="expected 0 planes, as the request says, got 1"):
            stream.take(PLANE)
        stream = begin(MaxPool2d(2), spec=TensorSpec("float32", shape))
    stream.finish()


TERABYTE = TensorSpec("float32", (2**14, 2**16, 2**8, 1))
SMALL = Limits(2**11, 2**10, 64, 2**11)


def test_a_tensor_of_any_size_passes_where_a_plane_does():
    """A tensor over every limit of a call is checked plane by plane, and has the shapes that it would have."""
    request = Request(TERABYTE, ((MaxPool2d((2, 1)), GlobalAvgPool()),))
    with pytest.raises(LimitExceededError):
        check_request(request, SMALL)
    planes, results = check_stream(request, SMALL)
    assert (planes.count, planes.plane_bytes) == (2**30, 2**10)
    assert results == request.results()
    assert results[0].output == TensorSpec("float32", (*TERABYTE.shape[:2], 1, 1))


@pytest.mark.parametrize(
    ("limits", "reason", "most", "actual"),
    [
        (Limits(1023, 2**60, 2**60, 2**60), "TENSOR_TOO_LARGE", 1023, 1024),
        (Limits(2**60, 511, 2**60, 2**60), "OUTPUT_TOO_LARGE", 511, 512),
        (Limits(2**60, 2**60, 2**60, 255), "WORK_BUDGET", 255, 256),
    ],
    ids=["input", "output", "work"],
)
def test_one_plane_is_held_to_every_limit(limits, reason, most, actual):
    """A plane of 1024 bytes, its output and its work each have their limit, as a call's have."""
    with pytest.raises(LimitExceededError) as raised:
        check_stream(Request(TERABYTE, ((MaxPool2d((2, 1)),),)), limits)
    assert raised.value.reason == reason
    assert raised.value.metadata == {"limit": str(most), "actual": str(actual)}
