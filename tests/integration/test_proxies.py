"""HTTP proxies of the environment: which calls go through one, and what it sees of them."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

import poolrpc
from poolrpc import MaxPool2d
from tests.integration.certificates import Authority, tls_settings
from tests.integration.connections import server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.conftest import Connect

pytestmark = pytest.mark.usefixtures("without_client_variables")

X = np.zeros((1, 1, 8, 8), np.float32)
TOKEN = "alices-token-0123456789"  # noqa: S105 - created for the tests
VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
REMOTE = "pool.invalid"
"""A name that no name server resolves (RFC 6761), so that only a proxy leads there."""


class ConnectProxy:
    """A proxy that answers CONNECT, leads every tunnel to one port of 127.0.0.1, and keeps what it sees.

    Attributes:
        url: Its URL.
        targets: The targets of its tunnels.
        seen: The bytes that clients have sent through it.
        port: The port to which its tunnels lead.

    """

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.targets: list[str] = []
        self.seen = bytearray()
        self.port = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._tunnel, args=self._listening.accept()[:1], daemon=True).start()

    def _tunnel(self, client: socket.socket) -> None:
        with suppress(OSError), client:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.recv(1)
            self.seen += head
            self.targets.append(head.split()[1].decode())
            with socket.create_connection(("127.0.0.1", self.port)) as upstream:
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                threading.Thread(target=self._copy, args=(upstream, client), daemon=True).start()
                self._copy(client, upstream, keep=True)

    def _copy(self, source: socket.socket, target: socket.socket, *, keep: bool = False) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if keep:
                    self.seen += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ConnectProxy]:
    """Return a proxy, in an environment that names none."""
    for name in ("no_grpc_proxy", "no_proxy", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    made = ConnectProxy()
    yield made
    made.close()


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "dns:///localhost", "ipv4:127.0.0.1"])
@pytest.mark.parametrize("transport", ["unary", "stream"])
def test_a_loopback_address_is_called_without_a_proxy(  # noqa: PLR0913, PLR0917 - the case
    connect: Connect,
    address: str,
    proxy: ConnectProxy,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    host: str,
    transport: str,
) -> None:
    """Calls of this machine work with a proxy in the environment, which sees none of them, nor their token."""
    monkeypatch.setenv(variable, proxy.url)
    client = connect(f"{host}:{address.rpartition(':')[2]}", token=TOKEN, timeout=30)
    assert client.pool(X, MaxPool2d(2), transport=transport).shape == (1, 1, 4, 4)  # type: ignore[arg-type]  # a name
    assert not proxy.seen


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_proxy_for_ranges_of_addresses_is_not_used_either(
    connect: Connect, addresses: list[str], proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The same holds for a unix socket, and for gRPC's own variables."""
    for variable in VARIABLES:
        monkeypatch.setenv(variable, proxy.url)
    monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY", proxy.url.removeprefix("http://"))
    monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES", "127.0.0.0/8")
    assert connect(addresses[kind == "unix"], token=TOKEN, timeout=30).health() == "SERVING"
    assert not proxy.seen


@pytest.mark.parametrize("variable", VARIABLES)
def test_another_machine_is_called_through_the_proxy(
    connect: Connect, address: str, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Without a token, a call of another machine uses the proxy of the environment."""
    monkeypatch.setenv(variable, proxy.url)
    proxy.port = int(address.rpartition(":")[2])
    assert connect(f"{REMOTE}:50051", timeout=30).health() == "SERVING"
    assert proxy.targets[0] == f"{REMOTE}:50051"


@pytest.mark.parametrize("transport", ["unary", "stream"])
def test_a_token_without_tls_never_goes_through_a_proxy(
    connect: Connect, address: str, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """A client that sends its own authorization in plaintext makes a direct connection, or none."""
    for variable in VARIABLES:
        monkeypatch.setenv(variable, proxy.url)
    proxy.port = int(address.rpartition(":")[2])
    client = connect(f"{REMOTE}:50051", metadata={"Authorization": f"Bearer {TOKEN}"}, timeout=30)
    with pytest.raises(poolrpc.UnavailableError):
        client.pool(X, MaxPool2d(2), transport=transport)  # type: ignore[arg-type]  # a name
    assert not proxy.seen


def test_a_token_in_tls_goes_through_the_proxy_unread(
    connect: Connect, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With TLS the proxy carries the call, and sees the name of the server and encrypted bytes."""
    (tmp_path / "tokens").write_text(f"alice {hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
    monkeypatch.setenv("https_proxy", proxy.url)
    ours = Authority(tmp_path / "ours")
    with server(**tls_settings(ours.issue(REMOTE)), token_file=str(tmp_path / "tokens")) as own:
        proxy.port = int(own.rpartition(":")[2])
        client = connect(f"{REMOTE}:50051", credentials=ours.credentials(), token=TOKEN, timeout=30)
        assert client.pool(X, MaxPool2d(2)).shape == (1, 1, 4, 4)
    assert set(proxy.targets) == {f"{REMOTE}:50051"}
    assert TOKEN.encode() not in proxy.seen
    assert b"authorization" not in proxy.seen.lower()


@pytest.mark.parametrize("option", ["grpc.enable_http_proxy", "grpc.http_proxy", "grpc.address_http_proxy"])
def test_a_proxy_in_the_options_needs_tls_for_a_token(option: str) -> None:
    """A proxy that the caller asks for is rejected if it could read the token, and taken otherwise."""
    options = {option: 1 if option.endswith("enable_http_proxy") else "http://127.0.0.1:1"}
    text = f"options: expected TLS to send a token through a proxy, which could read it, got plaintext and {option}"
    with pytest.raises(poolrpc.InvalidArgumentError, match=re.escape(text)):
        poolrpc.PoolClient("127.0.0.1:1", token=TOKEN, options=options)
    poolrpc.PoolClient("127.0.0.1:1", options=options).close()
    poolrpc.PoolClient("127.0.0.1:1", options=options, token=TOKEN, credentials=grpc.ssl_channel_credentials()).close()


def test_the_proxy_of_these_tests_sees_tokens(
    address: str, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare gRPC channel shows the token to the proxy, so that the other tests would notice it."""
    monkeypatch.setenv("http_proxy", proxy.url)
    proxy.port = int(address.rpartition(":")[2])
    with grpc.insecure_channel(f"{REMOTE}:50051") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        check(b"", metadata=(("authorization", f"Bearer {TOKEN}"),), timeout=30)
    assert TOKEN.encode() in proxy.seen
