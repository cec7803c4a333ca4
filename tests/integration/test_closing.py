"""Clients that are closed while they are used, unclosed ones, pickles, and other event loops."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

import poolrpc
from poolrpc import AsyncPoolClient, GlobalPool2d, MaxPool2d, PoolClient
from tests.integration.connections import server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.integration.conftest import Gate

X = np.zeros((1, 4, 256, 256), np.float32)
TRANSPORTS = ("unary", "stream", "arena", "local")
CLIENTS = (PoolClient, AsyncPoolClient)


@pytest.fixture
def own_address(tmp_path: Path) -> Iterator[str]:
    """Return the unix socket of a server of the test's own: a server keeps its plans, and the gate of another test."""
    with server(listen=(f"unix:{tmp_path / 'pool.sock'}",)) as address:
        yield address


def assert_closed(error: BaseException | None) -> None:
    """Check that an error says that the client is closed."""
    assert isinstance(error, poolrpc.PoolError)
    assert error.reason == "CLOSED"
    assert "closed" in str(error)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_call_in_flight_ends_with_the_client(own_address: str, gate: Gate, transport: str) -> None:
    """A call in another thread raises a CancelledError with the reason CLOSED when the client is closed."""
    with ThreadPoolExecutor(1) as threads, PoolClient(own_address) as client:
        call = threads.submit(client.pool, X, GlobalPool2d("max"), transport=transport)
        assert gate.entered.wait(60)
        client.close()
        error = call.exception(60)
        gate.opened.set()
    assert isinstance(error, poolrpc.CancelledError)
    assert_closed(error)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_task_in_flight_ends_with_the_client(own_address: str, gate: Gate, transport: str) -> None:
    """The same holds for a task, which is not itself cancelled."""
    async with AsyncPoolClient(own_address) as client:
        call = asyncio.create_task(client.pool(X, GlobalPool2d("max"), transport=transport))  # type: ignore[arg-type]  # a name
        assert await asyncio.to_thread(gate.entered.wait, 60)
        await client.close()
        (error,) = await asyncio.wait_for(asyncio.gather(call, return_exceptions=True), 60)
        gate.opened.set()
    assert isinstance(error, poolrpc.CancelledError)
    assert_closed(error)


async def test_a_task_that_is_cancelled_stays_cancelled(own_address: str, gate: Gate) -> None:
    """Cancelling a task of an open client, or of one that is closed meanwhile, raises asyncio's own error."""
    async with AsyncPoolClient(own_address) as client:
        call = asyncio.create_task(client.pool(X, GlobalPool2d("max"), transport="unary"))
        assert await asyncio.to_thread(gate.entered.wait, 60)
        call.cancel()
        await client.close()
        with pytest.raises(asyncio.CancelledError):
            await call
        gate.opened.set()


@pytest.mark.parametrize("call", ["pool", "stream", "map", "server_info"])
def test_threads_call_while_the_client_is_closed(unix_address: str, call: str) -> None:
    """Calls that begin around the moment of closing raise PoolErrors of the reason CLOSED, or succeed."""
    calls = {
        "pool": lambda client: client.pool(X, MaxPool2d(2)),
        "stream": lambda client: client.pool(X, MaxPool2d(2), transport="stream"),
        "map": lambda client: list(client.map([X[..., :8, :8]] * 8, MaxPool2d(2))),
        "server_info": lambda client: client.server_info(),
    }
    for _ in range(10):
        with PoolClient(unix_address) as client, ThreadPoolExecutor(4) as threads:
            started = threading.Barrier(5)

            def repeat(client: PoolClient = client, started: threading.Barrier = started) -> BaseException:
                started.wait(60)
                while True:
                    try:
                        calls[call](client)
                    except BaseException as error:  # noqa: BLE001 - the test looks at it
                        return error

            loops = [threads.submit(repeat) for _ in range(4)]
            started.wait(60)
            client.close()
            for loop in loops:
                assert_closed(loop.result(60))


