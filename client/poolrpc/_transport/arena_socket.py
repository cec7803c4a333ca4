"""Attaching an arena: the client's side of the server's arena socket.

A server is trusted with no more than it needs. The memory it sends must be sealed against shrinking, since reading a
page that is gone kills a process; and the server must be of this user or of root, since anyone may have put a socket at
the path.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from array import array
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from poolrpc._wire.arena_packets import (
    ID_BYTES,
    SUFFIX,
    decode_attach_response,
    encode_attach_request,
    peer_uid,
    unexpected,
)
from poolrpc.errors import PoolError, UnavailableError

if sys.platform == "linux":
    import fcntl

_RESPONSE_BYTES = 8192  # a response takes 30 bytes, an error less than 5 KB


class Attachment(NamedTuple):
    """An arena that the server has shared with this client.

    Attributes:
        connection: The connection to the arena socket. The server keeps the arena while it is open.
        arena_id: The server's id of the arena.
        mapping: The memory.
        socket: The name of the socket, in the directory of the server's, for calls that use the arena; empty: the
            server's own.

    """

    connection: socket.socket
    arena_id: bytes
    mapping: mmap.mmap
    socket: str


def attach(server_path: str, size: int, timeout: float) -> Attachment:
    """Request an arena from a server.

    Args:
        server_path: The path of the server's unix socket, without SUFFIX.
        size: The size of the arena, in bytes, at least.
        timeout: Seconds that the server may take for each step.

    Raises:
        PoolError: The server rejects the request, cannot be reached, or sends something other than an arena.

    """
    if sys.platform != "linux":
        raise UnavailableError("arenas need Linux: other systems have no memfd", reason="ARENA")
    path = server_path + SUFFIX
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(timeout)
            connection.connect(path)
            return Attachment(connection, *_receive(connection, size, Path(path)))
        except BaseException:
            connection.close()
            raise
    except PoolError:
        raise
    except OSError as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnavailableError(f"{path}: {reason}", reason="ARENA") from None


def _receive(connection: socket.socket, size: int, path: Path) -> tuple[bytes, mmap.mmap, str]:
    if (uid := peer_uid(connection)) not in (os.geteuid(), 0):
        raise unexpected(f"a server of user {os.geteuid()} or 0", f"one of user {uid}")
    with suppress(BrokenPipeError):  # the server may have rejected the connection already, and says why
        connection.send(encode_attach_request(size))
    # Not socket.recv_fds, which ignores its flags before Python 3.12: without close-on-exec, a descriptor is inherited.
    packet, ancillary, flags, _ = connection.recvmsg(_RESPONSE_BYTES, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC)
    descriptors = array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) // descriptors.itemsize * descriptors.itemsize])
    try:
        response = decode_attach_response(packet)
        arena_id, arena_bytes, call_socket = response.arena_id, response.size, response.socket
        if len(descriptors) != 1 or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or len(arena_id) != ID_BYTES:
            raise unexpected("an arena and 1 descriptor", f"{len(packet)} bytes and {len(descriptors)} descriptors")
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        if fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & seals != seals:
            raise unexpected("memory that can't shrink", "memory without seals")
        available = os.fstat(descriptors[0]).st_size
        if not size <= arena_bytes <= available:
            raise unexpected(f"{size} bytes", f"{arena_bytes}, of which {available} exist")
        # Checked once here, instead of in each call that uses the socket.
        if call_socket and ("/" in call_socket or not path.with_name(call_socket).exists()):
            raise unexpected(f"the name of a socket in the folder of {path}", repr(call_socket))
        return arena_id, mmap.mmap(descriptors[0], arena_bytes), call_socket
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
