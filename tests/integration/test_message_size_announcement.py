"""Messages that are announced: counted before they come, refused where there is no room for them, over real gRPC."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

import poolrpc as p
import poolrpc_server
from poolrpc._transport.unary import ANNOUNCED_BYTES
from poolrpc._wire.codec import Request, encode_request
from poolrpc._wire.framing import MESSAGE_BYTES_KEY
from poolrpc._wire.status import translate_rpc_error
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.dispatch import COPIES, Dispatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 60
POOL = "/poolrpc.v1.PoolService/Pool"
LAYER = p.MaxPool2d(2)
MIB = 2**20


class Seen:
    """What is announced to servers of this process.

    Attributes:
        announced: The bytes of each call that was let in, or was not.
        let_in: Released for each that was.
        arrived: Released when one isn't counted any more.

    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.announced: list[int] = []
        self.let_in, self.arrived = threading.Semaphore(0), threading.Semaphore(0)
        check_room, arrived = Dispatcher.check_room, Dispatcher.arrived

        def checked(dispatcher: Dispatcher, priority: int, announced: int = 0) -> None:
            self.announced.append(announced)
            check_room(dispatcher, priority, announced)
            self.let_in.release()

        def came(dispatcher: Dispatcher, announced: int) -> None:
            arrived(dispatcher, announced)
            self.arrived.release()

        monkeypatch.setattr(Dispatcher, "check_room", checked)
        monkeypatch.setattr(Dispatcher, "arrived", came)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """See what is announced."""
    return Seen(monkeypatch)


@pytest.fixture
def address(seen: Seen) -> Iterator[str]:  # noqa: ARG001 - watched from its begin
    """A server for 8 MiB under way, and messages of at most 7 MiB."""
    config = poolrpc_server.Config(
        listen=("127.0.0.1:0",), threads=1, max_inflight_bytes=8 * MIB, max_message_bytes=7 * MIB
    )
    server = poolrpc_server.Server(config)
    server.start()
    yield server.addresses[0]
    server.stop(grace=0)


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    """A channel that tries once."""
    with grpc.insecure_channel(address, [("grpc.enable_retries", 0)]) as made:
        yield made


@pytest.fixture
def announce(channel: grpc.Channel) -> Iterator[Callable[[int], Any]]:
    """Give the way to begin a call that announces so many bytes, and sends none."""
    ended = threading.Event()

    def nothing() -> Iterator[bytes]:
        ended.wait()
        yield from ()

    method = channel.stream_stream(POOL)
    yield lambda nbytes: method(nothing(), metadata=[(MESSAGE_BYTES_KEY, str(nbytes))], timeout=PATIENCE)
    ended.set()


def error_of(call: Any) -> p.PoolError:
    """Give the error that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    return translate_rpc_error(caught.value)


def test_what_is_announced_is_counted_before_it_comes(announce: Callable[[int], Any], seen: Seen, address: str) -> None:
    """While one message is awaited there is no room for another, until its caller leaves."""
    first = announce(3 * MIB)
    assert seen.let_in.acquire(timeout=PATIENCE)
    error = error_of(announce(3 * MIB))
    assert isinstance(error, p.UnavailableError)
    assert error.reason == "IN_FLIGHT_BYTES"
    assert error.metadata == {"limit": str(8 * MIB), "actual": str(2 * COPIES * 3 * MIB)}
    first.cancel()
    assert seen.arrived.acquire(timeout=PATIENCE)
    with p.PoolClient(address, timeout=PATIENCE) as client:
        x = np.ones((1, 1, 1024, 1024), np.float32)
        assert client.pool(x, LAYER, transport="unary").shape == (1, 1, 512, 512)
    assert seen.announced[:2] == [3 * MIB] * 2
    assert 4 * MIB < seen.announced[2] < 4 * MIB + 100


def test_a_message_that_has_come_is_counted_as_what_it_is(address: str, seen: Seen) -> None:
    """Call after call of 4 MiB, which with its output is more than half of what there is room for, is answered."""
    with p.PoolClient(address, timeout=PATIENCE, options={"grpc.enable_retries": 0}) as client:
        for _ in range(5):
            client.pool(np.ones((1, 1, 1024, 1024), np.float32), LAYER, transport="unary")
    for _ in range(5):
        assert seen.arrived.acquire(timeout=PATIENCE)


def test_more_than_a_message_may_be_is_refused_before_it_is_sent(announce: Callable[[int], Any]) -> None:
    """That is final, and says the limit."""
    error = error_of(announce(7 * MIB + 1))
    assert isinstance(error, p.LimitExceededError)
    assert (error.reason, error.metadata) == ("MESSAGE_TOO_LARGE", {"limit": str(7 * MIB), "actual": str(7 * MIB + 1)})


@pytest.mark.parametrize("bad", ["", "-1", "1e6", "many", "9" * 20])
def test_an_announcement_that_is_no_number_is_the_callers_fault(channel: grpc.Channel, bad: str) -> None:
    """INVALID_ARGUMENT names the metadata."""
    call = channel.unary_unary(POOL)
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", metadata=[(MESSAGE_BYTES_KEY, bad)], timeout=PATIENCE)
    error = translate_rpc_error(caught.value)
    assert isinstance(error, p.InvalidArgumentError)
    assert [each.field for each in error.violations] == [f"metadata.{MESSAGE_BYTES_KEY}"]


def test_whoever_announces_nothing_is_served(channel: grpc.Channel, seen: Seen) -> None:
    """Other clients know nothing of it."""
    spec = TensorSpec("float32", (1, 1, 1024, 512))
    message = encode_request(Request(spec, ((LAYER,),)))
    message.payload = bytes(spec.nbytes)
    assert channel.unary_unary(POOL)(message.SerializeToString(), timeout=PATIENCE)
    assert seen.announced == [0]


async def test_both_clients_announce_large_messages_alone(address: str, seen: Seen) -> None:
    """Of a small one there is nothing to say."""
    small, large = np.ones((1, 1, 8, 8), np.float32), np.ones((1, 1, 512, 512), np.float32)
    assert large.nbytes == ANNOUNCED_BYTES
    with p.PoolClient(address, timeout=PATIENCE) as client:
        client.pool(small, LAYER)
        client.pool(large, LAYER)
    async with p.AsyncPoolClient(address, timeout=PATIENCE) as client:
        await client.pool(small, LAYER)
        await client.pool(large, LAYER)
    assert [announced > large.nbytes for announced in seen.announced] == [False, True] * 2
    assert seen.announced[0] == 0
