"""Every transport of a call, from 64 bytes to 256 MB, compared with eager torch, a bare gRPC echo, and a plain server.

One compute thread on each side, MaxPool2d(2), float32. The echo is grpc.server with identity serializers in a process
of its own: the cost of gRPC in Python without protobuf, validation and computation. The plain server is that of a
tutorial: one message with a bytes field, and eager torch. Local calls are also compared with gRPC on the same unix
socket and with the arena of gRPC. The last parts are small calls of one thread and of eight, GetServerInfo, and `map`,
compared with one call per tensor.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import grpc
import numpy as np
import torch

from benchmarks.rounds import interleave, row
from poolrpc import MaxPool2d, PoolClient
from poolrpc.v1 import pool_pb2
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

SHAPES = [
    (1, 1, 4, 4),
    (1, 1, 16, 16),
    (1, 3, 32, 32),
    (1, 3, 64, 64),
    (1, 64, 28, 28),
    (1, 3, 160, 160),
    (1, 3, 224, 224),
    (1, 64, 56, 56),
    (1, 64, 112, 112),
    (8, 64, 56, 56),
    (8, 64, 112, 112),
    (16, 64, 128, 128),
    (16, 64, 256, 256),
]
SMALL = (1, 1, 4, 4)
THREADS, CALLS = 8, 25
MAPPED = (3, 32, 32), 20_000
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
LARGE = ("--max-message-bytes", str(2**30))
ECHO, PLAIN = "/bare/Echo", "/bare/Pool"


def bare(port: Connection, threads: int = 4) -> None:
    """Serve an echo that returns a quarter of its request, as MaxPool2d(2) does, and a plain pooling method."""
    torch.set_num_threads(1)
    module = torch.nn.MaxPool2d(2)

    def pool(request: pool_pb2.PoolRequest, _: grpc.ServicerContext) -> pool_pb2.PoolResponse:
        x = torch.from_numpy(np.frombuffer(request.payload, np.float32).reshape(tuple(request.input.shape)).copy())
        return pool_pb2.PoolResponse(payload=module(x).numpy().tobytes())

    server = grpc.server(ThreadPoolExecutor(threads), options=UNLIMITED)
    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(lambda request, _: request[: len(request) // 4]),
        "Pool": grpc.unary_unary_rpc_method_handler(
            pool, pool_pb2.PoolRequest.FromString, pool_pb2.PoolResponse.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bare", handlers)])
    port.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    port.recv()
    server.stop(0)


@contextmanager
def peers() -> Iterator[grpc.Channel]:
    """Run the bare server in a process of its own, and return a channel to it."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=bare, args=(theirs,))
    process.start()
    with grpc.insecure_channel(f"127.0.0.1:{ours.recv()}", UNLIMITED) as channel:
        yield channel
    ours.send(None)
    process.join()


def contenders(
    x: np.ndarray[Any, Any], tcp: PoolClient, unix: PoolClient, peer: grpc.Channel
) -> dict[str, Callable[[], Any]]:
    """Return every way to pool an array, and the baselines."""
    layer, module, tensor, payload = MaxPool2d(2), torch.nn.MaxPool2d(2), torch.from_numpy(x), x.tobytes()
    echo = peer.unary_unary(ECHO)
    plain = peer.unary_unary(PLAIN, pool_pb2.PoolRequest.SerializeToString, pool_pb2.PoolResponse.FromString)

    def tutorial() -> np.ndarray[Any, Any]:
        request = pool_pb2.PoolRequest(payload=x.tobytes())
        request.input.shape.extend(x.shape)
        half = (*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)
        return np.frombuffer(plain(request).payload, np.float32).reshape(half)

    runs: dict[str, Callable[[], Any]] = {
        "torch": lambda: module(tensor).numpy(),
        "echo": lambda: echo(payload),
        "plain server": tutorial,
        "auto": lambda: tcp.pool(x, layer).output,
        "unary": lambda: tcp.pool(x, layer, transport="unary").output,
        "stream": lambda: tcp.pool(x, layer, transport="stream").output,
        "unix unary": lambda: unix.pool(x, layer, transport="unary").output,
        "unix stream": lambda: unix.pool(x, layer, transport="stream").output,
        "arena": lambda: unix.pool(x, layer, transport="arena").output,
        "local": lambda: unix.pool(x, layer, transport="local").output,
    }
    shared = unix.empty(x.shape)
    shared[...] = x
    for transport in ("arena", "local"):
        runs[f"{transport}, no copies"] = partial(in_place, unix, shared, transport)
    return runs


