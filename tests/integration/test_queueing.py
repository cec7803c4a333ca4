"""Under load: turns and batches, refusals, priorities, callers that leave, deadlines and the stop, over real gRPC."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import poolrpc as p
import poolrpc_server
from poolrpc._wire.codec import Request, encode_request
from poolrpc._wire.status import DETAILS_KEY, decode_error
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2
from poolrpc_server.calls import dispatch
from poolrpc_server.compute import engine
from poolrpc_server.protocols import native
from tests.parity.reference import assert_same, reference, values
from tests.scrape import Scrape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PATIENCE = 60
"""Seconds after which a test that waits has failed."""

POOL = "/poolrpc.v1.PoolService/Pool"
HASTY = {"grpc.enable_retries": 0}


class Load:
    """What is seen of servers of this process, and their executions held up by number, from 0.

    Attributes:
        executions: The input shapes of each.

    """

    def __init__(self) -> None:
        self.executions: list[list[tuple[int, ...]]] = []
        self.waits, self.left, self.refused = (threading.Semaphore(0) for _ in range(3))
        self._held: dict[int, tuple[threading.Event, threading.Event]] = {}
        self._numbers = count()

    def executes(self, runs: Sequence[engine.Run]) -> None:
        """Take note of an execution, and hold it up where a test says so."""
        number = next(self._numbers)
        self.executions.append([run.schedule.request.input.shape for run in runs])
        if number in self._held:
            begun, let_go = self._held[number]
            begun.set()
            assert let_go.wait(PATIENCE)

    def hold(self, number: int) -> None:
        """Hold an execution up once it begins."""
        self._held[number] = threading.Event(), threading.Event()

    def begun(self, number: int) -> None:
        """Wait until an execution that is held has begun."""
        assert self._held[number][0].wait(PATIENCE)

    def let_go(self, *numbers: int) -> None:
        """Hold executions up no longer; all of them by default."""
        for number in numbers or self._held:
            self._held[number][1].set()

    @staticmethod
    def see(what: threading.Semaphore, times: int = 1) -> None:
        """Wait until something was seen so many times more."""
        for _ in range(times):
            assert what.acquire(timeout=PATIENCE)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """See executions, calls that wait for their turn, those that leave, and those that are refused."""
    made = Load()
    execute, check_room = engine.Engine.execute, dispatch.Dispatcher.check_room

    def executed(self: engine.Engine, runs: Sequence[engine.Run]) -> list[Any]:
        made.executes(runs)
        return execute(self, runs)

    def checked(self: dispatch.Dispatcher, priority: int, announced: int) -> None:
        try:
            check_room(self, priority, announced)
        except p.UnavailableError:
            made.refused.release()
            raise

    def caller(*told: Any) -> dispatch.Caller:
        made_by_the_door = dispatch.Caller(*told)

        def seen(callback: Callable[[], None]) -> bool:
            def leaves() -> None:
                callback()
                made.left.release()

            made.waits.release()
            return made_by_the_door.add_done_callback(leaves)

        return replace(made_by_the_door, add_done_callback=seen)

    monkeypatch.setattr(engine.Engine, "execute", executed)
    monkeypatch.setattr(dispatch.Dispatcher, "check_room", checked)
    monkeypatch.setattr(native, "Caller", caller)
    yield made
    made.let_go()


@pytest.fixture
def serve(load: Load) -> Iterator[Callable[..., poolrpc_server.Server]]:
    """Give the way to start servers of one thread in this process, on ports of their own."""
    made = []

    def start(**settings: Any) -> poolrpc_server.Server:
        config = poolrpc_server.Config(**{"listen": ("127.0.0.1:0",), "threads": 1, **settings})
        made.append(poolrpc_server.Server(config))
        made[-1].start()
        return made[-1]

    yield start
    load.let_go()
    for server in made:
        server.stop(grace=0)


class Callers:
    """Calls of a server, side by side: the first with a plane of zeros, the next with one of ones, and so on."""

    def __init__(self, server: poolrpc_server.Server, load: Load) -> None:
        self.channel = grpc.insecure_channel(server.addresses[0], list(HASTY.items()))
        self._call = self.channel.unary_unary(POOL)
        self._load = load
        self._calls: list[grpc.Future] = []  # gRPC cancels a call that nobody holds

    def call(self, width: int, priority: str | None = None) -> grpc.Future:
        """Call with a plane of that width; give the call."""
        spec = TensorSpec("float32", (1, 1, 4, width))
        message = encode_request(Request(spec, ((p.MaxPool2d(2),),)))
        message.payload = np.full(spec.shape, len(self._calls), np.float32).tobytes()
        metadata = [] if priority is None else [("priority", priority)]
        self._calls.append(self._call.future(message.SerializeToString(), metadata=metadata, timeout=PATIENCE))
        return self._calls[-1]

    def occupy(self) -> grpc.Future:
        """Take the only seat by a call that is held."""
        self._load.hold(0)
        call = self.call(64)
        self._load.begun(0)
        return call

    def wait(self, *widths: int, priority: str | None = None) -> list[grpc.Future]:
        """Call, and see each wait for its turn."""
        calls = []
        for width in widths:
            calls.append(self.call(width, priority))
            self._load.see(self._load.waits)
        return calls


@pytest.fixture
def callers(load: Load) -> Iterator[Callable[[poolrpc_server.Server], Callers]]:
    """Give the way to make callers."""
    made = []

    def make(server: poolrpc_server.Server) -> Callers:
        made.append(Callers(server, load))
        return made[-1]

    yield make
    for each in made:
        each.channel.close()


def value_of(call: grpc.Future) -> set[float]:
    """Give the values of a call's answer."""
    return set(np.frombuffer(pool_pb2.PoolResponse.FromString(call.result(PATIENCE)).payload, np.float32).tolist())


