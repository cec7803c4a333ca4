"""Who gets through to a server: tokens on every method, TLS with real certificates, files that change, and limits."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import poolrpc
import poolrpc_server
from poolrpc import AsyncPoolClient, MaxPool2d, PoolClient
from poolrpc.cli import main
from scripts.server_process import ServerProcess, serving
from tests.integration.authority import Authority, files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

X = np.random.default_rng(3).standard_normal((2, 3, 8, 10), np.float32)
LARGE = np.zeros((16, 16, 256, 256), np.float32)
"""Large enough for a stream, or an arena."""

TOKEN, INFO_ONLY = "alices-token-0123456789", "the-token-of-a-dashboard"
REFUSED = "expected a valid token, as the metadata authorization: Bearer TOKEN"
NO_RETRIES = {"grpc.enable_retries": 0}
# gRPC lets channels that look alike share a connection; these don't.
ALONE = {"grpc.use_local_subchannel_pool": 1, **NO_RETRIES}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what this process's own environment says away."""
    for name in ("POOLRPC_TOKEN", "POOLRPC_CA", "POOLRPC_CLIENT_CERT", "POOLRPC_CLIENT_KEY"):
        monkeypatch.delenv(name, raising=False)


def line(name: str, token: str, *allowed: str) -> str:
    """Give a token's line."""
    return " ".join([name, hashlib.sha256(token.encode()).hexdigest(), *allowed]) + "\n"


LINES = line("alice", TOKEN) + line("dashboard", INFO_ONLY, "poolrpc.v1.PoolService/GetServerInfo")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Give a server that asks for tokens, on a port and on a unix socket."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "tokens").write_text(LINES)
    with serving(
        *("--token-file", str(folder / "tokens"), "--listen", f"unix:{folder / 'sock'}", "--drain-seconds", "0")
    ) as server:
        yield server


@contextmanager
def server(**settings: object) -> Iterator[str]:
    """Run a server in this process, and give its address."""
    made = poolrpc_server.Server(poolrpc_server.Config(**{"listen": ("127.0.0.1:0",), **settings}))
    made.start()
    try:
        yield made.addresses[0].replace("127.0.0.1", "localhost")
    finally:
        made.stop(grace=0)


# Tokens.


@pytest.mark.parametrize(
    "values",
    [
        [],
        [""],
        ["Bearer"],
        ["Bearer "],
        ["Bearer wrong"],
        [f"Bearer {TOKEN[:-1]}"],
        [f"Bearer {TOKEN} x"],
        [f"Bearer  {TOKEN}"],
        [f"Basic {TOKEN}"],
        [TOKEN],
        [f"Bearer {hashlib.sha256(TOKEN.encode()).hexdigest()}"],
        ["Bearer " + "x" * 6000],
        [f"Bearer {TOKEN}", "Bearer wrong"],
        ["Bearer wrong", f"Bearer {TOKEN}"],
    ],
    ids=lambda values: " and ".join(each[:30] for each in values) or "none",
)
def test_without_a_valid_token_a_call_is_unauthenticated(guarded: ServerProcess, values: list[str]) -> None:
    """P05: no token, a wrong one and a malformed one are refused by the same words, on every way that a tensor goes."""
    metadata = [("authorization", value) for value in values]
    with PoolClient(guarded.address, metadata=metadata) as client:
        for x, transport in ((X, "unary"), (LARGE[:4], "unary"), (LARGE, "stream")):
            with pytest.raises(poolrpc.UnauthenticatedError) as caught:
                client.pool(x, MaxPool2d(2), transport=transport)
            assert (caught.value.message, caught.value.reason) == (REFUSED, "UNAUTHENTICATED")
            assert caught.value.metadata == {}
        assert client.health() == "SERVING"


def test_with_a_token_a_call_is_answered(guarded: ServerProcess) -> None:
    """A token is good for everything, on every way that a tensor goes; the scheme may be written in any case."""
    with PoolClient(guarded.address, token=TOKEN) as client:
        for transport in ("unary", "stream"):
            assert client.pool(X, MaxPool2d(2), transport=transport).shape == (2, 3, 4, 5)
        assert len(list(client.map([X, X], MaxPool2d(2)))) == 2
        assert client.output_shape(X.shape, MaxPool2d(2)) == (2, 3, 4, 5)
    with PoolClient(guarded.start_line["addresses"].split()[1], token=TOKEN) as client:
        result = client.pool(LARGE, MaxPool2d(2))
        assert (result.shape, result.transport) == ((16, 16, 128, 128), "arena")
    with PoolClient(guarded.address, metadata=[("authorization", f"bearer {TOKEN}")]) as client:
        assert client.server_info().threads


