"""Transfers: what a call sends, by which path, and what becomes of the answer, against a server in this process."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import (
    AvgPool2d,
    FractionalMaxPool2d,
    InternalError,
    InvalidArgumentError,
    LimitExceededError,
    LPPool2d,
    MaxPool2d,
    MaxUnpool2d,
)
from poolrpc._transport import transfer
from poolrpc._transport.transfer import PoolResult, PreparedRequest, StreamReader, Transfer, by_size, check_transport
from poolrpc._wire import framing
from poolrpc._wire.codec import BranchResult, Request, encode_results
from poolrpc.tensors import TensorSpec, spec_of
from poolrpc.v1 import pool_pb2
from tests.unit.client.transport.peer import Peer

WITH_INDICES = MaxPool2d(2, return_indices=True)
X = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def peer():
    """A server of wide limits."""
    made = Peer()
    yield made
    made.close()


def make(x, *branches, out=(), indices=None, layout="NCHW"):
    """Make a transfer; a layer is a branch of its own."""
    chains = tuple(each if isinstance(each, tuple) else (each,) for each in branches)
    second = None if indices is None else spec_of(indices, layout)
    arrays = [x] if indices is None else [x, indices]
    return Transfer(PreparedRequest(Request(spec_of(x, layout), chains, second)), arrays, out)


def unary(peer, sent, progress=None):
    """Make a unary call."""
    return sent.results(peer.unary(sent.message(2**30)), progress)


def stream(peer, sent, progress=None):
    """Make a call as a stream."""
    answers = peer.stream(sent.messages())
    arrival = StreamReader(sent, next(answers), progress)
    for message in answers:
        arrival.take(message)
    return arrival.finish()


def assert_same(ours, theirs):
    """Hold results to others, but for the way that they came by."""
    assert [each.shapes for each in ours] == [each.shapes for each in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for part in ("output", "indices"):
            assert (getattr(one, part) is None) == (getattr(other, part) is None)
            if getattr(one, part) is not None:
                assert getattr(one, part).dtype == getattr(other, part).dtype
                assert np.array_equal(getattr(one, part), getattr(other, part))


def test_a_message_is_the_request_with_its_tensors():
    """A unary message is protobuf's for the request, and its payload is aligned."""
    places = np.zeros(X.shape, np.int64)
    for sent, payload in (
        (make(X, MaxPool2d(2)), X.tobytes()),
        (make(X, MaxUnpool2d(2), indices=places), X.tobytes() + places.tobytes()),
    ):
        data = sent.message(2**20)
        message = pool_pb2.PoolRequest.FromString(data)
        assert message.payload == payload
        assert message.SerializeToString() == data
        assert (len(data) - len(payload)) % framing.PAYLOAD_ALIGNMENT == 0


@pytest.mark.parametrize("most", [0, X.nbytes - 1])
def test_a_message_that_would_be_too_large_is_not_made(most):
    """What a message may have, what it would, and how to raise the limit are said."""
    with pytest.raises(LimitExceededError, match="--max-message-bytes") as raised:
        make(X, MaxPool2d(2)).message(most)
    assert raised.value.reason == "MESSAGE_TOO_LARGE"
    assert raised.value.metadata == {"limit": str(most), "actual": str(X.nbytes)}
    assert make(X, MaxPool2d(2)).message(X.nbytes)


def test_several_arrays_are_the_bytes_of_one(peer):
    """The tensors of a transfer may be several, whose bytes follow each other."""
    outline = PreparedRequest(Request(TensorSpec("float32", X.shape), ((MaxPool2d(2),),)))
    assert_same(unary(peer, Transfer(outline, [X[0], X[1]])), unary(peer, make(X, MaxPool2d(2))))


def test_a_call_says_what_torch_says(peer):
    """Branches, chains and indices come back each with its shapes, and say that they came by one message."""
    results = unary(peer, make(X, WITH_INDICES, (AvgPool2d(2), MaxPool2d(2))))
    x = torch.from_numpy(X)
    values, places = torch.nn.MaxPool2d(2, return_indices=True)(x)
    means = torch.nn.MaxPool2d(2)(torch.nn.AvgPool2d(2)(x))
    assert_same(
        results,
        [
            PoolResult(values.numpy(), ((2, 3, 4, 4),), places.numpy()),
            PoolResult(means.numpy(), ((2, 3, 4, 4), (2, 3, 2, 2))),
        ],
    )
    assert {each.transport for each in results} == {"unary"}
    assert repr(results[1]) == "<PoolResult float32 (2, 3, 4, 4) -> (2, 3, 2, 2)>"


