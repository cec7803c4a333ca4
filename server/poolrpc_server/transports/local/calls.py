"""The local transport: calls as packets on connections to the arena socket, from clients on the same machine.

A connection carries one call at a time, and no thread belongs to a connection. Threads take turns: one at a time waits
for packets on an epoll of all connections, and answers one after the other. Several threads that answer small calls at
the same time would only wait for each other to release the interpreter, which doubles the time of each.

A call that has to wait, or that may take long, makes way: its thread passes the turn to another one, which also
notices if the client of that call is gone, and cancels it. From then on the call's thread alone sends on the connection
and closes it, until it waits for the next packet. A call that has the turn for longer than expected makes way because
of another thread, which looks at all calls from time to time (see Reaper).
"""

from __future__ import annotations

import os
import select
import socket
import threading
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from poolrpc._shapes.rules import clip
from poolrpc._wire.arena_packets import peer_pid
from poolrpc._wire.local_packets import MAX_PACKET_BYTES, decode_call, encode_answer, encode_failure
from poolrpc._wire.status import DETAILS_KEY, encode_error
from poolrpc.errors import InvalidArgumentError, LimitExceededError, UnavailableError, UnsupportedError
from poolrpc_server.calls.admitted_call import status_of
from poolrpc_server.calls.call import EndingContext, StatusError
from poolrpc_server.telemetry.logs import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from poolrpc._wire.local_packets import ReceivedCall
    from poolrpc_server.calls.pipeline import CallPipeline

_END_ONLY = select.EPOLLONESHOT  # EPOLLHUP is always reported

# Plain integers: the operators of socket's enumerations take some microseconds.
_HAS_DESCRIPTOR, _TRUNCATED = int(socket.MSG_CTRUNC), int(socket.MSG_TRUNC)


class LocalContext(EndingContext):
    """A call that came as a packet.

    Args:
        received: The call.
        connection: Its connection.
        make_way: Passes the turn to another thread, if the call's thread has it.

    """

    transport = "local"

    def __init__(
        self, received: ReceivedCall, connection: Connection, make_way: Callable[[Connection], object]
    ) -> None:
        super().__init__(received.method, received.metadata, connection.peer, received.timeout)
        self.arrived = len(received.message)
        self._connection, self._make_way = connection, make_way

    def make_way(self) -> None:
        """Pass the turn to another thread, unless this was done before."""
        self._make_way(self._connection)


class Connection:
    """A connection that carries calls.

    Attributes:
        socket: The socket.
        peer: The client, "unix:pid=123"; "unix:" if its process is unknown.
        call: The call in flight; None between calls.
        made_way: Whether the call makes way.
        gone: Whether the client is known to be gone.

    """

    __slots__ = ("call", "gone", "made_way", "peer", "socket")

    def __init__(self, socket: socket.socket, peer: str) -> None:
        self.socket, self.peer = socket, peer
        self.call: LocalContext | None = None
        self.made_way = self.gone = False


