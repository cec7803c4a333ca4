"""The packets that attach an arena."""

import os
import socket
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import InvalidArgumentError, LimitExceededError, PermissionDeniedError, PoolError, UnavailableError
from poolrpc._wire.arena_packets import (
    decode_attach_request,
    decode_attach_response,
    encode_attach_error,
    encode_attach_request,
    encode_attach_response,
    peer_uid,
)
from poolrpc.v1 import pool_pb2


@given(st.integers(0, 2**64 - 1))
def test_a_request_has_the_size(size):
    """The size survives encoding and decoding; without one the request is for a connection that carries calls."""
    assert decode_attach_request(encode_attach_request(size)) == (size, not size)


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**64 - 1), st.sampled_from(["", "pool.sock.2"]))
def test_a_response_describes_the_arena(arena_id, size, name):
    """The id, the size and the socket survive encoding and decoding."""
    response = decode_attach_response(encode_attach_response(arena_id, size, name))
    assert (response.arena_id, response.size, response.socket, response.calls) == (arena_id, size, name, False)
    assert decode_attach_response(encode_attach_response(b"", 0, name, calls=True)).calls


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("expected at least 1 byte, got 0", field="size"),
        LimitExceededError("too large", reason="ARENA_QUOTA", metadata={"limit": "1", "actual": "2"}),
        PermissionDeniedError("another user", reason="ARENA_USER"),
        UnavailableError("stopping", retry_delay=0.25),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_rejection_is_raised_as_it_was(error):
    """The class, the message and all attributes survive encoding and decoding."""
    with pytest.raises(PoolError) as raised:
        decode_attach_response(encode_attach_error(error))
    assert type(raised.value) is type(error)
    assert vars(raised.value) == vars(error)


@pytest.mark.parametrize("code", [0, 99])
def test_a_rejection_without_a_known_code_is_unknown(code):
    """A code that is not an error's makes a plain PoolError."""
    response = pool_pb2.AttachResponse()
    response.error.code = code
    with pytest.raises(PoolError, match=r"^UNKNOWN: $") as raised:
        decode_attach_response(response.SerializeToString())
    assert type(raised.value) is PoolError


def test_bytes_that_cannot_be_parsed_are_an_error_of_their_sender():
    """The server answers a bad request with INVALID_ARGUMENT; for the client, the server is unavailable."""
    with pytest.raises(InvalidArgumentError, match="expected an AttachRequest, got another packet"):
        decode_attach_request(b"\xff")
    with pytest.raises(UnavailableError, match="expected an AttachResponse, got another packet"):
        decode_attach_response(b"\xff")


@pytest.mark.skipif(sys.platform != "linux", reason="SO_PEERCRED is Linux's")
def test_the_uid_of_a_peer_is_that_of_its_process():
    """Both ends of a pair of sockets belong to this process."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_uid(ours) == peer_uid(theirs) == os.geteuid()
