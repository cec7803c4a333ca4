"""The queue under load, over real gRPC: batches, rejections, priorities, callers that leave, deadlines and the stop."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import poolrpc as p
import poolrpc_server
from poolrpc._wire.codec import Request, encode_request
from poolrpc._wire.framing import MESSAGE_BYTES_KEY
from poolrpc._wire.status import DETAILS_KEY, decode_error
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2
from poolrpc_server.calls import batcher, dispatch
from poolrpc_server.calls.call import DerivedContext
from poolrpc_server.compute import engine
from tests.integration.connections import until
from tests.parity.reference import assert_same, reference, values
from tests.scrape import Scrape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from poolrpc_server.calls.call import CallContext

PATIENCE = 60
"""Seconds after which a test that waits has failed."""

POOL = "/poolrpc.v1.PoolService/Pool"
ONCE = {"grpc.enable_retries": 0}


class Load:
    """The executions of servers of this process, which a test can hold by number, from 0.

    Attributes:
        executions: The input shapes of each.

    """

    def __init__(self) -> None:
        self.executions: list[list[tuple[int, ...]]] = []
        self.waits, self.left, self.rejected = (threading.Semaphore(0) for _ in range(3))
        self._held: dict[int, tuple[threading.Event, threading.Event]] = {}
        self._numbers = count()

    def execute(self, runs: Sequence[engine.Run]) -> None:
        """Record an execution, and hold it if the test says so."""
        number = next(self._numbers)
        self.executions.append([run.schedule.request.input.shape for run in runs])
        if number in self._held:
            held, released = self._held[number]
            held.set()
            assert released.wait(PATIENCE)

    def hold(self, number: int) -> None:
        """Hold an execution when it begins."""
        self._held[number] = threading.Event(), threading.Event()

    def wait_until_held(self, number: int) -> None:
        """Wait until an execution that is held has begun."""
        assert self._held[number][0].wait(PATIENCE)

    def release(self, *numbers: int) -> None:
        """Release executions; all of them by default."""
        for number in numbers or self._held:
            self._held[number][1].set()

    @staticmethod
    def await_events(what: threading.Semaphore, times: int = 1) -> None:
        """Wait until something has happened so many times more."""
        for _ in range(times):
            assert what.acquire(timeout=PATIENCE)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Record executions, calls that wait in the queue, those that leave, and those that are rejected."""
    made = Load()
    execute, admit, run = engine.Engine.execute, dispatch.Dispatcher.admit, batcher.Batcher.run

    def executed(self: engine.Engine, runs: Sequence[engine.Run]) -> list[Any]:
        made.execute(runs)
        return execute(self, runs)

    def admitted(self: dispatch.Dispatcher, priority: int, announced: int) -> Any:
        try:
            return admit(self, priority, announced)
        except p.UnavailableError:
            made.rejected.release()
            raise

    class Recorded(DerivedContext):
        def add_done_callback(self, callback: Callable[[], None]) -> bool:
            def leaves() -> None:
                callback()
                made.left.release()

            made.waits.release()
            return super().add_done_callback(leaves)

    def queued(self: Any, job: Any, context: CallContext, priority: int, **options: bool) -> Any:
        return run(self, job, Recorded(context), priority, **options)

    monkeypatch.setattr(engine.Engine, "execute", executed)
    monkeypatch.setattr(dispatch.Dispatcher, "admit", admitted)
    monkeypatch.setattr(batcher.Batcher, "run", queued)
    yield made
    made.release()


@pytest.fixture
def serve(load: Load) -> Iterator[Callable[..., poolrpc_server.Server]]:
    """Return a function that starts servers of one thread in this process, on ports of their own."""
    made = []

    def start(**settings: Any) -> poolrpc_server.Server:
        config = poolrpc_server.Config(**{"listen": ("127.0.0.1:0",), "threads": 1, **settings})
        made.append(poolrpc_server.Server(config))
        made[-1].start()
        return made[-1]

    yield start
    load.release()
    for server in made:
        server.stop(grace=0)


class Callers:
    """Calls of a server, side by side: the first has a plane of zeros, the next one of ones, and so on."""

    def __init__(self, server: poolrpc_server.Server, load: Load) -> None:
        self.channel = grpc.insecure_channel(server.addresses[0], list(ONCE.items()))
        self._call = self.channel.unary_unary(POOL)
        self._load = load
        self._calls: list[grpc.Future] = []  # gRPC cancels a call without references

    def call(self, width: int, priority: str | None = None) -> grpc.Future:
        """Call with a plane of a width, and return the call."""
        spec = TensorSpec("float32", (1, 1, 4, width))
        message = encode_request(Request(spec, ((p.MaxPool2d(2),),)))
        message.payload = np.full(spec.shape, len(self._calls), np.float32).tobytes()
        metadata = [(MESSAGE_BYTES_KEY, str(message.ByteSize()))]
        if priority is not None:
            metadata.append(("priority", priority))
        self._calls.append(self._call.future(message.SerializeToString(), metadata=metadata, timeout=PATIENCE))
        return self._calls[-1]

    def occupy(self) -> grpc.Future:
        """Use the only slot for a call that is held."""
        self._load.hold(0)
        call = self.call(64)
        self._load.wait_until_held(0)
        return call

    def wait(self, *widths: int, priority: str | None = None) -> list[grpc.Future]:
        """Call, and wait until each call is in the queue."""
        calls = []
        for width in widths:
            calls.append(self.call(width, priority))
            self._load.await_events(self._load.waits)
        return calls