def test_results_are_the_callers_own(peer):
    """Arrays that come back are writable, and apart from each other and from the message."""
    sent = make(X, MaxPool2d(2), MaxPool2d(2))
    data = peer.unary(sent.message(2**20))
    before = bytes(data)
    for result in sent.results(data):
        result.output[:] = 7
    assert data == before
    assert_same(sent.results(data), unary(peer, make(X, MaxPool2d(2), MaxPool2d(2))))


BRANCHES = (WITH_INDICES, (AvgPool2d(2), MaxPool2d(2)))


def answer(sent, *, shape=(2, 3, 4, 4), more=b"", payload=None):
    """Give an answer to a call of one layer, of that shape."""
    spec = TensorSpec("float32", shape)
    message = pool_pb2.PoolResponse(results=encode_results([BranchResult((shape,), spec)]))
    message.payload = np.arange(spec.numel, dtype=np.float32).tobytes() if payload is None else payload
    assert sent.outline.request.branches == ((MaxPool2d(2),),)
    return message.SerializeToString() + more


def test_an_answer_like_the_last_is_read_like_the_first(peer):
    """The start of an answer is remembered; what it says, and the new contents, are the same without."""
    sent = make(X, *BRANCHES)
    sent.results(peer.unary(sent.message(2**20)))
    for value in (1, 2):
        other = make(np.full_like(X, value), *BRANCHES)
        message = peer.unary(other.message(2**20))
        again = Transfer(sent.outline, other.arrays)
        assert_same(again.results(message), other.results(message))


def test_an_answer_unlike_the_last_is_read_anew():
    """Fields in another order, and unknown ones behind the payload, before or after the usual, change nothing."""
    sent = make(X, MaxPool2d(2))
    message = answer(sent)
    header, payload = framing.split_payload(message, pool_pb2.PoolResponse)
    for odd in (framing.join(b"", [payload]) + header, message, answer(sent, more=b"\x82\x01\x00"), message):
        (result,) = sent.results(odd)
        assert result.output.tobytes() == payload


@pytest.mark.parametrize("out", [(), (np.zeros((2, 3, 4, 4), np.float32),)], ids=["new", "out"])
@pytest.mark.parametrize(
    "shape", [(1, 3, 4, 4), (2, 3, 4, 5), (2, 9, 4, 4), (2, 3, 0, 4), (2, 3, -4, 4), (96,)], ids=str
)
def test_an_answer_of_another_shape_is_the_servers_fault(shape, out):
    """Shapes that the layers don't give are an error that says what came, by either path."""
    sent = make(X, MaxPool2d(2), out=out)
    spec = TensorSpec("float32", shape)
    results = encode_results([BranchResult((shape,), spec)])
    with pytest.raises(InternalError, match=re.escape(f"got [({shape},)]")) as raised:
        sent.results(pool_pb2.PoolResponse(results=results, payload=bytes(384)).SerializeToString())
    assert raised.value.reason == "ANSWER"
    with pytest.raises(InternalError, match=re.escape(f"got [({shape},)]")):
        StreamReader(sent, pool_pb2.PoolStreamResponse(results=results).SerializeToString(), None)


def test_an_answer_that_says_less_or_more_is_the_servers_fault():
    """No results, one too many, and a dtype that there isn't are errors, and never the caller's."""
    sent = make(X, MaxPool2d(2))
    one = BranchResult(((2, 3, 4, 4),), TensorSpec("float32", (2, 3, 4, 4)))
    unknown = pool_pb2.BranchResult(output=pool_pb2.TensorSpec(dtype=99))  # type: ignore[arg-type]  # as a server may
    for results in ([], encode_results([one, one]), [unknown]):
        with pytest.raises(InternalError):
            sent.results(pool_pb2.PoolResponse(results=results).SerializeToString())
        with pytest.raises(InternalError):
            StreamReader(sent, pool_pb2.PoolStreamResponse(results=results).SerializeToString(), None)


def test_bytes_that_are_no_answer_are_the_servers_fault():
    """What protobuf can't read is an error, as an answer and as a later message of a stream."""
    with pytest.raises(InternalError, match="PoolResponse, got bytes that are none"):
        make(X, MaxPool2d(2)).results(b"\xff\xff")
    with pytest.raises(InternalError, match="PoolStreamResponse, got bytes that are none"):
        StreamReader(make(X, MaxPool2d(2)), b"\xff\xff", None)
    with pytest.raises(InternalError, match="PoolStreamResponse, got bytes that are none"):
        begun().take(b"\xff\xff")


