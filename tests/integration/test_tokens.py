"""Tokens: who may call which method, what a rejection says, files that change, and the log."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import signal
from functools import partial
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import poolrpc
from poolrpc import AsyncPoolClient, MaxPool2d, PoolClient
from scripts.server_process import ServerProcess, serving
from tests.integration.connections import server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("without_client_variables")

MIB = 2**20
X = np.random.default_rng(3).standard_normal((2, 3, 8, 10), np.float32)
LARGE = np.zeros((16, 16, 256, 256), np.float32)
"""Large enough for a stream, or the arena."""

TOKEN, INFO_ONLY = "alices-token-0123456789", "the-token-of-a-dashboard"
REJECTED = "expected a valid token, as the metadata authorization: Bearer TOKEN"


def line(name: str, token: str, *allowed: str) -> str:
    """Return a token's line."""
    return " ".join([name, hashlib.sha256(token.encode()).hexdigest(), *allowed]) + "\n"


LINES = line("alice", TOKEN) + line("dashboard", INFO_ONLY, "poolrpc.v1.PoolService/GetServerInfo")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Return a server that requires tokens, on a port and on a unix socket."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "tokens").write_text(LINES)
    with serving(
        *("--token-file", str(folder / "tokens"), "--listen", f"unix:{folder / 'sock'}", "--drain-seconds", "0")
    ) as server:
        yield server


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
    """A missing, wrong or malformed token is rejected with the same words on every transport."""
    metadata = [("authorization", value) for value in values]
    with PoolClient(guarded.address, metadata=metadata) as client:
        for x, transport in ((X, "unary"), (LARGE[:4], "unary"), (LARGE, "stream")):
            with pytest.raises(poolrpc.UnauthenticatedError) as caught:
                client.pool(x, MaxPool2d(2), transport=transport)
            assert (caught.value.message, caught.value.reason) == (REJECTED, "UNAUTHENTICATED")
            assert caught.value.metadata == {}
        assert client.health() == "SERVING"


@pytest.mark.parametrize("transport", ["unary", "stream"])
def test_the_line_of_a_rejected_call_has_its_peer(guarded: ServerProcess, transport: str) -> None:
    """An operator sees from which address a call without a token came; a unix socket's is "unix"."""
    for address, peer in zip(guarded.start_line["addresses"], (r"127\.0\.0\.1:\d+", "unix"), strict=True):
        with PoolClient(address) as client, pytest.raises(poolrpc.UnauthenticatedError):
            client.pool(LARGE, MaxPool2d(2), transport=transport)
        # The line is written after the answer.
        while not any(
            line["status"] == "UNAUTHENTICATED" and re.fullmatch(peer, line["peer"]) for line in guarded.lines("call")
        ):
            pass


def test_with_a_token_a_call_is_answered(guarded: ServerProcess) -> None:
    """A token is good for every method on every transport; the scheme may be written in any case."""
    with PoolClient(guarded.address, token=TOKEN) as client:
        for transport in ("unary", "stream"):
            assert client.pool(X, MaxPool2d(2), transport=transport).shape == (2, 3, 4, 5)
        assert len(list(client.map([X, X], MaxPool2d(2)))) == 2
        assert client.output_shape(X.shape, MaxPool2d(2)) == (2, 3, 4, 5)
    with PoolClient(guarded.start_line["addresses"][1], token=TOKEN) as client:
        result = client.pool(LARGE, MaxPool2d(2))
        assert (result.shape, result.transport) == ((16, 16, 128, 128), "local")
    with PoolClient(guarded.address, metadata=[("authorization", f"bearer {TOKEN}")]) as client:
        assert client.server_info().threads


async def test_the_async_client_sends_its_token(guarded: ServerProcess) -> None:
    """AsyncPoolClient sends it, with streams as well."""
    async with AsyncPoolClient(guarded.address, token=TOKEN) as client:
        assert (await client.pool(LARGE, MaxPool2d(2))).shape == (16, 16, 128, 128)
    async with AsyncPoolClient(guarded.address) as client:
        for x in (X, LARGE):
            with pytest.raises(poolrpc.UnauthenticatedError):
                await client.pool(x, MaxPool2d(2))