@pytest.fixture
def callers(load: Load) -> Iterator[Callable[[poolrpc_server.Server], Callers]]:
    """Return a function that creates callers."""
    made = []

    def make(server: poolrpc_server.Server) -> Callers:
        made.append(Callers(server, load))
        return made[-1]

    yield make
    for each in made:
        each.channel.close()


def value_of(call: grpc.Future) -> set[float]:
    """Return the values of a call's result."""
    return set(np.frombuffer(pool_pb2.PoolResponse.FromString(call.result(PATIENCE)).payload, np.float32).tolist())


def error_of(call: Any) -> p.PoolError:
    """Return the error with which a call ends."""
    with pytest.raises(grpc.RpcError) as caught:
        call.result(PATIENCE)
    error: Any = caught.value
    return decode_error(error.code().name, error.details(), dict(error.trailing_metadata()).get(DETAILS_KEY))


def outcome_of(future: Future[Any]) -> Any:
    """Return the result or the error of a future."""
    error = future.exception(PATIENCE)
    return future.result() if error is None else error


MIXED = [
    (p.MaxPool2d(3, 2, 1), (2, 3, 17, 14), "float32"),
    (p.MaxPool2d(3, 2, 1), (1, 5, 17, 14), "float32"),
    (p.MaxPool2d(3, 2, 1), (4, 17, 14), "float32"),
    (p.MaxPool2d(2, return_indices=True), (1, 3, 8, 9), "float16"),
    (p.MaxPool2d(2, return_indices=True), (3, 1, 8, 9), "float16"),
    (p.AvgPool2d(2, ceil_mode=True), (1, 4, 9, 9), "float64"),
    (p.AvgPool2d(2, ceil_mode=True), (2, 2, 9, 9), "float64"),
    (p.AvgPool1d(3), (2, 4, 31), "float32"),
    (p.LPPool2d(2, 2), (1, 3, 8, 8), "float32"),
    (p.LPPool2d(3.5, 2), (1, 3, 8, 8), "float32"),
    (p.AdaptiveAvgPool2d((3, 2)), (1, 6, 11, 7), "float32"),
    (p.AdaptiveMaxPool3d(2), (1, 2, 5, 4, 6), "float64"),
    (p.MaxPool1d(2), (1, 3, 20), "int32"),
    (p.FractionalMaxPool2d(2, 3, seed=5), (1, 2, 8, 8), "float32"),
    (p.GlobalPool2d("max"), (2, 3, 6, 6), "uint8"),
    (p.MaxPool2d(2), (1, 32, 64, 64), "float32"),
]


def test_64_callers_at_once_receive_torchs_results(serve: Any, load: Load) -> None:
    """Each result is torch's, for many layers, shapes and dtypes; the metrics show that requests were batched."""
    server = serve(max_queue_seconds=60.0, metrics="127.0.0.1:0")
    load.hold(0)
    turn = threading.Barrier(64)

    def ask(number: int, client: p.PoolClient) -> None:
        turn.wait(PATIENCE)
        for i in range(4):
            layer, shape, dtype = MIXED[(number + 5 * i) % len(MIXED)]
            x = values(shape, dtype, number + i)
            result = client.pool(x, layer)
            expected, places = reference(layer, x)
            assert_same(result.output, expected, layer)
            if places is not None:
                assert_same(result.indices, places, layer)

    with p.PoolClient(server.addresses[0], options=ONCE) as client, ThreadPoolExecutor(64) as threads:
        answers = [threads.submit(ask, number, client) for number in range(64)]
        load.await_events(load.waits, 63)
        load.release(0)
        for answer in answers:
            answer.result(PATIENCE)
    sizes = [len(shapes) for shapes in load.executions]
    assert sum(sizes) == 64 * 4
    assert max(sizes) > 4
    # Requests of different shapes are batched if their planes are alike.
    assert any(len(set(shapes)) > 1 for shapes in load.executions)
    shown = Scrape(server.metrics_address)
    assert shown("poolrpc_requests_total") == 64 * 4
    assert shown("poolrpc_executions_total") == shown("poolrpc_batch_requests_count") == len(sizes)
    assert shown("poolrpc_batch_requests_bucket", le="1.0") == sizes.count(1) < len(sizes)


