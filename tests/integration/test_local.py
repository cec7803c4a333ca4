"""Calls as packets on the arena socket: results, errors, tokens, threads and workers."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import poolrpc
import poolrpc_server
from poolrpc import AvgPool2d, MaxPool2d, PoolClient
from scripts.server_process import serving
from tests.integration.local_calls import HELD, LARGE, X, halved, wait_for
from tests.scrape import Scrape

if TYPE_CHECKING:
    from poolrpc_server import Server
    from tests.integration.conftest import Connect, Gate

if sys.platform != "linux":
    pytest.skip("the arena socket needs Linux", allow_module_level=True)

TOKEN = "alices-token-0123456789"  # noqa: S105 - of the test


@pytest.mark.parametrize("x", [X, LARGE, X[:0]], ids=["inline", "in an arena", "empty"])
def test_it_is_the_default_on_a_unix_socket(connect: Connect, local_server: Server, x: np.ndarray) -> None:
    """Calls are packets, small tensors in them and large ones in an arena, and have the results of any other call."""
    client = connect(local_server.addresses[0])
    result = client.pool(x, MaxPool2d(2))
    np.testing.assert_array_equal(result.output, halved(x))
    assert result.transport == "local"
    if x.size:
        both = client.pool_each(x, [MaxPool2d(2), [AvgPool2d(2), MaxPool2d(2)]])
        assert {each.transport for each in both} == {"local"}
        steps = client.pool_steps(x, [MaxPool2d(2), MaxPool2d(2)])
        np.testing.assert_array_equal(steps[1].output, halved(halved(x)))
        maxima = client.pool(x, MaxPool2d(2, return_indices=True))
        unpooled = client.pool(maxima.output, poolrpc.MaxUnpool2d(2), indices=maxima.indices)
        np.testing.assert_array_equal(halved(np.where(unpooled.output, unpooled.output, -np.inf)), halved(x))
        assert {each.transport for each in (*steps, maxima, unpooled)} == {"local"}
    assert client.server_info().version == poolrpc.__version__
    assert client.output_shape((1, 1, 8, 8), MaxPool2d(2)) == (1, 1, 4, 4)
    assert all(each.transport == "local" for each in client.map([X] * 5, MaxPool2d(2)))
    scrape = Scrape(local_server.metrics_address)
    used = {
        each.labels["transport"]
        for each in scrape.samples
        if each.name == "poolrpc_transport_calls_total" and each.value
    }
    assert used == {"local"}


def test_no_grpc_connection_is_needed(local_server: Server) -> None:
    """The methods that go by packets make no call by gRPC: the server's pipeline alone sees them."""
    with PoolClient(local_server.addresses[0], options={"grpc.enable_retries": 0}) as client:
        client.pool(X, MaxPool2d(2))
        client.server_info()
        pids = {f"unix:pid={os.getpid()}"}
        assert {each.peer for each in local_server.local_connections()} == pids


def test_without_local_calls_everything_goes_by_grpc(connect: Connect, tmp_path: Path) -> None:
    """With --disable-local-calls the default is as over TCP and through the arena, and "local" is rejected."""
    with serving("--disable-local-calls", listen=f"unix:{tmp_path / 'pool.sock'}") as process:
        client = connect(process.address)
        assert client.pool(X, MaxPool2d(2)).transport == "unary"
        assert client.pool(LARGE, MaxPool2d(2)).transport == "arena"
        with pytest.raises(poolrpc.UnavailableError):
            client.pool(X, MaxPool2d(2), transport="local")
    for transport in ("local", "arena"):
        with pytest.raises(poolrpc.InvalidArgumentError, match="expected the address of a unix socket") as raised:
            connect("127.0.0.1:1").pool(X, MaxPool2d(2), transport=transport)
        assert raised.value.violations[0].field == "transport"


def test_errors_are_those_of_grpc(connect: Connect, local_server: Server) -> None:
    """A rejected call raises the same error, and the connection is used again."""
    client = connect(local_server.addresses[0])
    for layer, x in ((MaxPool2d(2), X.astype(np.int32)[:, :, :1]), (AvgPool2d(2), X.astype(np.int32))):
        errors = []
        for transport in ("local", "unary"):
            with pytest.raises(poolrpc.PoolError) as caught:
                client.pool(x, layer, transport=transport)
            errors.append((type(caught.value), caught.value.message))
        assert errors[0] == errors[1]
    with pytest.raises(poolrpc.InvalidArgumentError, match=r"expected indices in 0\.\.1023"):
        client.pool(X, poolrpc.MaxUnpool2d(2), indices=np.full(X.shape, 2**40), transport="local")
    assert client.pool(X, MaxPool2d(2)).transport == "local"
    assert len(local_server.local_connections()) == 1


def test_tokens_are_checked(connect: Connect, tmp_path: Path) -> None:
    """A call without a valid token is rejected, and priority 0 needs one that allows it."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
    with serving("--token-file", str(tokens), listen=f"unix:{tmp_path / 'pool.sock'}") as process:
        good = connect(process.address, token=TOKEN)
        assert good.pool(X, MaxPool2d(2), transport="local").transport == "local"
        with pytest.raises(poolrpc.UnauthenticatedError):
            connect(process.address).pool(X, MaxPool2d(2), transport="local")
        with pytest.raises(poolrpc.UnauthenticatedError):
            connect(process.address).server_info()


def test_threads_do_not_wait_for_each_other(gate: Gate) -> None:
    """Each concurrent call of a client has a connection of its own."""
    with poolrpc_server.embedded(threads=2) as client, ThreadPoolExecutor(2) as threads:
        held = threads.submit(client.pool, X, HELD)
        assert gate.entered.wait(60)
        np.testing.assert_array_equal(client.pool(X, MaxPool2d(2)).output, halved(X))
        gate.opened.set()
        assert held.result(60).transport == "local"


def test_idle_connections_take_no_thread(local_server: Server) -> None:
    """64 clients that have called and are idle share the few threads that their calls needed."""
    before = threading.active_count()
    with ExitStack() as clients:
        for _ in range(64):
            clients.enter_context(PoolClient(local_server.addresses[0])).pool(X, MaxPool2d(2))
        assert len(local_server.local_connections()) == 64
        mine = [thread for thread in threading.enumerate() if thread.name == "poolrpc-local"]
        assert len(mine) < 16
        assert threading.active_count() - before < 32


def test_connections_leave_nothing(local_server: Server) -> None:
    """Clients that come and go leave neither connections nor arenas, threads or descriptors."""

    def come_and_go() -> tuple[int, int]:
        for x in [X, LARGE] * 20:
            with PoolClient(local_server.addresses[0]) as client:
                assert client.pool(x, MaxPool2d(2)).transport == "local"
        wait_for(local_server, "poolrpc_arenas", 0)
        while local_server.local_connections():
            pass
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    threads, descriptors = come_and_go()
    more_threads, more_descriptors = come_and_go()
    assert more_threads <= threads + 4
    assert more_descriptors <= descriptors + 4


def test_workers(tmp_path: Path) -> None:
    """With several workers a connection belongs to one of them, and an arena's calls go to the worker that has it."""
    address = f"unix:{tmp_path / 'pool.sock'}"
    with serving("--workers", "2", listen=address), PoolClient(address) as client:
        for x in (X, LARGE, X, LARGE):
            result = client.pool(x, MaxPool2d(2))
            np.testing.assert_array_equal(result.output, halved(x))
            assert result.transport == "local"