async def test_the_async_client_has_a_token_too(guarded: ServerProcess) -> None:
    """AsyncPoolClient sends it, with streams as well."""
    async with AsyncPoolClient(guarded.address, token=TOKEN) as client:
        assert (await client.pool(LARGE, MaxPool2d(2))).shape == (16, 16, 128, 128)
    async with AsyncPoolClient(guarded.address) as client:
        for x in (X, LARGE):
            with pytest.raises(poolrpc.UnauthenticatedError):
                await client.pool(x, MaxPool2d(2))


def test_a_token_is_good_for_what_its_line_says(guarded: ServerProcess) -> None:
    """A known token without the right is PERMISSION_DENIED, without a word of what it may do."""
    with PoolClient(guarded.address, token=INFO_ONLY) as client:
        assert client.server_info().threads
        assert client.health() == "SERVING"
        for transport in ("unary", "stream"):
            with pytest.raises(poolrpc.PermissionDeniedError) as caught:
                client.pool(X, MaxPool2d(2), transport=transport)
            assert (caught.value.message, caught.value.reason) == (
                "the token does not allow this method",
                "PERMISSION_DENIED",
            )
        with pytest.raises(poolrpc.PermissionDeniedError):
            client.output_shape(X.shape, MaxPool2d(2))


def methods(address: str) -> list[str]:
    """Give every method of every service, as reflection tells with a token."""
    with grpc.insecure_channel(address) as channel:
        told = grpc.intercept_channel(channel, _Token())
        database = ProtoReflectionDescriptorDatabase(told)
        services = descriptor_pool.DescriptorPool(database)
        return [
            f"/{name}/{method.name}"
            for name in database.get_services()
            for method in services.FindServiceByName(name).methods
        ]


class _Token(grpc.StreamStreamClientInterceptor):
    """Adds the token to the calls of reflection."""

    def intercept_stream_stream(self, continuation, details, requests):
        return continuation(details._replace(metadata=[("authorization", f"Bearer {TOKEN}")]), requests)


def status(channel: grpc.Channel, method: str, token: str = "") -> grpc.StatusCode:
    """Give what an empty message gets, of a method of any kind; OK where it answers."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    call = channel.stream_stream(method)(iter([b""]), timeout=30, metadata=metadata)
    try:
        next(call, None)
    except grpc.RpcError as error:
        return error.code()
    call.cancel()
    return grpc.StatusCode.OK


def test_every_method_asks_for_a_token_but_health(guarded: ServerProcess) -> None:
    """Whatever reflection knows refuses a call without one, as do methods that aren't there; health answers."""
    found = methods(guarded.address)
    assert {"/poolrpc.v1.PoolService/Pool", "/poolrpc.v1.PoolService/PoolStream"} < set(found)
    assert any("grpc.reflection" in each for each in found)
    opened = {each for each in found if each.startswith("/grpc.health.v1.Health/")}
    assert opened
    with grpc.insecure_channel(guarded.address) as channel:
        for each in [*found, "/poolrpc.v1.PoolService/None", "/no.Such/Method", "/"]:
            got = status(channel, each)
            if each in opened:
                assert got == (grpc.StatusCode.UNIMPLEMENTED if each.endswith("List") else grpc.StatusCode.OK), each
            else:
                assert got == grpc.StatusCode.UNAUTHENTICATED, each


def test_every_method_but_the_allowed_refuses_a_lesser_token(guarded: ServerProcess) -> None:
    """Whatever reflection knows refuses a token whose line doesn't name it; health asks for none."""
    found = methods(guarded.address)
    with PoolClient(guarded.address, token=INFO_ONLY) as client:
        assert client.server_info().threads
    with grpc.insecure_channel(guarded.address) as channel:
        got = {each: status(channel, each, INFO_ONLY) for each in found if not each.startswith("/grpc.health.")}
    assert got.pop("/poolrpc.v1.PoolService/GetServerInfo") == grpc.StatusCode.OK
    assert set(got.values()) == {grpc.StatusCode.PERMISSION_DENIED}


