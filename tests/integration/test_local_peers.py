"""Peers of the local transport that do not keep to its protocol."""

from __future__ import annotations

import os
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import poolrpc
from poolrpc import MaxPool2d, PoolClient
from poolrpc._wire.local_packets import MAX_PACKET_BYTES, decode_answer, encode_call
from poolrpc.v1 import pool_pb2
from scripts.server_process import serving
from tests.integration.local_calls import POOL, X, packet_socket, request_of, wait_for
from tests.scrape import Scrape

if TYPE_CHECKING:
    from poolrpc_server import Server

if sys.platform != "linux":
    pytest.skip("the arena socket needs Linux", allow_module_level=True)

INFO = "poolrpc.v1.PoolService/GetServerInfo"
STREAMS = {"grpc_type": "bidi_stream", "grpc_service": "poolrpc.v1.PoolService", "grpc_method": "PoolStream"}
"""The labels of the method that streams."""


def header(**fields: object) -> bytes:
    """Return the packet of a call without a message."""
    call = pool_pb2.LocalCall(**fields).SerializeToString()
    return struct.pack("<HQ", len(call), 0) + call


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (b"\1", "expected the packet of a call"),
        (b"\xff" * 10, "expected a header of 65535 bytes, got 0"),
        (b"\2\0" + bytes(8) + b"\xff\xff", "expected the header of a call"),
        (header(method="/a", metadata=[b"key"]), "expected keys and values, got 1 texts"),
        (bytes(MAX_PACKET_BYTES + 1), "expected a packet of at most"),
        (os.urandom(1000), "expected "),
    ],
    ids=["short", "header beyond the end", "no header", "odd metadata", "too large", "random"],
)
def test_a_packet_that_is_not_a_call_ends_its_connection(local_server: Server, packet: bytes, message: str) -> None:
    """The peer learns why, and others are served."""
    with packet_socket(local_server.addresses[0]) as peer:
        peer.send(packet)
        with pytest.raises(poolrpc.InvalidArgumentError, match=message):
            decode_answer(peer.recv(MAX_PACKET_BYTES))
        assert peer.recv(1) == b""
    with PoolClient(local_server.addresses[0]) as client:
        assert client.pool(X, MaxPool2d(2)).transport == "local"


@pytest.mark.parametrize(
    ("method", "message", "error"),
    [
        ("poolrpc.v1.PoolService/PoolStream", b"", poolrpc.UnsupportedError),
        ("no.Such/Method", b"", poolrpc.UnsupportedError),
        (POOL, b"\xff\xff", poolrpc.InternalError),
        (POOL, b"", poolrpc.InvalidArgumentError),
    ],
)
def test_calls_that_cannot_be_answered(
    local_server: Server, method: str, message: bytes, error: type[poolrpc.PoolError]
) -> None:
    """A stream, an unknown method and a wrong message are errors of the call alone: the connection goes on."""
    with packet_socket(local_server.addresses[0]) as peer:
        for _ in range(3):
            peer.sendmsg(encode_call(method, 60, (), (message,)))
            with pytest.raises(error):
                decode_answer(peer.recv(MAX_PACKET_BYTES))
        if method.endswith("PoolStream"):  # seen by those who watch the server, as over gRPC
            shown = Scrape(local_server.metrics_address)
            assert shown("grpc_server_handled_total", **STREAMS, grpc_code="Unimplemented") == 3
        peer.sendmsg(encode_call(INFO, None, (), (b"",)))
        assert pool_pb2.GetServerInfoResponse.FromString(decode_answer(peer.recv(MAX_PACKET_BYTES))).version


def test_a_deadline_that_has_passed(local_server: Server) -> None:
    """A call without time left is not computed."""
    with packet_socket(local_server.addresses[0]) as peer, PoolClient(local_server.addresses[0]) as client:
        peer.sendmsg(encode_call(POOL, 0.0, (), request_of(client, X)))
        with pytest.raises(poolrpc.DeadlineExceededError):
            decode_answer(peer.recv(MAX_PACKET_BYTES))


def test_a_peer_that_never_reads(local_server: Server) -> None:
    """A peer whose answers fill its buffer is disconnected, and no thread waits for it."""
    with packet_socket(local_server.addresses[0]) as peer:
        peer.setblocking(False)
        call = b"".join(encode_call(INFO, None, (), (b"",)))
        while local_server.local_connections():
            with suppress(OSError):  # its buffer is full, and then it is disconnected
                peer.send(call)
    with PoolClient(local_server.addresses[0]) as client:
        assert client.pool(X, MaxPool2d(2)).transport == "local"
    wait_for(local_server, "poolrpc_inflight_bytes", 0)


def test_descriptors_that_no_one_asked_for_are_closed(local_server: Server) -> None:
    """A descriptor that comes with a call ends the connection, and does not stay in the server."""
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        with packet_socket(local_server.addresses[0]) as peer:
            socket.send_fds(peer, [b"".join(encode_call(INFO, None, (), (b"",)))], [0])
            with pytest.raises(poolrpc.InvalidArgumentError, match="got a descriptor"):
                decode_answer(peer.recv(MAX_PACKET_BYTES))
            assert peer.recv(1) == b""
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 1


def test_connections_are_limited(tmp_path: Path) -> None:
    """One connection too many is rejected, and its client calls by gRPC."""
    address = f"unix:{tmp_path / 'pool.sock'}"
    with (
        serving("--max-connections", "2", listen=address),
        packet_socket(address),
        packet_socket(address),
        PoolClient(address) as client,
    ):
        assert client.pool(X, MaxPool2d(2)).transport == "unary"
