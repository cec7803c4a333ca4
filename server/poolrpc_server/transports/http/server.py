"""The HTTP server of the explorer: one thread has every connection, others answer its calls through the pipeline."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING, Any

import h11

from poolrpc._wire.status import DETAILS_KEY, decode_error
from poolrpc.credentials import is_loopback
from poolrpc.errors import CancelledError, InvalidArgumentError, PoolError
from poolrpc_server.calls.call import StatusError
from poolrpc_server.protocols.json.errors import error_object
from poolrpc_server.sockets import listen
from poolrpc_server.telemetry.logs import log
from poolrpc_server.transports.http.connection import MAX_BODY_BYTES, READ_BYTES, HttpConnection, body_too_large
from poolrpc_server.transports.http.context import HttpContext
from poolrpc_server.transports.http.routes import HttpError, Routes, error_headers, status_code

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Sequence

    from poolrpc_server.calls.admitted_call import AdmittedCall
    from poolrpc_server.calls.pipeline import CallPipeline
    from poolrpc_server.transports.http.page import PageFile

MAX_CONNECTIONS = 64
"""Maximum number of connections, and so of threads that answer their calls: a connection has one call at a time."""

IDLE_SECONDS = 30.0
"""Seconds in which a connection has to send the first line and the headers of its next request."""

HANDSHAKE_SECONDS = 5.0
"""Seconds in which a new connection has to finish TLS's handshake."""

SEND_SECONDS = 10.0
"""Seconds in which a client has to read a file of the page. An answer to a call has the pipeline's limit."""

JSON_HEADERS = (("Content-Type", "application/json; charset=utf-8"), ("Cache-Control", "no-store"))


