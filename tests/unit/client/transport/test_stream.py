"""Streams: their messages, and reading the answer."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import AvgPool2d, FractionalMaxPool2d, InternalError, MaxPool2d, MaxUnpool2d
from poolrpc._transport.stream import StreamReader, stream_messages
from poolrpc._wire import framing
from poolrpc._wire.codec import BranchResult, encode_results
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2
from tests.unit.client.transport.peer import Peer, assert_same, call_stream, call_unary, make_transfer

BRANCHES = (MaxPool2d(2, return_indices=True), (AvgPool2d(2), MaxPool2d(2)))
X = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
PLANE = 256  # bytes of 8 x 8 float32


@pytest.fixture
def set_chunk_bytes(monkeypatch):
    """Return a function that sets how many bytes of a block a message has."""
    return lambda size: monkeypatch.setattr(framing, "chunks", partial(framing.chunks, chunk_bytes=size))


@pytest.mark.parametrize(
    ("block", "chunk", "blocks"),
    [
        (2**20, 2**20, [6 * PLANE]),
        (PLANE, 2**20, [PLANE] * 6),
        (1, 2**20, [PLANE] * 6),
        (4 * PLANE + 1, 2**20, [4 * PLANE, 2 * PLANE]),
        (4 * PLANE, 100, [4 * PLANE, 2 * PLANE]),
        (1, 1, [PLANE] * 6),
    ],
)
def test_a_stream_has_the_results_of_a_unary_call(peer, set_chunk_bytes, block, chunk, blocks):
    """Blocks of any size, and planes larger than a message, give each branch its output and indices."""
    set_chunk_bytes(chunk)
    peer.blocks.clear()
    transfer = make_transfer(X, *BRANCHES)
    results = call_stream(peer, transfer, block_bytes=block)
    assert peer.blocks == blocks
    assert {each.transport for each in results} == {"stream"}
    assert_same(results, call_unary(peer, transfer))


@given(
    st.sampled_from(["NCHW", "NHWC"]),
    st.integers(0, 3) | st.none(),
    st.integers(1, 4),
    st.sampled_from([1, 200, 700, 10**6]),
    st.sampled_from([50, 10**6]),
)
def test_any_tensor_can_be_streamed(layout, batch, channels, block, chunk):
    """An unbatched tensor, an empty batch, either layout, and a layer that numbers planes have a call's results."""
    lead = () if batch is None else (batch,)
    shape = (*lead, channels, 6, 5) if layout == "NCHW" else (*lead, 6, 5, channels)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    fractional = FractionalMaxPool2d(2, 2, seed=3, return_indices=True)
    transfer = make_transfer(x, fractional, MaxPool2d(2), layout=layout)
    peer = Peer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing, "chunks", partial(framing.chunks, chunk_bytes=chunk))
        assert_same(call_stream(peer, transfer, block_bytes=block), call_unary(peer, transfer))
    peer.close()


def test_a_block_has_planes_of_the_input_and_of_the_indices(peer, set_chunk_bytes):
    """A block has its planes of the input, then those of the indices."""
    set_chunk_bytes(100)
    y, indices = (each.numpy() for each in torch.nn.MaxPool2d(2, return_indices=True)(torch.from_numpy(X)))
    transfer = make_transfer(y, MaxUnpool2d(2), indices=indices)
    peer.blocks.clear()
    results = call_stream(peer, transfer, block_bytes=1)
    assert peer.blocks == [16 * 4 + 16 * 8] * 6
    assert_same(results, call_unary(peer, transfer))


def test_the_payloads_of_a_stream_are_aligned():
    """The first message is the request; the payload of every other one is aligned."""
    first, *rest = stream_messages(make_transfer(X, MaxPool2d(2)), PLANE)
    assert pool_pb2.PoolStreamRequest.FromString(first).request.input.shape == [2, 3, 8, 8]
    assert len(rest) == 6
    for data in rest:
        length = len(pool_pb2.PoolStreamRequest.FromString(data).payload)
        assert (len(data) - length) % framing.PAYLOAD_ALIGNMENT == 0


