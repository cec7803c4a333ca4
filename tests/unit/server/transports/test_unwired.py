"""A server without a wire answers what is handed to it as gRPC's own would."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

import poolrpc as p
from poolrpc._wire import codec
from poolrpc._wire.framing import join
from poolrpc._wire.status import DETAILS_KEY, decode_error
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2
from poolrpc_server import Config, Server
from poolrpc_server.transports.unwired import Call, UnwiredServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POOL, STREAM = "/poolrpc.v1.PoolService/Pool", "/poolrpc.v1.PoolService/PoolStream"
WAIT = 30


@contextmanager
def serving(**settings: Any) -> Iterator[UnwiredServer]:
    """Run everything that a server has, but for the wire."""
    made: list[UnwiredServer] = []

    def make(*arguments: Any, **options: Any) -> UnwiredServer:
        made.append(UnwiredServer(*arguments, **options))
        return made[0]

    server = Server(Config(threads=1, **settings), make_server=make)
    server.start()
    yield made[0]
    server.stop(grace=0)


@pytest.fixture
def unwired() -> Iterator[UnwiredServer]:
    """Such a server."""
    with serving() as made:
        yield made


def request(layer: p.Layer, *, stream: bool = False) -> bytes:
    """Give the request, encoded, to pool a tensor of 1 x 1 x 4 x 4."""
    message = codec.encode_request(codec.Request(TensorSpec("float32", (1, 1, 4, 4)), ((layer,),)))
    return pool_pb2.PoolStreamRequest(request=message).SerializeToString() if stream else message.SerializeToString()


X = np.arange(16, dtype=np.float32).tobytes()
POOLED = np.array([5, 7, 13, 15], np.float32).tobytes()


def error_of(call: Call) -> p.PoolError:
    """Give the error that a client makes of a call's status."""
    code = call.code()
    assert code is not None
    return decode_error(code.name, call.details(), dict(call.trailing_metadata()).get(DETAILS_KEY))


def test_a_message_is_answered(unwired: UnwiredServer) -> None:
    """The bytes of a request give the bytes of its answer, and no status is set."""
    call = Call(POOL, ())
    answer = unwired.unary(call, join(request(p.MaxPool2d(2)), [X])).result(WAIT)
    assert answer.endswith(POOLED)
    assert call.code() is None
    assert not call.is_active()


def test_a_stream_is_answered(unwired: UnwiredServer) -> None:
    """Each step gives one answer: the results' shapes, the block's, then none."""
    call = Call(STREAM, ())
    answers = unwired.stream(call, iter([request(p.MaxPool2d(2), stream=True), join(b"", [X])]))
    first, block, end = (answers.next().result(WAIT) for _ in range(3))
    assert pool_pb2.PoolStreamResponse.FromString(first).results[0].output.shape == [1, 1, 2, 2]
    assert pool_pb2.PoolStreamResponse.FromString(block).payload == POOLED
    assert end is None
    assert call.code() is None
    assert not call.is_active()


def test_what_is_parsed_is_parsed(unwired: UnwiredServer) -> None:
    """A method of protobuf messages has them read and written, and what is no message is said to be none."""
    answer = unwired.unary(Call("/grpc.health.v1.Health/Check", ()), b"").result(WAIT)
    assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING
    call = Call("/grpc.health.v1.Health/Check", ())
    assert unwired.unary(call, b"\xff").result(WAIT) == b""
    assert isinstance(error_of(call), p.InternalError)


def test_a_status_has_its_details(unwired: UnwiredServer) -> None:
    """What is raised on the way is what a client would raise."""
    call = Call(POOL, ())
    assert unwired.unary(call, join(request(p.MaxPool2d(9)), [X])).result(WAIT) == b""
    error = error_of(call)
    assert isinstance(error, p.InvalidArgumentError)
    assert error.violations[0].field == "branches[0].layers[0].max_pool.kernel_size"
    call = Call(STREAM, ())
    assert unwired.stream(call, iter([request(p.MaxPool2d(9), stream=True)])).next().result(WAIT) is None
    assert isinstance(error_of(call), p.InvalidArgumentError)


