"""Peers of the explorer: requests that never end, bodies that cost more than their size, and answers left unread."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from fuzz.attacks.attack import MIB, Target, attack, in_threads, repeat

if TYPE_CHECKING:
    from threading import Event

CONNECTIONS = 200
"""More than the explorer has at a time."""


def _connect(target: Target) -> socket.socket:
    host, _, port = target.explorer.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def _request(target: Target, body: bytes, announced: int | None = None) -> bytes:
    lines = ["POST /v1/pool HTTP/1.1", "Host: localhost"]
    lines += [f"{name}: {value}" for name, value in target.headers]
    lines += [f"Content-Length: {len(body) if announced is None else announced}", "", ""]
    return "\r\n".join(lines).encode() + body


@attack(variants=("tcp", "tokens"))
def http_half_requests(target: Target, until: Event) -> None:
    """Open as many connections to the explorer as it lets, and finish no request on any (of the kind of C6).

    Sent: a part of a request's headers, or all of them and a part of a body of 4 MiB; again when they are ended.
    Aims at: connections, threads, and the bytes in flight that bodies announce.
    """

    def hold() -> None:
        with ExitStack() as held:
            for number in range(CONNECTIONS):
                peer = held.enter_context(_connect(target))
                peer.sendall(_request(target, b"{", 4 * MIB) if number % 2 else b"POST /v1/pool HTTP/1.1\r\nHost: ")
                if until.is_set():
                    return
            until.wait(2)

    in_threads(*[partial(repeat, until, hold)] * 2)


@attack(variants=("tcp", "insider"))
def http_unread_answers(target: Target, until: Event) -> None:
    """Send requests with as many values as the explorer takes, and read no answer (of the kind of C4).

    Sent: lists of 250,000 numbers that are pooled, are ragged, or are nested as deep as it goes, on eight connections.
    Aims at: the interpreter, which parses them, and the memory of values and of answers.
    """
    plane = {"layer": "MaxPool2d(2)", "input": [[1.5] * 500] * 500, "encoding": "base64"}
    ragged = {"layer": "MaxPool2d(2)", "input": [*[[1.5] * 500] * 499, [1.5] * 499]}
    nested = b'{"layer": "MaxPool2d(2)", "input": ' + b"[" * 250_000
    requests = [_request(target, each) for each in (json.dumps(plane).encode(), json.dumps(ragged).encode(), nested)]

    def flood() -> None:
        with _connect(target) as peer:
            while not until.is_set():
                for request in requests:
                    peer.sendall(request)

    in_threads(*[partial(repeat, until, flood)] * 8)
