"""Callers that cancel at every moment: other callers do not notice, and what the cancelled ones held is free."""

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
from poolrpc._wire.framing import MESSAGE_BYTES_KEY
from poolrpc.chains import as_chain
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2, pool_pb2_grpc
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scripts.server_process import ServerProcess
    from tests.integration.conftest import Gate

LIMIT = 96 * 2**20
"""--max-inflight-bytes: more than a test has in flight at a time, and what the largest call at its end needs."""

MESSAGE_LIMIT = 48 * 2**20
"""--max-message-bytes: the size of that call."""

ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
"""Of the server: with several of glibc's heaps its memory would take long to settle, and leaks would be hidden."""

HEAP_GAPS = 256 * 2**20
"""How much a heap may grow by gaps between what is in use: it grows over some 120 rounds by 210 MiB, is then trimmed to
where it began, and grows again. The cancelled calls of 50 rounds, had they stayed, would be 360 MiB."""

NO_RETRIES = [("grpc.enable_retries", 0)]
RNG = np.random.default_rng(8)


@dataclass(frozen=True, slots=True)
class Case:
    """A request, and its result."""

    request: pool_pb2.PoolRequest
    tensor: np.ndarray
    layer: poolrpc.Layer
    expected: bytes

    @property
    def announcement(self) -> list[tuple[str, str]]:
        """The metadata with the size of the message."""
        return [(MESSAGE_BYTES_KEY, str(self.request.ByteSize()))]


