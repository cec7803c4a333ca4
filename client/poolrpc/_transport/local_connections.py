"""A client's connections for calls that are packets on the arena socket of a server on the same machine."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from poolrpc._transport.channel import MAX_RETRY_TOKENS, RETRY_TOKEN_RATIO
from poolrpc._wire.arena_packets import SUFFIX, decode_attach_response, encode_attach_request, peer_uid, unexpected
from poolrpc._wire.local_packets import MAX_PACKET_BYTES, decode_answer
from poolrpc.errors import DeadlineExceededError, PoolError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from poolrpc.tensors import Bytes

MAX_IDLE = 16
"""The connections to one process that a client keeps open between calls. Each carries one call at a time."""

MAX_POLL_MS = 2**31 - 1
"""The longest wait that the system knows, 24 days, in milliseconds."""

CONNECT_SECONDS = 2.0
"""Seconds that the server may take for each step of accepting a connection."""

RETRY_SECONDS = 5.0
"""Seconds after a rejection during which no connection is tried, so that calls go through gRPC without a delay."""


class NotLocalError(UnavailableError):
    """The server cannot be called by packets; calls can go through gRPC."""

    default_reason = "LOCAL"


class LostError(NotLocalError):
    """A connection ended before the answer."""


class LocalConnection:
    """A connection that carries one call at a time.

    Attributes:
        socket: The socket.
        process: The name of the socket of the server process at the other end; empty if there is only one.
        buffer: Receives the answers.

    """

    __slots__ = ("_answers", "buffer", "process", "socket")

    def __init__(self, connection: socket.socket, process: str) -> None:
        self.socket, self.process = connection, process
        self.buffer = memoryview(bytearray(MAX_PACKET_BYTES))
        self._answers = select.poll()
        self._answers.register(connection, select.POLLIN)

    def call(self, packet: Sequence[Bytes], timeout: float | None) -> bytes:
        """Send a call, and return its response.

        Args:
            packet: The parts of the packet.
            timeout: Seconds until the deadline; None for no deadline.

        Raises:
            PoolError: The call failed.
            TimeoutError: The deadline passed.
            OSError: The connection has ended.

        """
        # A socket with a timeout would be polled before it sends, too: there is room, since the last answer is here.
        self.socket.sendmsg(packet)
        if not self._answers.poll(None if timeout is None else min(ceil(timeout * 1000), MAX_POLL_MS)):
            raise TimeoutError
        return self.answer(self.socket.recv_into(self.buffer))

    def answer(self, nbytes: int) -> bytes:
        """Return the response in an answer of so many bytes, which was received into the buffer.

        Raises:
            PoolError: The call failed.
            ConnectionError: The answer is the end of the connection.

        """
        if not nbytes:
            raise ConnectionResetError
        return decode_answer(self.buffer[:nbytes])


class LocalConnections:
    """The connections of one client, made when they are needed; any number of threads may use them.

    Args:
        path: The path of the server's unix socket.

    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._idle: dict[str, list[LocalConnection]] = {}
        self._active: set[LocalConnection] = set()
        self._lock = threading.Lock()
        self._rejected_until = 0.0
        self._closed = False
        self._retry_tokens: float = MAX_RETRY_TOKENS

    @property
    def available(self) -> bool:
        """Whether the last attempt to connect succeeded, or may be repeated now."""
        return not self._rejected_until or time.monotonic() >= self._rejected_until

    def call(self, process: str, packet: Sequence[Bytes], timeout: float | None) -> bytes:
        """Send a call, and return its response.

        Args:
            process: The name of the socket of the server process; empty: any process.
            packet: The parts of the packet.
            timeout: Seconds until the deadline; None for no deadline.

        Raises:
            PoolError: The call failed.
            NotLocalError: The server cannot be called in this way, or the connection ended before the answer.

        """
        while (connection := self.take(process)) is None:
            self.connect(process)
        try:
            response = connection.call(packet, timeout)
        except BaseException as error:  # noqa: BLE001 - raised, or another in its place
            raise self.failed(connection, error) from error.__cause__
        self.put_back(connection)
        return response

    def take(self, process: str) -> LocalConnection | None:
        """Take an idle connection to a process (empty: to any) for one call; return None if there is none."""
        with self._lock:
            for idle in self._idle.values() if not process else (self._idle.get(process, ()),):
                if idle:
                    connection = idle.pop()
                    self._active.add(connection)
                    return connection
        return None

    def put_back(self, connection: LocalConnection) -> None:
        """Return a connection after its call was answered."""
        with self._lock:
            self._active.discard(connection)
            idle = self._idle.setdefault(connection.process, [])
            if not self._closed and len(idle) < MAX_IDLE:
                idle.append(connection)
                return
        connection.socket.close()

    def failed(self, connection: LocalConnection, error: BaseException) -> BaseException:
        """Return the error of a call, and its connection, which is closed unless the call was answered.

        Args:
            connection: The connection.
            error: What the call raised.

        """
        if isinstance(error, PoolError):
            self.put_back(connection)
            return error
        lost = isinstance(error, OSError) and not isinstance(error, TimeoutError)
        with self._lock:
            self._active.discard(connection)
            # The others of a process that has ended have ended too.
            ended = self._idle.pop(connection.process, []) if lost else []
        for each in (connection, *ended):  # an answer may still be on its way
            each.socket.close()
        if lost:
            return LostError("expected an answer, got the end of the connection: the server has ended; try again")
        return DeadlineExceededError("the deadline passed") if isinstance(error, TimeoutError) else error

    def connect(self, process: str) -> None:
        """Make an idle connection, which may block.

        Raises:
            NotLocalError: The server cannot be reached, or does not serve calls in this way.

        """
        path = Path(self._path).with_name(process) if process else self._path
        try:
            connection = connect(f"{path}{SUFFIX}")
        except PoolError as error:
            if not process:  # a process that has ended is replaced, and its arenas are forgotten
                self._rejected_until = time.monotonic() + RETRY_SECONDS
            raise NotLocalError(error.message) from error
        self._rejected_until = 0.0
        connection.process = process or connection.process  # the name by which it is taken
        self.put_back(connection)
        if self._closed:
            raise NotLocalError("the client was closed")

    def may_retry(self) -> bool:
        """Count a failure, and return whether its call may be sent again: gRPC's rule, with gRPC's numbers."""
        self._retry_tokens = max(0.0, self._retry_tokens - 1)
        return self._retry_tokens > MAX_RETRY_TOKENS / 2

    def succeeded(self) -> None:
        """Count a success."""
        if self._retry_tokens < MAX_RETRY_TOKENS:
            self._retry_tokens = min(MAX_RETRY_TOKENS, self._retry_tokens + RETRY_TOKEN_RATIO)

    def leave_to_parent(self) -> None:
        """Close the child's copies of the connections, after a fork: the parent uses them."""
        self._lock = threading.Lock()  # a thread of the parent may have held it
        idle, self._idle = self._idle, {}
        for connections in (*idle.values(), self._active):
            for connection in connections:
                connection.socket.close()
        self._active = set()

    def close(self) -> None:
        """Close the connections, and end the calls that they carry."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
            for active in self._active:
                with suppress(OSError):
                    active.socket.shutdown(socket.SHUT_RDWR)
        for connections in idle.values():
            for connection in connections:
                connection.socket.close()


def connect(path: str) -> LocalConnection:
    """Connect to an arena socket for calls.

    Raises:
        PoolError: The server rejects the connection, cannot be reached, or sends something unexpected.

    """
    if sys.platform != "linux":
        raise NotLocalError("calls by packets need Linux: other systems lack the sockets")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(CONNECT_SECONDS)
        connection.connect(path)
        process = _handshake(connection)
        connection.setblocking(False)
        return LocalConnection(connection, process)
    except OSError as error:
        connection.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise NotLocalError(f"{path}: {reason}") from None
    except BaseException:
        connection.close()
        raise


def _handshake(connection: socket.socket) -> str:
    """Ask for calls on a connection, and return the name of the socket of the server process at its other end."""
    if (uid := peer_uid(connection)) not in (os.geteuid(), 0):
        raise unexpected(f"a server of user {os.geteuid()} or 0", f"one of user {uid}")
    with suppress(BrokenPipeError):  # the server may have rejected the connection already, and says why
        connection.send(encode_attach_request(0))
    response = decode_attach_response(connection.recv(MAX_PACKET_BYTES))
    if not response.calls:
        raise unexpected("a connection for calls", "another one")
    return response.socket
