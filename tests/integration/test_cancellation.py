"""Callers that leave at every moment, beside others who wait: only they notice, and all that they held is free."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import numpy as np
import psutil
import pytest

import poolrpc
import poolrpc_server
from poolrpc import AsyncPoolClient, AvgPool2d, FractionalMaxPool2d, MaxPool2d, PoolClient
from poolrpc._wire import codec
from poolrpc.chains import as_chain
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2, pool_pb2_grpc
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Gate
    from scripts.server_process import ServerProcess

LIMIT = 48 * 2**20
"""Of the bytes under way: all that a test has under way at a time, and no more than the probe's."""

ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
"""For the server: glibc's heaps, one or more a thread, would take long to settle, and hide what is never freed."""

NO_RETRIES = [("grpc.enable_retries", 0)]
RNG = np.random.default_rng(8)


@dataclass(frozen=True, slots=True)
class Case:
    """A request, and what it gives."""

    request: pool_pb2.PoolRequest
    tensor: np.ndarray
    layer: poolrpc.Layer
    expected: bytes


def case(layer: poolrpc.Layer, shape: tuple[int, ...]) -> Case:
    """Give a case of random numbers, for a layer of windows of 2 without overlap."""
    tensor = RNG.integers(-99, 99, shape).astype(np.float32)
    windows = tensor.reshape(*shape[:2], shape[2] // 2, 2, shape[3] // 2, 2)
    # Sums of such integers are exact in whatever order they are made.
    output = windows.max((3, 5)) if isinstance(layer, MaxPool2d) else windows.sum((3, 5)) / np.float32(4)
    request = codec.encode_request(codec.Request(TensorSpec("float32", shape), (as_chain(layer),)))
    request.payload = tensor.tobytes()
    return Case(request, tensor, layer, output.astype(np.float32).tobytes())


CASES = [
    case(layer, shape)
    for shape in [(1, 3, 8, 8), (2, 16, 32, 32), (1, 64, 32, 32), (1, 8, 256, 256)]
    for layer in [MaxPool2d(2), AvgPool2d(2)]
]


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    """A server with one seat, so that calls wait at each stage."""
    flags = ["--threads", "1", "--call-threads", "64", "--max-streams", "4", "--max-inflight-bytes", str(LIMIT)]
    with serving(*flags, env=ONE_HEAP) as made:
        yield made
        assert made.process.poll() is None
        assert not [each for each in made.log if each["event"] == "unexpected error"]


def assert_nothing_is_held(address: str) -> None:
    """Check that no byte of anybody is counted: a call that takes the whole limit is let in, if need be with patience.

    The server frees what a caller held when it finds out that the caller has gone, which is soon: UNAVAILABLE until
    then, and the client tries again.
    """
    x = np.ones((1, 1, 3072, 3072), np.float32)
    largest = x.nbytes + x.nbytes // 4
    assert LIMIT - 2**20 * 4 < largest <= LIMIT
    with PoolClient(address) as client:
        assert client.pool(x, MaxPool2d(2), transport="unary", timeout=60).output.all()


def calls_among_which_some_are_cancelled(address: str, seed: int) -> dict[str, int]:
    """Make two dozen calls at once and cancel half of them, one whenever another is answered; count the outcomes.

    How many answers there have been is the moment of a cancellation: 0 is before the server has heard of the call, and
    the last ones find calls computed, sent, or over.
    """
    random = np.random.default_rng(seed)
    chosen = [CASES[i] for i in random.integers(0, len(CASES), 24)]
    moments = random.permutation(12)
    answers, lock = 0, threading.Lock()
    with grpc.insecure_channel(address, [*NO_RETRIES, ("grpc.use_local_subchannel_pool", 1)]) as channel:
        pool = pool_pb2_grpc.PoolServiceStub(channel).Pool
        futures = [pool.future(each.request, timeout=60) for each in chosen]
        staying, leaving = futures[::2], futures[1::2]

        def answered(_: grpc.Future) -> None:
            nonlocal answers
            with lock:
                answers += 1
                now = answers
            if now < len(leaving):
                leaving[moments[now]].cancel()

        leaving[moments[0]].cancel()
        for future in staying:
            future.add_done_callback(answered)
        for future, each in zip(staying, chosen[::2], strict=True):
            assert bytes(future.result().payload) == each.expected
        outcomes = {"OK": 0, "CANCELLED": 0}
        for future, each in zip(leaving, chosen[1::2], strict=True):
            try:
                assert bytes(future.result().payload) == each.expected
                outcomes["OK"] += 1
            except grpc.FutureCancelledError:
                outcomes["CANCELLED"] += 1
    return outcomes


def test_calls_cancelled_at_every_moment(server: ServerProcess) -> None:
    """P08: of many calls at once half are cancelled; the others' answers are right, and no byte or thread stays."""
    process = psutil.Process(server.process.pid)
    for seed in range(10):
        calls_among_which_some_are_cancelled(server.address, seed)
    assert_nothing_is_held(server.address)
    threads, rss = process.num_threads(), process.memory_info().rss
    counted = [calls_among_which_some_are_cancelled(server.address, seed) for seed in range(10, 60)]
    assert sum(each["CANCELLED"] for each in counted) > 50
    assert_nothing_is_held(server.address)
    # Threads come as calls need them, and stay for the next: at most one a call of those that were made at once.
    assert process.num_threads() <= threads + 24
    assert process.memory_info().rss < rss + 128 * 2**20


class LeftError(Exception):
    """What a caller's own code raises amid a stream."""


async def test_tasks_and_streams_cancelled_beside_others(server: ServerProcess) -> None:
    """P08: tasks of the asyncio client, by either way, are cancelled beside others, whose answers are right."""
    random = np.random.default_rng(3)
    async with AsyncPoolClient(server.address) as client:

        async def pool(each: Case, transport: str) -> None:
            result = await client.pool(each.tensor, each.layer, transport=transport, timeout=60)
            assert result.output.tobytes() == each.expected

        def leave(*_: int) -> None:
            raise LeftError

        for _ in range(30):
            chosen = [CASES[i] for i in random.integers(0, len(CASES), 16)]
            ways = random.choice(["unary", "stream"], 16, p=[0.8, 0.2])
            tasks = [asyncio.create_task(pool(*each)) for each in zip(chosen, ways, strict=True)]
            staying, leaving = tasks[::2], tasks[1::2]
            streamed = asyncio.create_task(
                client.pool(CASES[-1].tensor, CASES[-1].layer, transport="stream", progress=leave)
            )
            for answered in asyncio.as_completed(staying):
                await answered
                leaving.pop().cancel()
            with pytest.raises(LeftError):
                await streamed
            await asyncio.gather(*tasks[1::2], return_exceptions=True)
    await asyncio.to_thread(assert_nothing_is_held, server.address)


def test_calls_cancelled_in_the_queue(gate: Gate) -> None:
    """P08: while the engine is busy, calls are cancelled where they wait; the others of their kind are computed."""
    with poolrpc_server.embedded(threads=1, max_inflight_bytes=LIMIT) as client:
        with grpc.insecure_channel(client.address, NO_RETRIES) as channel:
            pool = pool_pb2_grpc.PoolServiceStub(channel).Pool
            held = codec.encode_request(
                codec.Request(TensorSpec("float32", (1, 1, 8, 8)), (as_chain(FractionalMaxPool2d(2, output_size=3)),))
            )
            held.payload = bytes(256)
            first = pool.future(held, timeout=60)
            assert gate.entered.wait(20)
            each = CASES[0]
            waiting = [pool.future(each.request, timeout=60) for _ in range(16)]
            assert client.health() == "SERVING"
            for future in waiting[::2]:
                future.cancel()
            gate.opened.set()
            assert len(first.result().payload) == 36
            assert all(bytes(future.result().payload) == each.expected for future in waiting[1::2])
        assert_nothing_is_held(client.address)
