"""Stream blocks: the size and number of planes of blocks, the request of each block, and the end of a stream."""

import gc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import (
    AvgPool2d,
    FractionalMaxPool2d,
    GlobalPool2d,
    InvalidArgumentError,
    LimitExceededError,
    MaxPool2d,
    MaxUnpool2d,
    Normalize,
)
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.stream_blocks import BLOCK_BYTES, StreamBlocks
from poolrpc_server.calls.validate import Limits, check_request, check_stream
from tests.unit.server.calls.eager_schedule import EagerSchedule

WIDE = Limits(2**60, 2**60, 2**60, 2**60)
PLANE = 64  # bytes of 4 x 4 cells of float32
SPEC = TensorSpec("float32", (2, 3, 4, 4))


def begin(*layers, spec=SPEC, indices=None, limits=WIDE, checks=None, block_bytes=BLOCK_BYTES):
    """Begin a stream with each layer as a branch; append the checked requests to `checks`."""
    request = Request(spec, tuple((layer,) for layer in layers), indices)
    planes, results = check_stream(request, limits, EagerSchedule)

    def check(block):
        if checks is not None:
            checks.append(block)
        return check_request(block, limits, EagerSchedule)

    return StreamBlocks(request, planes, results, check, block_bytes)


def test_block_becomes_a_request_for_its_planes():
    """A tensor may arrive in any number of blocks; each becomes a request with the same layers for its planes."""
    stream = begin(MaxPool2d(2))
    assert (stream.planes.count, stream.plane_bytes, stream.max_planes) == (6, PLANE, 6)
    for count in (1, 3, 2):
        checked = stream.next_block(count * PLANE)
        assert checked.request == Request(TensorSpec("float32", (1, count, 4, 4)), ((MaxPool2d(2),),), is_block=True)
        assert checked.outputs == (TensorSpec("float32", (1, count, 2, 2)),)
    stream.finish()


@given(st.lists(st.integers(1, 6), max_size=8))
def test_number_of_planes_must_match_the_request(counts):
    """A block with too many planes and an end with too few planes are rejected, with both numbers."""
    stream, sent = begin(MaxPool2d(2)), 0
    for count in counts:
        if sent + count > 6:
            with pytest.raises(InvalidArgumentError, match=rf"^payload: expected 6 planes, .*got {sent + count}$"):
                stream.next_block(count * PLANE)
            return
        assert stream.next_block(count * PLANE).request.input.shape == (1, count, 4, 4)
        sent += count
    if sent == 6:
        stream.finish()
    else:
        with pytest.raises(InvalidArgumentError, match=rf"^payload: expected 6 planes, .*got {sent}$"):
            stream.finish()


@pytest.mark.parametrize("nbytes", [0, 1, PLANE - 1, PLANE + 1, 2 * PLANE - 1, 7 * PLANE, 2**40])
def test_block_must_be_a_number_of_whole_planes(nbytes):
    """An empty block, a partial plane and too many planes are rejected; the error has the allowed and actual sizes."""
    message = rf"^payload: expected a block of 1 to 6 planes of {PLANE} bytes, got {nbytes} bytes$"
    with pytest.raises(InvalidArgumentError, match=message):
        begin(MaxPool2d(2)).next_block(nbytes)


def test_block_size_is_limited_to_at_least_one_plane():
    """A block holds the planes that fit into the block size, or one plane that is larger."""
    for size, max_planes in ((PLANE * 3 - 1, 2), (PLANE * 3, 3), (PLANE - 1, 1), (1, 1)):
        stream = begin(MaxPool2d(2), block_bytes=size)
        assert stream.max_planes == max_planes
        assert stream.next_block(max_planes * PLANE).request.input.shape == (1, max_planes, 4, 4)
        with pytest.raises(InvalidArgumentError, match=rf"expected a block of 1 to {max_planes} planes"):
            stream.next_block((max_planes + 1) * PLANE)


def test_blocks_of_equal_size_are_validated_once():
    """Blocks with the same number of planes share one validated request."""
    checks = []
    stream = begin(MaxPool2d(2), AvgPool2d(2), checks=checks)
    first, other, again = (stream.next_block(count * PLANE) for count in (2, 1, 2))
    assert first is again is not other
    assert len(checks) == 2


def test_only_the_last_sizes_of_blocks_are_remembered():
    """However many sizes the blocks of a stream have, it holds on to the validated requests of four of them."""
    spec = TensorSpec("float32", (1000, 4, 4))
    stream = begin(MaxPool2d(2), spec=spec)
    seen = [weakref.ref(stream.next_block(count * PLANE).schedule) for count in range(1, 40)]
    gc.collect()
    assert len([each for each in seen if each() is not None]) == 4


