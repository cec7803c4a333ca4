"""Addresses without a poolrpc server that the client can talk to: one sentence each, with what to try."""

from __future__ import annotations

import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

import poolrpc
import poolrpc_server
from poolrpc import MaxPool2d
from poolrpc.cli import main
from tests.integration.certificates import Authority, tls_settings
from tests.integration.connections import server
from tests.integration.test_client import Flaky, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.integration.conftest import Connect

pytestmark = pytest.mark.usefixtures("without_client_variables")

X = np.zeros((1, 1, 8, 8), np.float32)
TIMEOUT = 30


class Quiet(BaseHTTPRequestHandler):
    """A web server that logs nothing."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class Places:
    """Makes addresses of several kinds, and closes what is there at the end.

    Attributes:
        closing: What is to be closed.

    """

    def __init__(self, closing: ExitStack, folder: Path) -> None:
        self.closing = closing
        self._ours, self._others = Authority(folder / "ours"), Authority(folder / "others")
        self._folder = folder

    def nothing(self) -> tuple[str, dict[str, Any]]:
        """Return a port on which no server listens."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            return f"127.0.0.1:{free.getsockname()[1]}", {}

    def no_socket(self) -> tuple[str, dict[str, Any]]:
        """Return the path of a unix socket that does not exist."""
        return f"unix:{self._folder / 'nowhere.sock'}", {}

    def no_name(self) -> tuple[str, dict[str, Any]]:
        """Return a name that has no address."""
        return "pool.invalid:50051", {}

    def other_service(self) -> tuple[str, dict[str, Any]]:
        """Return a gRPC server with no service."""
        made = grpc.server(ThreadPoolExecutor(2))
        port = made.add_insecure_port("127.0.0.1:0")
        made.start()
        self.closing.callback(lambda: made.stop(0).wait())
        return f"127.0.0.1:{port}", {}

    def web_server(self) -> tuple[str, dict[str, Any]]:
        """Return a server of HTTP/1."""
        made = self.closing.enter_context(HTTPServer(("127.0.0.1", 0), Quiet))
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.closing.callback(made.shutdown)
        return f"127.0.0.1:{made.server_port}", {}

    def silence(self) -> tuple[str, dict[str, Any]]:
        """Return a port on which connections are accepted, and nothing is answered."""
        made = self.closing.enter_context(socket.create_server(("127.0.0.1", 0)))
        return f"127.0.0.1:{made.getsockname()[1]}", {"timeout": 2}

    def proxy_without_a_server(self) -> tuple[str, dict[str, Any]]:
        """Return a port on which connections are accepted and closed, as by Docker's proxy while the server starts."""
        made = self.closing.enter_context(socket.create_server(("127.0.0.1", 0)))

        def close_all() -> None:
            with suppress(OSError):
                while True:
                    made.accept()[0].close()

        threading.Thread(target=close_all, daemon=True).start()
        self.closing.callback(made.shutdown, socket.SHUT_RDWR)
        return f"127.0.0.1:{made.getsockname()[1]}", {}

    def tls_of_the_client(self) -> tuple[str, dict[str, Any]]:
        """Return a server without TLS, for a client with it."""
        return self.closing.enter_context(server()), {"credentials": self._ours.credentials()}

    def tls_of_the_server(self) -> tuple[str, dict[str, Any]]:
        """Return a server with TLS, for a client without it."""
        return self.closing.enter_context(server(**tls_settings(self._ours.issue("localhost")))), {}

    def other_authority(self) -> tuple[str, dict[str, Any]]:
        """Return a server whose authority the client does not trust."""
        address = self.closing.enter_context(server(**tls_settings(self._ours.issue("localhost"))))
        return address, {"credentials": self._others.credentials()}

    def other_host(self) -> tuple[str, dict[str, Any]]:
        """Return a server whose certificate is for another name."""
        address = self.closing.enter_context(server(**tls_settings(self._ours.issue("pool.test"))))
        return address, {"credentials": self._ours.credentials()}

    def no_client_certificate(self) -> tuple[str, dict[str, Any]]:
        """Return a server that requires a certificate, which the client does not have."""
        settings = {**tls_settings(self._ours.issue("localhost")), "tls_client_ca": str(self._ours.ca)}
        return self.closing.enter_context(server(**settings)), {"credentials": self._ours.credentials()}


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    """Return a maker of addresses."""
    with ExitStack() as closing:
        yield Places(closing, tmp_path)


