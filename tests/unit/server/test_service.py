"""A whole service, called without a transport: what any transport relies on."""

from hashlib import sha256

import numpy as np
import pytest

from poolrpc import (
    InternalError,
    InvalidArgumentError,
    MaxPool2d,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from poolrpc._wire import codec
from poolrpc._wire.framing import join
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2, standard_pb2
from poolrpc_server.calls.call import StatusError
from poolrpc_server.config import Config
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from poolrpc_server.service import Service
from tests.unit.server.context import Context, error_of

POOL, STREAM, CHECK = (
    "/poolrpc.v1.PoolService/Pool",
    "/poolrpc.v1.PoolService/PoolStream",
    "/grpc.health.v1.Health/Check",
)
X = np.arange(16, dtype=np.float32).tobytes()
POOLED = np.array([5, 7, 13, 15], np.float32).tobytes()


@pytest.fixture
def service():
    """Return a service that serves."""
    made = Service(Config(threads=1))
    made.health.set_serving(True)
    yield made
    made.close()


def request(layer, *, stream=False):
    """Return the encoded request to pool a tensor of 1 x 1 x 4 x 4."""
    message = codec.encode_request(codec.Request(TensorSpec("float32", (1, 1, 4, 4)), ((layer,),)))
    return pool_pb2.PoolStreamRequest(request=message).SerializeToString() if stream else message.SerializeToString()


def unary(service, message, method=POOL, metadata=()):
    """Make a call and return its answer, or the client's error."""
    context = Context(method, metadata)
    call = service.pipeline.admit(context)
    try:
        if call.error is not None:
            call.reject()
        return call.unary(iter([message]))
    except StatusError as status:
        return error_of(status)
    finally:
        context.ticket.release()


def test_a_request_is_answered(service):
    """The bytes of a request give the bytes of its answer."""
    assert unary(service, join(request(MaxPool2d(2)), [X])).endswith(POOLED)


def test_a_stream_is_answered(service):
    """The first answer has the results' shapes, the next that of the block."""
    context = Context(STREAM)
    call = service.pipeline.admit(context)
    first, block = call.stream(iter([request(MaxPool2d(2), stream=True), join(b"", [X])]))
    assert pool_pb2.PoolStreamResponse.FromString(first).results[0].output.shape == [1, 1, 2, 2]
    assert pool_pb2.PoolStreamResponse.FromString(block).payload == POOLED
    context.ticket.release()


INFER = "/inference.GRPCInferenceService/ModelInfer"


def infer(**parameters):
    """Return a request of the Open Inference Protocol to pool the same tensor, with parameters."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="input", datatype="FP32", shape=(1, 1, 4, 4))
    message = pb.ModelInferRequest(model_name="pool", inputs=[tensor], raw_input_contents=[X])
    for name, value in parameters.items():
        field = "int64_param" if isinstance(value, int) else "string_param"
        setattr(message.parameters[name], field, value)
    return message.SerializeToString()


def test_nothing_is_counted_when_every_call_has_ended():
    """After calls that were answered, failed, left in their middle or never read, every gauge is 0."""
    service = Service(Config(threads=1, metrics="127.0.0.1:0"))

    def gauges():
        shown = service.metrics.collect()
        return [shown.get_sample_value(f"poolrpc_{name}") for name in ("inflight_bytes", "streams")]

    message = join(request(MaxPool2d(2)), [X])
    for sent, method in ((message, POOL), (message[:-1], POOL), (infer(layer="MaxPool2d(2)"), INFER), (b"", CHECK)):
        unary(service, sent, method)
        assert gauges() == [0, 0]
    announced = Context(POOL, [("poolrpc-message-bytes", "1000000")])
    assert service.pipeline.admit(announced).error is None
    stream = Context(STREAM)
    answers = service.pipeline.admit(stream).stream(iter([request(MaxPool2d(2), stream=True), join(b"", [X])]))
    next(answers)
    inflight, streams = gauges()
    assert (inflight > 0, streams) == (True, 1)
    answers.close()
    for context in (announced, stream):
        context.ticket.release()
    assert gauges() == [0, 0]
    service.close()


@pytest.mark.parametrize(("token", "allowed"), [("secret", False), ("urgent", True)])
def test_priority_0_needs_the_tokens_word_in_each_protocol(tmp_path, token, allowed):
    """The priority in the metadata of a call and the one in a parameter of its request are the same."""
    file = tmp_path / "tokens"
    file.write_text(f"a {sha256(b'secret').hexdigest()}\nb {sha256(b'urgent').hexdigest()} priority-0\n")
    service = Service(Config(threads=1, token_file=str(file)))
    credentials = [("authorization", f"Bearer {token}")]
    for message, method, metadata, urgent in (
        (join(request(MaxPool2d(2)), [X]), POOL, [("priority", "0")], True),
        (infer(layer="MaxPool2d(2)", priority=1), INFER, [], True),  # Triton's highest priority
        (infer(layer="MaxPool2d(2)", priority=2), INFER, [], False),
    ):
        answer = unary(service, message, method, [*credentials, *metadata])
        assert isinstance(answer, bytes if allowed or not urgent else PermissionDeniedError), answer
    service.close()


def test_bytes_that_are_no_message_are_an_internal_error(service):
    """INTERNAL is the status that gRPC itself has for them, with a reason that tells it from a fault."""
    for method, message in ((POOL, b"\xff"), (CHECK, b"\xff")):
        error = unary(service, message, method)
        assert (type(error), error.reason) == (InternalError, "NO_MESSAGE")


def test_health_follows_the_service(service):
    """A check says SERVING or NOT_SERVING, and NOT_FOUND of a service that does not exist."""
    status = standard_pb2.HealthCheckResponse
    for serving, expected in ((True, status.SERVING_STATUS_SERVING), (False, status.SERVING_STATUS_NOT_SERVING)):
        service.health.set_serving(serving)
        for name in ("", "poolrpc.v1.PoolService"):
            message = standard_pb2.HealthCheckRequest(service=name).SerializeToString()
            assert status.FromString(unary(service, message, CHECK)).status == expected
    unknown = standard_pb2.HealthCheckRequest(service="x").SerializeToString()
    assert unary(service, unknown, CHECK).code == "NOT_FOUND"


def test_an_error_names_the_field(service):
    """The error that a client gets has the path of the field at fault, in a call and in a stream."""
    path = "branches[0].layers[0].max_pool.kernel_size"
    assert unary(service, join(request(MaxPool2d(9)), [X])).violations[0].field == path
    context = Context(STREAM)
    call = service.pipeline.admit(context)
    with pytest.raises(StatusError) as raised:
        next(call.stream(iter([request(MaxPool2d(9), stream=True)])))
    assert error_of(raised.value).violations[0].field == path
    context.ticket.release()


def test_an_invalid_priority_is_rejected(service):
    """It is rejected before the message is read."""
    assert isinstance(unary(service, b"", metadata=[("priority", "9")]), InvalidArgumentError)


def test_calls_need_a_token_if_there_are_tokens(tmp_path):
    """A call with a token is answered, one without is UNAUTHENTICATED, and health checks need none."""
    file = tmp_path / "tokens"
    file.write_text(f"someone {sha256(b'secret').hexdigest()}\n")
    service = Service(Config(threads=1, token_file=str(file)))
    message = join(request(MaxPool2d(2)), [X])
    assert unary(service, message, metadata=[("authorization", "Bearer secret")]).endswith(POOLED)
    assert isinstance(unary(service, message), UnauthenticatedError)
    assert isinstance(unary(service, b"", CHECK), bytes)
    service.close()


def test_a_method_that_does_not_exist_is_not_admitted(service):
    """The transport answers UNIMPLEMENTED."""
    assert service.pipeline.admit(Context("/no.Service/Method")) is None


def test_a_failed_service_says_so_once(service):
    """Health becomes NOT_SERVING, and on_failure is called with the first reason."""
    calls = []
    service.on_failure = lambda: calls.append(service.failure)
    service.fail("the device is lost")
    service.fail("again")
    assert (calls, service.health.serving) == (["the device is lost"], False)


def test_a_stopped_queue_rejects(service):
    """Calls that come after the queue was stopped are UNAVAILABLE and may be tried elsewhere."""
    service.stop_queue()
    error = unary(service, join(request(MaxPool2d(2)), [X]))
    assert (type(error), error.reason) == (UnavailableError, "STOPPING")
