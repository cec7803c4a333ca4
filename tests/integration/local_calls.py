"""What the tests of local calls have in common."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import numpy as np

from poolrpc import FractionalMaxPool2d, MaxPool2d, PoolClient
from poolrpc._wire.arena_packets import SUFFIX, encode_attach_request
from poolrpc.v1 import pool_pb2
from tests.scrape import Scrape

if TYPE_CHECKING:
    from poolrpc_server import Server

RNG = np.random.default_rng(7)
X = RNG.standard_normal((2, 3, 16, 16), np.float32)
LARGE = RNG.standard_normal((2, 3, 256, 256), np.float32)
HELD = FractionalMaxPool2d(2, output_size=8)
"""A layer that the gate holds."""
POOL = "poolrpc.v1.PoolService/Pool"
SERVER_INFO = "poolrpc.v1.PoolService/GetServerInfo"


def halved(x: np.ndarray) -> np.ndarray:
    """Return MaxPool2d(2) of a tensor with even height and width."""
    *lead, h, w = x.shape
    return x.reshape(*lead, h // 2, 2, w // 2, 2).max((-3, -1))


def packet_socket(address: str) -> socket.socket:
    """Return a connection that carries calls."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(60)
    connection.connect(address.removeprefix("unix:") + SUFFIX)
    connection.send(encode_attach_request(0))
    assert pool_pb2.AttachResponse.FromString(connection.recv(1000)).calls
    return connection


def wait_for(server: Server, name: str, value: float, **labels: str) -> None:
    """Wait until a metric has a value."""
    while Scrape(server.metrics_address)(name, **labels) != value:
        pass


def request_of(client: PoolClient, x: np.ndarray) -> tuple[bytes, bytes]:
    """Return the parts of the request of MaxPool2d(2)."""
    transfer = client._transfer(x, (MaxPool2d(2),), None, "NCHW", None)  # noqa: SLF001 - a real request's bytes
    return transfer.prepared.head, x.tobytes()
