"""Packets on connections for local calls: each must be answered, or end its connection if it is not a call."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from fuzz.arena_sockets import send
from fuzz.findings import FoundError
from fuzz.seeds import CLOSE, CUT, FDS, NEW, READ, SHUT, WRONG
from poolrpc._wire.arena_packets import SUFFIX, decode_attach_response, encode_attach_request
from poolrpc._wire.local_packets import MAX_PACKET_BYTES, decode_answer
from poolrpc.errors import BY_CODE, InternalError, PoolError
from poolrpc.v1 import pool_pb2
from poolrpc_server.protocols.messages import NO_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzz.mutate import Case

DEADLINE = 30.0
"""Seconds after which a call counts as hung."""
MAX_OPEN = 4
RESPONSES = (pool_pb2.PoolResponse, pool_pb2.InferShapeResponse, pool_pb2.GetServerInfoResponse)


def converse(path: str, case: Case, prepare: Callable[[bytes], bytes]) -> str:
    """Send calls to a server's socket, and return how the last answer that was read ended.

    Args:
        path: The path of the server's socket.
        case: For each call its flags (a byte, a wrong length of its header, its deadline), its header and its request.
        prepare: Replaces placeholders in a request.

    Raises:
        FoundError: It ended in a way that is a bug.

    """
    ending = "silent"
    with ExitStack() as opened:
        peers: list[socket.socket] = []
        for at in range(0, len(case), 3):
            flags, header, request = (*case[at : at + 3], b"", b"")[:3]
            bits = (flags or b"\0")[0]
            if not peers or (bits & NEW and len(peers) < MAX_OPEN):
                peers.append(opened.enter_context(_connected(path)))
            peer = peers[-1]
            length = int.from_bytes(flags[1:3], "little") if bits & WRONG else min(len(header), 0xFFFF)
            packet = length.to_bytes(2, "little") + flags[3:11].ljust(8, b"\xff") + header + prepare(request)
            with suppress(ConnectionError):  # an earlier packet has ended it
                send(peer, packet[: len(packet) // 2] if bits & CUT else packet, bits & FDS)
                if bits & SHUT:
                    peer.shutdown(socket.SHUT_WR)
                if bits & READ:
                    ending = _answer_of(peer)
            if bits & CLOSE:
                peers.pop().close()
    return ending


def _connected(path: str) -> socket.socket:
    while True:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        peer.settimeout(DEADLINE)
        peer.connect(path + SUFFIX)
        with suppress(ConnectionError):  # other callers have filled the server's queue of new connections
            peer.send(encode_attach_request(0))
            if packet := peer.recv(MAX_PACKET_BYTES):
                if not decode_attach_response(packet).calls:
                    raise FoundError("no connection for calls")
                return peer
        peer.close()


def _answer_of(peer: socket.socket) -> str:
    try:
        packet = peer.recv(MAX_PACKET_BYTES)
    except TimeoutError:
        raise FoundError("neither an answer nor the end of the connection") from None
    if not packet:
        return "ended"
    try:
        response = decode_answer(packet)
    except PoolError as error:
        if isinstance(error, InternalError) and error.reason != NO_MESSAGE:
            raise FoundError(f"INTERNAL: {error.message}") from None
        if error.code not in BY_CODE or error.code == "CANCELLED":
            raise FoundError(f"{error.code}: {error.message}") from None
        return f"{error.code}/{error.reason}"
    for kind in RESPONSES:
        with suppress(DecodeError):
            kind.FromString(response)
            return "OK"
    raise FoundError("a response that does not parse")