def error_of(call: Any) -> p.PoolError:
    """Give the error that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call.result(PATIENCE)
    error: Any = caught.value
    return decode_error(error.code().name, error.details(), dict(error.trailing_metadata()).get(DETAILS_KEY))


def ended(future: Future[Any]) -> Any:
    """Give what a call of a client's came to."""
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
    (p.GlobalMaxPool(), (2, 3, 6, 6), "uint8"),
    (p.MaxPool2d(2), (1, 32, 64, 64), "float32"),
]


def test_64_callers_at_once_have_torchs_answers(serve: Any, load: Load) -> None:
    """Each answer is torch's, of many layers, shapes and dtypes; the metrics show batches of what waited."""
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

    with p.PoolClient(server.addresses[0], options=HASTY) as client, ThreadPoolExecutor(64) as threads:
        answers = [threads.submit(ask, number, client) for number in range(64)]
        load.see(load.waits, 63)
        load.let_go(0)
        for answer in answers:
            answer.result(PATIENCE)
    sizes = [len(shapes) for shapes in load.executions]
    assert sum(sizes) == 64 * 4
    assert max(sizes) > 4
    # Beside each other are those of other shapes too, as long as their planes are alike.
    assert any(len(set(shapes)) > 1 for shapes in load.executions)
    shown = Scrape(server.metrics_address)
    assert shown("poolrpc_requests_total") == 64 * 4
    assert shown("poolrpc_executions_total") == shown("poolrpc_batch_requests_count") == len(sizes)
    assert shown("poolrpc_batch_requests_bucket", le="1.0") == sizes.count(1) < len(sizes)


