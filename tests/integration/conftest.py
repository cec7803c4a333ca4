"""Fixtures of the integration tests: a server on 127.0.0.1, either client, and ways to hold up the engine.

POOLRPC_TEST_ADDRESS names a server that is already running. With it test_client.py runs without torch and the server
package: CI runs it so with the lowest versions that the client supports.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest

import poolrpc
from poolrpc._wire import framing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from poolrpc import PoolClient
    from poolrpc_server import Server
    from poolrpc_server.compute.kernels.eager import Operator

    Connect = Callable[..., PoolClient]


class BlockingAsyncClient:
    """An AsyncPoolClient with the methods of PoolClient: each runs in an event loop of its own until it is done."""

    def __init__(self, address: str, **options: Any) -> None:
        self._runner = asyncio.Runner()

        async def connect() -> poolrpc.AsyncPoolClient:
            return poolrpc.AsyncPoolClient(address, **options)

        self._client = self._runner.run(connect())

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        return partial(self._call, attribute) if callable(attribute) else attribute

    def _call(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        result = method(*arguments, **options)
        if hasattr(result, "__anext__"):
            return self._iterate(result)
        if not hasattr(result, "__await__"):
            return result
        return self._runner.run(self._wait(result))

    def _iterate(self, results: Any) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._runner.run(self._wait(anext(results)))
                except StopAsyncIteration:
                    return
        finally:
            self._runner.run(self._wait(results.aclose()))

    @staticmethod
    async def _wait(result: Any) -> Any:
        return await result

    def close_all(self) -> None:
        """Close the client and its event loop."""
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture
def without_client_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove this process's own variables for clients."""
    for name in ("POOLRPC_TOKEN", "POOLRPC_CA", "POOLRPC_CLIENT_CERT", "POOLRPC_CLIENT_KEY"):
        monkeypatch.delenv(name, raising=False)


CLIENTS = ("blocking", "async")


def connected(kind: str, clients: ExitStack, address: str, **options: Any) -> PoolClient:
    """Return a client of a kind, which is closed with the stack."""
    if kind == "blocking":
        return clients.enter_context(poolrpc.PoolClient(address, **options))
    client = BlockingAsyncClient(address, **options)
    clients.callback(client.close_all)
    return cast("PoolClient", client)


@pytest.fixture(params=CLIENTS)
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Return a function that connects a client: a PoolClient in one run of the test, an AsyncPoolClient in another."""
    with ExitStack() as clients:
        yield partial(connected, request.param, clients)


@pytest.fixture(scope="session")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Return the addresses of a server: 127.0.0.1 and a port, and the path of a unix socket."""
    if "POOLRPC_TEST_ADDRESS" in os.environ:
        yield [os.environ["POOLRPC_TEST_ADDRESS"]]
        return
    import poolrpc_server  # noqa: PLC0415 - not if only the client is installed

    path = tmp_path_factory.mktemp("server") / "pool.sock"
    server = poolrpc_server.Server(poolrpc_server.Config(listen=("127.0.0.1:0", f"unix:{path}")))
    server.start()
    yield list(server.addresses)
    server.stop(grace=0)


@pytest.fixture(scope="session")
def address(addresses: list[str]) -> str:
    """Return the TCP address of that server."""
    return addresses[0]


@pytest.fixture(scope="session")
def unix_address(addresses: list[str]) -> str:
    """Return the unix socket of that server, on which clients have an arena."""
    return addresses[1]


@pytest.fixture
def client(address: str) -> Iterator[PoolClient]:
    """Return a client of that server."""
    with poolrpc.PoolClient(address) as made:
        yield made


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let commands receive SIGINT: a test run in the background of a shell ignores it, and its children would too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def stream_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets the size of a stream's blocks, and of the messages in which a block is sent."""

    def set_sizes(block_bytes: int, message_bytes: int | None = None) -> None:
        monkeypatch.setattr("poolrpc._transport.stream.STREAM_BLOCK_BYTES", block_bytes)
        if message_bytes is not None:
            monkeypatch.setattr(framing, "chunks", partial(framing.chunks, chunk_bytes=message_bytes))

    return set_sizes


@pytest.fixture
def many_blocks(stream_in: Callable[..., None]) -> None:
    """Stream in blocks of 64 KiB, so that a tensor of a few MiB has many."""
    stream_in(65536)


@pytest.fixture
def patch_operation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Callable[[Operator], Operator]], None]]:
    """Return a function that wraps what computes an operation in servers of this process."""
    from poolrpc_server.compute.kernels import eager, plan_for, table  # noqa: PLC0415 - not if only the client is installed

    def patch(operation: str, wrap: Callable[[Operator], Operator]) -> None:
        bound = eager.OPERATIONS[operation]
        monkeypatch.setitem(eager.OPERATIONS, operation, lambda *arguments: wrap(bound(*arguments)))
        monkeypatch.setattr(table, "TABLE", [row for row in table.TABLE if operation not in row.operations])
        plan_for.cache_clear()

    yield patch
    monkeypatch.undo()
    plan_for.cache_clear()


class Gate:
    """Holds global maxima and FractionalMaxPool inside of the engine until it is opened, and counts MaxPool's runs."""

    def __init__(self, patch_operation: Callable[..., None]) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.computed = 0

        def hold(run: Operator) -> Operator:
            def held(*arguments: Any) -> Any:
                self.entered.set()
                assert self.opened.wait(60)
                return run(*arguments)

            return held

        def count(run: Operator) -> Operator:
            def counted(*arguments: Any) -> Any:
                self.computed += 1
                return run(*arguments)

            return counted

        patch_operation("global_pool, max", hold)
        patch_operation("fractional_max_pool", hold)
        patch_operation("max_pool", count)


@pytest.fixture
def gate(patch_operation: Callable[..., None]) -> Iterator[Gate]:
    """Return a gate in the servers of this process, which is open at the test's end in any case."""
    made = Gate(patch_operation)
    yield made
    made.opened.set()


@pytest.fixture
def local_server(tmp_path: Path) -> Iterator[Server]:
    """Return a server on a unix socket with one slot, and with metrics."""
    from poolrpc_server import Config, Server  # noqa: PLC0415 - not if only the client is installed

    made = Server(Config(listen=(f"unix:{tmp_path / 'pool.sock'}",), threads=1, metrics="127.0.0.1:0"))
    made.start()
    yield made
    made.stop(0)
