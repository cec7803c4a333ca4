"""The announced size of a message: counted before the message arrives, and rejected if there is no room for it."""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

import poolrpc as p
import poolrpc_server
from poolrpc._wire.codec import Request, encode_request
from poolrpc._wire.framing import MESSAGE_BYTES_KEY
from poolrpc._wire.status import translate_rpc_error
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2, pool_pb2_grpc
from poolrpc_server.calls import admission

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integration.conftest import Connect, Gate

PATIENCE = 60
POOL = "/poolrpc.v1.PoolService/Pool"
LAYER = p.MaxPool2d(2)
MIB = 2**20
ONCE = {"grpc.enable_retries": 0}


@pytest.fixture
def address() -> Iterator[str]:
    """Return the address of a server for 16 MiB in flight, and messages of at most 7 MiB."""
    config = poolrpc_server.Config(
        listen=("127.0.0.1:0",), threads=2, max_inflight_bytes=16 * MIB, max_message_bytes=7 * MIB
    )
    server = poolrpc_server.Server(config)
    server.start()
    yield server.addresses[0]
    server.stop(grace=0)


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    """Return a channel that tries once."""
    with grpc.insecure_channel(address, list(ONCE.items())) as made:
        yield made


@pytest.fixture
def announce(channel: grpc.Channel) -> Iterator[Callable[[int], Any]]:
    """Return a function that begins a call which announces so many bytes, and sends none."""
    ended = threading.Event()

    def nothing() -> Iterator[bytes]:
        ended.wait()
        yield from ()

    method = channel.stream_stream(POOL)
    yield lambda nbytes: method(nothing(), metadata=[(MESSAGE_BYTES_KEY, str(nbytes))], timeout=PATIENCE)
    ended.set()


def error_of(call: Any) -> p.PoolError:
    """Return the error with which a call ends."""
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    return translate_rpc_error(caught.value)


