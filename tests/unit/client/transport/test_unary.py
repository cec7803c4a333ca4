"""Unary calls: their messages, their results, and what happens if the connection breaks."""

import re

import numpy as np
import pytest
import torch

from poolrpc import (
    AvgPool2d,
    InternalError,
    InvalidArgumentError,
    LimitExceededError,
    MaxPool2d,
    MaxUnpool2d,
    PoolResult,
    UnavailableError,
)
from poolrpc._transport.channel import POOL
from poolrpc._transport.options import CallOptions
from poolrpc._transport.unary import decode_message, encode_message, unary_steps
from poolrpc._wire import framing
from poolrpc._wire.codec import BranchResult, encode_results
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2
from tests.unit.client.transport.peer import assert_same, call_unary, make_transfer

WITH_INDICES = MaxPool2d(2, return_indices=True)
BRANCHES = (WITH_INDICES, (AvgPool2d(2), MaxPool2d(2)))
X = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


def test_a_message_is_the_request_with_its_tensors():
    """A unary message has the same bytes as protobuf's own encoding, and its payload is aligned."""
    indices = np.zeros(X.shape, np.int64)
    for transfer, payload in (
        (make_transfer(X, MaxPool2d(2)), X.tobytes()),
        (make_transfer(X, MaxUnpool2d(2), indices=indices), X.tobytes() + indices.tobytes()),
    ):
        data = encode_message(transfer, 2**20)
        message = pool_pb2.PoolRequest.FromString(data)
        assert message.payload == payload
        assert message.SerializeToString() == data
        assert (len(data) - len(payload)) % framing.PAYLOAD_ALIGNMENT == 0


@pytest.mark.parametrize("limit", [0, X.nbytes - 1])
def test_a_message_over_the_limit_is_not_made(limit):
    """The error has the limit, the actual size, and how to raise the limit."""
    with pytest.raises(LimitExceededError, match="--max-message-bytes") as raised:
        encode_message(make_transfer(X, MaxPool2d(2)), limit)
    assert raised.value.reason == "MESSAGE_TOO_LARGE"
    assert raised.value.metadata == {"limit": str(limit), "actual": str(X.nbytes)}
    assert encode_message(make_transfer(X, MaxPool2d(2)), X.nbytes)


def test_results_are_torchs(peer):
    """Branches, chains and indices are returned each with its shapes, and name their transport."""
    results = call_unary(peer, make_transfer(X, *BRANCHES))
    x = torch.from_numpy(X)
    values, indices = torch.nn.MaxPool2d(2, return_indices=True)(x)
    means = torch.nn.MaxPool2d(2)(torch.nn.AvgPool2d(2)(x))
    assert_same(
        results,
        [
            PoolResult(values.numpy(), ((2, 3, 4, 4),), indices.numpy()),
            PoolResult(means.numpy(), ((2, 3, 4, 4), (2, 3, 2, 2))),
        ],
    )
    assert {each.transport for each in results} == {"unary"}
    assert repr(results[1]) == "<PoolResult float32 (2, 3, 4, 4) -> (2, 3, 2, 2)>"


def test_results_do_not_share_memory(peer):
    """Output arrays are writable, and independent of each other and of the message."""
    transfer = make_transfer(X, MaxPool2d(2), MaxPool2d(2))
    data = peer.unary(encode_message(transfer, 2**20))
    before = bytes(data)
    for result in decode_message(transfer, data):
        result.output[:] = 7
    assert data == before
    assert_same(decode_message(transfer, data), call_unary(peer, make_transfer(X, MaxPool2d(2), MaxPool2d(2))))


def answer(transfer, *, more=b"", payload=None):
    """Return an answer to a call of MaxPool2d(2) on X, with unknown fields and another payload."""
    spec = TensorSpec("float32", (2, 3, 4, 4))
    message = pool_pb2.PoolResponse(results=encode_results([BranchResult((spec.shape,), spec)]))
    message.payload = np.arange(spec.numel, dtype=np.float32).tobytes() if payload is None else payload
    assert transfer.prepared.request.branches == ((MaxPool2d(2),),)
    return message.SerializeToString() + more


def test_any_encoding_of_an_answer_is_read():
    """Fields in another order, and unknown fields after the payload, change nothing."""
    transfer = make_transfer(X, MaxPool2d(2))
    message = answer(transfer)
    header, payload = framing.split_payload(message, pool_pb2.PoolResponse)
    for other in (framing.join(b"", [payload]) + header, message, answer(transfer, more=b"\x82\x01\x00"), message):
        (result,) = decode_message(transfer, other)
        assert result.output.tobytes() == payload