@pytest.mark.parametrize("length", [0, 1, 383, 385])
@pytest.mark.parametrize("remembered", [False, True])
def test_an_answer_of_more_or_fewer_bytes_than_it_says_is_the_servers_fault(length, remembered):
    """A payload that doesn't fit the shapes beside it is an error, whether an answer came before or not."""
    sent = make(X, MaxPool2d(2))
    if remembered:
        sent.results(answer(sent))
    with pytest.raises(InternalError) as raised:
        sent.results(answer(sent, payload=bytes(length)))
    assert raised.value.reason == "ANSWER"


def test_outputs_go_where_they_are_told_to(peer):
    """An array of the output's shape and dtype is filled; None beside it gives a new one; by either path."""
    for call in (unary, stream):
        out = [np.zeros((2, 3, 4, 4), np.float32), None, np.zeros((2, 3, 2, 2), np.float32)]
        results = call(peer, make(X, *BRANCHES, out=out))
        assert results[0].output is out[0]
        assert results[1].output is out[2]
        assert_same(results, unary(peer, make(X, *BRANCHES)))


def test_a_transfer_may_be_repeated_unless_its_output_is_written_over_its_input():
    """Only an array of the outputs that may share memory with one of the inputs hinders."""
    x = X.copy()
    layer = MaxPool2d(1)
    assert make(x, layer).repeatable
    assert make(x, layer, out=[np.empty_like(x)]).repeatable
    assert make(x, layer, layer, out=[np.empty_like(x), None]).repeatable
    assert not make(x, layer, layer, out=[None, x]).repeatable


def read_only():
    """Give an array of the output's shape and dtype that refuses to be written."""
    array = np.zeros((2, 3, 4, 4), np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("array", "got"),
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
def test_an_array_that_does_not_fit_is_refused_before_anything_is_sent(array, got):
    """What an output needs and what was given are both said."""
    expected = "out: expected a writable, C-contiguous array of float32 (2, 3, 4, 4), got "
    with pytest.raises(InvalidArgumentError, match=f"^{re.escape(expected + got)}$") as raised:
        make(X, MaxPool2d(2), out=[array])
    assert [each.field for each in raised.value.violations] == ["out"]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_there_is_an_array_for_each_tensor(count):
    """Too few arrays for the outputs and indices of all branches, or too many, are refused."""
    with pytest.raises(InvalidArgumentError, match=rf"^out: expected 3 arrays, .*, got {count}$"):
        make(X, *BRANCHES, out=[None] * count)


@pytest.fixture
def small_blocks(monkeypatch):
    """Give what makes a stream's blocks so large, and what a message holds of them."""

    def make_small(block, piece):
        monkeypatch.setattr(transfer, "BLOCK_BYTES", block)
        monkeypatch.setattr(framing, "chunks", partial(framing.chunks, chunk_bytes=piece))

    return make_small


PLANE = 256  # bytes of 8 x 8 cells of float32


@pytest.mark.parametrize(
    ("block", "piece", "blocks"),
    [
        (2**20, 2**20, [6 * PLANE]),
        (PLANE, 2**20, [PLANE] * 6),
        (1, 2**20, [PLANE] * 6),
        (4 * PLANE + 1, 2**20, [4 * PLANE, 2 * PLANE]),
        (4 * PLANE, 100, [4 * PLANE, 2 * PLANE]),
        (1, 1, [PLANE] * 6),
    ],
)
def test_a_stream_gives_what_one_message_gives(peer, small_blocks, block, piece, blocks):
    """Blocks of any size, of planes larger than a message too, give each branch's output and indices whole."""
    small_blocks(block, piece)
    peer.blocks.clear()
    sent = make(X, *BRANCHES)
    results = stream(peer, sent)
    assert peer.blocks == blocks
    assert {each.transport for each in results} == {"stream"}
    assert_same(results, unary(peer, sent))


@given(
    st.sampled_from(["NCHW", "NHWC"]),
    st.integers(0, 3) | st.none(),
    st.integers(1, 4),
    st.sampled_from([1, 200, 700, 10**6]),
    st.sampled_from([50, 10**6]),
)
def test_any_tensor_is_streamed(layout, batch, channels, block, piece):
    """Batched or not, an empty batch, either layout, a layer that tells planes apart: the stream changes nothing."""
    lead = () if batch is None else (batch,)
    shape = (*lead, channels, 6, 5) if layout == "NCHW" else (*lead, 6, 5, channels)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    sent = make(x, FractionalMaxPool2d(2, 2, seed=3, return_indices=True), MaxPool2d(2), layout=layout)
    there = Peer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "BLOCK_BYTES", block)
        patch.setattr(framing, "chunks", partial(framing.chunks, chunk_bytes=piece))
        assert_same(stream(there, sent), unary(there, sent))
    there.close()


