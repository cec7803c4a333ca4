"""TLS with real certificates: handshakes that fail, files that change, and errors at the start."""

from __future__ import annotations

import hashlib
import json
import signal
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization

import poolrpc
import poolrpc_server
from poolrpc import AsyncPoolClient, MaxPool2d, PoolClient
from poolrpc.cli import main
from scripts.server_process import serving
from tests.integration.certificates import Authority, tls_settings
from tests.integration.connections import OWN_CONNECTION, server

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("without_client_variables")

X = np.random.default_rng(3).standard_normal((2, 3, 8, 10), np.float32)
LARGE = np.zeros((16, 16, 256, 256), np.float32)
"""Large enough for a stream, or the arena."""

TOKEN = "alices-token-0123456789"  # noqa: S105 - created for the tests


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    """Return the authority of the server's certificates."""
    return Authority(tmp_path / "ours")


@pytest.fixture
def others(tmp_path: Path) -> Authority:
    """Return another authority."""
    return Authority(tmp_path / "others")


def assert_no_handshake(address: str, credentials: grpc.ChannelCredentials | None) -> None:
    """Check that a client fails at the handshake, which it reports as final."""
    with (
        PoolClient(address, credentials=credentials, options=OWN_CONNECTION, timeout=30) as client,
        pytest.raises(poolrpc.FailedPreconditionError),
    ):
        client.server_info()


def assert_served(address: str, credentials: grpc.ChannelCredentials | None) -> None:
    """Check that a client receives a result through a connection of its own."""
    with PoolClient(address, credentials=credentials, options=OWN_CONNECTION) as client:
        assert client.pool(X, MaxPool2d(2)).shape == (2, 3, 4, 5)


def test_failed_handshakes_do_not_disturb_other_clients(ours: Authority, others: Authority) -> None:
    """While clients of another authority, or in plaintext, fail at the handshake, others are served."""
    with (
        server(**tls_settings(ours.issue("localhost"))) as address,
        PoolClient(address, credentials=ours.credentials()) as other,
    ):
        for credentials in (others.credentials(), grpc.ssl_channel_credentials(), None):
            assert_no_handshake(address, credentials)
            assert other.pool(X, MaxPool2d(2)).shape == (2, 3, 4, 5)
        assert_served(address, ours.credentials())


