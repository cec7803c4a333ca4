"""The matrix of who comes how to which door of which server: TLS, certificates and tokens, all of them real."""

from __future__ import annotations

import hashlib
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import poolrpc
import poolrpc_server
from poolrpc import MaxPool2d, PoolClient
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from tests.integration.authority import Authority, files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

X = np.random.default_rng(3).standard_normal((2, 3, 8, 10), np.float32)
POOLED = X.reshape(2, 3, 4, 2, 5, 2).max((3, 5))
# gRPC lets channels that look alike share a connection; these don't, and try once.
ALONE = {"grpc.use_local_subchannel_pool": 1, "grpc.enable_retries": 0}

TOKENS = {
    "any": "a-token-for-everything",
    "native": "a-token-of-our-own-clients",
    "triton": "a-token-of-tritons-clients",
    "prober": "a-token-of-who-probes",
    "wrong": "a-token-of-nobody",
}
ALLOWED = {
    "any": "",
    "native": "poolrpc.v1.PoolService",
    "triton": "inference.GRPCInferenceService",
    "prober": "grpc.health.v1.Health",
}

OK, SHUT, WHO, NOT_YOU = "OK", "UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED"
MATRIX = [
    # server                   client                   token     native   OIP      health   reflection
    ("plaintext",              "plaintext",             "",       OK,      OK,      OK,      OK),
    ("plaintext",              "plaintext",             "wrong",  OK,      OK,      OK,      OK),
    ("plaintext",              "TLS",                   "",       SHUT,    SHUT,    SHUT,    SHUT),
    ("tokens",                 "plaintext",             "",       WHO,     WHO,     OK,      WHO),
    ("tokens",                 "plaintext",             "wrong",  WHO,     WHO,     OK,      WHO),
    ("tokens",                 "plaintext",             "any",    OK,      OK,      OK,      OK),
    ("tokens",                 "plaintext",             "native", OK,      NOT_YOU, OK,      NOT_YOU),
    ("tokens",                 "plaintext",             "triton", NOT_YOU, OK,      OK,      NOT_YOU),
    ("tokens",                 "plaintext",             "prober", NOT_YOU, NOT_YOU, OK,      NOT_YOU),
    ("tokens",                 "TLS",                   "any",    SHUT,    SHUT,    SHUT,    SHUT),
    ("tokens closed-health",   "plaintext",             "",       WHO,     WHO,     WHO,     WHO),
    ("tokens closed-health",   "plaintext",             "wrong",  WHO,     WHO,     WHO,     WHO),
    ("tokens closed-health",   "plaintext",             "native", OK,      NOT_YOU, NOT_YOU, NOT_YOU),
    ("tokens closed-health",   "plaintext",             "prober", NOT_YOU, NOT_YOU, OK,      NOT_YOU),
    ("tokens closed-health",   "plaintext",             "any",    OK,      OK,      OK,      OK),
    ("TLS",                    "TLS",                   "",       OK,      OK,      OK,      OK),
    ("TLS",                    "certificate",           "",       OK,      OK,      OK,      OK),
    ("TLS",                    "plaintext",             "",       SHUT,    SHUT,    SHUT,    SHUT),
    ("TLS",                    "wrong CA",              "",       SHUT,    SHUT,    SHUT,    SHUT),
    ("TLS",                    "the system's CAs",      "",       SHUT,    SHUT,    SHUT,    SHUT),
    ("TLS-expired",            "TLS",                   "",       SHUT,    SHUT,    SHUT,    SHUT),
    ("TLS-of-another-name",    "TLS",                   "",       SHUT,    SHUT,    SHUT,    SHUT),
    ("TLS tokens",             "TLS",                   "",       WHO,     WHO,     OK,      WHO),
    ("TLS tokens",             "TLS",                   "any",    OK,      OK,      OK,      OK),
    ("TLS tokens",             "plaintext",             "any",    SHUT,    SHUT,    SHUT,    SHUT),
    ("TLS tokens",             "wrong CA",              "any",    SHUT,    SHUT,    SHUT,    SHUT),
    ("mTLS",                   "certificate",           "",       OK,      OK,      OK,      OK),
    ("mTLS",                   "TLS",                   "",       SHUT,    SHUT,    SHUT,    SHUT),
    ("mTLS",                   "plaintext",             "",       SHUT,    SHUT,    SHUT,    SHUT),
    ("mTLS",                   "expired certificate",   "",       SHUT,    SHUT,    SHUT,    SHUT),
    ("mTLS",                   "other's certificate",   "",       SHUT,    SHUT,    SHUT,    SHUT),
    ("mTLS tokens",            "certificate",           "",       WHO,     WHO,     OK,      WHO),
    ("mTLS tokens",            "certificate",           "any",    OK,      OK,      OK,      OK),
    ("mTLS tokens",            "certificate",           "native", OK,      NOT_YOU, OK,      NOT_YOU),
    ("mTLS tokens",            "TLS",                   "any",    SHUT,    SHUT,    SHUT,    SHUT),
    ("mTLS tokens",            "expired certificate",   "any",    SHUT,    SHUT,    SHUT,    SHUT),
    ("mTLS tokens",            "plaintext",             "any",    SHUT,    SHUT,    SHUT,    SHUT),
]  # fmt: skip
COLUMNS = ("native", "OIP", "health", "reflection")


