"""Callers that keep the server waiting: they neither send nor read, and the server ends them, or gives others room."""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

import poolrpc
import poolrpc_server
from fuzz.attacks.raw_peer import MIB, RawPeer, framed
from poolrpc import AdaptiveMaxPool2d, MaxPool2d, PoolClient
from poolrpc._wire import codec
from poolrpc._wire.framing import MESSAGE_BYTES_KEY
from poolrpc.chains import as_chain
from poolrpc.tensors import TensorSpec
from scripts.server_process import serving
from tests.integration.connections import OWN_CONNECTION, until
from tests.integration.raw_requests import SERVICE, pool_request, stream_header
from tests.scrape import Scrape

if TYPE_CHECKING:
    from collections.abc import Iterator

POOL = SERVICE + "Pool"
X = np.ones((1, 1, 8, 8), np.float32)


class Served:
    """A server in this process, and its metrics."""

    def __init__(self, **settings: object) -> None:
        config = {"listen": ("127.0.0.1:0",), "metrics": "127.0.0.1:0", **settings}
        self.server = poolrpc_server.Server(poolrpc_server.Config(**config))
        self.server.start()
        self.address = self.server.addresses[0]

    def value(self, name: str, **labels: str) -> float:
        """Return a metric."""
        return Scrape(self.server.metrics_address)(name, **labels)

    def ended(self, reason: str) -> float:
        """Return the number of calls that the server has ended for a reason."""
        return self.value("poolrpc_ended_total", reason=reason)

    def is_empty(self) -> bool:
        """Return whether no bytes are in flight and no stream is open."""
        return not self.value("poolrpc_inflight_bytes") and not self.value("poolrpc_streams")


@contextmanager
def served(**settings: object) -> Iterator[Served]:
    """Run a server in this process."""
    made = Served(**settings)
    try:
        yield made
    finally:
        made.server.stop(grace=0)


@contextmanager
def announced(channel: grpc.Channel, nbytes: int) -> Iterator[grpc.Call]:
    """Begin a call that announces a message, and does not send it before the end of the context."""
    left = threading.Event()

    def nothing() -> Iterator[bytes]:
        left.wait()
        yield from ()

    try:
        yield channel.stream_stream(POOL)(nothing(), metadata=[(MESSAGE_BYTES_KEY, str(nbytes))], timeout=120)
    finally:
        left.set()


def with_answer_of(side: int) -> bytes:
    """Return the message of a request of some bytes, whose answer is a plane of float32."""
    request = codec.encode_request(
        codec.Request(TensorSpec("float32", (1, 1, 1, 1)), (as_chain(AdaptiveMaxPool2d(side)),))
    )
    request.payload = bytes(4)
    return request.SerializeToString()


