"""Arenas: memory that client and server share, what falls back to sending bytes, and how arenas end."""

from __future__ import annotations

import asyncio
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import poolrpc
import poolrpc_server
from poolrpc import AsyncPoolClient, AvgPool2d, FractionalMaxPool2d, MaxPool2d, PoolClient
from scripts.server_process import serving
from tests.integration.connections import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integration.conftest import Connect, Gate

if sys.platform != "linux":
    pytest.skip("arenas need memfd, which only Linux has", allow_module_level=True)

ARENA_BYTES = 64 * 2**20
"""The size of a client's arena."""
RNG = np.random.default_rng(7)
X = RNG.standard_normal((2, 3, 128, 128), np.float32)
HELD = FractionalMaxPool2d(2, output_size=8)
"""A layer that the gate holds."""


@pytest.fixture
def client(unix_address: str) -> Iterator[PoolClient]:
    """Return a client of the server's unix socket."""
    with PoolClient(unix_address) as made:
        yield made


def halved(x: np.ndarray) -> np.ndarray:
    """Return MaxPool2d(2) of a tensor with even height and width."""
    *lead, h, w = x.shape
    return x.reshape(*lead, h // 2, 2, w // 2, 2).max((-3, -1))


def mappings(process: int | str = "self") -> int:
    """Return the number of arenas that a process has mapped, as a client or as a server."""
    return Path(f"/proc/{process}/maps").read_text().count("memfd:poolrpc-arena")


def in_arena(array: np.ndarray) -> bool:
    """Return whether an array is in an arena that this process has mapped."""
    start = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:poolrpc-arena" in line:
            low, high = (int(each, 16) for each in line.split()[0].split("-"))
            if low <= start and start + array.nbytes <= high:
                return True
    return False


# Shared memory


def test_empty_and_results_without_copy_are_in_the_arena(client: PoolClient) -> None:
    """client.empty's arrays and results with copy=False are in memory that the server shares; other results do not."""
    x = client.empty((2, 3, 64, 64), np.float32)
    x[...] = RNG.standard_normal(x.shape, np.float32)
    assert in_arena(x)
    view, copy = client.pool(x, MaxPool2d(2), transport="arena", copy=False), client.pool(x, MaxPool2d(2))
    assert in_arena(view.output)
    assert not in_arena(copy.output)
    assert copy.output.flags.owndata
    np.testing.assert_array_equal(view.output, halved(x))
    np.testing.assert_array_equal(copy.output, halved(x))
    again = client.pool(view.output, MaxPool2d(2), transport="arena", copy=False)  # a result is an input as it is
    np.testing.assert_array_equal(again.output, halved(halved(x)))
    np.testing.assert_array_equal(view.output, halved(x))


def test_arrays_of_objects_are_not_in_an_arena(client: PoolClient) -> None:
    """An array of references is rejected, or is in ordinary memory: another process must not read or change them."""
    try:
        array = client.empty(3, object)
    except (poolrpc.PoolError, TypeError, ValueError):
        return
    assert not in_arena(array)


def test_the_server_reads_an_array_in_place(gate: Gate) -> None:
    """The server computes on what is in client.empty's array at that time: only a small one is copied."""
    with poolrpc_server.embedded(threads=2) as client, ThreadPoolExecutor(2) as threads:
        x, y = client.empty((1, 1, 256, 256), np.float32), np.zeros((1, 1, 256, 256), np.float32)
        x[...] = 0
        results = [threads.submit(client.pool, each, HELD, transport="arena") for each in (x, y)]
        assert gate.entered.wait(60)
        x[...] = y[...] = 5
        gate.opened.set()
        assert (results[0].result().output == 5).all()
        assert (results[1].result().output == 0).all()


def test_views_outlive_the_client_and_the_server() -> None:
    """A result in the arena, and a view of it, stay valid after the client is closed and the server has ended."""
    x, before = RNG.standard_normal((2, 3, 64, 64), np.float32), mappings()
    with poolrpc_server.embedded() as client:
        mine = client.empty(x.shape)
        mine[...] = x
        view = client.pool(mine, MaxPool2d(2), transport="arena", copy=False).output[:, 1, ::2]
        with pytest.raises(poolrpc.InvalidArgumentError):
            client.pool(mine, MaxPool2d(99), transport="arena")
    gc.collect()
    assert in_arena(view[0, 0])
    np.testing.assert_array_equal(view, halved(x)[:, 1, ::2])
    view[...] = mine[0, 0, 0, 0]
    assert (view == x[0, 0, 0, 0]).all()
    del view, mine
    gc.collect()
    assert mappings() <= before


def test_an_arena_is_used_again(tmp_path: Path) -> None:
    """Many calls, with results kept or not, use one arena: its memory is free again when arrays are deleted."""
    with serving(listen=f"unix:{tmp_path / 'pool.sock'}") as server, PoolClient(server.address) as client:
        x = RNG.standard_normal((4, 8, 128, 128), np.float32)
        expected = halved(x)
        kept: list[np.ndarray] = []
        for i in range(300):
            result = client.pool(x, MaxPool2d(2), copy=i % 2 == 0)
            assert result.transport == "local"
            kept = [*kept[-3:], result.output]
            assert i % 50 or np.array_equal(result.output, expected)
        assert mappings(server.process.pid) == 1


def test_a_client_that_repeated_its_calls_leaves_nothing_mapped(tmp_path: Path) -> None:
    """What the server keeps for calls in one place ends with their client, so that its memory is unmapped."""
    with serving(listen=f"unix:{tmp_path / 'pool.sock'}") as server:
        with PoolClient(server.address) as client:
            x = client.empty((1, 64, 28, 28))
            for number in range(5):
                x[...] = number
                assert set(client.pool(x, MaxPool2d(2), copy=False).output.ravel()) == {number}
            assert mappings(server.process.pid) == 1
        until(lambda: not mappings(server.process.pid))


def test_threads_share_an_arena(client: PoolClient) -> None:
    """Calls of many threads at the same time use ranges of their own, and each receives its own result."""

    def work(number: int) -> None:
        for i in range(15):
            x = np.full((1, 4, 64, 64 + 2 * number), number * 100 + i, np.float32)
            if i % 2:
                mine = client.empty(x.shape)
                mine[...] = x
                x = mine
            result = client.pool(x, AvgPool2d(2), transport="arena", copy=i % 3 == 0)
            assert (result.output == number * 100 + i).all()
            assert result.transport == "arena"

    with ThreadPoolExecutor(12) as threads:
        for future in [threads.submit(work, number) for number in range(12)]:
            future.result()


async def test_tasks_share_an_arena(unix_address: str) -> None:
    """Calls that overlap in one event loop use ranges of their own too."""
    async with AsyncPoolClient(unix_address) as client:

        async def call(number: int) -> None:
            x = client.empty((1, 4, 64, 64)) if number % 2 else np.empty((1, 4, 64, 64), np.float32)
            x[...] = number
            result = await client.pool(x, AvgPool2d(2), transport="arena", copy=number % 3 == 0)
            assert (result.output == number).all()
            assert result.transport == "arena"

        await asyncio.gather(*(call(number) for number in range(64)))


# Without an arena


@pytest.mark.parametrize("why", ["TCP", "no arenas"])
def test_without_an_arena_bytes_are_sent(connect: Connect, address: str, why: str) -> None:
    """Over TCP, or if the server has no arenas, transport="arena" is an error, and None sends bytes."""
    x, large = np.ones((1, 4, 128, 128), np.float32), np.ones((1, 256, 128, 128), np.float32)
    with ExitStack() as servers:
        if why != "TCP":
            address = servers.enter_context(poolrpc_server.embedded(max_arena_bytes=0)).address
        client = connect(address)
        cls = poolrpc.InvalidArgumentError if why == "TCP" else poolrpc.UnavailableError
        with pytest.raises(cls, match=r"expected the address of a unix socket|expected an arena, got none") as caught:
            client.pool(x, MaxPool2d(2), transport="arena")
        assert caught.value.reason == ("INVALID_ARGUMENT" if why == "TCP" else "ARENA")
        assert [client.pool(each, MaxPool2d(2)).transport for each in (x, large)] == ["unary", "stream"]
        mine = client.empty(x.shape, "float64")
        assert (mine.shape, mine.dtype) == (x.shape, np.float64)
        assert not in_arena(mine)


def test_a_full_quota_falls_back_to_bytes() -> None:
    """Bytes are sent if another client has the quota, if the arena is full, and if a tensor is larger than an arena."""
    x, large = np.ones((1, 4, 128, 128), np.float32), np.ones((1, 256, 128, 128), np.float32)
    with poolrpc_server.embedded(max_arena_bytes=ARENA_BYTES) as first, PoolClient(first.address) as second:
        assert first.pool(x, MaxPool2d(2)).transport == "local"
        assert [second.pool(each, MaxPool2d(2)).transport for each in (x, large)] == ["unary", "stream"]
        with pytest.raises(poolrpc.UnavailableError, match="at most 67108864 bytes of arenas") as caught:
            second.pool(x, MaxPool2d(2), transport="arena")
        assert caught.value.reason == "ARENA"
        assert not in_arena(second.empty(x.shape))
        taken = [first.empty(ARENA_BYTES // 4, np.uint8) for _ in range(4)]
        assert all(map(in_arena, taken))
        assert not in_arena(first.empty(1024, np.uint8))
        assert first.pool(x, MaxPool2d(2)).transport == "unary"
        del taken
        assert first.pool(x, MaxPool2d(2)).transport == "local"
        assert not in_arena(first.empty(ARENA_BYTES + 1, np.uint8))
        assert first.pool(x, MaxPool2d(2)).transport == "local"


# How arenas end


@pytest.fixture
def restart(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Return a function that starts a server, in place of the one before it, and returns its unix socket's address."""
    address = f"unix:{tmp_path / 'pool.sock'}"
    servers: list[poolrpc_server.Server] = []

    def start() -> str:
        if servers:
            servers.pop().stop(grace=0)
        servers.append(poolrpc_server.Server(poolrpc_server.Config(listen=(address,))))
        servers[0].start()
        return address

    yield start
    servers.pop().stop(grace=0)


SOON = {"grpc.min_reconnect_backoff_ms": 50, "grpc.initial_reconnect_backoff_ms": 50}


def test_a_restarted_server_has_a_new_arena(connect: Connect, restart: Callable[[], str]) -> None:
    """After a restart the next call is answered, a later one uses a new arena, and results of before stay valid."""
    client = connect(restart(), options=SOON)
    mine = client.empty(X.shape)
    mine[...] = X
    kept = client.pool(mine, MaxPool2d(2), copy=False)
    assert kept.transport == "local"
    restart()
    for x, transport in ((mine, "arena"), (mine, "local"), (X, "local")):
        result = client.pool(x, MaxPool2d(2))
        assert result.transport == transport
        np.testing.assert_array_equal(result.output, halved(X))
    np.testing.assert_array_equal(kept.output, halved(X))


def test_the_arena_of_a_restarted_server_is_not_found(connect: Connect, restart: Callable[[], str]) -> None:
    """With transport="arena" the first call after a restart raises NotFoundError, and the next one has a new arena."""
    client = connect(restart(), options=SOON)
    assert client.pool(X, MaxPool2d(2), transport="arena").transport == "arena"
    restart()
    with pytest.raises(poolrpc.NotFoundError) as caught:
        client.pool(X, MaxPool2d(2), transport="arena")
    assert caught.value.reason == "ARENA"
    assert client.pool(X, MaxPool2d(2), transport="arena").transport == "arena"


def test_an_arena_that_the_server_may_still_write_to_is_not_used_again(gate: Gate, connect: Connect) -> None:
    """After a timeout the next call has another arena, which the late result of the first call does not reach."""
    with poolrpc_server.embedded(threads=2) as server:
        client = connect(server.address)
        x = client.empty((1, 1, 128, 128))
        x[...] = 7
        with pytest.raises(poolrpc.DeadlineExceededError):
            client.pool(x, HELD, transport="arena", timeout=1)
        assert gate.entered.wait(60)
        y = RNG.standard_normal((1, 1, 128, 128), np.float32)
        results = [client.pool(y, MaxPool2d(2), transport="arena", copy=False) for _ in range(8)]
        mine = client.empty((1, 1, 128, 128))
        mine[...] = y
        again = client.pool(x, MaxPool2d(2))  # an array of the old arena is sent like any other
        assert (again.output == 7).all()
        gate.opened.set()
        assert (client.pool(x, HELD, transport="arena").output == 7).all()
    # The server has ended, so the first call has written everything.
    for result in results:
        np.testing.assert_array_equal(result.output, halved(y))
    np.testing.assert_array_equal(mine, y)
    assert (x == 7).all()


async def test_the_arena_of_a_cancelled_task_is_not_used_again(gate: Gate) -> None:
    """The same holds for a task that is cancelled while the server computes."""
    with poolrpc_server.embedded(threads=2) as embedded:
        async with AsyncPoolClient(embedded.address) as client:
            x = client.empty((1, 1, 128, 128))
            x[...] = 7
            task = asyncio.create_task(client.pool(x, HELD, transport="arena"))
            assert await asyncio.to_thread(gate.entered.wait, 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            y = RNG.standard_normal((1, 1, 128, 128), np.float32)
            result = await client.pool(y, MaxPool2d(2), transport="arena", copy=False)
            gate.opened.set()
            assert (await client.pool(x, HELD, transport="arena")).transport == "arena"
    np.testing.assert_array_equal(result.output, halved(y))


def test_a_client_that_is_closed_during_a_call(gate: Gate) -> None:
    """Closing the client ends the call; the server finishes computing in memory that is still there."""
    with poolrpc_server.embedded(threads=2) as other, ThreadPoolExecutor(1) as threads:
        client = PoolClient(other.address)
        x = client.empty((1, 1, 128, 128))
        x[...] = 7
        call = threads.submit(client.pool, x, HELD, transport="arena", copy=False)
        assert gate.entered.wait(60)
        client.close()
        with pytest.raises(poolrpc.CancelledError):
            call.result(60)
        gate.opened.set()
        assert (other.pool(x, HELD, transport="arena").output == 7).all()
