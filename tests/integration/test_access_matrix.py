"""Which callers may call which service of which server: TLS, certificates and tokens, all of them real."""

from __future__ import annotations

import hashlib
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Literal

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import poolrpc
import poolrpc_server
from poolrpc import MaxPool2d, PoolClient
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from tests.integration.certificates import Authority, tls_settings
from tests.integration.connections import OWN_CONNECTION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

X = np.random.default_rng(3).standard_normal((2, 3, 8, 10), np.float32)
POOLED = X.reshape(2, 3, 4, 2, 5, 2).max((3, 5))

TOKENS = {
    "any": "a-token-for-everything",
    "native": "a-token-of-our-own-clients",
    "triton": "a-token-of-tritons-clients",
    "prober": "a-token-of-a-prober",
    "wrong": "a-token-that-is-wrong",
}
ALLOWED = {
    "any": "",
    "native": "poolrpc.v1.PoolService",
    "triton": "inference.GRPCInferenceService",
    "prober": "grpc.health.v1.Health",
}

OK, DOWN, NO_TOKEN, DENIED = "OK", "UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED"
MATRIX = [
    # server                    client                   token      native    Triton    health    reflection
    ("plaintext",              "plaintext",             "",        OK,       OK,       OK,       OK),
    ("plaintext",              "plaintext",             "wrong",   OK,       OK,       OK,       OK),
    ("plaintext",              "TLS",                   "",        DOWN,     DOWN,     DOWN,     DOWN),
    ("tokens",                 "plaintext",             "",        NO_TOKEN, NO_TOKEN, OK,       NO_TOKEN),
    ("tokens",                 "plaintext",             "wrong",   NO_TOKEN, NO_TOKEN, OK,       NO_TOKEN),
    ("tokens",                 "plaintext",             "any",     OK,       OK,       OK,       OK),
    ("tokens",                 "plaintext",             "native",  OK,       DENIED,   OK,       DENIED),
    ("tokens",                 "plaintext",             "triton",  DENIED,   OK,       OK,       DENIED),
    ("tokens",                 "plaintext",             "prober",  DENIED,   DENIED,   OK,       DENIED),
    ("tokens",                 "TLS",                   "any",     DOWN,     DOWN,     DOWN,     DOWN),
    ("tokens closed-health",   "plaintext",             "",        NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN),
    ("tokens closed-health",   "plaintext",             "wrong",   NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN),
    ("tokens closed-health",   "plaintext",             "native",  OK,       DENIED,   DENIED,   DENIED),
    ("tokens closed-health",   "plaintext",             "prober",  DENIED,   DENIED,   OK,       DENIED),
    ("tokens closed-health",   "plaintext",             "any",     OK,       OK,       OK,       OK),
    ("TLS",                    "TLS",                   "",        OK,       OK,       OK,       OK),
    ("TLS",                    "certificate",           "",        OK,       OK,       OK,       OK),
    ("TLS",                    "plaintext",             "",        DOWN,     DOWN,     DOWN,     DOWN),
    ("TLS",                    "wrong CA",              "",        DOWN,     DOWN,     DOWN,     DOWN),
    ("TLS",                    "the system's CAs",      "",        DOWN,     DOWN,     DOWN,     DOWN),
    ("TLS-expired",            "TLS",                   "",        DOWN,     DOWN,     DOWN,     DOWN),
    ("TLS-of-another-name",    "TLS",                   "",        DOWN,     DOWN,     DOWN,     DOWN),
    ("TLS tokens",             "TLS",                   "",        NO_TOKEN, NO_TOKEN, OK,       NO_TOKEN),
    ("TLS tokens",             "TLS",                   "any",     OK,       OK,       OK,       OK),
    ("TLS tokens",             "plaintext",             "any",     DOWN,     DOWN,     DOWN,     DOWN),
    ("TLS tokens",             "wrong CA",              "any",     DOWN,     DOWN,     DOWN,     DOWN),
    ("mTLS",                   "certificate",           "",        OK,       OK,       OK,       OK),
    ("mTLS",                   "TLS",                   "",        DOWN,     DOWN,     DOWN,     DOWN),
    ("mTLS",                   "plaintext",             "",        DOWN,     DOWN,     DOWN,     DOWN),
    ("mTLS",                   "expired certificate",   "",        DOWN,     DOWN,     DOWN,     DOWN),
    ("mTLS",                   "other's certificate",   "",        DOWN,     DOWN,     DOWN,     DOWN),
    ("mTLS tokens",            "certificate",           "",        NO_TOKEN, NO_TOKEN, OK,       NO_TOKEN),
    ("mTLS tokens",            "certificate",           "any",     OK,       OK,       OK,       OK),
    ("mTLS tokens",            "certificate",           "native",  OK,       DENIED,   OK,       DENIED),
    ("mTLS tokens",            "TLS",                   "any",     DOWN,     DOWN,     DOWN,     DOWN),
    ("mTLS tokens",            "expired certificate",   "any",     DOWN,     DOWN,     DOWN,     DOWN),
    ("mTLS tokens",            "plaintext",             "any",     DOWN,     DOWN,     DOWN,     DOWN),
]  # fmt: skip
COLUMNS = ("native", "Triton", "health", "reflection")


