"""The packets with which a client attaches an arena, and definitions that both sides of the arena socket share."""

from __future__ import annotations

import socket as sockets
import struct

from google.protobuf.message import DecodeError

from poolrpc._wire.status import STATUS_NUMBERS, decode_error, encode_error
from poolrpc.errors import InvalidArgumentError, PoolError, UnavailableError
from poolrpc.v1 import pool_pb2

SUFFIX = ".arena"
"""The suffix of an arena socket's path, after the path of the server's own socket."""

ID_BYTES = 16
"""The length of an arena id, in bytes."""

_ERROR_CODES = {number: code for code, number in STATUS_NUMBERS.items() if code != "OK"}
_CREDENTIALS = struct.Struct("iII")  # the result of SO_PEERCRED: process, user and group id


def peer_uid(connection: sockets.socket) -> int:
    """Return the user id of the process at the other end of a unix socket (Linux)."""
    credentials = connection.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(credentials)[1]
    return uid


def peer_pid(connection: sockets.socket) -> int:
    """Return the id of the process that connected the other end of a unix socket (Linux); 0 if it isn't visible."""
    credentials = connection.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(credentials)[0]
    return pid


def encode_attach_request(size: int) -> bytes:
    """Return the packet that requests an arena of `size` bytes; of 0 bytes: a connection that carries calls."""
    return pool_pb2.AttachRequest(size=size, calls=not size).SerializeToString()


def decode_attach_request(packet: bytes) -> tuple[int, bool]:
    """Return the size, in bytes, that a packet requests, and whether it requests a connection that carries calls.

    Raises:
        InvalidArgumentError: The packet is not an AttachRequest.

    """
    try:
        request = pool_pb2.AttachRequest.FromString(packet)
    except DecodeError:
        raise InvalidArgumentError("expected an AttachRequest, got another packet", field="request") from None
    return request.size, request.calls


def encode_attach_response(arena_id: bytes, size: int, socket: str = "", *, calls: bool = False) -> bytes:
    """Return the packet that accompanies the descriptor of an arena.

    Args:
        arena_id: The server's id of the arena.
        size: The size of the arena, in bytes.
        socket: The name of the socket, in the same directory as the server's, that serves calls which use the arena;
            empty for the server's own.
        calls: Whether the connection carries calls, and there is no arena.

    """
    return pool_pb2.AttachResponse(arena_id=arena_id, size=size, socket=socket, calls=calls).SerializeToString()


def encode_attach_error(error: PoolError) -> bytes:
    """Return the packet that rejects a request for an arena."""
    response = pool_pb2.AttachResponse()
    response.error.MergeFromString(encode_error(error)[1])
    return response.SerializeToString()


def decode_attach_response(packet: bytes) -> pool_pb2.AttachResponse:
    """Return the response that a packet is.

    Raises:
        PoolError: The packet rejects the request.
        UnavailableError: The packet is not an AttachResponse.

    """
    try:
        response = pool_pb2.AttachResponse.FromString(packet)
    except DecodeError:
        raise unexpected("an AttachResponse", "another packet") from None
    if response.HasField("error"):
        code = _ERROR_CODES.get(response.error.code, "UNKNOWN")
        raise decode_error(code, response.error.message, response.error.SerializeToString())
    return response


def unexpected(expected: str, received: str) -> UnavailableError:
    """Return the error for a server that does not attach an arena as it should."""
    return UnavailableError(f"arena: expected {expected}, got {received}", reason="ARENA")
