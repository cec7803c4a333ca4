"""A unary call over TCP against local eager torch, and against a bare gRPC echo of the same bytes.

One compute thread on each side. The echo is grpc.server with identity serialisers in a process of its own: what gRPC in
Python costs without protobuf, checks or computing.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import torch

from benchmarks.rounds import interleave, row
from poolrpc import MaxPool2d, PoolClient
from scripts.serving import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

SHAPES = [(1, 1, 4, 4), (1, 3, 32, 32), (1, 64, 56, 56), (1, 3, 224, 224), (8, 64, 112, 112)]
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
METHOD = "/echo/Echo"


def echo(port: Connection) -> None:
    """Serve an echo that gives back a quarter of what it got, as MaxPool2d(2) does, until the pipe closes."""
    server = grpc.server(ThreadPoolExecutor(4), options=UNLIMITED)
    handler = grpc.unary_unary_rpc_method_handler(lambda request, _: request[: len(request) // 4])
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("echo", {"Echo": handler})])
    port.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    port.recv()
    server.stop(0)


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Give the rows."""
    torch.set_num_threads(1)
    layer, reference = MaxPool2d(2), torch.nn.MaxPool2d(2)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=echo, args=(theirs,))
    process.start()
    with (
        serving("--threads", "1") as server,
        PoolClient(server.address) as client,
        grpc.insecure_channel(f"127.0.0.1:{ours.recv()}", UNLIMITED) as channel,
    ):
        bare = channel.unary_unary(METHOD)
        for shape in SHAPES:
            x = np.random.default_rng(0).standard_normal(shape, np.float32)
            tensor, payload = torch.from_numpy(x), x.tobytes()
            same = torch.equal(torch.from_numpy(client.pool(x, layer).output), reference(tensor))
            times = interleave(
                {
                    "unary": lambda x=x: client.pool(x, layer),
                    "echo": lambda payload=payload: bare(payload),
                    "torch": lambda tensor=tensor: reference(tensor),
                },
                rounds,
            )
            for baseline in ("torch", "echo"):
                yield row(f"MaxPool2d(2) {shape}", baseline, "unary", times, bytes=x.nbytes, equal=same)
    ours.send(None)
    process.join()
