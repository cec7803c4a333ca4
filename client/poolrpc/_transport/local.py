"""Calls that are sent as packets to a server on the same machine: the client's connections for them."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from poolrpc._transport.arena import arena_steps
from poolrpc._transport.channel import POOL
from poolrpc._transport.steps import SendLocal
from poolrpc._transport.unary import decode_message
from poolrpc._wire.arena_packets import SUFFIX, decode_attach_response, encode_attach_request, peer_uid, unexpected
from poolrpc._wire.local_packets import MAX_PACKET_BYTES, decode_answer, encode_call
from poolrpc.errors import CancelledError, DeadlineExceededError, PoolError, UnavailableError
from poolrpc.tensors import array_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from poolrpc._transport.arena_memory import Arenas
    from poolrpc._transport.options import CallOptions
    from poolrpc._transport.request import Transfer
    from poolrpc._transport.result import PoolResult, Progress
    from poolrpc._transport.steps import Steps
    from poolrpc.tensors import Bytes

INLINE_BYTES = 64 * 2**10
"""The largest input, and the largest output, that are in the packets themselves; larger ones are in an arena."""

MAX_IDLE = 16
"""The connections that a client keeps open between calls. Each carries one call at a time."""

CONNECT_SECONDS = 2.0
"""Seconds that the server may take to accept a connection."""

RETRY_SECONDS = 5.0
"""Seconds after a rejection during which no connection is tried, so that calls go through gRPC without a delay."""


def local_steps(  # noqa: PLR0913 - the call, and what its caller chose
    transfer: Transfer,
    arenas: Arenas | None,
    options: CallOptions,
    progress: Progress | None,
    *,
    copy: bool,
    required: bool,
) -> Steps[list[PoolResult] | None]:
    """Pool tensors by a packet, with large ones in an arena; return None if the server cannot be called in this way.

    Args:
        transfer: The tensors.
        arenas: The arenas of the client.
        options: The options of the call.
        progress: Called when all planes are done.
        copy: Whether the results are copied out of an arena.
        required: Whether to raise an error instead of returning None.

    """
    prepared = transfer.prepared
    if max(prepared.nbytes, prepared.output_nbytes) > INLINE_BYTES:
        return (
            yield from arena_steps(
                transfer, arenas, options, progress, copy=copy, required=required, send=send_steps, transport="local"
            )
        )
    try:
        response = yield from send_steps(POOL, (prepared.head, *map(array_bytes, transfer.arrays)), options)
    except UnavailableError:
        if required:
            raise
        return None
    return decode_message(transfer, response, progress, "local")


def send_steps(method: str, message: Iterable[Bytes], options: CallOptions, process: str = "") -> Steps[bytes]:
    """Send a call as a packet, once more if its connection ends, and return the response.

    Args:
        method: "package.Service/Method".
        message: The parts of the request.
        options: The options of the call.
        process: The name of the socket of the server process; empty: any process.

    Raises:
        UnavailableError: The server cannot be called in this way.

    """
    parts = tuple(message)
    for attempt in range(2):
        packet = encode_call(method, options.time_remaining(), options.metadata, parts)
        if packet is None:
            raise UnavailableError(f"expected at most {MAX_PACKET_BYTES} bytes in a packet, got more", reason="LOCAL")
        try:
            response: bytes = yield SendLocal(packet, options, process)
        except LostError:
            if attempt:
                raise
        else:
            return response
    raise AssertionError("unreachable: the second attempt returns or raises")


class LostError(UnavailableError):
    """A connection ended before the answer."""


class LocalConnection:
    """A connection that carries calls.

    Attributes:
        socket: The socket.
        process: The name of the socket of the server process at the other end; empty if there is only one.

    """

    __slots__ = ("process", "socket")

    def __init__(self, connection: socket.socket, process: str) -> None:
        self.socket, self.process = connection, process


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
        self._retry_at = 0.0
        self._closed = False

    @property
    def available(self) -> bool:
        """Whether the last attempt to connect succeeded, or may be repeated now."""
        return not self._closed and time.monotonic() >= self._retry_at

    def idle(self, process: str) -> bool:
        """Return whether there is an idle connection to a process; empty: to any."""
        return bool(self._idle.get(process)) if process else any(self._idle.values())

    def prepare(self, process: str) -> None:
        """Make an idle connection, which may block.

        Raises:
            UnavailableError: As borrow.

        """
        connection = self._connect(process)
        with self._lock:
            self._active.discard(connection)
            self._idle.setdefault(connection.process, []).append(connection)

    @contextmanager
    def borrow(self, process: str) -> Iterator[LocalConnection]:
        """Borrow a connection for one call. If the call fails, the connection is closed.

        Args:
            process: The name of the socket of the server process; empty: any process.

        Raises:
            UnavailableError: The server cannot be reached, or does not serve calls in this way.

        """
        connection = self._take(process) or self._connect(process)
        try:
            yield connection
        except BaseException as error:
            with self._lock:
                self._active.discard(connection)
                # The others of a process that has ended have ended too.
                ended = self._idle.pop(connection.process, []) if isinstance(error, LostError) else []
            for each in (connection, *ended):  # an answer may still be on its way
                each.socket.close()
            if self._closed and isinstance(error, LostError):
                raise CancelledError("the client was closed during the call", reason="CLOSED") from None
            raise
        with self._lock:
            self._active.discard(connection)
            idle = self._idle.setdefault(connection.process, [])
            if not self._closed and len(idle) < MAX_IDLE:
                idle.append(connection)
                return
        connection.socket.close()

    def call(self, process: str, packet: Sequence[Bytes], timeout: float | None) -> bytes:
        """Send a call, and return its response.

        Args:
            process: The name of the socket of the server process; empty: any process.
            packet: The parts of the packet.
            timeout: Seconds until the deadline; None for no deadline.

        Raises:
            PoolError: The call failed.
            LostError: The connection ended before the answer.

        """
        with self.borrow(process) as connection, translated():
            connection.socket.settimeout(timeout)
            connection.socket.sendmsg(packet)
            answer = connection.socket.recv(MAX_PACKET_BYTES)
            if not answer:
                raise lost()
        return decode_answer(answer)

    def leave_to_parent(self) -> None:
        """Close the child's copies of the connections, after a fork: the parent uses them."""
        self._lock = threading.Lock()
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

    def _take(self, process: str) -> LocalConnection | None:
        with self._lock:
            names = [process] if process else self._idle
            taken = next((self._idle[name].pop() for name in names if self._idle.get(name)), None)
            if taken is not None:
                self._active.add(taken)
            return taken

    def _connect(self, process: str) -> LocalConnection:
        path = Path(self._path).with_name(process) if process else self._path
        try:
            connection = connect(f"{path}{SUFFIX}")
        except PoolError as error:
            if not process:  # a process that has ended is replaced, and its arenas are forgotten
                self._retry_at = time.monotonic() + RETRY_SECONDS
            if isinstance(error, UnavailableError):
                raise
            # Whatever the reason is, calls can go through gRPC.
            raise UnavailableError(error.message, reason="LOCAL") from error
        with self._lock:
            self._active.add(connection)
        return connection


def connect(path: str) -> LocalConnection:
    """Connect to an arena socket for calls.

    Raises:
        PoolError: The server rejects the connection, cannot be reached, or sends something unexpected.

    """
    if sys.platform != "linux":
        raise UnavailableError("calls by packets need Linux: other systems lack the sockets", reason="LOCAL")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(CONNECT_SECONDS)
        connection.connect(path)
        return LocalConnection(connection, _handshake(connection))
    except OSError as error:
        connection.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UnavailableError(f"{path}: {reason}", reason="LOCAL") from None
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


def lost() -> LostError:
    """Return the error of a call whose connection ended before the answer."""
    return LostError("expected an answer, got the end of the connection: the server has ended; try again")


@contextmanager
def translated() -> Iterator[None]:
    """Raise a PoolError in place of an error of a socket."""
    try:
        yield
    except TimeoutError:
        raise DeadlineExceededError("the deadline passed before the answer") from None
    except OSError as error:
        raise lost() from error