def test_health_can_be_closed_too(tmp_path: Path) -> None:
    """With health_requires_token no method at all answers without a token."""
    (tmp_path / "tokens").write_text(LINES)
    with server(token_file=str(tmp_path / "tokens"), health_requires_token=True) as address:
        with grpc.insecure_channel(address) as channel:
            assert {status(channel, each) for each in methods(address)} == {grpc.StatusCode.UNAUTHENTICATED}
        with PoolClient(address, token=TOKEN) as client:
            assert client.health() == "SERVING"
        with PoolClient(address, token=INFO_ONLY) as client, pytest.raises(poolrpc.PermissionDeniedError):
            client.health()


def test_tokens_change_while_the_server_runs(tmp_path: Path) -> None:
    """A token counts from the next call on, in and out; a file that is broken or gone changes nothing."""
    path = tmp_path / "tokens"
    path.write_text(LINES)
    with (
        server(token_file=str(path)) as address,
        PoolClient(address, token=TOKEN) as alice,
        PoolClient(address, token="bobs-token") as bob,  # noqa: S106 - a test's
    ):
        assert alice.server_info()
        with pytest.raises(poolrpc.UnauthenticatedError):
            bob.server_info()
        path.write_text(LINES + line("bob", "bobs-token"))
        assert bob.server_info()
        path.write_text("alice: " + TOKEN)
        assert alice.server_info()
        assert bob.server_info()
        path.unlink()
        assert bob.server_info()
        path.write_text(line("bob", "bobs-token"))
        assert bob.server_info()
        with pytest.raises(poolrpc.UnauthenticatedError):
            alice.server_info()


def test_the_log_says_who_calls_and_nothing_secret(tmp_path: Path) -> None:
    """A call's line has the token's name; refused calls have lines too; no token, hash or wrong try is anywhere."""
    path = tmp_path / "tokens"
    path.write_text(LINES)
    with serving("--token-file", str(path), "--drain-seconds", "0", "--log-level", "debug") as server:
        with PoolClient(server.address, token=TOKEN) as client:
            client.pool(X, MaxPool2d(2))
            info = client.server_info()
        with PoolClient(server.address, token=INFO_ONLY) as client, pytest.raises(poolrpc.PermissionDeniedError):
            client.pool(X, MaxPool2d(2))
        with PoolClient(server.address, token="a-wrong-token") as client, pytest.raises(poolrpc.PoolError):  # noqa: S106
            client.pool(X, MaxPool2d(2))
        with grpc.insecure_channel(server.address) as channel:
            status(channel, "/made.Up/Name")
        path.write_text("alice " + TOKEN)
        with PoolClient(server.address, token=TOKEN) as client:
            client.server_info()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert (server.start_line["tls"], server.start_line["tokens"]) == ("off", "on")
    calls = [
        (each["method"].rpartition("/")[2], each["status"], each.get("caller"))
        for each in server.log
        if each["event"] == "call"
    ]
    assert calls == [
        ("Pool", "OK", "alice"),
        ("GetServerInfo", "OK", "alice"),
        ("Pool", "PERMISSION_DENIED", "dashboard"),
        ("Pool", "UNAUTHENTICATED", None),
        ("Unknown", "UNAUTHENTICATED", None),
        ("GetServerInfo", "OK", "alice"),
    ]
    assert [each["level"] for each in server.log if each["event"].startswith("the token file")] == ["error"]
    said = json.dumps(server.log) + repr(info)
    for secret in (TOKEN, INFO_ONLY, "a-wrong-token", *LINES.split()[1:4:2], "made.Up"):
        assert secret not in said


# TLS.


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    """Give the authority of the server's certificates."""
    return Authority(tmp_path / "ours")


@pytest.fixture
def others(tmp_path: Path) -> Authority:
    """Give another one."""
    return Authority(tmp_path / "others")


def assert_refused(address: str, credentials: grpc.ChannelCredentials | None) -> None:
    """See a client end as where there is no server: the handshake failed."""
    with (
        PoolClient(address, credentials=credentials, options=ALONE, timeout=30) as client,
        pytest.raises(poolrpc.UnavailableError),
    ):
        client.server_info()


