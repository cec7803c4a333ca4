"""A connection of HTTP/1.1 on asyncio's streams, with h11 for the protocol."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import h11

from poolrpc.errors import CancelledError, InvalidArgumentError, LimitExceededError
from poolrpc_server.transports.http.page import SECURITY_HEADERS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

READ_BYTES = 64 * 2**10
"""Bytes that are read at a time, and that a connection holds before they are asked for."""

MAX_HEAD_BYTES = 16 * 2**10
"""Size of a request's first line and headers up to which they are read; what was read with them may be as much."""

MAX_BODY_BYTES = 4 * 2**20
"""Maximum size of a request's body."""

LINGER_SECONDS = 1.0
"""Seconds in which the rest of a request is read and dropped, so that its client sees the answer to the beginning."""


class HttpConnection:
    """The requests of a client, one after the other.

    Attributes:
        peer: The client, in gRPC's notation.

    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        # An answer counts as sent when the system has all of it.
        writer.transport.set_write_buffer_limits(high=0)
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        host, port = (writer.get_extra_info("peername") or ("", 0))[:2]
        self.peer = f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
        self._watching: asyncio.Task[None] | None = None
        self._is_head = False

    async def next_request(self) -> h11.Request | None:
        """Return the next request; None if the client has left.

        Raises:
            h11.RemoteProtocolError: What the client sends is not HTTP, or its headers are too large.

        """
        event = await self._next_event(MAX_HEAD_BYTES)
        if not isinstance(event, h11.Request):
            return None
        self._is_head = event.method == b"HEAD"
        return event

    async def read_body(self) -> bytes:
        """Return the body of the request.

        Raises:
            CancelledError: The client has left.
            InvalidArgumentError: What it sends is not HTTP.
            LimitExceededError: The body is larger than MAX_BODY_BYTES.

        """
        body = bytearray()
        try:
            while isinstance(event := await self._next_event(), h11.Data):
                body += event.data
                if len(body) > MAX_BODY_BYTES:
                    raise body_too_large(len(body))
        except h11.RemoteProtocolError as error:
            if self._reader.at_eof():
                raise CancelledError("the client has left") from None
            raise InvalidArgumentError(f"expected a body of HTTP, got an invalid one: {error}", field="body") from None
        return bytes(body)

    async def _next_event(self, read_bytes: int = READ_BYTES) -> object:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self._http.they_are_waiting_for_100_continue:
                await self._send(self._http.send(h11.InformationalResponse(status_code=100, headers=[])))
            self._http.receive_data(await self._reader.read(read_bytes))

    def watch(self, ended: Callable[[], object]) -> None:
        """Call `ended` if the client leaves before it gets the answer to the request, whose body has been read."""
        self._watching = asyncio.create_task(self._watch(ended))

    async def _watch(self, ended: Callable[[], object]) -> None:
        with suppress(OSError):
            if data := await self._reader.read(READ_BYTES):
                self._http.receive_data(data)  # the beginning of the next request: h11 keeps it
                return
        ended()

    async def stop_watching(self) -> None:
        """Stop watching for the end of the client."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
            self._watching = None

    async def answer(self, status: int, headers: Sequence[tuple[str, str]], content: bytes | None = None) -> bool:
        """Send the answer to the request; return whether the connection may have further requests.

        Args:
            status: The status code.
            headers: The headers, without those that every answer has.
            content: The content, which is not sent if the request is for the headers alone. None: there is none, and no
                length of it.

        """
        fields = [*headers, *SECURITY_HEADERS]
        if content is not None:
            fields.append(("Content-Length", str(len(content))))
        if self._http.their_state is not h11.DONE:  # what is left of the request is not read
            fields.append(("Connection", "close"))
        events = [h11.Response(status_code=status, headers=fields), h11.EndOfMessage()]
        if content and not self._is_head:
            events.insert(1, h11.Data(data=content))
        await self._send(b"".join(self._http.send(each) or b"" for each in events))
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            return True
        await self._linger()
        return False

    async def _send(self, data: bytes | None) -> None:
        self._writer.write(data or b"")
        await self._writer.drain()

    async def _linger(self) -> None:
        # A connection that is closed with unread bytes is reset, and the client may lose the answer.
        with suppress(OSError, TimeoutError):
            if self._writer.can_write_eof():
                self._writer.write_eof()
            async with asyncio.timeout(LINGER_SECONDS):
                while await self._reader.read(READ_BYTES):
                    pass

    def abort(self) -> None:
        """End the connection at once."""
        self._writer.transport.abort()


def body_too_large(nbytes: int) -> LimitExceededError:
    """Return the error of a request whose body is too large."""
    msg = f"expected a body of at most {MAX_BODY_BYTES} bytes, got {nbytes} or more"
    limits = {"limit": str(MAX_BODY_BYTES), "actual": str(nbytes)}
    return LimitExceededError(msg, reason="MESSAGE_TOO_LARGE", metadata=limits)
