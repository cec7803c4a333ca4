"""What a request is for: a file of the page, or a method; and the status and headers of an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poolrpc._shapes.rules import clip
from poolrpc.credentials import is_loopback
from poolrpc.errors import (
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    PoolError,
    UnauthenticatedError,
    UnavailableError,
)
from poolrpc_server.protocols.json.servicer import ROUTES
from poolrpc_server.transports.http.page import read_page

if TYPE_CHECKING:
    from collections.abc import Sequence

    import h11

    from poolrpc_server.transports.http.page import PageFile

HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 413,  # 429 would mean that the same request may succeed later
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""The status of HTTP for each of gRPC's that is not an internal error."""


class HttpError(Exception):
    """The failure of a request that is not a call.

    Attributes:
        status: The status of HTTP.
        error: The error.
        headers: Headers of the answer.

    """

    def __init__(self, status: int, error: PoolError, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(str(error))
        self.status, self.error, self.headers = status, error, headers


class Routes:
    """The files of the page, and the methods of the JSON protocol, by their paths.

    Args:
        any_host: Whether the host that a request names may be any, and not only this machine. A page of someone else
            whose name leads to 127.0.0.1 would be of the same origin as this one.

    """

    def __init__(self, *, any_host: bool) -> None:
        self._any_host = any_host
        self._page = read_page()

    def find(self, request: h11.Request) -> PageFile | str:
        """Return the file that a request is for, or the name of the method.

        Raises:
            HttpError: There is none, or the request is from a page of another origin.

        """
        headers = dict(request.headers)
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if not (self._any_host or is_loopback(_without_port(host))):
            msg = f"expected the host to be this machine, such as localhost, got {clip(host)}"
            raise HttpError(403, PermissionDeniedError(msg, reason="HOST"))
        if origin and origin.partition("://")[2] != host:
            msg = "expected a request from a page of this server, got one of another origin"
            raise HttpError(403, PermissionDeniedError(msg, reason="ORIGIN"))
        method, path = request.method.decode("ascii"), request.target.decode("latin-1").partition("?")[0]
        if path not in self._page and path not in ROUTES:
            msg = f"expected /, {', '.join(ROUTES)}, got {clip(path)}"
            raise HttpError(404, NotFoundError(msg, reason="PATH"))
        expected, name = ROUTES.get(path, ("GET", ""))
        if method != expected and (method, name) != ("HEAD", ""):
            wrong = InvalidArgumentError(f"expected {expected} for {path}, got {clip(method)}", field="method")
            raise HttpError(405, wrong, [("Allow", expected)])
        if b"content-encoding" in headers:
            wrong = InvalidArgumentError("expected a body as it is, got Content-Encoding", field="body")
            raise HttpError(415, wrong)
        return name or self._page[path]


def _without_port(host: str) -> str:
    """Return the name or address of a Host header: "localhost", "127.0.0.1" or "[::1]"."""
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def status_code(error: PoolError) -> int:
    """Return the status of HTTP for an error."""
    return HTTP_STATUS.get(error.code, 500)


def error_headers(error: PoolError) -> list[tuple[str, str]]:
    """Return the headers of an error's answer."""
    if isinstance(error, UnauthenticatedError):
        return [("WWW-Authenticate", "Bearer")]
    if isinstance(error, UnavailableError):
        return [("Retry-After", str(max(1, round(error.retry_delay or 0))))]  # whole seconds; the body has the rest
    return []