class LocalCalls:
    """The connections that carry calls, and the threads that answer them.

    Args:
        pipeline: Answers the calls.
        max_threads: Maximum number of threads; they are started when the calls of all others make way.
        max_connections: Maximum number of connections.

    """

    def __init__(self, pipeline: CallPipeline, *, max_threads: int, max_connections: int) -> None:
        self._pipeline = pipeline
        self._max_threads = max_threads
        self._max_connections = max_connections
        self._connections: dict[int, Connection] = {}
        self._epoll = select.epoll()
        self._ended = os.eventfd(0)
        self._epoll.register(self._ended, select.EPOLLIN)  # ends one thread after another, since it is never read
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._turn = threading.Lock()
        self._current: Connection | None = None  # whose call is answered by the thread that has the turn
        self._count = self._seen = 0  # the calls so far, and until `relieve` looked last
        self._available = 0  # threads that have the turn or wait for it
        self._stopped = False
        self._start_thread()

    @property
    def connections(self) -> tuple[Connection, ...]:
        """The connections."""
        return tuple(self._connections.copy().values())

    def check_room(self) -> None:
        """Check that there may be another connection.

        Raises:
            LimitExceededError: There are as many as there may be.
            UnavailableError: The server is stopping.

        """
        if self._stopped:
            raise UnavailableError("the server is stopping", reason="STOPPING")
        count = len(self._connections)
        if count >= self._max_connections:
            msg = f"expected at most {self._max_connections} connections for calls, got another"
            limits = {"limit": str(self._max_connections), "actual": str(count + 1)}
            raise LimitExceededError(msg, reason="LOCAL_CONNECTIONS", metadata=limits)

    def adopt(self, connection: socket.socket) -> None:
        """Serve the calls of a connection, which doesn't block, from now on."""
        # A process of another namespace is not visible, and has no identity among callers.
        peer = f"unix:pid={pid}" if (pid := peer_pid(connection)) else "unix:"
        with self._lock, suppress(OSError):  # the epoll is full
            if not self._stopped:
                self._epoll.register(connection, select.EPOLLIN)
                self._connections[connection.fileno()] = Connection(connection, peer)
                return
        connection.close()

    def relieve(self) -> None:
        """Let a call make way that has had the turn since this was called last."""
        current, count = self._current, self._count
        if count == self._seen and current is not None:
            self._make_way(current, count)
        self._seen = count

    def stop(self) -> None:
        """Receive no more packets; those that have arrived are answered, and then their connections are closed."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        for connection in self.connections:
            with suppress(OSError):  # it has ended meanwhile
                # To a thread that waits for its next packet, this is its end; its client cannot send any more.
                connection.socket.shutdown(socket.SHUT_RD)
        self._end_if_done()

    def wait(self, timeout: float) -> bool:
        """Wait until the calls in flight are answered, after `stop`; return False after `timeout` seconds."""
        deadline = monotonic() + timeout
        while threads := self._living_threads():
            if (left := deadline - monotonic()) <= 0:
                return False
            threads[0].join(left)
        return True

    def close(self) -> None:
        """Cancel the calls in flight, and end every connection."""
        if self._epoll.closed:
            return
        self.stop()
        for connection in self.connections:
            if (call := connection.call) is not None:
                call.cancel()
        while threads := self._living_threads():
            threads[0].join()
        self._epoll.close()
        os.close(self._ended)

    def _living_threads(self) -> list[threading.Thread]:
        with self._lock:
            return [thread for thread in self._threads if thread.is_alive()]

    def _start_thread(self) -> None:
        # Called with the lock held, or before there are other threads.
        buffer = bytearray(MAX_PACKET_BYTES)
        thread = threading.Thread(target=self._run, args=(buffer,), name="poolrpc-local", daemon=True)
        thread.start()
        self._threads.append(thread)
        self._available += 1

    def _run(self, buffer: bytearray) -> None:
        with self._turn:
            while True:
                ((descriptor, events),) = self._epoll.poll(maxevents=1)
                if descriptor == self._ended:
                    return
                # That of a call that made way may be closed by now, and the descriptor that of another connection.
                connection = self._connections.get(descriptor)
                try:
                    if connection is not None and events & select.EPOLLIN:
                        connection.gone = bool(events & select.EPOLLHUP)  # its packet is a call of no one
                        self._serve(connection, buffer)
                    elif connection is not None:
                        _cancel_if_gone(connection)
                except BaseException:  # noqa: BLE001 - the thread must go on for the other clients
                    with suppress(Exception):  # of a handler of the program that embeds the server
                        log.exception("local transport failed")

    def _serve(self, connection: Connection, buffer: bytearray) -> None:
        """Answer the packet of a connection; when this returns, the thread has the turn again."""
        goes_on = False
        self._count += 1
        self._current = connection
        try:
            goes_on = self._serve_packet(connection, buffer)
        finally:
            with self._lock:
                made_way, connection.made_way = connection.made_way, False
                if not made_way:
                    self._current = None
            try:
                if not goes_on:
                    self._drop(connection)
                elif made_way:
                    self._epoll.modify(connection.socket, select.EPOLLIN)
            finally:
                if made_way:
                    with self._lock:
                        self._available += 1
                    self._turn.acquire()

    def _make_way(self, connection: Connection, count: int | None = None) -> None:
        """Pass the turn to another thread, if the call of a connection has it, and is number `count`, if given."""
        with self._lock:
            if self._current is not connection or count not in {None, self._count}:
                return
            self._epoll.modify(connection.socket, _END_ONLY)
            connection.made_way, self._current = True, None
            self._available -= 1
            if not self._available and len(self._threads) < self._max_threads:
                # If no thread can be started now, packets wait for the end of a call.
                with suppress(RuntimeError, MemoryError):
                    self._start_thread()
        self._turn.release()

    def _serve_packet(self, connection: Connection, buffer: bytearray) -> bool:
        """Answer the packet of a connection; return False if it is the last one."""
        answer: Iterable[bytes] | None = None
        try:
            nbytes, _, flags, _ = connection.socket.recvmsg_into([buffer])
            if nbytes:
                answer = self._answer(connection, memoryview(buffer)[:nbytes], flags)
        except InvalidArgumentError as error:  # not a call: this client cannot be understood
            _send(connection, encode_failure(encode_error(error)[1]))
        except OSError:  # the client is gone
            pass
        finally:
            connection.call = None
        return answer is not None and _send(connection, answer)

    def _answer(self, connection: Connection, packet: memoryview, flags: int) -> Iterable[bytes] | None:
        """Return the parts of the answer to a call; None if its client is gone, or the server has ended it."""
        if flags & _HAS_DESCRIPTOR:  # there is no buffer for it, so the kernel has closed it
            raise InvalidArgumentError("expected a packet, got a descriptor with it")
        if flags & _TRUNCATED:
            raise InvalidArgumentError(f"expected a packet of at most {MAX_PACKET_BYTES} bytes, got a larger one")
        received = decode_call(packet)
        call = connection.call = LocalContext(received, connection, self._make_way)
        if connection.gone:  # noticed before there was a call to cancel
            call.cancel()
        try:
            answer = encode_answer(self._respond(call, received.message))
            if answer is None:
                msg = f"expected a response of less than {MAX_PACKET_BYTES} bytes for a packet, got a larger one"
                answer = encode_failure(encode_error(LimitExceededError(msg, reason="LOCAL_PACKET"))[1])
        except StatusError as status:
            answer = encode_failure(dict(status.trailing)[DETAILS_KEY])  # type: ignore[arg-type]  # it is bytes
        finally:
            cancelled = call.cancelled
            call.ticket.release()
            call.cancel()
        return None if cancelled else answer

    def _respond(self, call: LocalContext, message: bytes) -> bytes:
        admitted = self._pipeline.admit(call)
        call.add_done_callback(call.ticket.release)  # if the client leaves, at once, also while the call is queued
        if admitted is None:
            raise status_of(UnsupportedError(f"expected a method of this server, got {clip(call.method)}"))
        if admitted.error is None and admitted.method.unary is None:
            admitted.error = UnsupportedError(f"expected a method with one message each way, got {call.method}")
        if admitted.error is not None:
            admitted.reject()
        return admitted.unary(iter((message,)))

    def _drop(self, connection: Connection) -> None:
        del self._connections[connection.socket.fileno()]
        with suppress(OSError):
            # Closing does neither if a child process has the descriptor too.
            self._epoll.unregister(connection.socket)
            connection.socket.shutdown(socket.SHUT_RDWR)
        connection.socket.close()
        self._end_if_done()

    def _end_if_done(self) -> None:
        """End the threads, if the server has stopped and every connection is closed."""
        if self._stopped and not self._connections:
            os.eventfd_write(self._ended, 1)


def _send(connection: Connection, parts: Iterable[bytes]) -> bool:
    # A client that has read the last answer has room for this one. No other is waited for.
    try:
        connection.socket.sendmsg(parts)
    except OSError:
        return False
    return True


def _cancel_if_gone(connection: Connection) -> None:
    """Cancel the call of a connection that has ended; by now its descriptor may be that of another connection."""
    poll = select.poll()
    with suppress(ValueError):  # it is closed
        poll.register(connection.socket, 0)
        if poll.poll(0):
            connection.gone = True
            if (call := connection.call) is not None:
                call.cancel()