def assert_served(address: str, credentials: grpc.ChannelCredentials | None) -> None:
    """See a client get an answer by a connection of its own."""
    with PoolClient(address, credentials=credentials, options=ALONE) as client:
        assert client.pool(X, MaxPool2d(2)).shape == (2, 3, 4, 5)


def test_tls_takes_who_trusts_the_server(ours: Authority, others: Authority) -> None:
    """P12: a client that trusts another authority, or talks in clear, finds nobody; others are served meanwhile."""
    with (
        server(**files(ours.issue("localhost"))) as address,
        PoolClient(address, credentials=ours.trust()) as other,
    ):
        for credentials in (others.trust(), grpc.ssl_channel_credentials(), None):
            assert_refused(address, credentials)
            assert other.pool(X, MaxPool2d(2)).shape == (2, 3, 4, 5)
        assert_served(address, ours.trust())


def test_an_expired_certificate_is_refused(ours: Authority) -> None:
    """P12: neither side takes a certificate that is over, and the server goes on with those that aren't."""
    with server(**files(ours.issue("localhost", expired=True))) as address:
        assert_refused(address, ours.trust())
    with server(**files(ours.issue("localhost")), tls_client_ca=str(ours.ca)) as address:
        assert_refused(address, ours.trust(ours.issue("client.test", expired=True)))
        assert_served(address, ours.trust(ours.issue("client.test")))


def test_mutual_tls_takes_clients_with_a_certificate(ours: Authority, others: Authority) -> None:
    """P12: with tls_client_ca a client without a certificate, or with another authority's, finds nobody."""
    with (
        server(**files(ours.issue("localhost")), tls_client_ca=str(others.ca)) as address,
        PoolClient(address, credentials=ours.trust(others.issue("client.test"))) as other,
    ):
        for credentials in (ours.trust(), ours.trust(ours.issue("client.test")), None):
            assert_refused(address, credentials)
            assert other.pool(X, MaxPool2d(2)).shape == (2, 3, 4, 5)