@dataclass(frozen=True, slots=True)
class Peer:
    """A caller: the address that it calls, and what it has."""

    address: str
    credentials: grpc.ChannelCredentials | None
    metadata: list[tuple[str, str]]

    def client(self) -> PoolClient:
        """Return a PoolClient."""
        return PoolClient(
            self.address, credentials=self.credentials, metadata=self.metadata, options=OWN_CONNECTION, timeout=30
        )

    def channel(self) -> grpc.Channel:
        """Return a channel of gRPC."""
        options = list(OWN_CONNECTION.items())
        if self.credentials is None:
            return grpc.insecure_channel(self.address, options)
        return grpc.secure_channel(self.address, self.credentials, options)


def pool(caller: Peer) -> object:
    """Pool through the unary method."""
    with caller.client() as client:
        return client.pool(X, MaxPool2d(2), transport="unary").output.tobytes() == POOLED.tobytes()


def pool_stream(caller: Peer) -> object:
    """Pool through a stream."""
    with caller.client() as client:
        return client.pool(X, MaxPool2d(2), transport="stream").output.tobytes() == POOLED.tobytes()


def infer_shape(caller: Peer) -> object:
    """Infer a shape."""
    with caller.client() as client:
        return client.output_shape(X.shape, MaxPool2d(2)) == POOLED.shape


def server_info(caller: Peer) -> object:
    """Get the server's info."""
    with caller.client() as client:
        return client.server_info().threads


def request() -> pb.ModelInferRequest:
    """Return a request of a preset."""
    made = pb.ModelInferRequest(model_name="half", raw_input_contents=[X.tobytes()])
    made.inputs.add(name="input", datatype="FP32", shape=X.shape)
    return made


def infer(caller: Peer) -> object:
    """Run a preset."""
    kinds = pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
    with caller.channel() as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", *kinds)
        return call(request(), metadata=caller.metadata, timeout=30).raw_output_contents == [POOLED.tobytes()]


def infer_stream(caller: Peer) -> object:
    """Run a preset through a stream."""
    kinds = pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
    with caller.channel() as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer", *kinds)
        (answer,) = call(iter([request()]), metadata=caller.metadata, timeout=30)
        return answer.infer_response.raw_output_contents == [POOLED.tobytes()]


def live(caller: Peer) -> object:
    """Call ServerLive."""
    kinds = pb.ServerLiveRequest.SerializeToString, pb.ServerLiveResponse.FromString
    with caller.channel() as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ServerLive", *kinds)
        return call(pb.ServerLiveRequest(), metadata=caller.metadata, timeout=30).live


def check(caller: Peer) -> object:
    """Check the health."""
    with caller.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), metadata=caller.metadata, timeout=30)
        return answer.status == health_pb2.HealthCheckResponse.SERVING


def watch(caller: Peer) -> object:
    """Watch the health."""
    with caller.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        call = stub.Watch(health_pb2.HealthCheckRequest(), metadata=caller.metadata, timeout=30)
        return next(call).status == health_pb2.HealthCheckResponse.SERVING


def reflect(caller: Peer) -> object:
    """List the services by reflection."""
    with caller.channel() as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([listing]), metadata=caller.metadata, timeout=30)
        return "poolrpc.v1.PoolService" in {each.name for each in answer.list_services_response.service}


METHODS: dict[Callable[[Peer], object], str] = {
    **dict.fromkeys((pool, pool_stream, infer_shape, server_info), "native"),
    **dict.fromkeys((infer, infer_stream, live), "Triton"),
    **dict.fromkeys((check, watch), "health"),
    reflect: "reflection",
}


