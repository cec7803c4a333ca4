"""The HTTP server of the probes /livez and /readyz, and of /metrics."""

from __future__ import annotations

import asyncio
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING, Any

from prometheus_client import make_wsgi_app

from poolrpc_server.sockets import listen

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry

MAX_CONNECTIONS = 64
"""Maximum number of connections."""

REQUEST_SECONDS = 10
"""Seconds that a connection may take to send its request and receive the answer."""

MAX_HTTP_BYTES = 16 * 2**10
"""Maximum size of a request."""

RETRY_SECONDS = 0.05
"""Seconds to wait if there is no descriptor for a connection."""

TEXT = ("Content-Type", "text/plain; charset=utf-8")


class MonitoringServer:
    """An HTTP server of /livez (the process answers), /readyz (it should get calls) and, if there are any, /metrics.

    One thread has every connection, and another one renders metrics. Neither connections that send nothing nor a
    process without free descriptors keep a probe from its answer: for a new connection, the oldest one that has not
    sent its request is closed, and a descriptor is kept in reserve.

    Attributes:
        address: The address on which it listens, "host:port".

    """

    def __init__(
        self, address: str, collect: Callable[[], CollectorRegistry] | None, ready: Callable[[], bool]
    ) -> None:
        """Start the server.

        Args:
            address: "host:port"; port 0: a free one.
            collect: Returns the registry to show, for each request. None: there are only the probes.
            ready: Returns whether calls should be sent here.

        Raises:
            OSError: The address is in use, or not one of this machine.

        """
        self._collect = collect
        self._ready = ready
        self._listener, self.address = listen(address, backlog=1024)
        self._listener.setblocking(False)
        self._reserve = -1
        self._take_reserve()
        self._connections: dict[asyncio.Task[None], socket.socket] = {}
        self._sending: dict[asyncio.Task[None], None] = {}
        self._renderer = ThreadPoolExecutor(1, "poolrpc-metrics")
        self._loop = asyncio.new_event_loop()
        self._serving = self._loop.create_task(self._serve())
        self._thread = Thread(target=self._run, name="poolrpc-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the server."""
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join()
        self._renderer.shutdown()

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._serving)
        self._loop.close()

    async def _serve(self) -> None:
        try:
            while True:
                await self._wait_for_connection()
                try:
                    connection, _ = self._listener.accept()
                except (BlockingIOError, ConnectionError):  # the client has left
                    continue
                except OSError:  # there is no descriptor for it
                    if not await self._free_descriptor():
                        await asyncio.sleep(RETRY_SECONDS)
                    continue
                if len(self._connections) >= MAX_CONNECTIONS:
                    await self._drop_oldest()
                task = asyncio.create_task(self._answer(connection))
                self._connections[task], self._sending[task] = connection, None
                task.add_done_callback(self._forget)
        finally:
            self._listener.close()
            while self._connections:
                await self._drop_oldest()
            if self._reserve >= 0:
                os.close(self._reserve)

    async def _wait_for_connection(self) -> None:
        # Before accept(): without a free descriptor, it fails whether there is a connection or not.
        waiting = asyncio.Event()
        self._loop.add_reader(self._listener, waiting.set)
        try:
            await waiting.wait()
        finally:
            self._loop.remove_reader(self._listener)

    def _forget(self, task: asyncio.Task[None]) -> None:
        if task in self._connections:
            self._connections.pop(task).close()  # here, because a task that is cancelled at once never begins
            self._sending.pop(task, None)
            self._take_reserve()

    async def _drop_oldest(self) -> None:
        task = next(iter(self._sending or self._connections))
        task.cancel()
        await asyncio.wait([task])
        self._forget(task)

    async def _free_descriptor(self) -> bool:
        """Free a descriptor for the next connection; return False if there is none to free."""
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1
        elif self._connections:
            await self._drop_oldest()
        else:
            return False
        return True

    def _take_reserve(self) -> None:
        if self._reserve < 0:
            with suppress(OSError):
                self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    async def _answer(self, connection: socket.socket) -> None:
        # Not logged: monitoring asks every few seconds, and clients may leave or be slow.
        with suppress(OSError, TimeoutError):
            connection.setblocking(False)
            async with asyncio.timeout(REQUEST_SECONDS):
                request = b""
                while b"\r\n\r\n" not in request:
                    piece = await self._loop.sock_recv(connection, 4096)
                    request += piece
                    if not piece or len(request) > MAX_HTTP_BYTES:
                        return
                if (task := asyncio.current_task()) is not None:
                    self._sending.pop(task, None)
                await self._loop.sock_sendall(connection, await self._response(request))
                connection.shutdown(socket.SHUT_WR)

    async def _response(self, request: bytes) -> bytes:
        first, *lines = request.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        method, _, target = first.rpartition(" ")[0].partition(" ")
        path, _, query = target.partition("?")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", f"expected GET, got {method or first!r}\n")
        match path:
            case "/metrics" if self._collect:
                headers = {
                    name.strip().lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)
                }
                answer = await self._loop.run_in_executor(self._renderer, _render, self._collect, query, headers)
            case "/livez":
                answer = _response("200 OK", "ok\n")
            case "/readyz" if self._ready():
                answer = _response("200 OK", "ready\n")
            case "/readyz":
                answer = _response("503 Service Unavailable", "not ready\n")
            case _:
                pages = "/metrics, /livez or /readyz" if self._collect else "/livez or /readyz"
                answer = _response("404 Not Found", f"expected {pages}, got {path}\n")
        return answer if method == "GET" else answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def open_monitoring(
    metrics: str, probes: str, collect: Callable[[], CollectorRegistry], ready: Callable[[], bool]
) -> dict[str, MonitoringServer]:
    """Start the HTTP servers of a server's addresses, and return them by the name of the setting.

    Args:
        metrics: Address of /metrics and the probes. Empty: they are not served.
        probes: Address of the probes alone. Empty: they are not served.
        collect: Returns the registry to show, for each request.
        ready: Returns whether calls should be sent here.

    Raises:
        ValueError: An address is in use, or not one of this machine; the message says which.

    """
    servers: dict[str, MonitoringServer] = {}
    for name, address, shown in (("metrics", metrics, collect), ("probes", probes, None)):
        try:
            if address:
                servers[name] = MonitoringServer(address, shown, ready)
        except (OSError, UnicodeError) as error:  # the latter for a name that no host can have
            for server in servers.values():
                server.close()
            raise ValueError(f"{name}: expected a free address, got {address!r}: {error}") from None
    return servers


def _render(collect: Callable[[], CollectorRegistry], query: str, headers: dict[str, str]) -> bytes:
    # prometheus_client's application chooses the format and the compression.
    started: list[Any] = []
    application = make_wsgi_app(collect())
    environment = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/metrics",
        "QUERY_STRING": query,
        "HTTP_ACCEPT": headers.get("accept", ""),
        "HTTP_ACCEPT_ENCODING": headers.get("accept-encoding", ""),
    }
    body = b"".join(application(environment, lambda *response: started.extend(response)))
    return _response(started[0], body, *started[1])


def _response(status: str, body: str | bytes, *headers: tuple[str, str]) -> bytes:
    content = body.encode() if isinstance(body, str) else body
    lines = [f"{name}: {value}" for name, value in headers or (TEXT,)]
    head = (f"HTTP/1.1 {status}", *lines, f"Content-Length: {len(content)}", "Connection: close", "", "")
    return "\r\n".join(head).encode("latin-1") + content
