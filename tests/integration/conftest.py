"""What the tests share: a server on 127.0.0.1, in this process or where the environment says, and ways to hold one up.

POOLRPC_TEST_ADDRESS lets test_client.py run where there is no torch, against a server elsewhere on this machine: CI
does so at the lowest versions that the client claims to support.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

import poolrpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from poolrpc_server.compute.kernels.eager import Operator


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The address of a server."""
    if "POOLRPC_TEST_ADDRESS" in os.environ:
        yield os.environ["POOLRPC_TEST_ADDRESS"]
        return
    import poolrpc_server  # noqa: PLC0415 - not where only the client is installed

    server = poolrpc_server.Server(poolrpc_server.Config(listen=("127.0.0.1:0",)))
    server.start()
    yield server.addresses[0]
    server.stop(grace=0)


@pytest.fixture
def client(address: str) -> Iterator[poolrpc.PoolClient]:
    """A client of that server."""
    with poolrpc.PoolClient(address) as made:
        yield made


@pytest.fixture
def patch_family(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Callable[[Operator], Operator]], None]]:
    """Give the way to wrap what computes a family of layers in servers of this process: to fail, to wait, to count."""
    from poolrpc_server.compute.kernels import eager, plan_for, table  # noqa: PLC0415 - not where only the client is installed

    def patch(family: str, wrap: Callable[[Operator], Operator]) -> None:
        bound = eager.FAMILIES[family]
        monkeypatch.setitem(eager.FAMILIES, family, lambda *arguments: wrap(bound(*arguments)))
        monkeypatch.setattr(table, "TABLE", [row for row in table.TABLE if family not in row.families])
        plan_for.cache_clear()

    yield patch
    monkeypatch.undo()
    plan_for.cache_clear()


class Gate:
    """Holds the engine's thread inside a layer until it is opened, and counts what MaxPool computes.

    A FractionalMaxPool is held, and a GlobalMaxPool.
    """

    def __init__(self, patch_family: Callable[..., None]) -> None:
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

        patch_family("global_max_pool", hold)
        patch_family("fractional_max_pool", hold)
        patch_family("max_pool", count)


@pytest.fixture
def gate(patch_family: Callable[..., None]) -> Iterator[Gate]:
    """Give a gate in the servers of this process; it opens at the test's end, whatever that is."""
    made = Gate(patch_family)
    yield made
    made.opened.set()