@dataclass(frozen=True, slots=True)
class Way:
    """How a caller comes."""

    address: str
    credentials: grpc.ChannelCredentials | None
    metadata: list[tuple[str, str]]

    def client(self) -> PoolClient:
        """Give our own client."""
        return PoolClient(self.address, credentials=self.credentials, metadata=self.metadata, options=ALONE, timeout=30)

    def channel(self) -> grpc.Channel:
        """Give gRPC's own way."""
        options = list(ALONE.items())
        if self.credentials is None:
            return grpc.insecure_channel(self.address, options)
        return grpc.secure_channel(self.address, self.credentials, options)


def pool(way: Way) -> object:
    """Pool by one message each way."""
    with way.client() as client:
        return client.pool(X, MaxPool2d(2), transport="unary").output.tobytes() == POOLED.tobytes()


def pool_stream(way: Way) -> object:
    """Pool by a stream."""
    with way.client() as client:
        return client.pool(X, MaxPool2d(2), transport="stream").output.tobytes() == POOLED.tobytes()


def infer_shape(way: Way) -> object:
    """Ask for a shape."""
    with way.client() as client:
        return client.output_shape(X.shape, MaxPool2d(2)) == POOLED.shape


def server_info(way: Way) -> object:
    """Ask what the server is."""
    with way.client() as client:
        return client.server_info().threads


def request() -> pb.ModelInferRequest:
    """Give a request of a preset."""
    made = pb.ModelInferRequest(model_name="half", raw_input_contents=[X.tobytes()])
    made.inputs.add(name="input", datatype="FP32", shape=X.shape)
    return made


def infer(way: Way) -> object:
    """Run a preset."""
    kinds = pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
    with way.channel() as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", *kinds)
        return call(request(), metadata=way.metadata, timeout=30).raw_output_contents == [POOLED.tobytes()]


def infer_stream(way: Way) -> object:
    """Run a preset by a stream."""
    kinds = pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
    with way.channel() as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer", *kinds)
        (answer,) = call(iter([request()]), metadata=way.metadata, timeout=30)
        return answer.infer_response.raw_output_contents == [POOLED.tobytes()]


def live(way: Way) -> object:
    """Ask as Triton's clients do whether the server lives."""
    kinds = pb.ServerLiveRequest.SerializeToString, pb.ServerLiveResponse.FromString
    with way.channel() as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ServerLive", *kinds)
        return call(pb.ServerLiveRequest(), metadata=way.metadata, timeout=30).live


def check(way: Way) -> object:
    """Ask for the health."""
    with way.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), metadata=way.metadata, timeout=30)
        return answer.status == health_pb2.HealthCheckResponse.SERVING


def watch(way: Way) -> object:
    """Watch the health."""
    with way.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        call = stub.Watch(health_pb2.HealthCheckRequest(), metadata=way.metadata, timeout=30)
        return next(call).status == health_pb2.HealthCheckResponse.SERVING


def reflect(way: Way) -> object:
    """Ask which services there are."""
    with way.channel() as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([asked]), metadata=way.metadata, timeout=30)
        return "poolrpc.v1.PoolService" in {each.name for each in answer.list_services_response.service}


DOORS: dict[Callable[[Way], object], str] = {
    **dict.fromkeys((pool, pool_stream, infer_shape, server_info), "native"),
    **dict.fromkeys((infer, infer_stream, live), "OIP"),
    **dict.fromkeys((check, watch), "health"),
    reflect: "reflection",
}


