"""Requests on connections to the explorer: each must have an answer of HTTP, or end its connection."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING

import numpy as np

from fuzz.findings import FoundError
from fuzz.seeds import CLOSE, CUT, NEW, READ, SHUT, WRONG
from poolrpc.errors import BY_CODE

if TYPE_CHECKING:
    from fuzz.mutate import Case
    from poolrpc.tensors import Array

DEADLINE = 30.0
"""Seconds after which a request counts as hung."""

STATUSES = {400, 401, 403, 404, 405, 413, 415, 431, 501, 503, 504}


def converse(address: str, case: Case) -> str:
    """Send requests to the explorer, and return how the last answer that was read ended.

    Args:
        address: The explorer's address.
        case: For each request its flags (a byte), its first line and headers, and its body.

    Raises:
        FoundError: It ended in a way that is a bug.

    """
    ending = "silent"
    host, _, port = address.rpartition(":")
    with ExitStack() as opened:
        peer: socket.socket | None = None
        for at in range(0, len(case), 3):
            flags, head, body = (*case[at : at + 3], b"", b"")[:3]
            bits = (flags or b"\0")[0]
            if peer is None or bits & NEW:
                peer = opened.enter_context(socket.create_connection((host, int(port)), timeout=DEADLINE))
            length = f"\r\nContent-Length: {len(body) + (7 if bits & WRONG else 0)}\r\n\r\n".encode()
            data = head + (b"" if head.endswith(b"\r\n\r\n") else length) + body
            with suppress(ConnectionError):  # an earlier request has ended it
                peer.sendall(data[: len(data) // 2] if bits & CUT else data)
                if bits & SHUT or bits & (CUT | WRONG):
                    peer.shutdown(socket.SHUT_WR)  # what is missing will not come
                if bits & READ:
                    ending = _answer_of(peer, "HEAD" if head.startswith(b"HEAD") else "GET")
            if bits & CLOSE:
                peer.close()
                peer = None
    return ending


def check(address: str, x: Array, expected: Array) -> None:
    """Check that MaxPool2d(2) of an array is right.

    Raises:
        AssertionError: It is not.

    """
    host, _, port = address.rpartition(":")
    tensor = {"data": base64.b64encode(x.tobytes()).decode(), "shape": x.shape, "dtype": x.dtype.name}
    with closing(http.client.HTTPConnection(host, int(port), timeout=DEADLINE)) as connection:
        connection.request("POST", "/v1/pool", json.dumps({"layer": "MaxPool2d(2)", "input": tensor}))
        np.testing.assert_array_equal(np.array(json.load(connection.getresponse())["output"], x.dtype), expected)


def _answer_of(peer: socket.socket, method: str) -> str:
    response = http.client.HTTPResponse(peer, method=method)
    try:
        response.begin()
        content = response.read()
    except TimeoutError:
        raise FoundError("neither an answer nor the end of the connection") from None
    except (http.client.HTTPException, ConnectionError, OSError):
        return "ended"
    if response.status in {200, 304}:
        if "json" in (response.headers["Content-Type"] or ""):
            json.loads(content, parse_constant=_no_constant)
        return "OK"
    error = json.loads(content)["error"]
    if response.status not in STATUSES or error["code"] not in BY_CODE or error["code"] == "INTERNAL":
        raise FoundError(f"{response.status}: {error}")
    return f"{error['code']}/{error['reason']}"


def _no_constant(name: str) -> None:
    raise FoundError(f"{name}, which JSON does not have")