class HttpServer:
    """The explorer's HTTP server: the page's files, and the methods of the JSON protocol.

    A client that sends or reads slowly has no thread of its own until its call is admitted, and from then on the
    pipeline's limits. For a new connection beyond MAX_CONNECTIONS, the oldest one without a call is closed.

    Attributes:
        address: The address on which it listens, "host:port".

    """

    def __init__(
        self,
        pipeline: CallPipeline,
        address: str,
        *,
        tokens: bool = False,
        tls: ssl.SSLContext | None = None,
        share_port: bool = False,
    ) -> None:
        """Make a server and take its address.

        Args:
            pipeline: Answers its calls.
            address: "host:port"; port 0: a free one.
            tokens: Whether calls need a token.
            tls: TLS of its connections. None: plaintext.
            share_port: Whether other processes may listen on the same port.

        Raises:
            OSError: The address is in use, or not one of this machine.

        """
        self._pipeline = pipeline
        self._tls = tls
        self._listener, self.address = listen(address, backlog=128, share_port=share_port)
        self._routes = Routes(any_host=tokens or not is_loopback(address.rpartition(":")[0]))
        self._threads = ThreadPoolExecutor(MAX_CONNECTIONS, "poolrpc-http-call")
        self._idle: dict[asyncio.Task[Any], None] = {}
        self._busy: dict[asyncio.Task[Any], None] = {}
        self._loop = asyncio.new_event_loop()
        self._stopping, self._ending = asyncio.Event(), asyncio.Event()
        self._thread = Thread(target=self._run, name="poolrpc-http", daemon=True)

    def start(self) -> None:
        """Serve."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more connections and requests; those that have arrived are answered."""
        self._set(self._stopping)

    def wait(self, timeout: float) -> bool:
        """Wait until the calls in flight are answered, after `stop`; return False after `timeout` seconds."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Cancel the calls in flight, and end every connection."""
        self.stop()
        self._set(self._ending)
        if self._thread.ident is None:
            self._listener.close()
            self._loop.close()
        else:
            self._thread.join()

    def _set(self, event: asyncio.Event) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(event.set)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(
            self._connected,
            sock=self._listener,
            limit=READ_BYTES,
            ssl=self._tls,
            ssl_handshake_timeout=None if self._tls is None else HANDSHAKE_SECONDS,
        )
        await self._stopping.wait()
        server.close()
        for task in [*self._idle]:
            task.cancel()
        ending = asyncio.create_task(self._ending.wait())
        while (tasks := [*self._idle, *self._busy]) and not ending.done():
            await asyncio.wait([*tasks, ending], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await asyncio.to_thread(self._threads.shutdown)  # they use this loop until they end

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in one
        connection = HttpConnection(reader, writer)
        if self._stopping.is_set() or not self._make_room():
            connection.abort()
            return
        self._idle[task] = None
        try:
            while await self._exchange(connection, task) and not self._stopping.is_set():
                self._busy.pop(task)
                self._idle[task] = None
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # the client has left or is slow, or the server ends
        except Exception:  # noqa: BLE001 - the server must go on for the other clients
            log.exception("http transport failed")
        finally:
            self._idle.pop(task, None)
            self._busy.pop(task, None)
            connection.abort()  # all that was written has been sent

    def _make_room(self) -> bool:
        if len(self._idle) + len(self._busy) < MAX_CONNECTIONS:
            return True
        if not self._idle:
            return False
        oldest = next(iter(self._idle))
        self._idle.pop(oldest)
        oldest.cancel()
        return True

    async def _exchange(self, connection: HttpConnection, task: asyncio.Task[Any]) -> bool:
        """Answer one request; return whether the connection may have further ones."""
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                request = await connection.next_request()
        except h11.RemoteProtocolError as error:
            invalid = InvalidArgumentError(f"expected a request of HTTP/1.1, got an invalid one: {error}", field="http")
            return await self._send_error(connection, invalid, error.error_status_hint)
        if request is None:
            return False
        self._idle.pop(task, None)
        self._busy[task] = None
        return await self._respond(connection, request)

    async def _respond(self, connection: HttpConnection, request: h11.Request) -> bool:
        try:
            found = self._routes.find(request)
            if isinstance(found, str):
                return await self._call(connection, request, found)
            return await self._send_file(connection, request, found)
        except HttpError as error:
            return await self._send_error(connection, error.error, error.status, error.headers)
        except CancelledError:  # the client has left
            return False
        except PoolError as error:
            return await self._send_error(connection, error)

    @staticmethod
    async def _send_file(connection: HttpConnection, request: h11.Request, file: PageFile) -> bool:
        async with asyncio.timeout(SEND_SECONDS):
            await connection.read_body()
            if (b"if-none-match", file.etag.encode()) in request.headers:
                return await connection.answer(304, file.headers)
            return await connection.answer(200, file.headers, file.content)

    async def _call(self, connection: HttpConnection, request: h11.Request, method: str) -> bool:
        announced = None
        if request.method == b"POST":
            announced = int(dict(request.headers).get(b"content-length", MAX_BODY_BYTES))
            if announced > MAX_BODY_BYTES:
                raise body_too_large(announced)
        context = HttpContext(method, [*request.headers], connection.peer, announced)
        finished = False

        def end() -> None:
            if not finished:  # the server ends the call, because its client is slow, for example
                self._loop.call_soon_threadsafe(connection.abort)

        try:
            admitted = self._pipeline.admit(context)
            assert admitted is not None  # noqa: S101 - the pipeline has every method of ROUTES
            context.add_done_callback(context.ticket.release)
            context.add_done_callback(end)
            answer = await self._answered(connection, admitted, context)
            await connection.stop_watching()
            headers = (*JSON_HEADERS, ("Server-Timing", context.server_timing()))
            return await connection.answer(200, headers, answer)
        except StatusError as status:
            await connection.stop_watching()
            if context.cancelled:
                return False
            details = dict(status.trailing).get(DETAILS_KEY)
            assert isinstance(details, bytes)  # noqa: S101 - it is the error's
            return await self._send_error(connection, decode_error(status.code, status.message, details))
        finally:
            await connection.stop_watching()
            finished = True
            context.ticket.release()
            context.cancel()

    async def _answered(self, connection: HttpConnection, admitted: AdmittedCall, context: HttpContext) -> bytes:
        if admitted.error is not None:
            admitted.reject()
        messages = self._messages(connection, context)
        return await self._loop.run_in_executor(self._threads, admitted.unary, messages)

    def _messages(self, connection: HttpConnection, context: HttpContext) -> Iterator[bytes]:
        """Yield the call's message, in the thread that answers it: nothing of it is read before it is asked for."""
        future = asyncio.run_coroutine_threadsafe(_received(connection, context), self._loop)

        def cancel() -> None:
            future.cancel()

        if not context.add_done_callback(cancel):
            cancel()
        with suppress(FutureCancelledError):  # the call has ended
            if (message := future.result()) is not None:
                yield message

    @staticmethod
    async def _send_error(
        connection: HttpConnection, error: PoolError, status: int = 0, headers: Sequence[tuple[str, str]] = ()
    ) -> bool:
        fields = [*JSON_HEADERS, *headers, *error_headers(error)]
        async with asyncio.timeout(SEND_SECONDS):
            content = json.dumps(error_object(error)).encode() + b"\n"
            return await connection.answer(status or status_code(error), fields, content)


async def _received(connection: HttpConnection, context: HttpContext) -> bytes | None:
    """Return the body of a call's request; None if the call has ended."""
    try:
        async with asyncio.timeout(context.time_remaining()):
            body = await connection.read_body()
    except TimeoutError:  # the deadline has passed
        return None
    except (CancelledError, OSError):  # the client has left
        context.cancel()
        return None
    connection.watch(context.cancel)
    return body