def test_a_full_queue_refuses_and_says_when_to_come_again(serve: Any, load: Load, callers: Any) -> None:
    """UNAVAILABLE with the reason, the limit, and the time to wait, for our clients and for gRPC's own retries alike.

    Whoever asks for less than a turn is answered: health, reflection, the server's info, shapes.
    """
    server = serve(max_queue=2)
    asked = callers(server)
    first = asked.occupy()
    waiting = asked.wait(4, 6)
    refused = asked.call(8)
    error = error_of(refused)
    assert isinstance(error, p.UnavailableError)
    assert (error.reason, error.metadata) == ("QUEUE", {"limit": "2", "actual": "3"})
    pushback = dict(refused.trailing_metadata())["grpc-retry-pushback-ms"]
    assert int(pushback) == round(error.retry_delay * 1000) > 0
    with p.PoolClient(server.addresses[0], options=HASTY, timeout=PATIENCE) as client:
        assert client.health() == "SERVING"
        assert client.server_info().limits["max_queue"].value == 2
        assert client.output_shape((1, 1, 4, 4), p.MaxPool2d(2)) == (1, 1, 2, 2)
    assert "poolrpc.v1.PoolService" in ProtoReflectionDescriptorDatabase(asked.channel).get_services()
    load.let_go(0)
    assert all(call.result(PATIENCE) for call in (first, *waiting))
    assert asked.call(8).result(PATIENCE)


@pytest.mark.parametrize("method", ["Pool", "PoolStream"])
def test_a_refusal_waits_for_no_message(serve: Any, load: Load, callers: Any, method: str) -> None:
    """A caller that has sent nothing yet is refused: what would be thrown away isn't read."""
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
    load.let_go(0)


def test_a_client_with_its_default_retries_gets_through(serve: Any, load: Load, callers: Any) -> None:
    """Who was refused comes again by itself, and is answered once there is room."""
    server = serve(max_queue=1)
    asked = callers(server)
    asked.occupy()
    asked.wait(4)
    x = values((1, 2, 8, 8), "float32", 0)
    with p.PoolClient(server.addresses[0]) as client, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(client.pool, x, p.MaxPool2d(2))
        load.see(load.refused)
        load.let_go(0)
        assert_same(answer.result(PATIENCE).output, reference(p.MaxPool2d(2), x)[0], "retried")


def test_priorities_come_by_metadata(serve: Any, load: Load, callers: Any) -> None:
    """0 goes first and 2 goes last, whoever came first; none is 1."""
    asked = callers(serve())
    asked.occupy()
    calls = [*asked.wait(4, priority="2"), *asked.wait(6), *asked.wait(8, priority="1"), *asked.wait(10, priority="0")]
    load.let_go(0)
    assert all(call.result(PATIENCE) for call in calls)
    assert [shape[-1] for (shape,) in load.executions] == [64, 10, 6, 8, 4]


@pytest.mark.parametrize("bad", ["3", "-1", "", "high", "01", "1" * 1000])
def test_a_priority_that_there_is_not_is_refused(serve: Any, callers: Any, bad: str) -> None:
    """What was expected is said, under the name of the metadata."""
    error = error_of(callers(serve()).call(4, priority=bad))
    assert isinstance(error, p.InvalidArgumentError)
    assert [each.field for each in error.violations] == ["metadata.priority"]
    assert "expected one of 0, 1, 2" in str(error)


def test_each_priority_has_a_queue_of_its_own(serve: Any, load: Load, callers: Any) -> None:
    """Who floods the last level takes no place of those before it."""
    asked = callers(serve(max_queue=1))
    asked.occupy()
    calls = asked.wait(4, priority="2")
    assert error_of(asked.call(6, priority="2")).reason == "QUEUE"
    calls += [*asked.wait(8), *asked.wait(10, priority="0")]
    load.let_go(0)
    assert all(call.result(PATIENCE) for call in calls)