def test_a_full_queue_rejects_with_a_retry_delay(serve: Any, load: Load, callers: Any) -> None:
    """UNAVAILABLE has the reason, the limit, and the delay, for our clients and for gRPC's own retries.

    Calls that need no slot are answered: health, reflection, the server's info, shapes.
    """
    server = serve(max_queue=2)
    asked = callers(server)
    first = asked.occupy()
    waiting = asked.wait(4, 6)
    rejected = asked.call(8)
    error = error_of(rejected)
    assert isinstance(error, p.UnavailableError)
    assert (error.reason, error.metadata) == ("QUEUE", {"limit": "2", "actual": "3"})
    pushback = dict(rejected.trailing_metadata())["grpc-retry-pushback-ms"]
    assert int(pushback) == round(error.retry_delay * 1000) > 0
    with p.PoolClient(server.addresses[0], options=ONCE, timeout=PATIENCE) as client:
        assert client.health() == "SERVING"
        assert client.server_info().limits["max_queue"].value == 2
        assert client.output_shape((1, 1, 4, 4), p.MaxPool2d(2)) == (1, 1, 2, 2)
    assert "poolrpc.v1.PoolService" in ProtoReflectionDescriptorDatabase(asked.channel).get_services()
    load.release(0)
    assert all(call.result(PATIENCE) for call in (first, *waiting))
    assert asked.call(8).result(PATIENCE)


@pytest.mark.parametrize("method", ["Pool", "PoolStream"])
def test_a_call_is_rejected_before_its_message_is_read(serve: Any, load: Load, callers: Any, method: str) -> None:
    """A caller that has sent nothing yet is rejected: a message that would be dropped is not read."""
    asked = callers(serve(max_queue=1))
    asked.occupy()
    asked.wait(4)
    sending = threading.Event()

    def nothing() -> Iterator[bytes]:
        sending.wait(PATIENCE)
        yield from ()

    answers = asked.channel.stream_stream(f"/poolrpc.v1.PoolService/{method}")(nothing(), timeout=PATIENCE)
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    sending.set()
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert decode_error("UNAVAILABLE", "", dict(error.trailing_metadata())[DETAILS_KEY]).reason == "QUEUE"
    load.release(0)


def pool_async(address: str, x: Any, layer: p.Layer) -> p.PoolResult:
    """Pool by an asyncio client of its own."""

    async def pool() -> p.PoolResult:
        async with p.AsyncPoolClient(address) as client:
            return await client.pool(x, layer)

    return asyncio.run(pool())


def pool_blocking(address: str, x: Any, layer: p.Layer) -> p.PoolResult:
    """Pool by a blocking client of its own."""
    with p.PoolClient(address) as client:
        return client.pool(x, layer)