class Secured:
    """A server of one kind, on a port, a unix socket and an address for metrics; and its callers."""

    def __init__(self, kind: str, folder: Path) -> None:
        ours, others = Authority(folder / "ours"), Authority(folder / "others")
        self._credentials = {
            "plaintext": None,
            "TLS": ours.credentials(),
            "wrong CA": others.credentials(),
            "the system's CAs": grpc.ssl_channel_credentials(),
            "certificate": ours.credentials(ours.issue("client.test")),
            "expired certificate": ours.credentials(ours.issue("client.test", expired=True)),
            "other's certificate": ours.credentials(others.issue("client.test")),
        }
        lines = [f"{name} {hashlib.sha256(TOKENS[name].encode()).hexdigest()} {ALLOWED[name]}\n" for name in ALLOWED]
        (folder / "tokens").write_text("".join(lines))
        parts: dict[str, dict[str, object]] = {
            "plaintext": {},
            "tokens": {"token_file": str(folder / "tokens")},
            "closed-health": {"health_requires_token": True},
            "TLS": {**tls_settings(ours.issue("localhost"))},
            "TLS-expired": {**tls_settings(ours.issue("localhost", expired=True))},
            "TLS-of-another-name": {**tls_settings(ours.issue("elsewhere.test"))},
            "mTLS": {**tls_settings(ours.issue("localhost")), "tls_client_ca": str(ours.ca)},
        }
        settings = {name: value for part in kind.split() for name, value in parts[part].items()}
        listen = "127.0.0.1:0", f"unix:{folder / 'sock'}"
        self.server = poolrpc_server.Server(
            poolrpc_server.Config(listen=listen, metrics="127.0.0.1:0", model=("half=MaxPool2d(2)",), **settings)
        )
        self.server.start()

    def caller(self, client: str, token: str, *, unix: bool = False) -> Peer:
        """Return a caller by the names of its credentials and of its token."""
        address = self.server.addresses[unix].replace("127.0.0.1", "localhost")
        metadata = [("authorization", f"Bearer {TOKENS[token]}")] if token else []
        return Peer(address, self._credentials[client], metadata)

    def calls(self) -> float:
        """Return the number of calls that the server has counted in its metrics."""
        with urllib.request.urlopen(f"http://{self.server.metrics_address}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        return sum(float(each.rpartition(" ")[2]) for each in lines if each.startswith("grpc_server_started_total"))


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Secured]]:
    """Return a function that returns the server of a kind, which all tests share."""
    with ExitStack() as stack:

        def make(kind: str) -> Secured:
            made = Secured(kind, tmp_path_factory.mktemp("secured"))
            stack.callback(made.server.stop, grace=0)
            return made

        yield cache(make)


def outcome(method: Callable[[Peer], object], caller: Peer) -> str:
    """Return the status of a call; OK if the result is right."""
    try:
        return "OK" if method(caller) else "a wrong result"
    except poolrpc.PoolError as error:
        # What the client has found out to be final is UNAVAILABLE for gRPC's own.
        return DOWN if isinstance(error, poolrpc.FailedPreconditionError) else error.code
    except grpc.RpcError as error:
        return str(error.code().name)


@pytest.mark.parametrize(
    "row",
    MATRIX,
    ids=[" ".join(filter(None, (row[0], "by", row[1], row[2] and f"with {row[2]}"))) for row in MATRIX],
)
def test_access(secured: Callable[[str], Secured], row: tuple[str, ...]) -> None:
    """Each method answers or has the one right status; a caller that fails the handshake has called nothing."""
    kind, client, token, *columns = row
    expected = {method: columns[COLUMNS.index(service)] for method, service in METHODS.items()}
    if set(columns) == {DOWN}:
        expected = {pool: DOWN, check: DOWN}  # a failed handshake does not depend on the method
    server = secured(kind)
    before = server.calls()
    assert {method: outcome(method, server.caller(client, token)) for method in expected} == expected
    if set(columns) == {DOWN}:
        assert server.calls() == before


def pool_by(transport: Literal["unary", "arena", "local"], caller: Peer) -> object:
    """Pool by a transport."""
    with caller.client() as client:
        result = client.pool(X, MaxPool2d(2), transport=transport)
        return result.transport == transport and result.output.tobytes() == POOLED.tobytes()


def local_info(caller: Peer) -> object:
    """Ask for the description of the server, which goes by a local call."""
    with caller.client() as client:
        return client.server_info().version


@pytest.mark.parametrize(
    ("kind", "token", "expected"),
    [
        ("plaintext", "", OK),
        ("tokens", "", NO_TOKEN),
        ("tokens", "wrong", NO_TOKEN),
        ("tokens", "triton", DENIED),
        ("tokens", "native", OK),
        ("TLS", "", OK),
        ("mTLS", "", OK),
        ("mTLS tokens", "", NO_TOKEN),
        ("mTLS tokens", "any", OK),
    ],
)
def test_access_by_the_unix_socket(secured: Callable[[str], Secured], kind: str, token: str, expected: str) -> None:
    """The socket is plaintext whatever TLS the ports have, and requires tokens as they do, by every transport."""
    caller = secured(kind).caller("plaintext", token, unix=True)
    methods = [pool, pool_stream, local_info, *(partial(pool_by, each) for each in ("unary", "arena", "local"))]
    assert {outcome(method, caller) for method in methods} == {expected}