def test_progress_is_reported_after_each_block(peer, set_chunk_bytes):
    """The numbers are the planes that are done and all planes."""
    set_chunk_bytes(100)
    reported = []
    call_stream(peer, make_transfer(X, MaxPool2d(2)), lambda *planes: reported.append(planes), block_bytes=2 * PLANE)
    assert reported == [(2, 6), (4, 6), (6, 6)]


def reader_after_first(out=()):
    """Return a reader that has read the first message of an answer: 6 planes of 64 bytes follow."""
    spec = TensorSpec("float32", (2, 3, 4, 4))
    first = pool_pb2.PoolStreamResponse(results=encode_results([BranchResult((spec.shape,), spec)]))
    return StreamReader(make_transfer(X, MaxPool2d(2), out=out), first.SerializeToString(), None)


@pytest.mark.parametrize("out", [(), (np.zeros((2, 3, 4, 4), np.float32),)], ids=["new", "out"])
@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 3, 0, 4), (2, 3, -4, 4), (96,)], ids=str)
def test_an_answer_of_another_shape_is_an_internal_error(shape, out):
    """Shapes other than those of the layers are an error of the server, with the shapes that it sent."""
    results = encode_results([BranchResult((shape,), TensorSpec("float32", shape))])
    first = pool_pb2.PoolStreamResponse(results=results).SerializeToString()
    with pytest.raises(InternalError, match=re.escape(f"got [({shape},)]")):
        StreamReader(make_transfer(X, MaxPool2d(2), out=out), first, None)


def test_an_answer_with_other_results_is_an_internal_error():
    """No results, one too many, and an unknown dtype are errors of the server, never of the caller."""
    one = BranchResult(((2, 3, 4, 4),), TensorSpec("float32", (2, 3, 4, 4)))
    unknown = pool_pb2.BranchResult(output=pool_pb2.TensorSpec(dtype=99))  # type: ignore[arg-type]  # as a server may
    for results in ([], encode_results([one, one]), [unknown]):
        first = pool_pb2.PoolStreamResponse(results=results).SerializeToString()
        with pytest.raises(InternalError):
            StreamReader(make_transfer(X, MaxPool2d(2)), first, None)


def test_bytes_that_are_not_an_answer_are_an_internal_error():
    """Bytes that protobuf cannot parse are an error of the server, as the first message and as a later one."""
    with pytest.raises(InternalError, match="expected a PoolStreamResponse, got bytes that cannot be parsed"):
        StreamReader(make_transfer(X, MaxPool2d(2)), b"\xff\xff", None)
    with pytest.raises(InternalError, match="expected a PoolStreamResponse, got bytes that cannot be parsed"):
        reader_after_first().read(b"\xff\xff")


@pytest.mark.parametrize("lengths", [[63], [65], [64, 1], [7 * 64], [64, 6 * 64], [64] * 7], ids=repr)
def test_partial_or_additional_planes_are_an_internal_error(lengths):
    """A partial plane and planes beyond the last end the call, and nothing but the output is written."""
    around = np.zeros(3 * 96, np.float32)
    reader = reader_after_first([around[96:192].reshape(2, 3, 4, 4)])

    def read_all():
        for length in lengths:
            reader.read(framing.join(b"", [b"\x01" * length]))

    with pytest.raises(InternalError, match="expected whole planes"):
        read_all()
    assert not around[:96].any()
    assert not around[192:].any()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_answer_that_ends_early_is_an_internal_error(count):
    """An end before the last plane is an error with both numbers of planes."""
    reader = reader_after_first()
    for _ in range(count):
        reader.read(framing.join(b"", [bytes(64)]))
    with pytest.raises(InternalError, match=f"expected 6 planes of output, got {count}"):
        reader.finish()


def test_a_block_may_be_split_into_messages_anywhere():
    """A message that is marked unfinished continues in the next one, even in the middle of an element."""
    reader, expected = reader_after_first(), np.arange(96, dtype=np.float32)
    data = expected.tobytes()
    for start, stop, header in (
        (0, 1, framing.UNFINISHED),
        (1, 100, framing.UNFINISHED),
        (100, 128, b""),
        (128, 384, b""),
    ):
        reader.read(framing.join(header, [data[start:stop]]))
    (result,) = reader.finish()
    assert result.output.ravel().tolist() == expected.tolist()