def test_announced_bytes_are_counted_before_they_arrive(
    announce: Callable[[int], Any], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one message of 6 MiB is awaited there is no room for another, until its caller leaves.

    It is counted twice, because gRPC holds two copies of it, and all calls but one may have 3/4 of the bytes.
    """
    monkeypatch.setattr(admission, "STALLED_BYTES_PER_SECOND", 1)  # else the second call may end the first
    calls = [announce(6 * MIB) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        errors = {threads.submit(error_of, call): call for call in calls}
        (rejected,), _ = wait(errors, return_when=FIRST_COMPLETED)
        error = rejected.result()
        assert isinstance(error, p.UnavailableError)
        assert error.reason == "IN_FLIGHT_BYTES"
        assert int(error.metadata["actual"]) > int(error.metadata["limit"]) == 12 * MIB
        for call in calls:
            call.cancel()
    with p.PoolClient(address, timeout=PATIENCE) as client:
        x = np.ones((1, 1, 1024, 1024), np.float32)
        assert client.pool(x, LAYER, transport="unary").shape == (1, 1, 512, 512)


def test_an_arrived_message_is_counted_by_its_own_size(gate: Gate, channel: grpc.Channel, address: str) -> None:
    """While a small message is computed that was announced with 6 MiB, there is room for one of 4 MiB."""
    message = encode_request(Request(TensorSpec("float32", (1, 1, 2, 2)), ((p.GlobalPool2d("max"),),)))
    message.payload = bytes(16)
    call = channel.unary_unary(POOL).future(
        message.SerializeToString(), metadata=[(MESSAGE_BYTES_KEY, str(6 * MIB))], timeout=PATIENCE
    )
    assert gate.entered.wait(PATIENCE)
    with p.PoolClient(address, timeout=PATIENCE, options=ONCE) as client:
        assert client.pool(np.ones((1, 1, 1024, 1024), np.float32), LAYER, transport="unary").output.all()
    gate.opened.set()
    assert call.result(PATIENCE)


def test_a_message_larger_than_announced_is_counted_by_its_own_size(channel: grpc.Channel) -> None:
    """A caller that announces less than it sends is answered all the same."""
    spec = TensorSpec("float32", (1, 1, 1024, 1024))
    message = encode_request(Request(spec, ((LAYER,),)))
    message.payload = bytes(spec.nbytes)
    assert channel.unary_unary(POOL)(message.SerializeToString(), metadata=[(MESSAGE_BYTES_KEY, "1")], timeout=PATIENCE)


def test_a_call_that_can_never_fit_is_rejected_for_good() -> None:
    """A message, two copies of which exceed the bytes in flight is RESOURCE_EXHAUSTED, with the limit."""
    config = poolrpc_server.Config(listen=("127.0.0.1:0",), max_inflight_bytes=8 * MIB, max_message_bytes=7 * MIB)
    server = poolrpc_server.Server(config)
    server.start()
    with p.PoolClient(server.addresses[0], timeout=PATIENCE) as client, pytest.raises(p.LimitExceededError) as caught:
        client.pool(np.ones((1, 5, 512, 512), np.float32), LAYER, transport="unary")
    server.stop(grace=0)
    assert (caught.value.reason, caught.value.metadata["limit"]) == ("IN_FLIGHT_BYTES", str(8 * MIB))


def test_an_announcement_over_the_message_limit_is_rejected(announce: Callable[[int], Any]) -> None:
    """The rejection is final and has the limit."""
    error = error_of(announce(7 * MIB + 1))
    assert isinstance(error, p.LimitExceededError)
    assert (error.reason, error.metadata) == ("MESSAGE_TOO_LARGE", {"limit": str(7 * MIB), "actual": str(7 * MIB + 1)})


@pytest.mark.parametrize("bad", ["", "-1", "1e6", "many", "9" * 20])
def test_an_announcement_must_be_a_number(channel: grpc.Channel, bad: str) -> None:
    """INVALID_ARGUMENT names the metadata."""
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(POOL)(b"", metadata=[(MESSAGE_BYTES_KEY, bad)], timeout=PATIENCE)
    error = translate_rpc_error(caught.value)
    assert isinstance(error, p.InvalidArgumentError)
    assert [each.field for each in error.violations] == [f"metadata.{MESSAGE_BYTES_KEY}"]


def test_clients_need_not_announce_anything(channel: grpc.Channel) -> None:
    """A message without an announcement is answered."""
    spec = TensorSpec("float32", (1, 1, 1024, 512))
    message = encode_request(Request(spec, ((LAYER,),)))
    message.payload = bytes(spec.nbytes)
    assert channel.unary_unary(POOL)(message.SerializeToString(), timeout=PATIENCE)


def test_clients_announce_every_message(connect: Connect) -> None:
    """Either client announces the size of each message."""
    announced: list[int] = []

    class Recording(pool_pb2_grpc.PoolServiceServicer):
        def Pool(  # noqa: N802
            self, request: pool_pb2.PoolRequest, context: grpc.ServicerContext
        ) -> pool_pb2.PoolResponse:
            announced.append(int(dict(context.invocation_metadata())[MESSAGE_BYTES_KEY]))
            assert announced[-1] == request.ByteSize()
            result = pool_pb2.BranchResult(shapes=[pool_pb2.Shape(dims=request.input.shape)], output=request.input)
            return pool_pb2.PoolResponse(results=[result], payload=request.payload)

    server = grpc.server(ThreadPoolExecutor(1))
    pool_pb2_grpc.add_PoolServiceServicer_to_server(Recording(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    small, large = np.ones((1, 1, 8, 8), np.float32), np.ones((1, 1, 512, 512), np.float32)
    client = connect(f"127.0.0.1:{port}", timeout=PATIENCE)
    for x in (small, large):
        client.pool(x, p.MaxPool2d(1), transport="unary")
    server.stop(0).wait()
    first, second = announced
    assert small.nbytes < first < large.nbytes < second