@pytest.mark.parametrize("out", [(), (np.zeros((2, 3, 4, 4), np.float32),)], ids=["new", "out"])
@pytest.mark.parametrize(
    "shape", [(1, 3, 4, 4), (2, 3, 4, 5), (2, 9, 4, 4), (2, 3, 0, 4), (2, 3, -4, 4), (96,)], ids=str
)
def test_an_answer_of_another_shape_is_an_internal_error(shape, out):
    """Shapes other than those of the layers are an error of the server, with the shapes that it sent."""
    transfer = make_transfer(X, MaxPool2d(2), out=out)
    results = encode_results([BranchResult((shape,), TensorSpec("float32", shape))])
    with pytest.raises(InternalError, match=re.escape(f"got [({shape},)]")) as raised:
        decode_message(transfer, pool_pb2.PoolResponse(results=results, payload=bytes(384)).SerializeToString())
    assert raised.value.reason == "ANSWER"


def test_an_answer_with_other_results_is_an_internal_error():
    """No results, one too many, and an unknown dtype are errors of the server, never of the caller."""
    transfer = make_transfer(X, MaxPool2d(2))
    one = BranchResult(((2, 3, 4, 4),), TensorSpec("float32", (2, 3, 4, 4)))
    unknown = pool_pb2.BranchResult(output=pool_pb2.TensorSpec(dtype=99))  # type: ignore[arg-type]  # as a server may
    for results in ([], encode_results([one, one]), [unknown]):
        with pytest.raises(InternalError):
            decode_message(transfer, pool_pb2.PoolResponse(results=results).SerializeToString())


def test_bytes_that_are_not_an_answer_are_an_internal_error():
    """Bytes that protobuf cannot parse are an error of the server."""
    with pytest.raises(InternalError, match="expected a PoolResponse, got bytes that cannot be parsed"):
        decode_message(make_transfer(X, MaxPool2d(2)), b"\xff\xff")


@pytest.mark.parametrize("length", [0, 1, 383, 385])
def test_a_payload_of_another_length_is_an_internal_error(length):
    """A payload that does not fit the shapes in its header is an error of the server, also after a correct answer."""
    transfer = make_transfer(X, MaxPool2d(2))
    for _ in range(2):
        with pytest.raises(InternalError) as raised:
            decode_message(transfer, answer(transfer, payload=bytes(length)))
        assert raised.value.reason == "ANSWER"
        decode_message(transfer, answer(transfer))


def test_progress_is_reported_once(peer):
    """A message reports all planes when it has been read."""
    reported = []
    call_unary(peer, make_transfer(X, MaxPool2d(2)), lambda *planes: reported.append(planes))
    assert reported == [(6, 6)]


def steps_of(x, *, retry=True, options=None):
    """Return the steps of a unary call."""
    return unary_steps(
        make_transfer(x, MaxPool2d(2)), options or CallOptions(None, ()), None, max_message_bytes=2**30, retry=retry
    )


def test_a_call_is_one_step(peer):
    """The call sends its message to Pool, and returns the results of the response."""
    steps = steps_of(X)
    step = next(steps)
    assert (step.method, step.socket) == (POOL, "")
    with pytest.raises(StopIteration) as stop:
        steps.send(peer.unary(step.message))
    assert_same(stop.value.value, call_unary(peer, make_transfer(X, MaxPool2d(2))))


def test_a_call_whose_connection_breaks_is_sent_once_more():
    """The second attempt sends the same message; its error is the call's."""
    steps = steps_of(X)
    step = next(steps)
    assert steps.throw(UnavailableError("Socket closed")) is step
    with pytest.raises(UnavailableError, match="recvmsg"):
        steps.throw(UnavailableError("recvmsg: Connection reset by peer"))


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        (UnavailableError("Socket closed"), False),
        (UnavailableError("full", retry_delay=0.1), True),
        (InvalidArgumentError("Socket closed"), True),
    ],
    ids=["retries disabled", "server full", "another error"],
)
def test_other_errors_end_the_call(error, retry):
    """A call is not sent again if retries are disabled, or if the connection did not break."""
    steps = steps_of(X, retry=retry)
    next(steps)
    with pytest.raises(type(error)) as raised:
        steps.throw(error)
    assert raised.value is error


@pytest.mark.parametrize("nbytes", [16, 2**20])
def test_a_message_of_any_size_is_announced(nbytes):
    """The metadata has the size of the message, after the caller's own."""
    options = CallOptions(None, (("key", "value"),))
    step = next(steps_of(np.zeros((1, 1, 2, nbytes // 8), np.float32), options=options))
    announced = ("poolrpc-message-bytes", str(len(step.message)))
    assert options.arguments()["metadata"] == (("key", "value"), announced)