@pytest.mark.parametrize("pool", [pool_blocking, pool_async])
def test_a_client_with_its_default_retries_is_answered(
    serve: Any, load: Load, callers: Any, pool: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A rejected call is tried again, and answered once there is room; the logger poolrpc has the attempts at DEBUG."""
    server = serve(max_queue=1)
    asked = callers(server)
    asked.occupy()
    asked.wait(4)
    x = values((1, 2, 8, 8), "float32", 0)
    with ThreadPoolExecutor(1) as threads, caplog.at_level(logging.DEBUG, "poolrpc"):
        answer = threads.submit(pool, server.addresses[0], x, p.MaxPool2d(2))
        load.await_events(load.rejected)
        load.release(0)
        assert_same(answer.result(PATIENCE).output, reference(p.MaxPool2d(2), x)[0], "retried")
    (logged,) = [each.getMessage() for each in caplog.records if each.name == "poolrpc"]
    assert re.fullmatch(r"gRPC tried a call again; attempts before the one with the answer: [1-4]", logged)


def test_priorities_in_metadata(serve: Any, load: Load, callers: Any) -> None:
    """Priority 0 goes first and 2 last, in any order of arrival; the default is 1."""
    asked = callers(serve())
    asked.occupy()
    calls = [*asked.wait(4, priority="2"), *asked.wait(6), *asked.wait(8, priority="1"), *asked.wait(10, priority="0")]
    load.release(0)
    assert all(call.result(PATIENCE) for call in calls)
    assert [shape[-1] for (shape,) in load.executions] == [64, 10, 6, 8, 4]


@pytest.mark.parametrize("bad", ["3", "-1", "", "high", "01", "1" * 1000])
def test_an_unknown_priority_is_rejected(serve: Any, callers: Any, bad: str) -> None:
    """The error names the metadata and what was expected."""
    error = error_of(callers(serve()).call(4, priority=bad))
    assert isinstance(error, p.InvalidArgumentError)
    assert [each.field for each in error.violations] == ["metadata.priority"]
    assert "expected one of 0, 1, 2" in str(error)


def test_each_priority_has_a_queue_of_its_own(serve: Any, load: Load, callers: Any) -> None:
    """A full queue of the last priority leaves room for the others."""
    asked = callers(serve(max_queue=1))
    asked.occupy()
    calls = asked.wait(4, priority="2")
    assert error_of(asked.call(6, priority="2")).reason == "QUEUE"
    calls += [*asked.wait(8), *asked.wait(10, priority="0")]
    load.release(0)
    assert all(call.result(PATIENCE) for call in calls)


def test_a_cancelled_call_leaves_the_queue_at_once(serve: Any, load: Load, callers: Any) -> None:
    """Another call has its place while nothing else moves, and the cancelled one is never computed."""
    asked = callers(serve(max_queue=1))
    first = asked.occupy()
    (gone,) = asked.wait(4)
    assert error_of(asked.call(6)).reason == "QUEUE"
    gone.cancel()
    load.await_events(load.left)
    (next_one,) = asked.wait(8)
    load.release(0)
    assert first.result(PATIENCE)
    assert next_one.result(PATIENCE)
    assert [shape[-1] for (shape,) in load.executions] == [64, 8]


def test_a_cancelled_call_of_a_batch_frees_its_bytes(serve: Any, load: Load, callers: Any) -> None:
    """They are free while the batch is still computed; the other calls of the batch are answered."""
    server = serve(metrics="127.0.0.1:0")

    def in_flight() -> float:
        return Scrape(server.metrics_address)("poolrpc_inflight_bytes")

    asked = callers(server)
    first = asked.occupy()
    held = in_flight()
    one, gone, other = asked.wait(4, 4, 4)
    each = (in_flight() - held) / 3
    load.hold(1)
    load.release(0)
    assert first.result(PATIENCE)
    load.wait_until_held(1)
    gone.cancel()
    load.await_events(load.left)
    until(lambda: in_flight() == 2 * each > 0)  # once the server has noticed the end of the first call, too
    load.release(1)
    assert (value_of(one), value_of(other)) == ({1}, {3})
    assert [len(shapes) for shapes in load.executions] == [1, 3]


def test_a_batch_outlives_its_first_call(serve: Any, load: Load, callers: Any) -> None:
    """The thread that computes the batch goes on if its own call is cancelled."""
    asked = callers(serve())
    asked.occupy()
    gone, *others = asked.wait(4, 4, 4)
    load.hold(1)
    load.release(0)
    load.wait_until_held(1)
    gone.cancel()
    load.await_events(load.left)
    load.release(1)
    assert [value_of(call) for call in others] == [{2}, {3}]
    assert len(load.executions) == 2


def test_a_deadline_that_passes_in_the_queue(serve: Any, load: Load, callers: Any) -> None:
    """The call is DEADLINE_EXCEEDED while the slot is still in use, is not computed, and its place is free."""
    server = serve(max_queue=1)
    asked = callers(server)
    asked.occupy()
    with p.PoolClient(server.addresses[0]) as client, pytest.raises(p.DeadlineExceededError):
        client.pool(np.ones((1, 1, 4, 4), np.float32), p.MaxPool2d(2), timeout=0.3)
    load.await_events(load.waits)
    load.await_events(load.left)
    (behind,) = asked.wait(6)
    load.release(0)
    assert behind.result(PATIENCE)
    assert [shape[-1] for (shape,) in load.executions] == [64, 6]


def test_calls_that_wait_past_the_grace(serve: Any, load: Load, callers: Any) -> None:
    """They are UNAVAILABLE with STOPPING and a retry delay, and are never computed."""
    server = serve()
    asked = callers(server)
    first = asked.occupy()
    waiting = asked.wait(4, 6)
    with ThreadPoolExecutor(1) as threads:
        stopped = threads.submit(server.stop, 0.2)
        for call in waiting:
            error = error_of(call)
            assert isinstance(error, p.UnavailableError)
            assert error.reason == "STOPPING"
            assert error.retry_delay > 0
        load.release(0)
        outcome_of(stopped)
    first.exception(PATIENCE)
    assert [shape[-1] for (shape,) in load.executions] == [64]


def test_calls_that_begin_within_the_grace_are_answered(serve: Any, load: Load, callers: Any) -> None:
    """A stop does not cost accepted calls their results."""
    server = serve()
    asked = callers(server)
    calls = [asked.occupy(), *asked.wait(4, 6)]
    with ThreadPoolExecutor(1) as threads:
        stopped = threads.submit(server.stop, PATIENCE)
        load.release(0)
        assert all(call.result(PATIENCE) for call in calls)
        outcome_of(stopped)