def half_sent(peer: RawPeer) -> int:
    """Begin a call, send half of its message, and return its number."""
    request = pool_request(1, 1, 8, 8)
    request.payload = X.tobytes()
    message = framed(request.SerializeToString())
    stream = peer.open(POOL)
    peer.send(stream, message[: len(message) // 2], end=False)
    return stream


# Callers that do not send


def test_an_arena_call_takes_no_room_of_messages(tmp_path: Path) -> None:
    """Its own message is small, and announced: it fits next to a large one, which does not give way to it."""
    x = np.ones((1, 64, 64, 64), np.float32)
    with (
        served(
            listen=("127.0.0.1:0", f"unix:{tmp_path}/socket"), max_inflight_bytes=4 * MIB, max_message_bytes=2 * MIB
        ) as server,
        grpc.insecure_channel(server.address) as channel,
        announced(channel, 3 * MIB // 2) as call,
        PoolClient(f"unix:{tmp_path}/socket") as client,
    ):
        until(lambda: server.value("poolrpc_inflight_bytes") == 3 * MIB)
        assert client.pool(x, MaxPool2d(2), transport="arena").transport == "arena"
        assert call.is_active()
        assert server.ended("STALLED") == 0


def test_a_caller_that_does_not_send_is_ended() -> None:
    """It is ended after --receive-timeout and the time for its bytes, which are free then."""
    with (
        served(receive_timeout=0.5, max_inflight_bytes=5 * MIB // 2, max_message_bytes=2 * MIB) as server,
        grpc.insecure_channel(server.address) as channel,
        announced(channel, MIB) as call,
    ):
        with pytest.raises(grpc.RpcError):
            next(call)
        until(lambda: server.ended("TIMEOUT") == 1)
        until(server.is_empty)
        with PoolClient(server.address) as client:
            assert client.pool(np.ones((1, 1, 512, 512), np.float32), MaxPool2d(2), transport="unary").output.all()


def test_a_caller_that_does_not_send_gives_way() -> None:
    """Without a timeout it is ended as soon as another caller needs its bytes."""
    with (
        served(receive_timeout=3600, max_inflight_bytes=4 * MIB, max_message_bytes=2 * MIB) as server,
        grpc.insecure_channel(server.address) as channel,
        announced(channel, MIB) as call,
    ):
        until(lambda: server.value("poolrpc_inflight_bytes") == 2 * MIB)
        with PoolClient(server.address, options=OWN_CONNECTION) as client:
            x = np.ones((1, 1, 512, 512), np.float32)

            def answered() -> bool:
                try:
                    return bool(client.pool(x, MaxPool2d(2), transport="unary").output.all())
                except poolrpc.UnavailableError:
                    return False

            until(answered)
        with pytest.raises(grpc.RpcError):
            next(call)
        assert server.ended("STALLED") == 1


def test_half_sent_calls_leave_room_for_others() -> None:
    """300 calls of one connection whose messages do not end leave calls, streams and bytes for another connection."""
    with served(call_threads=64, max_connection_calls=300) as server, RawPeer(server.address) as peer:
        streams = [half_sent(peer) for _ in range(300)]
        with PoolClient(server.address) as client:  # rejected perhaps until the server has looked at all 300
            for transport in ("unary", "stream"):
                assert client.pool(X, MaxPool2d(2), transport=transport).output.all()
        while len(peer.ended) < 300 - 48:  # 3/4 of the call threads
            peer.receive()
        with PoolClient(server.address, options=OWN_CONNECTION) as client:
            for transport in ("unary", "stream"):
                assert client.pool(X, MaxPool2d(2), transport=transport).output.all()
            assert client.health() == "SERVING"
        assert {peer.ended[stream]["grpc-status"] for stream in streams if stream in peer.ended} <= {"14", "1"}
        peer.socket.close()
        until(server.is_empty)


def test_methods_that_do_not_compute_need_not_wait_for_others() -> None:
    """Health and the server's description answer while hundreds of their calls wait for a message that never comes."""
    with served(receive_timeout=3600, max_connection_calls=300) as server, RawPeer(server.address) as peer:
        for method in (SERVICE + "GetServerInfo", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"):
            for _ in range(100):
                peer.open(method)
            peer.flush()
        with PoolClient(server.address, options=OWN_CONNECTION) as client:
            for _ in range(10):
                assert client.health() == "SERVING"
                assert client.server_info().threads


# Callers that do not read


def test_a_caller_that_does_not_read_its_answer_is_ended() -> None:
    """It is ended after --receive-timeout and the time for its bytes, which are free then."""
    with served(receive_timeout=0.5) as server, RawPeer(server.address) as peer:
        stream = peer.open(POOL)
        peer.send(stream, framed(with_answer_of(512)))
        # The stream's window stays at 64 KiB, so that an answer of 1 MiB begins and cannot end.
        while stream not in peer.ended:
            peer.receive()
        assert stream in peer.answering
        assert server.ended("TIMEOUT") == 1
        until(server.is_empty)
        with PoolClient(server.address) as client:
            assert client.pool(X, MaxPool2d(2)).output.all()


@pytest.mark.slow
def test_unread_answers_stay_within_the_bytes_in_flight() -> None:
    """Hundreds of small requests with answers of 4 MiB that are not read take no more memory than the limit allows."""
    limit = 64 * MIB
    flags = ["--max-inflight-bytes", str(limit), "--max-message-bytes", str(8 * MIB), "--metrics", "127.0.0.1:0"]
    flags += ["--max-connection-calls", "400"]
    with (
        serving(*flags, env={"MALLOC_ARENA_MAX": "1"}) as server,
        RawPeer(server.address) as peer,
        PoolClient(server.address) as client,
    ):
        folder = Path(f"/proc/{server.process.pid}")

        def peak() -> int:
            found = re.search(r"VmHWM:\s+(\d+) kB", (folder / "status").read_text())
            assert found
            return 1024 * int(found[1])

        def in_flight() -> float:
            return Scrape(server.start_line["metrics"])("poolrpc_inflight_bytes")

        client.pool(X, MaxPool2d(2))
        before, message, counts = peak(), framed(with_answer_of(1023)), []
        for _ in range(40):
            for _ in range(10):
                peer.send(peer.open(POOL), message)
            assert client.pool(X, MaxPool2d(2)).output.all()
            counts.append(in_flight())
        assert limit // 4 < max(counts) <= limit
        assert peak() < before + limit + 128 * MIB  # 400 answers are 1600 MiB
        peer.socket.close()
        until(lambda: not in_flight())


# Callers that leave


@pytest.mark.slow
def test_nothing_is_counted_after_callers_have_left() -> None:
    """After calls that were abandoned at every stage, no bytes are in flight and no stream is open."""
    with served(max_inflight_bytes=64 * MIB, max_streams=8) as server:
        for reset in (True, False):
            with RawPeer(server.address) as peer:
                streams = [half_sent(peer) for _ in range(5)]
                streams += [peer.open(POOL, (MESSAGE_BYTES_KEY, str(nbytes))) for nbytes in (1, 2 * MIB, 2**40)]
                for message in (b"", framed(b"\xff" * 9), framed(with_answer_of(512)), framed(bytes(MIB))):
                    streams.append(peer.open(POOL))
                    peer.send(streams[-1], message)
                for data in (b"", stream_header(64, 4, 64, 64), framed(b"\xff" * 9)):
                    streams.append(peer.open(SERVICE + "PoolStream"))
                    peer.send(streams[-1], data, end=False)
                empty = ("PoolStream", "InferShape", "GetServerInfo", "Nothing")
                streams += [peer.open(SERVICE + method) for method in empty]
                peer.flush()
                until(lambda: server.value("poolrpc_inflight_bytes"))
                until(lambda: server.value("poolrpc_streams"))
                if reset:
                    for stream in streams:
                        if stream not in peer.ended:
                            peer.reset(stream)
                    peer.flush()
                    until(server.is_empty)
            until(server.is_empty)
        with PoolClient(server.address) as client:
            for transport in ("unary", "stream"):
                assert client.pool(X, MaxPool2d(2), transport=transport).output.all()
        until(server.is_empty)


def test_calls_that_are_reset_at_once_leave_nothing() -> None:
    """A call that has ended before its thread begins is not counted any more, whatever the thread does then."""
    with served(max_streams=8, call_threads=16) as server:
        for method in ("PoolStream", "Pool", "GetServerInfo"):
            for _ in range(10):
                with RawPeer(server.address) as peer:
                    for _ in range(20):
                        peer.reset(peer.open(SERVICE + method))
                    peer.flush()
                    # The server has read the resets once it has answered a later call.
                    probe = peer.open("/grpc.health.v1.Health/Check")
                    peer.send(probe, framed(b""))
                    assert peer.status(probe) == "0"
        until(server.is_empty)