def case(layer: poolrpc.Layer, shape: tuple[int, ...]) -> Case:
    """Return a case of random numbers, for a layer with windows of 2 that do not overlap."""
    tensor = RNG.integers(-99, 99, shape).astype(np.float32)
    windows = tensor.reshape(*shape[:2], shape[2] // 2, 2, shape[3] // 2, 2)
    # Sums of such integers are exact in any order.
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
    """Return a server with one slot, so that calls wait at each stage."""
    flags = ["--threads", "1", "--call-threads", "64", "--max-streams", "4"]
    limits = ["--max-inflight-bytes", str(LIMIT), "--max-message-bytes", str(MESSAGE_LIMIT)]
    with serving(*flags, *limits, env=ONE_HEAP) as made:
        yield made
        assert made.process.poll() is None
        assert not [each for each in made.log if each["event"] == "unexpected error"]


def assert_nothing_is_held(address: str) -> None:
    """Check that no bytes are in flight: a call of more than 3/4 of the limit is admitted, after retries perhaps.

    A call may only have more than 3/4 of the bytes if it is the only one that has any.

    The server frees what a caller held when it notices that the caller is gone. Until then the call is UNAVAILABLE and
    the client tries again.
    """
    x = np.ones((1, 100, 320, 320), np.float32)
    assert 3 * LIMIT // 4 < 2 * x.nbytes < LIMIT  # the message is held twice while it is received
    with PoolClient(address) as client:
        assert client.pool(x, MaxPool2d(2), transport="unary", timeout=60).output.all()


def cancel_half_of_many_calls(address: str, seed: int) -> dict[str, int]:
    """Make two dozen calls at once and cancel half of them, one whenever another is answered; return the outcomes.

    The number of results so far is the moment of a cancellation: at 0 the server may not know of the call, and at the
    last ones the call may be computed, sent, or over.
    """
    random = np.random.default_rng(seed)
    chosen = [CASES[i] for i in random.integers(0, len(CASES), 24)]
    moments = random.permutation(12)
    answers, lock = 0, threading.Lock()
    with grpc.insecure_channel(address, [*NO_RETRIES, ("grpc.use_local_subchannel_pool", 1)]) as channel:
        pool = pool_pb2_grpc.PoolServiceStub(channel).Pool
        futures = [pool.future(each.request, timeout=60, metadata=each.announcement) for each in chosen]
        kept, cancelled = futures[::2], futures[1::2]

        def answered(_: grpc.Future) -> None:
            nonlocal answers
            with lock:
                answers += 1
                now = answers
            if now < len(cancelled):
                cancelled[moments[now]].cancel()

        cancelled[moments[0]].cancel()
        for future in kept:
            future.add_done_callback(answered)
        for future, each in zip(kept, chosen[::2], strict=True):
            assert bytes(future.result().payload) == each.expected
        outcomes = {"OK": 0, "CANCELLED": 0}
        for future, each in zip(cancelled, chosen[1::2], strict=True):
            try:
                assert bytes(future.result().payload) == each.expected
                outcomes["OK"] += 1
            except grpc.FutureCancelledError:
                outcomes["CANCELLED"] += 1
    return outcomes


def test_calls_cancelled_at_every_moment(server: ServerProcess) -> None:
    """Half of many calls at once are cancelled; the others have the right results, and no byte or thread stays."""
    process = psutil.Process(server.process.pid)
    for seed in range(10):
        cancel_half_of_many_calls(server.address, seed)
    assert_nothing_is_held(server.address)
    threads, rss = process.num_threads(), process.memory_info().rss
    counted = [cancel_half_of_many_calls(server.address, seed) for seed in range(10, 60)]
    assert sum(each["CANCELLED"] for each in counted) > 50
    assert_nothing_is_held(server.address)
    # Threads are started when calls need them, and stay: at most one for each call of two rounds, since on a busy
    # machine the cancelled calls of one round end during the next.
    assert process.num_threads() <= threads + 48
    assert process.memory_info().rss < rss + HEAP_GAPS


class LeftError(Exception):
    """Raised by a caller's own code in the middle of a stream."""


async def test_tasks_and_streams_cancelled_among_others(server: ServerProcess) -> None:
    """Tasks of the asyncio client, unary and streams, are cancelled; the others have the right results."""
    random = np.random.default_rng(3)
    async with AsyncPoolClient(server.address) as client:

        async def pool(each: Case, transport: str) -> None:
            result = await client.pool(each.tensor, each.layer, transport=transport, timeout=60)
            assert result.output.tobytes() == each.expected

        def leave(*_: int) -> None:
            raise LeftError

        for _ in range(30):
            chosen = [CASES[i] for i in random.integers(0, len(CASES), 16)]
            transports = random.choice(["unary", "stream"], 16, p=[0.8, 0.2])
            tasks = [asyncio.create_task(pool(*each)) for each in zip(chosen, transports, strict=True)]
            kept, cancelled = tasks[::2], tasks[1::2]
            streamed = asyncio.create_task(
                client.pool(CASES[-1].tensor, CASES[-1].layer, transport="stream", progress=leave)
            )
            for answered in asyncio.as_completed(kept):
                await answered
                cancelled.pop().cancel()
            with pytest.raises(LeftError):
                await streamed
            await asyncio.gather(*tasks[1::2], return_exceptions=True)
    await asyncio.to_thread(assert_nothing_is_held, server.address)


def test_calls_cancelled_in_the_queue(gate: Gate) -> None:
    """While the engine is busy, calls are cancelled in the queue; the others of their batch are computed."""
    with poolrpc_server.embedded(threads=1, max_inflight_bytes=LIMIT, max_message_bytes=MESSAGE_LIMIT) as client:
        with grpc.insecure_channel(client.address, NO_RETRIES) as channel:
            pool = pool_pb2_grpc.PoolServiceStub(channel).Pool
            held = codec.encode_request(
                codec.Request(TensorSpec("float32", (1, 1, 8, 8)), (as_chain(FractionalMaxPool2d(2, output_size=3)),))
            )
            held.payload = bytes(256)
            first = pool.future(held, timeout=60)
            assert gate.entered.wait(60)
            each = CASES[0]
            waiting = [pool.future(each.request, timeout=60, metadata=each.announcement) for _ in range(16)]
            assert client.health() == "SERVING"
            for future in waiting[::2]:
                future.cancel()
            gate.opened.set()
            assert len(first.result().payload) == 36
            assert all(bytes(future.result().payload) == each.expected for future in waiting[1::2])
        assert_nothing_is_held(client.address)