def test_tokens_are_required_through_tls_too(ours: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's command takes certificates and the token from the environment."""
    (tmp_path / "tokens").write_text(f"alice {hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
    certificate = ours.issue("client.test")
    with server(
        **tls_settings(ours.issue("localhost")), tls_client_ca=str(ours.ca), token_file=str(tmp_path / "tokens")
    ) as address:
        with PoolClient(address, credentials=ours.credentials(certificate)) as client:
            with pytest.raises(poolrpc.UnauthenticatedError):
                client.pool(LARGE, MaxPool2d(2))
            assert client.health() == "SERVING"
        with PoolClient(address, credentials=ours.credentials(certificate), token=TOKEN) as client:
            assert client.pool(LARGE, MaxPool2d(2)).transport == "stream"
        assert main(["info", "--address", address, "--timeout", "10"]) == 1
        for name, value in (("CA", ours.ca), ("CLIENT_CERT", certificate[0]), ("CLIENT_KEY", certificate[1])):
            monkeypatch.setenv(f"POOLRPC_{name}", str(value))
        assert main(["info", "--address", address]) == 1
        monkeypatch.setenv("POOLRPC_TOKEN", TOKEN)
        assert main(["info", "--address", address]) == 0


async def test_the_async_client_reads_the_environment(
    ours: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AsyncPoolClient finds the authority and the token there, with streams as well."""
    (tmp_path / "tokens").write_text(f"alice {hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
    monkeypatch.setenv("POOLRPC_CA", str(ours.ca))
    monkeypatch.setenv("POOLRPC_TOKEN", TOKEN)
    with server(**tls_settings(ours.issue("localhost")), token_file=str(tmp_path / "tokens")) as address:
        async with AsyncPoolClient(address) as client:
            for x in (X, LARGE):
                assert (await client.pool(x, MaxPool2d(2))).shape[2] == x.shape[2] // 2


def test_every_tcp_address_has_tls(ours: Authority, tmp_path: Path) -> None:
    """TLS holds for all TCP addresses; a unix socket stays in plaintext."""
    path = f"unix:{tmp_path / 'sock'}"
    config = poolrpc_server.Config(listen=("127.0.0.1:0", path, "127.0.0.1:0"), **tls_settings(ours.issue("localhost")))
    made = poolrpc_server.Server(config)
    made.start()
    assert_served(path, None)
    for address in (made.addresses[0], made.addresses[2]):
        local = address.replace("127.0.0.1", "localhost")
        assert_no_handshake(local, None)
        assert_served(local, ours.credentials())
    made.stop(grace=0)


def test_certificates_change_while_the_server_runs(ours: Authority, others: Authority) -> None:
    """New connections have the new certificate, but not half of a change; old connections stay."""
    old, new = ours.issue("localhost"), others.issue("localhost")
    with serving(
        *("--tls-cert", str(old[0]), "--tls-key", str(old[1]), "--drain-seconds", "0", "--listen", "127.0.0.1:0")
    ) as server:
        first, second = (each.replace("127.0.0.1", "localhost") for each in server.start_line["addresses"])
        with PoolClient(first, credentials=ours.credentials()) as before:
            assert before.server_info()
            # The new certificate without its key.
            old[0].write_bytes(new[0].read_bytes())
            for _ in range(3):
                assert_served(first, ours.credentials())
            assert_served(second, ours.credentials())
            old[1].write_bytes(new[1].read_bytes()[:100])
            assert_served(first, ours.credentials())
            old[1].write_bytes(new[1].read_bytes())
            assert_served(second, others.credentials())
            assert_served(first, others.credentials())
            assert_no_handshake(first, ours.credentials())
            assert before.server_info()
            old[1].unlink()
            assert_served(first, others.credentials())
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert server.start_line["tls"] == "on"
    changes = [each["level"] for each in server.log if each["event"].startswith("the TLS files")]
    assert changes == ["error", "error", "info", "error"]
    assert "PRIVATE KEY" not in json.dumps(server.log)


def test_an_expired_certificate_is_logged(ours: Authority, caplog: pytest.LogCaptureFixture) -> None:
    """An expired certificate is valid TLS for a server, and no client takes it: the log has a warning at once."""
    with server(**tls_settings(ours.issue("localhost", expired=True))) as address:
        assert_no_handshake(address, ours.credentials())
    (warning,) = (each for each in caplog.records if "a certificate has expired" in each.getMessage())
    assert warning.levelname == "WARNING"


def test_client_authorities_change_while_the_server_runs(ours: Authority, others: Authority) -> None:
    """Clients of an authority that is removed are no longer served, those of one that is added are."""
    mine, theirs = ours.issue("client.test"), others.issue("client.test")
    pair = ours.issue("localhost")
    authorities = ours.ca.parent / "clients.pem"
    authorities.write_bytes(ours.ca.read_bytes())
    with server(**tls_settings(pair), tls_client_ca=str(authorities)) as address:
        assert_served(address, ours.credentials(mine))
        assert_no_handshake(address, ours.credentials(theirs))
        authorities.write_bytes(others.ca.read_bytes())
        assert_no_handshake(address, ours.credentials(mine))
        assert_served(address, ours.credentials(theirs))


def test_unusable_files_are_errors_at_the_start(ours: Authority, others: Authority, tmp_path: Path) -> None:
    """A server whose TLS or token files cannot be used is not created; the error names the file."""
    chain, key = ours.issue("localhost")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN CERTIFICATE-----\nxyz\n-----END CERTIFICATE-----\n")
    locked = tmp_path / "locked.key"
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    locked.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"passphrase"),
        )
    )
    good = {"tls_cert": str(chain), "tls_key": str(key)}
    for settings, words in (
        (good | {"tls_key": str(others.issue("localhost")[1])}, "mismatch"),
        (good | {"tls_cert": str(garbage)}, "garbage.pem"),
        (good | {"tls_client_ca": str(garbage)}, "garbage.pem"),
        (good | {"tls_key": str(locked)}, "without a passphrase"),
        (good | {"tls_cert": str(tmp_path / "nowhere")}, "No such file"),
        ({"token_file": str(garbage)}, "token_file: line 1"),
        ({"token_file": str(tmp_path / "nowhere")}, "nowhere: No such file"),
    ):
        with pytest.raises(poolrpc_server.ConfigError, match=r"^(tls_cert|token_file): ") as raised:
            poolrpc_server.Server(poolrpc_server.Config(listen=("127.0.0.1:0",), **settings))
        assert words.lower() in str(raised.value).lower()
