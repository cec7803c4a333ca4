"""Requests that repeat the beginning of earlier ones, which the server does not read field by field again."""

from __future__ import annotations

from itertools import permutations

import grpc
import numpy as np
import pytest

from poolrpc import MaxPool2d
from poolrpc._wire import framing
from poolrpc._wire.codec import Request, encode_request
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2

METHOD = "/poolrpc.v1.PoolService/Pool"
SHAPE = (1, 1, 4, 8)
FIRST, SECOND = (np.random.default_rng(seed).standard_normal(SHAPE, np.float32) for seed in range(2))


def pooled(x: np.ndarray, height: int, width: int) -> bytes:
    """Return the maxima over adjacent windows, as bytes."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // height, height, w // width, width).max((3, 5)).tobytes()


def header(*kernel: int) -> bytes:
    """Return a request without its payload."""
    return encode_request(Request(TensorSpec("float32", SHAPE), ((MaxPool2d(kernel),),))).SerializeToString()


def field(x: np.ndarray) -> bytes:
    """Return a payload with its tag and length."""
    return framing.message_prefix(b"", x.nbytes) + x.tobytes()


TALL, WIDE = header(4, 2), header(2, 4)
REQUESTS = {
    "payload last": (TALL + field(FIRST), pooled(FIRST, 4, 2)),
    "another payload": (TALL + field(SECOND), pooled(SECOND, 4, 2)),
    "another layer": (WIDE + field(FIRST), pooled(FIRST, 2, 4)),
    "payload first": (field(FIRST) + TALL, pooled(FIRST, 4, 2)),
    "payload first, another layer": (field(FIRST) + WIDE, pooled(FIRST, 2, 4)),
}
TWICE = {
    "two payloads": (TALL + field(FIRST) + field(SECOND), pooled(SECOND, 4, 2)),
    "two payloads, another last": (TALL + field(FIRST) + field(FIRST), pooled(FIRST, 4, 2)),
    "two payloads, one first": (field(FIRST) + TALL + field(SECOND), pooled(SECOND, 4, 2)),
}


@pytest.mark.parametrize("requests", [REQUESTS, TWICE], ids=["one payload", "two payloads"])
def test_requests_of_one_length_are_told_apart(address: str, requests: dict[str, tuple[bytes, bytes]]) -> None:
    """Requests of the same length that differ in fields, their order or the payload have their own answers."""
    messages = {name: message for name, (message, _) in requests.items()}
    assert len({len(message) for message in messages.values()}) == 1
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(METHOD)
        for order in permutations(messages, 3):
            for name in (*order, order[0]):
                answer = pool_pb2.PoolResponse.FromString(call(messages[name], timeout=30))
                assert answer.payload == requests[name][1], (name, order)


def test_a_request_without_its_payload_is_rejected_after_one_with_it(address: str) -> None:
    """A message as long as an earlier one, whose payload's length is another, is read again."""
    valid, expected = REQUESTS["payload last"]
    # The length of the payload is one less, and the last byte is a field of its own: cut off, it is not a message.
    start = len(TALL) + 1
    shorter = valid[:start] + bytes((valid[start] - 1,)) + valid[start + 1 :]
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(METHOD)
        for _ in range(2):
            assert pool_pb2.PoolResponse.FromString(call(valid, timeout=30)).payload == expected
            with pytest.raises(grpc.RpcError):
                call(shorter, timeout=30)