def in_place(unix: PoolClient, shared: np.ndarray[Any, Any], transport: Literal["arena", "local"]) -> Any:  # noqa: ANN401 - an array
    """Return the output of an array in the arena, which stays there."""
    return unix.pool(shared, MaxPool2d(2), transport=transport, copy=False).output


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = f"unix:{Path(folder) / 'pool.sock'}"
        with (
            serving("--threads", "1", "--listen", path, *LARGE) as server,
            PoolClient(server.address, max_message_bytes=2**30) as tcp,
            PoolClient(path, max_message_bytes=2**30) as unix,
            peers() as peer,
        ):
            for shape in SHAPES:
                x = np.random.default_rng(0).standard_normal(shape, np.float32)
                runs = contenders(x, tcp, unix, peer)
                expected = runs["torch"]()
                times = interleave(runs, rounds, least=0.05)
                for name in list(runs)[3:]:
                    equal = bool(np.array_equal(runs[name](), expected))
                    more = ("unix unary", "arena") if name.startswith("local") else ()
                    for baseline in ("torch", "echo", "plain server", *more):
                        case = f"MaxPool2d(2) {'x'.join(map(str, shape))}"
                        yield row(case, baseline, name, times, bytes=x.nbytes, equal=equal)
            yield from small_calls(path, unix, peer, rounds)
            for name, client in (("map", tcp), ("map, unix", unix)):
                yield mapped(name, client, rounds)


def small_calls(path: str, unix: PoolClient, peer: grpc.Channel, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of small calls of one thread and of several threads of a client, and of GetServerInfo."""
    x, layer, echo = np.ones(SMALL, np.float32), MaxPool2d(2), peer.unary_unary(ECHO)
    link = Path(f"{path.removeprefix('unix:')}.link")  # there is no socket for local calls next to it
    link.symlink_to(link.with_suffix(""))
    with PoolClient(f"unix:{link}") as grpc_only, ThreadPoolExecutor(THREADS) as threads:
        calls: dict[str, Callable[[], object]] = {
            "unix unary": lambda: unix.pool(x, layer, transport="unary"),
            "local": lambda: unix.pool(x, layer, transport="local"),
            "echo": lambda: echo(bytes(x.nbytes)),
        }
        info: dict[str, Callable[[], object]] = {
            "unix unary": grpc_only.server_info,
            "local": unix.server_info,
            "echo": calls["echo"],
        }

        def by_all(call: Callable[[], object]) -> None:
            list(threads.map(lambda _: [call() for _ in range(CALLS)], range(THREADS)))

        cases = {
            "calls of 64 bytes, 1 thread": calls,
            f"calls of 64 bytes, {THREADS} threads of a client": {
                name: partial(by_all, call) for name, call in calls.items()
            },
            "GetServerInfo": info,
        }
        for case, runs in cases.items():
            times = interleave(runs, rounds, least=0.05)
            for baseline in ("unix unary", "echo"):
                yield row(case, baseline, "local", times, bytes=x.nbytes, equal=True)


def mapped(name: str, client: PoolClient, rounds: int) -> dict[str, Any]:
    """Return the row of a map over many small tensors, compared with one call each (of a tenth of them, times ten)."""
    shape, count = MAPPED
    tensors = list(np.random.default_rng(0).standard_normal((count, *shape), np.float32))
    layer = MaxPool2d(2)
    expected = [client.pool(each, layer).output for each in tensors[:100]]
    equal = all(map(np.array_equal, expected, (each.output for each in client.map(tensors[:100], layer))))
    runs: dict[str, Callable[[], Any]] = {
        "one call each": lambda: [client.pool(each, layer) for each in tensors[: count // 10]],
        name: lambda: sum(1 for _ in client.map(tensors, layer)),
    }
    times = interleave(runs, max(3, rounds // 3))
    times["one call each"] = [10 * each for each in times["one call each"]]
    case = f"{count} tensors of {'x'.join(map(str, shape))}"
    return row(case, "one call each", name, times, bytes=tensors[0].nbytes, equal=equal)
