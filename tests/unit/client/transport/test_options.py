"""The options of a call, and the choice of its transport."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest

from poolrpc import InvalidArgumentError, LPPool2d, MaxPool2d
from poolrpc._transport import options
from poolrpc._transport.options import CallOptions, check_transport, default_transport, transport_by_size
from tests.unit.client.transport.peer import make_transfer

X = np.zeros((2, 3, 8, 8), np.float32)
LIMIT = 10 * X.nbytes


@pytest.mark.parametrize("timeout", [None, math.inf])
def test_a_call_without_timeout_has_no_deadline(timeout):
    """None and math.inf are no limit."""
    assert CallOptions(timeout, ()).time_remaining() is None


def test_the_deadline_is_fixed_at_the_start():
    """Each attempt has what remains of the timeout, and the metadata added before it."""
    call = CallOptions(10.0, (("a", "1"),))
    first = call.arguments()
    time.sleep(0.001)
    call.add_metadata({"b": "2"})
    second = call.arguments()
    assert 0 < second["timeout"] < first["timeout"] <= 10
    assert (first["metadata"], second["metadata"]) == ((("a", "1"),), (("a", "1"), ("b", "2")))


@pytest.mark.parametrize("transport", ["", "Unary", "grpc", 1, b"unary"])
def test_an_unknown_transport_is_rejected(transport):
    """A transport is one of three, or None for the fastest."""
    for known in ("unary", "stream", "arena", None):
        check_transport(known)
    with pytest.raises(InvalidArgumentError, match=r"^transport: expected one of unary, stream, arena or None, got"):
        check_transport(transport)


def test_the_transport_is_chosen_by_size():
    """Large tensors are streamed and others sent in a message; unsplittable ones are streamed if a message can't be."""
    size = X.nbytes
    assert transport_by_size(make_transfer(X, MaxPool2d(2)), LIMIT, stream_min_bytes=size) == "stream"
    assert transport_by_size(make_transfer(X, LPPool2d(2, 2)), LIMIT, stream_min_bytes=size) == "stream"
    assert transport_by_size(make_transfer(X, LPPool2d(3, 2)), LIMIT, stream_min_bytes=size) == "unary"
    assert transport_by_size(make_transfer(X, LPPool2d(3, 2)), size - 1, stream_min_bytes=size) == "stream"
    assert transport_by_size(make_transfer(X, MaxPool2d(2)), LIMIT, stream_min_bytes=size + 1) == "unary"


@pytest.mark.parametrize(
    ("nbytes", "found", "chosen"),
    [
        (options.ARENA_MIN_BYTES - 4, False, "unary"),
        (options.ARENA_MIN_BYTES - 4, True, "unary"),
        (options.ARENA_MIN_BYTES, False, "arena"),
        (options.ARENA_MAX_BYTES, False, "arena"),
        (options.ARENA_MAX_BYTES + 4, False, "stream"),
        (options.ARENA_MAX_BYTES + 4, True, "arena"),
    ],
)
def test_an_arena_is_chosen_by_size_unless_the_tensor_is_in_one(nbytes, found, chosen):
    """On a unix socket, small tensors are sent, and very large ones are not copied to an arena."""
    x = np.broadcast_to(np.float32(0), (1, 1, 1, nbytes // 4))
    assert (
        default_transport(make_transfer(x, MaxPool2d(1)), SimpleNamespace(find=lambda _: found or None), 2**40)
        == chosen
    )
    without = default_transport(make_transfer(x, MaxPool2d(1)), None, 2**40)
    assert without == ("unary" if nbytes < options.STREAM_MIN_BYTES else "stream")
