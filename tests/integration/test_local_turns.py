"""Threads of the local transport take turns: who answers small calls, and which calls keep no others waiting."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import poolrpc_server
from poolrpc import MaxPool2d, PoolClient
from poolrpc_server.calls import dispatch
from poolrpc_server.transports.local.calls import LocalCalls
from tests.integration.local_calls import HELD, LARGE, X, halved, wait_for
from tests.scrape import Scrape

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc_server import Server
    from poolrpc_server.compute.kernels.eager import Operator
    from tests.integration.conftest import Gate

if sys.platform != "linux":
    pytest.skip("the arena socket needs Linux", allow_module_level=True)

CALLERS, CALLS = 8, 50


def queue_length(server: Server) -> float:
    """Return the number of queued calls."""
    samples = Scrape(server.metrics_address).samples
    return sum(each.value for each in samples if each.name == "poolrpc_queue_length")


@pytest.fixture
def never_relieved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls have the turn for any time, unless they make way by themselves."""
    monkeypatch.setattr(LocalCalls, "relieve", lambda _: None)


@pytest.mark.parametrize("x", [X, LARGE], ids=["inline", "in an arena"])
@pytest.mark.usefixtures("never_relieved")
def test_small_calls_are_answered_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, patch_operation: Callable[..., None], x: np.ndarray
) -> None:
    """Many callers at a time need one thread, though the server may compute four calls at a time."""
    monkeypatch.setattr(dispatch, "LONG_SECONDS", 60.0)
    threads, counted = set(), threading.Lock()
    running = most = 0

    def watch(run: Operator) -> Operator:
        def watched(*arguments: Any) -> Any:
            nonlocal running, most
            with counted:
                threads.add(threading.get_ident())
                running += 1
                most = max(most, running)
            try:
                return run(*arguments)
            finally:
                with counted:
                    running -= 1

        return watched

    patch_operation("max_pool", watch)
    with poolrpc_server.embedded(threads=4) as client, ThreadPoolExecutor(CALLERS) as callers:
        results = callers.map(lambda _: [client.pool(x, MaxPool2d(2)) for _ in range(CALLS)], range(CALLERS))
        for result in [each for of_caller in results for each in of_caller]:
            assert result.transport == "local"
            np.testing.assert_array_equal(result.output, halved(x))
    assert (len(threads), most) == (1, 1)


@pytest.mark.usefixtures("never_relieved")
def test_a_long_call_keeps_no_others_waiting(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call whose estimate is long lets others be answered, and be computed."""
    monkeypatch.setattr(dispatch, "LONG_SECONDS", 0.0)
    with poolrpc_server.embedded(threads=2) as client, ThreadPoolExecutor(1) as threads:
        held = threads.submit(client.pool, X, HELD)
        assert gate.entered.wait(60)
        np.testing.assert_array_equal(client.pool(X, MaxPool2d(2)).output, halved(X))
        assert client.server_info().device == "cpu"
        gate.opened.set()
        assert held.result(60).transport == "local"


@pytest.mark.usefixtures("never_relieved")
def test_a_queued_call_keeps_no_others_waiting(gate: Gate, local_server: Server) -> None:
    """While small calls wait for the only slot, which a call by gRPC has, other methods are answered."""
    with PoolClient(local_server.addresses[0]) as client, ThreadPoolExecutor(4) as threads:
        held = threads.submit(client.pool, X, HELD, transport="unary")
        assert gate.entered.wait(60)
        queued = [threads.submit(client.pool, X, MaxPool2d(2)) for _ in range(3)]
        while queue_length(local_server) < len(queued):
            pass
        assert client.server_info().device == "cpu"
        gate.opened.set()
        assert held.result(60).transport == "unary"
        for each in queued:
            assert each.result(60).transport == "local"
            np.testing.assert_array_equal(each.result().output, halved(X))


def test_a_call_that_takes_longer_than_expected_keeps_no_others_waiting(gate: Gate, local_server: Server) -> None:
    """Others are answered after a while, and a client that leaves meanwhile is noticed."""
    with PoolClient(local_server.addresses[0]) as client, ThreadPoolExecutor(1) as threads:
        leaving = PoolClient(local_server.addresses[0])
        held = threads.submit(leaving.pool, X, HELD)
        assert gate.entered.wait(60)
        assert client.server_info().device == "cpu"
        leaving.close()
        assert held.exception(60) is not None
        wait_for(local_server, "poolrpc_inflight_bytes", 0)
        gate.opened.set()
        np.testing.assert_array_equal(client.pool(X, MaxPool2d(2)).output, halved(X))


def test_calls_are_answered_though_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch, local_server: Server
) -> None:
    """Then the next packet is received after the call that has made way."""

    def fail(_: LocalCalls) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(dispatch, "LONG_SECONDS", 0.0)
    monkeypatch.setattr(LocalCalls, "_start_thread", fail)
    with PoolClient(local_server.addresses[0]) as client, ThreadPoolExecutor(4) as threads:
        for result in threads.map(lambda _: client.pool(X, MaxPool2d(2)), range(20)):
            assert result.transport == "local"
            np.testing.assert_array_equal(result.output, halved(X))
