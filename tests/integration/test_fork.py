"""Clients in a process that forks: parent and child get their own answers, at the same time."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

CALLS = 100
MANY_CALLS = 1000

# What a process calls, and the numbers of the answers that are wrong. Every process has numbers of its own.
SCRIPT = """
import os, sys
import numpy as np
import poolrpc, poolrpc_server
from poolrpc import MaxPool2d, PoolClient

address, kind, calls = sys.argv[1:]
shape = (1, 1, 16, 16) if "small" in kind else (1, 4, 128, 128)
copy = "copy=False" not in kind
transport = kind if kind in ("unary", "stream", "arena", "local") else None

def wrong(client, first):
    found, kept = 0, []
    for number in range(first, first + int(calls)):
        x = client.empty(shape) if "empty" in kind else np.empty(shape, np.float32)
        x[...] = number
        if kind == "map":
            found += sum(not (each.output == number).all() for each in client.map([x, x], MaxPool2d(2)))
            continue
        result = client.pool(x, MaxPool2d(2), copy=copy, transport=transport)
        found += "unix" in address and transport is None and result.transport != "local"
        kept.append((result.output, number))
        if len(kept) > 3:
            output, expected = kept.pop(0)
            found += not (output == expected).all()
    return found

def both(client):
    before = client.pool(np.full(shape, 7, np.float32), MaxPool2d(2), copy=False).output
    child = os.fork()
    first = 10_000 if child else 20_000
    found = wrong(client, first)
    if not child:
        os._exit(min(found, 255))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(found, status, (before == 7).all(), flush=True)

if address == "embedded":
    with poolrpc_server.embedded() as client:
        both(client)
else:
    with PoolClient(address, timeout=60) as client:
        both(client)
"""

ASYNC = """
import asyncio, os, sys
import numpy as np
from poolrpc import AsyncPoolClient, MaxPool2d, PoolError

x = np.ones((1, 1, 8, 8), np.float32)

async def main():
    async with AsyncPoolClient(sys.argv[1]) as client:
        assert (await client.pool(x, MaxPool2d(2))).output.all()
        child = os.fork()
        if not child:
            try:
                client.pool(x, MaxPool2d(2)).send(None)
            except PoolError as error:
                print(error.reason, error, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        assert (await client.pool(x, MaxPool2d(2))).output.all()
        print("OK", flush=True)

asyncio.run(main())
"""


BUSY = """
import os, socket, sys, threading
import numpy as np
from poolrpc import MaxPool2d, PoolClient, PoolError

x = np.ones((1, 1, 8, 8), np.float32)
silent = socket.create_server(("127.0.0.1", 0))
busy = PoolClient(f"127.0.0.1:{silent.getsockname()[1]}")

def wait():
    try:
        busy.pool(x, MaxPool2d(2))
    except PoolError:
        pass  # the client is closed at the end

with PoolClient(sys.argv[1]) as client:
    thread = threading.Thread(target=wait)
    thread.start()
    silent.accept()
    child = os.fork()
    if not child:
        for attempt in (lambda: client.pool(x, MaxPool2d(2)), lambda: PoolClient(sys.argv[1])):
            try:
                attempt()
            except PoolError as error:
                print(error.reason, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    print(client.pool(x, MaxPool2d(2)).output.all(), flush=True)
    busy.close()
    thread.join()
"""


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the addresses of a server process: of a port and of a unix socket."""
    path = f"unix:{tmp_path_factory.mktemp('fork') / 'pool.sock'}"
    with serving("--listen", path) as server:
        yield {"port": server.address, "unix": path, "embedded": "embedded"}


def output_of(script: str, *arguments: str) -> str:
    """Run a script and return what it prints."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)  # noqa: S603 - ours
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("unix", "default"),
        ("unix", "unary"),
        ("unix", "stream"),
        ("unix", "arena"),
        ("unix", "local"),
        ("unix", "small"),
        ("unix", "small, empty, copy=False"),
        ("unix", "empty"),
        ("unix", "copy=False"),
        ("unix", "map"),
        ("port", "default"),
        ("embedded", "local"),
    ],
)
def test_a_client_may_be_used_in_parent_and_child(addresses: dict[str, str], address: str, kind: str) -> None:
    """Both pool at the same time with the client from before the fork, and what the parent had keeps its values."""
    assert output_of(SCRIPT, addresses[address], kind, str(CALLS)) == "0 0 True\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["small", "default", "empty", "copy=False", "empty, copy=False"])
def test_many_calls_in_parent_and_child(addresses: dict[str, str], kind: str) -> None:
    """Of 1000 local calls each, none has a wrong answer or goes another way."""
    assert output_of(SCRIPT, addresses["unix"], kind, str(MANY_CALLS)) == "0 0 True\n"


@pytest.mark.parametrize("address", ["unix", "port"])
def test_an_asyncio_client_of_the_parent_raises_an_error_in_the_child(addresses: dict[str, str], address: str) -> None:
    """Its event loop is the parent's, where it goes on."""
    client = f"AsyncPoolClient({addresses[address]!r})"
    expected = f"FORKED expected a client that was created in this process, got {client} of its parent\nOK\n"
    assert output_of(ASYNC, addresses[address]) == expected


@pytest.mark.parametrize("address", ["unix", "port"])
def test_a_fork_during_a_call_of_another_thread_is_an_error_in_the_child(
    addresses: dict[str, str], address: str
) -> None:
    """GRPC cannot be used there: calls and new clients say so instead of hanging, and the parent goes on."""
    assert output_of(BUSY, addresses[address]) == "FORKED\nFORKED\nTrue\n"