def test_tokens_and_tls_go_together(ours: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through TLS a token is asked for all the same; the client's command takes both from the environment."""
    (tmp_path / "tokens").write_text(LINES)
    certificate = ours.issue("client.test")
    with server(
        **files(ours.issue("localhost")), tls_client_ca=str(ours.ca), token_file=str(tmp_path / "tokens")
    ) as address:
        with PoolClient(address, credentials=ours.trust(certificate)) as client:
            with pytest.raises(poolrpc.UnauthenticatedError):
                client.pool(LARGE, MaxPool2d(2))
            assert client.health() == "SERVING"
        with PoolClient(address, credentials=ours.trust(certificate), token=TOKEN) as client:
            assert client.pool(LARGE, MaxPool2d(2)).transport == "stream"
        assert main(["info", "--address", address, "--timeout", "10"]) == 1
        for name, value in (("CA", ours.ca), ("CLIENT_CERT", certificate[0]), ("CLIENT_KEY", certificate[1])):
            monkeypatch.setenv(f"POOLRPC_{name}", str(value))
        assert main(["info", "--address", address]) == 1
        monkeypatch.setenv("POOLRPC_TOKEN", TOKEN)
        assert main(["info", "--address", address]) == 0


async def test_the_async_client_takes_the_environment_too(
    ours: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AsyncPoolClient finds authority and token there, with streams as well."""
    (tmp_path / "tokens").write_text(LINES)
    monkeypatch.setenv("POOLRPC_CA", str(ours.ca))
    monkeypatch.setenv("POOLRPC_TOKEN", TOKEN)
    with server(**files(ours.issue("localhost")), token_file=str(tmp_path / "tokens")) as address:
        async with AsyncPoolClient(address) as client:
            for x in (X, LARGE):
                assert (await client.pool(x, MaxPool2d(2))).shape[2] == x.shape[2] // 2


def test_a_unix_socket_stays_in_clear(ours: Authority, tmp_path: Path) -> None:
    """TLS is for addresses that go through a network; every one of those has it."""
    path = f"unix:{tmp_path / 'sock'}"
    config = poolrpc_server.Config(listen=("127.0.0.1:0", path, "127.0.0.1:0"), **files(ours.issue("localhost")))
    made = poolrpc_server.Server(config)
    made.start()
    assert_served(path, None)
    for address in (made.addresses[0], made.addresses[2]):
        local = address.replace("127.0.0.1", "localhost")
        assert_refused(local, None)
        assert_served(local, ours.trust())
    made.stop(grace=0)


def test_certificates_change_while_the_server_runs(ours: Authority, others: Authority) -> None:
    """A new connection, to any address, meets the new certificate, but not half of a change; old connections stay."""
    old, new = ours.issue("localhost"), others.issue("localhost")
    with serving(
        *("--tls-cert", str(old[0]), "--tls-key", str(old[1]), "--drain-seconds", "0", "--listen", "127.0.0.1:0")
    ) as server:
        first, second = (each.replace("127.0.0.1", "localhost") for each in server.start_line["addresses"].split())
        with PoolClient(first, credentials=ours.trust()) as before:
            assert before.server_info()
            # The certificate is there, its key not yet.
            old[0].write_bytes(new[0].read_bytes())
            for _ in range(3):
                assert_served(first, ours.trust())
            assert_served(second, ours.trust())
            old[1].write_bytes(new[1].read_bytes()[:100])
            assert_served(first, ours.trust())
            old[1].write_bytes(new[1].read_bytes())
            assert_served(second, others.trust())
            assert_served(first, others.trust())
            assert_refused(first, ours.trust())
            assert before.server_info()
            old[1].unlink()
            assert_served(first, others.trust())
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert server.start_line["tls"] == "on"
    changes = [each["level"] for each in server.log if each["event"].startswith("the TLS files")]
    assert changes == ["error", "error", "info", "error"]
    assert "PRIVATE KEY" not in json.dumps(server.log)


def test_authorities_of_clients_change_too(ours: Authority, others: Authority) -> None:
    """A client whose authority is taken out is no longer served, one whose authority is put in is."""
    mine, theirs = ours.issue("client.test"), others.issue("client.test")
    pair = ours.issue("localhost")
    authorities = ours.ca.parent / "clients.pem"
    authorities.write_bytes(ours.ca.read_bytes())
    with server(**files(pair), tls_client_ca=str(authorities)) as address:
        assert_served(address, ours.trust(mine))
        assert_refused(address, ours.trust(theirs))
        authorities.write_bytes(others.ca.read_bytes())
        assert_refused(address, ours.trust(mine))
        assert_served(address, ours.trust(theirs))


def test_files_that_can_not_be_used_are_said_at_the_start(ours: Authority, others: Authority, tmp_path: Path) -> None:
    """A server that can't have the TLS or the tokens it was told to have isn't made; the error names the file."""
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


# Limits of connections.


def test_metadata_is_bounded() -> None:
    """A call with more metadata than the limit is RESOURCE_EXHAUSTED, one with a little less is served."""
    with server(max_metadata_bytes=4096) as address:
        with PoolClient(address, metadata=[("x", "y" * 3000)]) as client:
            assert client.server_info()
        with PoolClient(address, metadata=[("x", "y" * 5000)]) as client, pytest.raises(poolrpc.LimitExceededError):
            client.server_info()


def test_calls_of_a_connection_are_bounded() -> None:
    """A call over the limit waits at its client, by no fault of another connection's."""
    with server(max_connection_calls=1) as address, grpc.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        with PoolClient(address, options=ALONE) as client:
            assert client.server_info()
        with pytest.raises(grpc.RpcError) as caught:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=0.5)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        watch.cancel()
        assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30).status


@pytest.mark.parametrize("limit", ["max_connection_age_seconds", "max_connection_idle_seconds"])
def test_a_connection_ends_by_its_age_or_idle(limit: str) -> None:
    """The server ends a connection that is old, or has no calls; the next call makes another."""
    with server(**{limit: 1.0}) as address, grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        left, ready = threading.Event(), threading.Event()

        def on_state(state: grpc.ChannelConnectivity) -> None:
            if state == grpc.ChannelConnectivity.READY:
                ready.set()
            elif ready.is_set():
                left.set()

        channel.subscribe(on_state)
        assert check(health_pb2.HealthCheckRequest(), timeout=30).status
        assert left.wait(60)
        assert check(health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True).status