def test_a_token_allows_the_methods_of_its_line(guarded: ServerProcess) -> None:
    """A valid token for other methods is PERMISSION_DENIED, and the message does not say what it allows."""
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
    """Return every method of every service, as reflection lists them with a token."""
    with grpc.insecure_channel(address) as channel:
        authorized = grpc.intercept_channel(channel, _Token())
        database = ProtoReflectionDescriptorDatabase(authorized)
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
    """Return the status of an empty message for a method of any kind; OK if it answers."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    call = channel.stream_stream(method)(iter([b""]), timeout=30, metadata=metadata)
    try:
        next(call, None)
    except grpc.RpcError as error:
        return error.code()
    call.cancel()
    return grpc.StatusCode.OK


def test_every_method_but_health_requires_a_token(guarded: ServerProcess) -> None:
    """Every method that reflection lists, and any other, rejects a call without a token; health's own answer."""
    found = methods(guarded.address)
    assert {"/poolrpc.v1.PoolService/Pool", "/poolrpc.v1.PoolService/PoolStream"} < set(found)
    assert any("grpc.reflection" in each for each in found)
    open_methods = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"}
    assert open_methods < set(found)
    with grpc.insecure_channel(guarded.address) as channel:
        for each in [*found, "/poolrpc.v1.PoolService/None", "/no.Such/Method", "/"]:
            expected = grpc.StatusCode.OK if each in open_methods else grpc.StatusCode.UNAUTHENTICATED
            assert status(channel, each) == expected, each


def test_every_other_method_rejects_a_restricted_token(guarded: ServerProcess) -> None:
    """Every method that reflection lists rejects a token whose line does not name it; health requires none."""
    found = methods(guarded.address)
    with PoolClient(guarded.address, token=INFO_ONLY) as client:
        assert client.server_info().threads
    with grpc.insecure_channel(guarded.address) as channel:
        got = {each: status(channel, each, INFO_ONLY) for each in found if not each.startswith("/grpc.health.")}
    assert got.pop("/poolrpc.v1.PoolService/GetServerInfo") == grpc.StatusCode.OK
    assert set(got.values()) == {grpc.StatusCode.PERMISSION_DENIED}


def test_health_can_require_a_token(tmp_path: Path) -> None:
    """With health_requires_token no method answers without a token."""
    (tmp_path / "tokens").write_text(LINES)
    with server(token_file=str(tmp_path / "tokens"), health_requires_token=True) as address:
        with grpc.insecure_channel(address) as channel:
            assert {status(channel, each) for each in methods(address)} == {grpc.StatusCode.UNAUTHENTICATED}
        with PoolClient(address, token=TOKEN) as client:
            assert client.health() == "SERVING"
        with PoolClient(address, token=INFO_ONLY) as client, pytest.raises(poolrpc.PermissionDeniedError):
            client.health()


def test_priority_0_requires_the_word_of_the_token(tmp_path: Path) -> None:
    """A token without priority-0 is PERMISSION_DENIED for it on every transport, and allows the other priorities."""
    (tmp_path / "tokens").write_text(LINES + line("viewer", "viewers-token", "priority-0"))
    with server(token_file=str(tmp_path / "tokens")) as address:
        for token, allowed in ((TOKEN, False), ("viewers-token", True)):
            with PoolClient(address, token=token) as client:
                for priority, transport in itertools.product((0, 1, 2), ("unary", "stream")):
                    metadata = [("authorization", f"Bearer {token}"), ("priority", str(priority))]
                    with PoolClient(address, metadata=metadata) as urgent:
                        for call in (
                            partial(urgent.pool, X, MaxPool2d(2), transport=transport),
                            partial(client.pool, X, MaxPool2d(2), transport=transport, priority=priority),
                        ):
                            if allowed or priority:
                                assert call().shape == (2, 3, 4, 5)
                            else:
                                with pytest.raises(poolrpc.PermissionDeniedError, match="priority 0"):
                                    call()
                # The priority does not matter to calls that are not queued.
                assert client.server_info().threads


def test_an_announcement_without_a_token_reserves_nothing(tmp_path: Path) -> None:
    """After a hundred announcements without a valid token a call of more than 3/4 of the bytes has room."""
    (tmp_path / "tokens").write_text(LINES)
    limits = {"max_inflight_bytes": 16 * MIB, "max_message_bytes": 8 * MIB}
    with server(token_file=str(tmp_path / "tokens"), **limits) as address, grpc.insecure_channel(address) as channel:
        pool = channel.stream_stream("/poolrpc.v1.PoolService/Pool")
        for i in range(100):
            metadata = [("poolrpc-message-bytes", str(7 * MIB)), *[("authorization", "Bearer wrong")] * (i % 2)]
            with pytest.raises(grpc.RpcError) as caught:
                next(pool(iter([]), metadata=metadata, timeout=60))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with PoolClient(address, token=TOKEN, options={"grpc.enable_retries": 0}) as client:
            x = np.ones((1, 7, 512, 512), np.float32)
            assert client.pool(x, MaxPool2d(2), transport="unary").shape == (1, 7, 256, 256)


def test_tokens_change_while_the_server_runs(tmp_path: Path) -> None:
    """A change counts from the next call on; a file that is broken or missing changes nothing."""
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


def test_the_log_names_callers_and_has_no_secrets(tmp_path: Path) -> None:
    """Each call's line has the token's name, rejected calls included; no token, hash or wrong token is in the log."""
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
    text = json.dumps(server.log) + repr(info)
    for secret in (TOKEN, INFO_ONLY, "a-wrong-token", *LINES.split()[1:4:2], "made.Up"):
        assert secret not in text