def test_interceptors_refuse(unwired: UnwiredServer) -> None:
    """A call that is refused before its message is read has that status, of either kind."""
    call = Call(POOL, [("priority", "9")])
    assert unwired.unary(call, b"").result(WAIT) == b""
    assert "priority" in str(error_of(call))
    call = Call(STREAM, [("priority", "9")])
    assert unwired.stream(call, iter(())).next().result(WAIT) is None
    assert "priority" in str(error_of(call))


def test_tokens_are_asked_for(tmp_path: Path) -> None:
    """A call with a token is answered, one without is UNAUTHENTICATED."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"someone {sha256(b'secret').hexdigest()}\n")
    with serving(token_file=str(tokens)) as server:
        call = Call(POOL, [("authorization", "Bearer secret")])
        assert server.unary(call, join(request(p.MaxPool2d(2)), [X])).result(WAIT).endswith(POOLED)
        call = Call(POOL, ())
        assert server.unary(call, join(request(p.MaxPool2d(2)), [X])).result(WAIT) == b""
        assert isinstance(error_of(call), p.UnauthenticatedError)


def test_an_unknown_method_is_unimplemented(unwired: UnwiredServer) -> None:
    """As gRPC has it."""
    call = Call("/no.Service/Method", ())
    assert unwired.unary(call, b"").result(WAIT) == b""
    assert call.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_stream_that_nobody_wants_ends() -> None:
    """To close it ends its servicer too, and tells it that the caller has left."""
    told, ended = threading.Event(), threading.Event()

    def behaviour(_: object, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(told.set)
        try:
            yield b"1"
            yield b"2"
        finally:
            ended.set()

    with ThreadPoolExecutor(1) as threads:
        server = served(threads, grpc.stream_stream_rpc_method_handler(behaviour))
        answers = server.stream(Call("/a.B/C", ()), iter(()))
        assert answers.next().result(WAIT) == b"1"
        answers.close()
        assert told.wait(WAIT)
        assert ended.wait(WAIT)
        assert server.stop(WAIT).wait(WAIT)


def test_stopping_waits_for_calls_and_refuses_others() -> None:
    """A call under way is finished, and one that comes meanwhile is UNAVAILABLE."""
    begun, go, told = threading.Event(), threading.Event(), threading.Event()

    def behaviour(_: object, context: grpc.ServicerContext) -> bytes:
        context.add_callback(told.set)
        begun.set()
        assert go.wait(WAIT)
        return b"answer"

    with ThreadPoolExecutor(1) as threads:
        server = served(threads, grpc.unary_unary_rpc_method_handler(behaviour))
        answer = server.unary(Call("/a.B/C", ()), b"")
        assert begun.wait(WAIT)
        ended = server.stop(WAIT)
        late = Call("/a.B/C", ())
        refused = server.unary(late, b"")
        assert not ended.is_set()
        go.set()
        assert answer.result(WAIT) == b"answer"
        assert refused.result(WAIT) == b""
        assert late.code() is grpc.StatusCode.UNAVAILABLE
        assert ended.wait(WAIT)
        assert told.is_set()


def test_stopping_cancels_what_takes_longer() -> None:
    """A stream that nobody reads is told, and doesn't hold the end up."""
    with ThreadPoolExecutor(1) as threads:
        server = served(threads, grpc.stream_stream_rpc_method_handler(lambda *_: iter((b"1", b"2"))))
        call = Call("/a.B/C", ())
        assert server.stream(call, iter(())).next().result(WAIT) == b"1"
        assert call.is_active()
        assert server.stop(0).wait(WAIT)
        assert not call.is_active()
        assert call.code() is grpc.StatusCode.CANCELLED


def served(threads: ThreadPoolExecutor, handler: grpc.RpcMethodHandler[Any, Any]) -> UnwiredServer:
    """Give a server of one method, /a.B/C."""
    server = UnwiredServer(threads)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", {"C": handler}),))
    server.start()
    return server