def test_indices_are_streamed_with_their_planes(peer, small_blocks):
    """A block has its planes of the input, then those of the indices."""
    small_blocks(1, 100)
    y, places = (each.numpy() for each in torch.nn.MaxPool2d(2, return_indices=True)(torch.from_numpy(X)))
    sent = make(y, MaxUnpool2d(2), indices=places)
    peer.blocks.clear()
    results = stream(peer, sent)
    assert peer.blocks == [16 * 4 + 16 * 8] * 6
    assert_same(results, unary(peer, sent))


def test_a_streams_messages_are_aligned():
    """The first message is the request; the payload of each that follows lies at a multiple of 16."""
    first, *rest = make(X, MaxPool2d(2)).messages()
    assert pool_pb2.PoolStreamRequest.FromString(first).request.input.shape == [2, 3, 8, 8]
    for data in rest:
        length = len(pool_pb2.PoolStreamRequest.FromString(data).payload)
        assert (len(data) - length) % framing.PAYLOAD_ALIGNMENT == 0


def test_progress_is_told_in_planes(peer, small_blocks):
    """A stream tells after each block how many planes are done, of how many; a message tells when all are."""
    small_blocks(2 * PLANE, 100)
    told = []
    stream(peer, make(X, MaxPool2d(2)), lambda *planes: told.append(planes))
    assert told == [(2, 6), (4, 6), (6, 6)]
    told.clear()
    unary(peer, make(X, MaxPool2d(2)), lambda *planes: told.append(planes))
    assert told == [(6, 6)]


def begun(out=()):
    """Give what has seen the first message of an answer: 6 planes of 64 bytes will come."""
    spec = TensorSpec("float32", (2, 3, 4, 4))
    first = pool_pb2.PoolStreamResponse(results=encode_results([BranchResult((spec.shape,), spec)]))
    return StreamReader(make(X, MaxPool2d(2), out=out), first.SerializeToString(), None)


@pytest.mark.parametrize("lengths", [[63], [65], [64, 1], [7 * 64], [64, 6 * 64], [64] * 7], ids=repr)
def test_blocks_that_are_no_planes_or_too_many_are_the_servers_fault(lengths):
    """A cut plane and planes over the number that there are end the call, and nothing beside the output is written."""
    around = np.zeros(3 * 96, np.float32)
    arrival = begun([around[96:192].reshape(2, 3, 4, 4)])

    def take():
        for length in lengths:
            arrival.take(framing.join(b"", [b"\x01" * length]))

    with pytest.raises(InternalError, match="expected whole planes"):
        take()
    assert not around[:96].any()
    assert not around[192:].any()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_answer_that_ends_too_soon_is_the_servers_fault(count):
    """An end before all planes have come is an error with both numbers."""
    arrival = begun()
    for _ in range(count):
        arrival.take(framing.join(b"", [bytes(64)]))
    with pytest.raises(InternalError, match=f"expected 6 planes of output, got {count}"):
        arrival.finish()


def test_a_block_may_come_in_pieces_of_any_size():
    """What is marked unfinished goes on in the next message, in the middle of a cell perhaps."""
    arrival, expected = begun(), np.arange(96, dtype=np.float32)
    data = expected.tobytes()
    for start, stop, header in (
        (0, 1, framing.UNFINISHED),
        (1, 100, framing.UNFINISHED),
        (100, 128, b""),
        (128, 384, b""),
    ):
        arrival.take(framing.join(header, [data[start:stop]]))
    (result,) = arrival.finish()
    assert result.output.ravel().tolist() == expected.tolist()


def test_the_path_is_chosen_by_size(monkeypatch):
    """Tensors of a size go as a stream, smaller ones in a message; those that can't be split, while one has room."""
    most = 10 * X.nbytes
    monkeypatch.setattr(transfer, "STREAM_BYTES", X.nbytes)
    assert by_size(make(X, MaxPool2d(2)), most) == "stream"
    assert by_size(make(X, LPPool2d(2, 2)), most) == "stream"
    assert by_size(make(X, LPPool2d(3, 2)), most) == "unary"
    assert by_size(make(X, LPPool2d(3, 2)), X.nbytes - 1) == "stream"
    monkeypatch.setattr(transfer, "STREAM_BYTES", X.nbytes + 1)
    assert by_size(make(X, MaxPool2d(2)), most) == "unary"


@pytest.mark.parametrize("transport", ["", "Unary", "grpc", 1, b"unary"])
def test_an_unknown_path_is_refused(transport):
    """A path is one of three, or None for what is fastest."""
    for known in ("unary", "stream", "arena", None):
        check_transport(known)
    with pytest.raises(InvalidArgumentError, match=r"^transport: expected one of unary, stream, arena or None, got"):
        check_transport(transport)