@pytest.mark.parametrize("call", ["pool", "stream", "map", "server_info"])
async def test_tasks_call_while_the_client_is_closed(unix_address: str, call: str) -> None:
    """The same holds for tasks."""

    async def mapped(client: AsyncPoolClient) -> None:
        async for _ in client.map([X[..., :8, :8]] * 8, MaxPool2d(2)):
            pass

    calls = {
        "pool": lambda client: client.pool(X, MaxPool2d(2)),
        "stream": lambda client: client.pool(X, MaxPool2d(2), transport="stream"),
        "map": mapped,
        "server_info": lambda client: client.server_info(),
    }

    async def repeat(client: AsyncPoolClient) -> None:
        while True:
            await calls[call](client)

    for pause in range(10):
        async with AsyncPoolClient(unix_address) as client:
            loops = [asyncio.create_task(repeat(client)) for _ in range(4)]
            for _ in range(pause * 5):
                await asyncio.sleep(0)
            await client.close()
            for error in await asyncio.wait_for(asyncio.gather(*loops, return_exceptions=True), 60):
                assert_closed(error)


@pytest.mark.parametrize("cls", CLIENTS)
def test_an_unclosed_client_warns(cls: type[PoolClient | AsyncPoolClient]) -> None:
    """A client that is freed without being closed is a ResourceWarning that names its address."""

    def use() -> None:
        cls("127.0.0.1:1")
        gc.collect()

    with pytest.warns(ResourceWarning, match=rf"^unclosed {cls.__name__}\('127.0.0.1:1'\)"):
        use()


def test_a_closed_client_does_not_warn() -> None:
    """Neither does one that was never made, because its settings were rejected."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PoolClient("127.0.0.1:1").close()
        with pytest.raises(poolrpc.InvalidArgumentError):
            PoolClient("127.0.0.1:1", timeout=-1)
        gc.collect()
    assert not [each for each in caught if each.category is ResourceWarning]


@pytest.mark.parametrize("duplicate", [lambda client: pickle.loads(pickle.dumps(client)), copy.copy, copy.deepcopy])  # noqa: S301 - its own pickle
def test_a_client_is_pickled_as_its_settings(address: str, duplicate: Callable[[PoolClient], PoolClient]) -> None:
    """A copy has the same settings, and connections of its own: it outlives the original."""
    settings = {"token": "a-token", "metadata": {"tenant": "a"}, "options": {"grpc.enable_retries": 0}, "timeout": 9}
    client = PoolClient(address, max_message_bytes=2**20, **settings)  # type: ignore[arg-type]  # by name
    other = duplicate(client)
    client.close()
    with other:
        assert other.health() == "SERVING"
        assert (other.address, other.timeout, other.max_message_bytes) == (address, 9.0, 2**20)


def test_a_token_of_the_environment_is_not_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy reads the environment where it is unpickled."""
    monkeypatch.setenv("POOLRPC_TOKEN", "environments-token")
    with PoolClient("127.0.0.1:1") as client:
        assert b"environments-token" not in pickle.dumps(client)


async def test_an_async_client_is_pickled_too(address: str) -> None:
    """An AsyncPoolClient is copied in the same way."""
    async with AsyncPoolClient(address) as client, pickle.loads(pickle.dumps(client)) as other:  # noqa: S301 - its own
        assert await other.health() == "SERVING"


def test_a_client_with_credentials_says_why_it_is_not_pickled() -> None:
    """GRPC's credentials have no bytes; the error names the variable to use instead."""
    with (
        PoolClient("127.0.0.1:1", credentials=grpc.ssl_channel_credentials()) as client,
        pytest.raises(TypeError, match=r"^expected a client without credentials= to pickle, .* POOLRPC_CA"),
    ):
        pickle.dumps(client)


def test_an_async_client_belongs_to_the_loop_of_its_first_call(address: str) -> None:
    """It may be made outside of a loop; calls in a second loop raise a PoolError, and it can be closed there."""
    client = AsyncPoolClient(address)
    calls = {
        "pool": lambda: client.pool(X, MaxPool2d(2)),
        "health": client.health,
        "map": lambda: anext(client.map([X], MaxPool2d(2))),
    }

    async def run(call: str) -> object:
        return await calls[call]()

    assert asyncio.run(run("health")) == "SERVING"
    for call in calls:
        with pytest.raises(poolrpc.PoolError, match="expected the event loop of the first call of") as raised:
            asyncio.run(run(call))
        assert raised.value.reason == "EVENT_LOOP"
    asyncio.run(client.close())
    with pytest.raises(poolrpc.PoolError, match="is closed"):
        asyncio.run(run("health"))