START = ": start one with poolrpc-server, or correct the address (--address, POOLRPC_ADDRESS)"
CORRECT = ": correct the address (--address, POOLRPC_ADDRESS)"
CASES = {
    "nothing": (poolrpc.UnavailableError, f"got no connection (Connection refused){START}"),
    "no_socket": (poolrpc.UnavailableError, f"got no connection (No such file or directory){START}"),
    "no_name": (poolrpc.UnavailableError, START),
    "other_service": (poolrpc.UnsupportedError, CORRECT),
    "web_server": (
        poolrpc.FailedPreconditionError,
        f"got one that does not speak gRPC, such as a web server{CORRECT}",
    ),
    "silence": (poolrpc.DeadlineExceededError, "within 2 s, got none: set a longer timeout=, or look at the server"),
    "proxy_without_a_server": (poolrpc.UnavailableError, "got no connection ("),
    "tls_of_the_client": (
        poolrpc.FailedPreconditionError,
        "got one without TLS: unset POOLRPC_CA, and pass no credentials=",
    ),
    "tls_of_the_server": (poolrpc.FailedPreconditionError, "got one that requires TLS: set POOLRPC_CA to the file"),
    "other_authority": (poolrpc.FailedPreconditionError, ": check that POOLRPC_CA or credentials= has the authority"),
    "other_host": (poolrpc.FailedPreconditionError, "that the certificate has this name"),
    "no_client_certificate": (poolrpc.FailedPreconditionError, "POOLRPC_CLIENT_CERT, POOLRPC_CLIENT_KEY"),
}
CALLS: dict[str, Callable[[poolrpc.PoolClient], object]] = {
    "unary": lambda client: client.pool(X, MaxPool2d(2)),
    "stream": lambda client: client.pool(X, MaxPool2d(2), transport="stream"),
    "health": lambda client: client.health(),
    "map": lambda client: list(client.map([X], MaxPool2d(2))),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("place", CASES)
def test_an_address_without_a_server_for_this_client(connect: Connect, places: Places, place: str, call: str) -> None:
    """The error has the address, what was found there, and what to try; what is final is not called unavailable."""
    cls, words = CASES[place]
    address, options = getattr(places, place)()
    client = connect(address, **{"timeout": TIMEOUT, **options})
    with pytest.raises(poolrpc.PoolError) as raised:
        CALLS[call](client)
    assert type(raised.value) is cls
    assert address in raised.value.message
    assert words in raised.value.message
    assert "\n" not in raised.value.message


@pytest.mark.parametrize("place", CASES)
def test_waiting_for_a_server(connect: Connect, places: Places, place: str) -> None:
    """wait_until_ready waits as long as a server may come, and raises what is final at once."""
    cls, words = CASES[place]
    address, options = getattr(places, place)()
    final = cls in (poolrpc.FailedPreconditionError, poolrpc.UnsupportedError)
    client = connect(address, **options)
    with pytest.raises(poolrpc.PoolError) as raised:
        client.wait_until_ready(timeout=600 if final else 2)
    assert type(raised.value) is cls
    assert words.replace("30 s", "2 s") in raised.value.message


@pytest.mark.parametrize("kind", ["tcp", "tls", "unix"])
def test_a_server_that_starts_is_waited_for(connect: Connect, places: Places, tmp_path: Path, kind: str) -> None:
    """wait_until_ready returns when the server serves, and the next call succeeds."""
    address = (
        f"unix:{tmp_path / 'pool.sock'}" if kind == "unix" else places.nothing()[0].replace("127.0.0.1", "localhost")
    )
    ours, options = Authority(tmp_path / "own"), {}
    settings = {"listen": (address.replace("localhost", "127.0.0.1"),)}
    if kind == "tls":
        settings |= tls_settings(ours.issue("localhost"))
        options = {"credentials": ours.credentials()}
    client = connect(address, timeout=TIMEOUT, **options)
    made = poolrpc_server.Server(poolrpc_server.Config(**settings))
    try:
        threading.Timer(0.3, made.start).start()
        client.wait_until_ready(timeout=60)
        assert client.pool(X, MaxPool2d(2)).shape == (1, 1, 4, 4)
        made.drain()
        with pytest.raises(poolrpc.UnavailableError, match="to be SERVING, got NOT_SERVING") as raised:
            client.wait_until_ready(timeout=0.5)
        assert raised.value.reason == "NOT_SERVING"
    finally:
        made.stop(grace=0)


def test_a_server_with_tls_that_starts_after_the_call(connect: Connect, places: Places, tmp_path: Path) -> None:
    """A call that found no server does not report that TLS fails, though there is a server with TLS by now."""
    ours = Authority(tmp_path / "own")
    address, _ = places.nothing()
    client = connect(address, credentials=ours.credentials())
    for _ in range(2):  # gRPC repeats its last error until it connects again
        with pytest.raises(poolrpc.UnavailableError, match="Connection refused"):
            client.server_info()
    made = poolrpc_server.Server(poolrpc_server.Config(listen=(address,), **tls_settings(ours.issue("127.0.0.1"))))
    try:
        made.start()
        for _ in range(1000):
            try:
                client.server_info()
            except poolrpc.UnavailableError as error:
                assert "there is one now: try again" in error.message  # noqa: PT017 - it is of some of the calls
            else:
                return
        pytest.fail("expected a connection at last")
    finally:
        made.stop(grace=0)


def test_the_command_prints_the_sentence(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints one line that says how to go on."""
    address, _ = places.nothing()
    assert main(["info", "--address", address, "--timeout", "30"]) == 1
    assert capsys.readouterr().err == (
        f"poolrpc: expected a poolrpc server at {address}, got no connection (Connection refused){START}\n"
    )


def test_retries_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The attempts of a stream are logged at DEBUG by the logger poolrpc, with their cause and the pause."""
    flaky = Flaky(failures=2)
    with serving(flaky) as address, poolrpc.PoolClient(address) as client, caplog.at_level(logging.DEBUG, "poolrpc"):
        client.pool(np.zeros((1, 4, 1024, 1024), np.float32), MaxPool2d(1))
    lines = [each.getMessage() for each in caplog.records if each.name == "poolrpc"]
    assert len(lines) == 2
    assert lines[0].startswith("attempt 1 of a stream failed (StatusCode.UNAVAILABLE: full), the next is in ")
