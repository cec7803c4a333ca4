"""Calls of the JSON protocol by Python's own HTTP client."""

from __future__ import annotations

import http.client
import json
import socket
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl

PLANE = [[1, 3, 2, 4], [5, 6, 8, 7], [4, 2, 1, 0], [9, 7, 3, 2]]


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer: its status, its headers with lower-case names, and its content."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        """The content as JSON."""
        assert self.headers["content-type"] == "application/json; charset=utf-8"
        return json.loads(self.content)

    @property
    def error(self) -> dict[str, Any]:
        """The error."""
        assert self.status >= 400
        return dict(self.json["error"])


def send(  # noqa: PLR0913 - all but the first three are optional
    address: str,
    path: str,
    body: object = None,
    *,
    method: str = "",
    headers: dict[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> HttpAnswer:
    """Send a request on a connection of its own: bytes and strings as they are, other bodies as JSON."""
    host, _, port = address.rpartition(":")
    kind: Any = http.client.HTTPConnection if tls is None else http.client.HTTPSConnection
    options = {} if tls is None else {"context": tls}
    data = body if isinstance(body, bytes | str) or body is None else json.dumps(body)
    with closing(kind(host, int(port), timeout=30, **options)) as connection:
        connection.request(method or ("GET" if body is None else "POST"), path, data, headers or {})
        return read_answer(connection)


def read_answer(connection: http.client.HTTPConnection) -> HttpAnswer:
    """Read the answer to a request that was sent."""
    response = connection.getresponse()
    return HttpAnswer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def raw(address: str) -> socket.socket:
    """Return a connection."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def read_raw(connection: socket.socket) -> HttpAnswer:
    """Read an answer from a connection."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return HttpAnswer(response.status, headers, response.read())