def test_a_caller_that_leaves_the_queue_frees_its_place_at_once(serve: Any, load: Load, callers: Any) -> None:
    """While nothing moves another one has its place, and what it asked for is never computed."""
    asked = callers(serve(max_queue=1))
    first = asked.occupy()
    (gone,) = asked.wait(4)
    assert error_of(asked.call(6)).reason == "QUEUE"
    gone.cancel()
    load.see(load.left)
    (next_one,) = asked.wait(8)
    load.let_go(0)
    assert first.result(PATIENCE)
    assert next_one.result(PATIENCE)
    assert [shape[-1] for (shape,) in load.executions] == [64, 8]


def test_a_caller_that_leaves_its_batch_frees_its_bytes_and_nobody_notices(
    serve: Any, load: Load, callers: Any
) -> None:
    """P08: while the batch is still computed its bytes are another one's; the others have their answers."""
    sizes = {width: 4 * 4 * width + 4 * 2 * (width // 2) for width in (64, 4)}
    # Once the first has been answered: the batch of three, and not a fourth of twice the size.
    server = serve(max_inflight_bytes=sizes[64] + 3 * sizes[4])
    asked = callers(server)
    first = asked.occupy()
    one, gone, other = asked.wait(4, 4, 4)
    load.hold(1)
    load.let_go(0)
    assert first.result(PATIENCE)
    load.begun(1)
    gone.cancel()
    load.see(load.left)
    with p.PoolClient(server.addresses[0]) as client, ThreadPoolExecutor(1) as threads:
        # All but what the two of the batch still hold.
        room = np.ones((1, 1, 4, 64 + 4), np.float32)
        beside = threads.submit(client.pool, room, p.MaxPool2d(2))
        load.see(load.waits)
        load.let_go(1)
        assert beside.result(PATIENCE).shape == (1, 1, 2, 34)
    assert (value_of(one), value_of(other)) == ({1}, {3})
    assert [len(shapes) for shapes in load.executions] == [1, 3, 1]


def test_of_a_batch_whose_first_caller_leaves_the_others_are_answered(serve: Any, load: Load, callers: Any) -> None:
    """P08: the thread that computes for all goes on, whoever left."""
    asked = callers(serve())
    asked.occupy()
    gone, *others = asked.wait(4, 4, 4)
    load.hold(1)
    load.let_go(0)
    load.begun(1)
    gone.cancel()
    load.see(load.left)
    load.let_go(1)
    assert [value_of(call) for call in others] == [{2}, {3}]
    assert len(load.executions) == 2


def test_a_deadline_that_passes_in_the_queue_is_told_and_nothing_computed(serve: Any, load: Load, callers: Any) -> None:
    """P07: DEADLINE_EXCEEDED while the seat is still taken, and its place is free."""
    server = serve(max_queue=1)
    asked = callers(server)
    asked.occupy()
    with p.PoolClient(server.addresses[0]) as client, pytest.raises(p.DeadlineExceededError):
        client.pool(np.ones((1, 1, 4, 4), np.float32), p.MaxPool2d(2), timeout=0.3)
    load.see(load.waits)
    load.see(load.left)
    (behind,) = asked.wait(6)
    load.let_go(0)
    assert behind.result(PATIENCE)
    assert [shape[-1] for (shape,) in load.executions] == [64, 6]


def test_what_waits_past_the_grace_is_told_that_the_server_stops(serve: Any, load: Load, callers: Any) -> None:
    """UNAVAILABLE with STOPPING and a time to come again, elsewhere perhaps; it was never computed."""
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
        load.let_go(0)
        ended(stopped)
    first.exception(PATIENCE)
    assert [shape[-1] for (shape,) in load.executions] == [64]


def test_what_gets_its_turn_within_the_grace_is_answered(serve: Any, load: Load, callers: Any) -> None:
    """A stop doesn't cost what was accepted its answer."""
    server = serve()
    asked = callers(server)
    calls = [asked.occupy(), *asked.wait(4, 6)]
    with ThreadPoolExecutor(1) as threads:
        stopped = threads.submit(server.stop, PATIENCE)
        load.let_go(0)
        assert all(call.result(PATIENCE) for call in calls)
        ended(stopped)