@pytest.mark.parametrize(("layout", "first", "count"), [("NCHW", 1, 4), ("NHWC", 3, 1)])
def test_fractional_layer_starts_at_the_first_plane_of_its_block(layout, first, count):
    """A layer that depends on the plane gets the number of the block's first plane, also with channels last."""
    layer = FractionalMaxPool2d(2, 2, seed=2**64 - 1)
    spec = SPEC if layout == "NCHW" else TensorSpec("float32", (2, 4, 4, 3), layout)
    stream = begin(layer, MaxPool2d(2), spec=spec)
    assert stream.next_block(stream.plane_bytes).request.branches == ((layer,), (MaxPool2d(2),))
    assert stream.next_block(count * stream.plane_bytes).request.branches == ((layer.at_plane(first),), (MaxPool2d(2),))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_normalize_starts_at_the_channel_of_its_block(layout):
    """A block has the numbers of its planes' channels, and blocks that begin at the same channel share a request."""
    step, layer = Normalize((1, 2, 3), (4, 5, 6)), MaxPool2d(2)
    checks = []
    spec = SPEC if layout == "NCHW" else TensorSpec("float32", (6, 4, 4, 3), layout)
    request = Request(spec, ((step, layer),))
    planes, results = check_stream(request, WIDE, EagerSchedule)
    stream = StreamBlocks(
        request, planes, results, lambda block: checks.append(block) or check_request(block, WIDE, EagerSchedule)
    )
    found = [stream.next_block(stream.plane_bytes).request.branches[0][0] for _ in range(6)]
    if layout == "NHWC":
        assert (found, len(checks)) == ([step] * 6, 1)
        return
    assert found == [step, Normalize((2, 3, 1), (5, 6, 4)), Normalize((3, 1, 2), (6, 4, 5))] * 2
    assert len(checks) == 3


def test_image_with_channels_last_is_one_plane():
    """With channels last, the planes of an image are interleaved, so a block consists of whole images."""
    stream = begin(MaxPool2d(2), spec=TensorSpec("float32", (5, 4, 4, 3), "NHWC"))
    assert (stream.planes.count, stream.plane_bytes) == (5, 3 * PLANE)
    assert stream.next_block(6 * PLANE).outputs == (TensorSpec("float32", (2, 2, 2, 3), "NHWC"),)
    with pytest.raises(InvalidArgumentError, match="expected a block of 1 to 5 planes of 192 bytes"):
        stream.next_block(2 * PLANE)


def test_block_contains_its_planes_of_the_indices():
    """A block for MaxUnpool contains planes of the input, then the same planes of the indices."""
    stream = begin(MaxUnpool2d(2), indices=TensorSpec("int64", SPEC.shape))
    assert stream.plane_bytes == 3 * PLANE
    checked = stream.next_block(2 * 3 * PLANE)
    assert checked.request.specs == (TensorSpec("float32", (1, 2, 4, 4)), TensorSpec("int64", (1, 2, 4, 4)))


@pytest.mark.parametrize("shape", [(3, 4, 4), (0, 3, 4, 4)])
def test_tensor_without_or_with_an_empty_batch_can_be_streamed(shape):
    """An unbatched tensor has the planes of one image; an empty batch has none and is complete at once."""
    stream = begin(MaxPool2d(2), spec=TensorSpec("float32", shape))
    assert stream.results[0].shapes == ((*shape[:-2], 2, 2),)
    if stream.planes.count:
        assert stream.next_block(3 * PLANE).request.input.shape == (1, 3, 4, 4)
    else:
        with pytest.raises(InvalidArgumentError, match="expected 0 planes, as the request says, got 1"):
            stream.next_block(PLANE)
        stream = begin(MaxPool2d(2), spec=TensorSpec("float32", shape))
    stream.finish()


TERABYTE = TensorSpec("float32", (2**14, 2**16, 2**8, 1))
SMALL = Limits(2**11, 2**10, 64, 2**11)


def test_tensor_of_any_size_is_valid_if_its_planes_are():
    """A tensor that exceeds every limit of a single request passes plane by plane, with the shapes of the whole."""
    request = Request(TERABYTE, ((MaxPool2d((2, 1)), GlobalPool2d("mean")),))
    with pytest.raises(LimitExceededError):
        check_request(request, SMALL, EagerSchedule)
    planes, results = check_stream(request, SMALL, EagerSchedule)
    assert (planes.count, planes.plane_bytes) == (2**30, 2**10)
    assert results == request.results()
    assert results[0].output == TensorSpec("float32", (*TERABYTE.shape[:2], 1, 1))


@pytest.mark.parametrize(
    ("limits", "reason", "limit", "actual"),
    [
        (Limits(1023, 2**60, 2**60, 2**60), "TENSOR_TOO_LARGE", 1023, 1024),
        (Limits(2**60, 511, 2**60, 2**60), "OUTPUT_TOO_LARGE", 511, 512),
        (Limits(2**60, 2**60, 2**60, 255), "WORK_BUDGET", 255, 256),
    ],
    ids=["input", "output", "work"],
)
def test_limits_apply_to_one_plane(limits, reason, limit, actual):
    """The size, output and work of one plane are limited like those of a request."""
    with pytest.raises(LimitExceededError) as raised:
        check_stream(Request(TERABYTE, ((MaxPool2d((2, 1)),),)), limits, EagerSchedule)
    assert raised.value.reason == reason
    assert raised.value.metadata == {"limit": str(limit), "actual": str(actual)}