class Secured:
    """A server of one kind, on a port, a unix socket and an address for metrics; and how callers come to it."""

    def __init__(self, kind: str, folder: Path) -> None:
        ours, others = Authority(folder / "ours"), Authority(folder / "others")
        self._credentials = {
            "plaintext": None,
            "TLS": ours.trust(),
            "wrong CA": others.trust(),
            "the system's CAs": grpc.ssl_channel_credentials(),
            "certificate": ours.trust(ours.issue("client.test")),
            "expired certificate": ours.trust(ours.issue("client.test", expired=True)),
            "other's certificate": ours.trust(others.issue("client.test")),
        }
        lines = [f"{name} {hashlib.sha256(TOKENS[name].encode()).hexdigest()} {ALLOWED[name]}\n" for name in ALLOWED]
        (folder / "tokens").write_text("".join(lines))
        parts: dict[str, dict[str, object]] = {
            "plaintext": {},
            "tokens": {"token_file": str(folder / "tokens")},
            "closed-health": {"health_requires_token": True},
            "TLS": {**files(ours.issue("localhost"))},
            "TLS-expired": {**files(ours.issue("localhost", expired=True))},
            "TLS-of-another-name": {**files(ours.issue("elsewhere.test"))},
            "mTLS": {**files(ours.issue("localhost")), "tls_client_ca": str(ours.ca)},
        }
        settings = {name: value for part in kind.split() for name, value in parts[part].items()}
        listen = "127.0.0.1:0", f"unix:{folder / 'sock'}"
        self.server = poolrpc_server.Server(
            poolrpc_server.Config(listen=listen, metrics="127.0.0.1:0", model=("half=MaxPool2d(2)",), **settings)
        )
        self.server.start()

    def way(self, client: str, token: str, *, unix: bool = False) -> Way:
        """Give how a caller comes, by the name of what it has."""
        address = self.server.addresses[unix].replace("127.0.0.1", "localhost")
        metadata = [("authorization", f"Bearer {TOKENS[token]}")] if token else []
        return Way(address, self._credentials[client], metadata)

    def calls(self) -> float:
        """Give how many calls it knows of, as it tells everybody who may reach its address for metrics."""
        with urllib.request.urlopen(f"http://{self.server.metrics_address}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        return sum(float(each.rpartition(" ")[2]) for each in lines if each.startswith("grpc_server_started_total"))


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Secured]]:
    """Give the way to have the server of a kind: one, for all tests."""
    with ExitStack() as stack:

        def make(kind: str) -> Secured:
            made = Secured(kind, tmp_path_factory.mktemp("secured"))
            stack.callback(made.server.stop, grace=0)
            return made

        yield cache(make)


def outcome(door: Callable[[Way], object], way: Way) -> str:
    """Give the status that a caller has; OK only with the right answer."""
    try:
        return "OK" if door(way) else "a wrong answer"
    except poolrpc.PoolError as error:
        return error.code
    except grpc.RpcError as error:
        return str(error.code().name)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
@pytest.mark.parametrize(
    "row",
    MATRIX,
    ids=[" ".join(filter(None, (row[0], "by", row[1], row[2] and f"with {row[2]}"))) for row in MATRIX],
)
def test_who_gets_in(secured: Callable[[str], Secured], row: tuple[str, ...], door: Callable[[Way], object]) -> None:
    """P12: each door answers, or refuses with the one right status; who fails at the handshake has called nothing."""
    kind, client, token, *columns = row
    expected = columns[COLUMNS.index(DOORS[door])]
    server = secured(kind)
    before = server.calls()
    assert outcome(door, server.way(client, token)) == expected
    if expected == SHUT:
        assert server.calls() == before


def arena(way: Way) -> object:
    """Pool in shared memory."""
    with way.client() as client:
        result = client.pool(X, MaxPool2d(2), transport="arena")
        return result.transport == "arena" and result.output.tobytes() == POOLED.tobytes()


@pytest.mark.parametrize(
    ("kind", "token", "expected"),
    [
        ("plaintext", "", OK),
        ("tokens", "", WHO),
        ("tokens", "wrong", WHO),
        ("tokens", "triton", NOT_YOU),
        ("tokens", "native", OK),
        ("TLS", "", OK),
        ("mTLS", "", OK),
        ("mTLS tokens", "", WHO),
        ("mTLS tokens", "any", OK),
    ],
)
def test_who_gets_in_by_the_unix_socket(
    secured: Callable[[str], Secured], kind: str, token: str, expected: str
) -> None:
    """It stays plaintext whatever TLS the ports have, and asks for tokens as they do, with shared memory too."""
    way = secured(kind).way("plaintext", token, unix=True)
    assert {outcome(door, way) for door in (pool, pool_stream, arena)} == {expected}
