"""The Open Inference Protocol over a real server: results, errors, presets, streams, shared memory and reflection."""

from __future__ import annotations

import os
import secrets
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import poolrpc
import poolrpc_server
from poolrpc import AvgPool2d, GlobalPool2d, MaxPool2d, MaxUnpool2d
from poolrpc._wire.status import DETAILS_KEY, decode_error
from poolrpc.tensors import numpy_dtype
from poolrpc_server.calls.dispatch import Dispatcher
from poolrpc_server.protocols.triton import requests
from poolrpc_server.protocols.triton.datatypes import CONTENTS_FIELDS, DATATYPE_OF, DATATYPES
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from poolrpc_server.protocols.triton.servicer import CONTROL_METHODS, TRITON_SERVICE
from tests.scrape import Scrape

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from tests.integration.conftest import Gate

X = np.random.default_rng(7).standard_normal((2, 3, 8, 10), np.float32)
STEM = "MaxPool2d(3, stride=2, padding=1)"
BRANCHES = "[[MaxPool2d(2, return_indices=True)], [AvgPool2d(2), MaxPool2d(2, return_indices=True)]]"
SHM = Path("/dev/shm")  # noqa: S108 - POSIX shared memory


class TritonClient:
    """A client of the service, written with protoc's and gRPC's code alone."""

    def __init__(self, address: str) -> None:
        limit = [("grpc.max_receive_message_length", -1)]
        self.channel = grpc.insecure_channel(address, limit)

    def call(self, method: str, **fields: Any) -> Any:
        """Call a method with one message each way."""
        descriptor = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[method]
        request, response = getattr(pb, descriptor.input_type.name), getattr(pb, descriptor.output_type.name)
        call = self.channel.unary_unary(f"/{TRITON_SERVICE}/{method}", request.SerializeToString, response.FromString)
        return call(request(**fields), timeout=60)

    def infer(self, request: pb.ModelInferRequest, timeout: float = 60) -> pb.ModelInferResponse:
        """Run a model."""
        kinds = pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
        return self.channel.unary_unary(f"/{TRITON_SERVICE}/ModelInfer", *kinds)(request, timeout=timeout)

    def stream(self, requests: Iterator[pb.ModelInferRequest]) -> Any:
        """Run a model for each request of a stream."""
        kinds = pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
        return self.channel.stream_stream(f"/{TRITON_SERVICE}/ModelStreamInfer", *kinds)(requests, timeout=60)

    def fail(self, request: pb.ModelInferRequest, timeout: float = 60) -> poolrpc.PoolError:
        """Return the error of a request, as our client would raise it."""
        with pytest.raises(grpc.RpcError) as raised:
            self.infer(request, timeout)
        return error_of(raised.value)


def error_of(error: Any) -> poolrpc.PoolError:
    """Return the error of a call."""
    details = dict(error.trailing_metadata() or ()).get(DETAILS_KEY)
    return decode_error(error.code().name, error.details(), details)


@contextmanager
def serving(**settings: Any) -> Iterator[TritonClient]:
    """Run a server in this process, and return a caller of it."""
    server = poolrpc_server.Server(poolrpc_server.Config(listen=("127.0.0.1:0",), **settings))
    server.start()
    caller = TritonClient(server.addresses[0])
    try:
        yield caller
    finally:
        caller.channel.close()
        server.stop(grace=0)


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[TritonClient, poolrpc.PoolClient]]:
    """Return two clients of a server with presets and shared memory: one of this protocol, and our own."""
    presets = (f"stem={STEM}", f"two={BRANCHES}", "un=MaxUnpool2d(2)")
    server = poolrpc_server.Server(
        poolrpc_server.Config(listen=("127.0.0.1:0",), model=presets, allow_client_shm=True, max_message_bytes=2**22)
    )
    server.start()
    caller = TritonClient(server.addresses[0])
    with poolrpc.PoolClient(server.addresses[0]) as client:
        yield caller, client
    caller.channel.close()
    server.stop(grace=0)


@pytest.fixture
def caller(both: tuple[TritonClient, poolrpc.PoolClient]) -> TritonClient:
    """Return a caller of that server."""
    return both[0]


@pytest.fixture
def client(both: tuple[TritonClient, poolrpc.PoolClient]) -> poolrpc.PoolClient:
    """Return our client of the same server."""
    return both[1]


@pytest.fixture
def region(caller: TritonClient) -> Iterator[Path]:
    """Return a file of 64 KiB of shared memory, which is registered as "it"."""
    path = SHM / f"poolrpc-test-{secrets.token_hex(8)}"
    path.write_bytes(bytes(2**16))
    caller.call("SystemSharedMemoryRegister", name="it", key=f"/{path.name}", offset=16, byte_size=2**16 - 16)
    yield path
    caller.call("SystemSharedMemoryUnregister")
    path.unlink(missing_ok=True)


def request(
    *arrays: NDArray[Any],
    layer: str = "",
    model: str = "pool",
    outputs: Iterable[str] = (),
    operand: str = "indices",
    **parameters: int,
) -> pb.ModelInferRequest:
    """Return a request with raw inputs."""
    message = pb.ModelInferRequest(model_name=model, raw_input_contents=[each.tobytes() for each in arrays])
    for name, each in zip(("input", operand), arrays, strict=False):
        message.inputs.add(name=name, datatype=DATATYPE_OF[each.dtype.name], shape=each.shape)
    if layer:
        message.parameters["layer"].string_param = layer
    for name, value in parameters.items():
        message.parameters[name].int64_param = value
    for name in outputs:
        message.outputs.add(name=name)
    return message


def arrays_of(answer: pb.ModelInferResponse) -> dict[str, NDArray[Any]]:
    """Return the outputs of a response by name."""
    return {
        each.name: np.frombuffer(data, numpy_dtype(DATATYPES[each.datatype])).reshape(each.shape)
        for each, data in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


def assert_same(got: NDArray[Any], expected: NDArray[Any]) -> None:
    """Check that two arrays have the same shape, dtype and bytes."""
    assert (got.shape, got.dtype, got.tobytes()) == (expected.shape, expected.dtype, expected.tobytes())


@pytest.mark.parametrize("dtype", MaxPool2d.dtypes)
def test_results_are_those_of_our_client(caller: TritonClient, client: poolrpc.PoolClient, dtype: str) -> None:
    """In every dtype, raw and typed, the outputs have the bytes that our client receives."""
    x = (X * 50).astype(numpy_dtype(dtype))
    expected = client.pool(x, MaxPool2d(3, stride=2)).output
    message = request(x, layer="MaxPool2d(3, stride=2)")
    assert_same(arrays_of(caller.infer(message))["output"], expected)
    if dtype in CONTENTS_FIELDS:
        del message.raw_input_contents[:]
        getattr(message.inputs[0].contents, CONTENTS_FIELDS[dtype]).extend(x.reshape(-1).tolist())
        assert_same(arrays_of(caller.infer(message))["output"], expected)


def test_steps_have_the_results_of_our_client(caller: TritonClient, client: poolrpc.PoolClient) -> None:
    """Integers are converted in the server, from raw and typed tensors, and outputs have the dtypes of their chains."""
    x = (X * 50).astype(np.uint16)
    layer = "[[ToDtype('float32'), AvgPool2d(2), Round(), ToDtype('uint8')], [MaxPool2d(2), ToDtype('float64')]]"
    expected = [each.output for each in client.pool_each(x, layer)]
    for typed in (False, True):
        message = request(x, layer=layer)
        if typed:
            del message.raw_input_contents[:]
            message.inputs[0].contents.uint_contents.extend(x.reshape(-1).tolist())
        outputs = arrays_of(caller.infer(message))
        for name, array in zip(("output", "output_1"), expected, strict=True):
            assert_same(outputs[name], array)
    assert [each.dtype for each in expected] == [np.uint8, np.float64]


def test_branches_are_outputs_by_name(caller: TritonClient, client: poolrpc.PoolClient) -> None:
    """Branches, chains and indices have output names; a request lists the outputs that it wants, in order."""
    one, two = client.pool_each(
        X, [MaxPool2d(2, return_indices=True), [AvgPool2d(2), MaxPool2d(2, return_indices=True)]]
    )
    expected = {"output": one.output, "indices": one.indices, "output_1": two.output, "indices_1": two.indices}
    for message in (request(X, layer=BRANCHES), request(X, model="two")):
        found = arrays_of(caller.infer(message))
        assert list(found) == list(expected)
        for name, array in found.items():
            assert_same(array, expected[name])
    found = arrays_of(caller.infer(request(X, model="two", outputs=["indices_1", "output"])))
    assert list(found) == ["indices_1", "output"]
    assert_same(found["indices_1"], expected["indices_1"])
    assert_same(found["output"], expected["output"])


OPERANDS = {
    "offsets": ("SegmentPool('max')", X[0], np.array([0, 2, 4])),
    "weights": ("GlobalPool2d('mean')", X, np.arange(160, dtype=np.float32).reshape(2, 8, 10)),
    "boxes": ("[RoIAlign(2), MaxPool2d(2)]", X, np.array([[0, 0, 0, 3, 3]], np.float32)),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_operands_are_inputs_by_their_names(caller: TritonClient, client: poolrpc.PoolClient, name: str) -> None:
    """An operand is a second input; the outputs are those of our client, and another name or value is an error."""
    layer, x, operand = OPERANDS[name]
    expected = client.pool(x, layer, **{name: operand}).output
    assert_same(arrays_of(caller.infer(request(x, operand, layer=layer, operand=name)))["output"], expected)
    other = next(each for each in OPERANDS if each != name)
    error = caller.fail(request(x, operand, layer=layer, operand=other))
    assert str(error) == f"inputs: expected {name} for these layers, got {other}"
    error = caller.fail(request(x, operand - 100, layer=layer, operand=name))
    assert error.violations[0].field == name


PYRAMID = "[MaxPool2d(2, return_indices=True), AvgPool2d(2), MaxPool2d(2, return_indices=True)]"


@pytest.mark.parametrize("method", ["infer", "stream"])
def test_the_steps_of_a_chain_are_outputs_by_name(
    caller: TritonClient, client: poolrpc.PoolClient, method: str
) -> None:
    """A name with the number of a layer is its output or its indices; one without is that of the last layer."""
    steps = client.pool_steps(X, PYRAMID)
    expected = {
        "output.0": steps[0].output,
        "indices.0": steps[0].indices,
        "output.1": steps[1].output,
        "output.2": steps[2].output,
        "output": steps[2].output,
        "indices.2": steps[2].indices,
        "indices": steps[2].indices,
    }
    for names in (list(expected), ["indices", "output.0"], ["output.1", "indices.0"], ["output.0"]):
        message = request(X, layer=PYRAMID, outputs=names)
        answer = caller.infer(message) if method == "infer" else next(caller.stream(iter([message]))).infer_response
        found = arrays_of(answer)
        assert list(found) == names
        for name, array in found.items():
            assert_same(array, expected[name])


def test_steps_of_several_branches_and_of_a_preset(caller: TritonClient, client: poolrpc.PoolClient) -> None:
    """The number of a branch precedes that of its layer; branches whose outputs are not named are still checked."""
    one, two = client.pool_each(X, [MaxPool2d(2), AvgPool2d(2)])
    found = arrays_of(caller.infer(request(X, model="two", outputs=["output_1.0", "output", "output_1"])))
    assert list(found) == ["output_1.0", "output", "output_1"]
    assert_same(found["output_1.0"], two.output)
    assert_same(found["output"], one.output)
    assert_same(found["output_1"], client.pool(two.output, MaxPool2d(2)).output)


@pytest.mark.parametrize(
    "name", ["output.3", "output.-1", "output.00", "output_0.0", "output_1.0", "indices.1", "output."]
)
def test_a_step_that_there_is_not(caller: TritonClient, name: str) -> None:
    """A name of another form or of a layer that the chain lacks is an error of the output's name."""
    error = caller.fail(request(X, layer="[MaxPool2d(2), AvgPool2d(2), MaxPool2d(2)]", outputs=["output.0", name]))
    assert isinstance(error, poolrpc.InvalidArgumentError)
    assert (
        error.message
        == f"outputs[1].name: expected one of output, or a layer's such as output.0, each once, got '{name}'"
    )


def test_a_step_goes_to_shared_memory(caller: TritonClient, client: poolrpc.PoolClient, region: Path) -> None:
    """The output of a step may be written to the client's memory."""
    message = request(X, layer="[MaxPool2d(2), AvgPool2d(2)]", outputs=["output.0", "output"])
    expected = client.pool_steps(X, "[MaxPool2d(2), AvgPool2d(2)]")
    for key, value in {"shared_memory_region": "it", "shared_memory_byte_size": expected[0].output.nbytes}.items():
        kind = "string_param" if isinstance(value, str) else "int64_param"
        setattr(message.outputs[0].parameters[key], kind, value)
    answer = caller.infer(message)
    assert region.read_bytes()[16 : 16 + expected[0].output.nbytes] == expected[0].output.tobytes()
    assert answer.raw_output_contents[1] == expected[1].output.tobytes()


def test_unpool_takes_indices(caller: TritonClient, client: poolrpc.PoolClient) -> None:
    """MaxUnpool has two inputs, in either order."""
    pooled = client.pool(X, MaxPool2d(2, return_indices=True))
    expected = client.pool(pooled.output, MaxUnpool2d(2), indices=pooled.indices).output
    message = request(pooled.output, pooled.indices, model="un")
    assert_same(arrays_of(caller.infer(message))["output"], expected)
    swapped = request(pooled.output, pooled.indices, model="un")
    swapped.inputs[0].CopyFrom(message.inputs[1])
    swapped.inputs[1].CopyFrom(message.inputs[0])
    swapped.raw_input_contents[:] = message.raw_input_contents[::-1]
    assert_same(arrays_of(caller.infer(swapped))["output"], expected)


def test_unbatched_and_empty_tensors(caller: TritonClient) -> None:
    """A tensor without a batch axis and one of no images are answered, and the id is returned."""
    message = request(X[0], layer="AvgPool2d(2)")
    message.id, message.model_version = "naïve-7", "1"
    answer = caller.infer(message)
    assert (answer.id, answer.model_name, answer.model_version) == ("naïve-7", "pool", "1")
    assert arrays_of(answer)["output"].shape == (3, 4, 5)
    assert arrays_of(caller.infer(request(X[:0], layer="AvgPool2d(2)")))["output"].shape == (0, 3, 4, 5)


@pytest.mark.parametrize(
    ("message", "code", "reason", "words"),
    [
        (request(X), "INVALID_ARGUMENT", "", "parameters.layer: expected an expression such as MaxPool2d(2)"),
        (request(X, layer="MaxPool2d(2"), "INVALID_ARGUMENT", "", "parameters.layer: column"),
        (request(X, layer="MaxPool2d(99)"), "INVALID_ARGUMENT", "", "max_pool.kernel_size: expected an effective"),
        (request(X, model="stem", layer="MaxPool2d(2)"), "INVALID_ARGUMENT", "", f"stem is '{STEM}'"),
        (request(X, layer="MaxPool2d(2)", outputs=["x"]), "INVALID_ARGUMENT", "", "outputs[0].name: expected one of"),
        (request(X, model="stem", outputs=["output"] * 2), "INVALID_ARGUMENT", "", "outputs[1].name: expected"),
        (request(X, model="un"), "INVALID_ARGUMENT", "", "indices"),
        (request(X, X, model="stem"), "INVALID_ARGUMENT", "", "indices"),
        (request(X > 0, model="stem"), "UNIMPLEMENTED", "DTYPE", "MaxPool2d takes"),
        (request(X, model="none"), "NOT_FOUND", "MODEL", "expected one of pool, stem, two, un, got 'none'"),
        (
            pb.ModelInferRequest(model_name="stem", model_version="2"),
            "NOT_FOUND", "MODEL", "expected version 1 of stem, got '2'",
        ),
        (
            request(np.zeros((1, 1, 700, 700), np.float32), layer="LPPool2d(2, 255, 1)"),
            "RESOURCE_EXHAUSTED", "WORK_BUDGET", "expected at most",
        ),
    ],
)  # fmt: skip
def test_errors_are_those_of_the_native_api(
    caller: TritonClient, message: pb.ModelInferRequest, code: str, reason: str, words: str
) -> None:
    """A wrong request has the status, reason and details that it has through our own client."""
    error = caller.fail(message)
    assert error.code == code
    assert words in str(error)
    assert not reason or error.reason == reason
    if isinstance(error, poolrpc.InvalidArgumentError):
        assert error.violations[0].field


def test_bytes_that_are_not_a_message(caller: TritonClient) -> None:
    """They have the status that gRPC itself has for them."""
    with pytest.raises(grpc.RpcError) as raised:
        caller.channel.unary_unary(f"/{TRITON_SERVICE}/ModelInfer")(b"\xff\xff", timeout=60)
    assert error_of(raised.value).code == "INTERNAL"


def test_models_are_described(caller: TritonClient) -> None:
    """Metadata, configuration, readiness and the index describe every model, and no other."""
    metadata = caller.call("ModelMetadata", name="two")
    assert [(each.name, each.datatype, list(each.shape)) for each in metadata.inputs] == [("input", "FP32", [-1] * 4)]
    assert [(each.name, each.datatype) for each in metadata.outputs] == [
        ("output", "FP32"), ("indices", "INT64"), ("output_1", "FP32"), ("indices_1", "INT64"),
    ]  # fmt: skip
    config = caller.call("ModelConfig", name="stem", version="1").config
    assert (config.name, config.max_batch_size, config.parameters["layer"].string_value) == ("stem", 0, STEM)
    assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU
    assert [each.name for each in caller.call("RepositoryIndex", ready=True).models] == ["pool", "stem", "two", "un"]
    assert {each.state for each in caller.call("RepositoryIndex").models} == {"READY"}
    ready = {name: caller.call("ModelReady", name=name).ready for name in ("pool", "stem", "none")}
    assert ready == {"pool": True, "stem": True, "none": False}
    assert not caller.call("ModelReady", name="stem", version="2").ready
    for method in ("ModelMetadata", "ModelConfig", "ModelStatistics"):
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            caller.call(method, name="none")
    server = caller.call("ServerMetadata")
    assert (server.name, server.version) == ("poolrpc", poolrpc.__version__)
    assert "system_shared_memory" in server.extensions
    assert caller.call("ServerLive").live


def test_requests_are_counted_by_model() -> None:
    """Statistics have the number of successes and failures of a model, or of all models, and their durations."""
    with serving(model=("a=MaxPool2d(2)", "b=AvgPool2d(2)")) as caller:
        for _ in range(3):
            caller.infer(request(X, model="a"))
        caller.fail(request(X[0, 0], model="a"))
        models = {each.name: each for each in caller.call("ModelStatistics").model_stats}
        (only,) = caller.call("ModelStatistics", name="a").model_stats
    assert (list(models), models["a"].inference_count, models["b"].inference_count) == (["pool", "a", "b"], 3, 0)
    stats = only.inference_stats
    assert (stats.success.count, stats.fail.count, stats.compute_infer.count) == (3, 1, 3)
    parts = (stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output)
    assert sum(each.ns for each in parts) == stats.success.ns > 0
    assert only.last_inference > 0


def test_a_stream_answers_in_order_and_continues_after_an_error(caller: TritonClient) -> None:
    """Each request of a stream has a response with its id; an error is in its response, and others follow."""
    requests = [request(X, model="stem") for _ in range(6)]
    for i, each in enumerate(requests):
        each.id = str(i)
    requests[2].model_name = "none"
    requests[4].raw_input_contents[0] = b"short"
    answers = list(caller.stream(iter(requests)))
    assert [each.infer_response.id for each in answers] == list("012345")
    assert answers[2].error_message.startswith("NOT_FOUND: expected one of pool")
    assert answers[4].error_message.startswith("INVALID_ARGUMENT: raw_input_contents[0]: expected ")
    expected = arrays_of(caller.infer(requests[0]))["output"]
    for each in (answers[0], answers[1], answers[3], answers[5]):
        assert not each.error_message
        assert each.infer_response.parameters["triton_final_response"].bool_param
        assert_same(arrays_of(each.infer_response)["output"], expected)


def test_a_request_of_a_stream_that_is_rejected_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a call that is rejected, by its reason, though the stream goes on."""

    def full(*_: object) -> NoReturn:
        raise poolrpc.UnavailableError("expected room", reason="QUEUE")

    monkeypatch.setattr(Dispatcher, "pool", full)
    server = poolrpc_server.Server(poolrpc_server.Config(listen=("127.0.0.1:0",), metrics="127.0.0.1:0"))
    server.start()
    caller = TritonClient(server.addresses[0])
    try:
        answers = list(caller.stream(iter([request(X, layer="MaxPool2d(2)")] * 2)))
        assert [each.error_message.partition(":")[0] for each in answers] == ["UNAVAILABLE"] * 2
        assert Scrape(server.metrics_address)("poolrpc_rejects_total", reason="QUEUE") == 2
    finally:
        caller.channel.close()
        server.stop(grace=0)


def test_a_stream_answers_before_it_ends(caller: TritonClient) -> None:
    """A response arrives while the stream is open."""
    sent: Queue[pb.ModelInferRequest | None] = Queue()
    answers = caller.stream(iter(sent.get, None))
    for _ in range(3):
        sent.put(request(X, model="stem"))
        assert next(answers).infer_response.outputs
    sent.put(None)
    assert list(answers) == []


def test_streams_of_all_protocols_share_the_limit() -> None:
    """A stream over the limit is UNAVAILABLE, whichever protocol the others use."""
    with serving(max_streams=1) as caller:
        sent: Queue[pb.ModelInferRequest | None] = Queue()
        first = caller.stream(iter(sent.get, None))
        sent.put(request(X, layer="MaxPool2d(2)"))
        next(first)
        native = caller.channel.stream_stream("/poolrpc.v1.PoolService/PoolStream")
        for other in (caller.stream(iter([])), native(iter([]), timeout=60)):
            with pytest.raises(grpc.RpcError) as raised:
                next(other)
            error = error_of(raised.value)
            assert (error.code, error.reason) == ("UNAVAILABLE", "STREAMS")
        sent.put(None)
        assert list(first) == []


def test_the_timeout_parameter(gate: Gate) -> None:
    """A request whose `timeout`, in microseconds, passes in the queue is DEADLINE_EXCEEDED and is not computed."""
    with serving(threads=1) as caller:
        held = threading.Thread(target=caller.infer, args=[request(X, layer=repr(GlobalPool2d("max")))])
        held.start()
        assert gate.entered.wait(60)
        error = caller.fail(request(X, layer="MaxPool2d(2)", timeout=1000))
        assert (error.code, gate.computed) == ("DEADLINE_EXCEEDED", 0)
        streamed = next(caller.stream(iter([request(X, layer="MaxPool2d(2)", timeout=1000)])))
        assert streamed.error_message.startswith("DEADLINE_EXCEEDED: ")
        gate.opened.set()
        held.join(60)
        assert caller.infer(request(X, layer="MaxPool2d(2)", timeout=60_000_000)).outputs


def test_the_timeout_counts_from_the_arrival_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that it takes to decode a request is a part of its `timeout`."""
    decode = requests.decode_infer

    def decode_slowly(*arguments: Any) -> Any:
        time.sleep(0.1)
        return decode(*arguments)

    monkeypatch.setattr(requests, "decode_infer", decode_slowly)
    with serving(threads=1) as caller:
        assert caller.fail(request(X, layer="MaxPool2d(2)", timeout=50_000)).code == "DEADLINE_EXCEEDED"
        assert caller.infer(request(X, layer="MaxPool2d(2)", timeout=60_000_000)).outputs


def test_the_priority_parameter(gate: Gate) -> None:
    """Triton's priority 1 has a queue of its own, which admits a request while the default one is full."""
    with serving(threads=1, max_queue=1) as caller:
        held = threading.Thread(target=caller.infer, args=[request(X, layer=repr(GlobalPool2d("max")))])
        held.start()
        assert gate.entered.wait(60)
        # The queue of the default priority is full once one request waits. Either of the two may be rejected.
        errors: Queue[poolrpc.PoolError | None] = Queue()

        def wait() -> None:
            try:
                caller.infer(request(X, layer="MaxPool2d(2)"))
            except grpc.RpcError as error:
                errors.put(error_of(error))
            else:
                errors.put(None)

        waiting = [threading.Thread(target=wait) for _ in range(2)]
        for each in waiting:
            each.start()
        rejected = errors.get(timeout=60)
        assert rejected is not None
        assert (rejected.code, rejected.reason) == ("UNAVAILABLE", "QUEUE")
        urgent = caller.channel.unary_unary(f"/{TRITON_SERVICE}/ModelInfer").future(
            request(X, layer="MaxPool2d(2)", priority=1).SerializeToString(),
            timeout=60,
            metadata=[("priority", "0")],
        )
        gate.opened.set()
        assert urgent.result()
        assert errors.get(timeout=60) is None
        for each in (held, *waiting):
            each.join(60)


def in_region(message: Any, name: str, nbytes: int, offset: int = 0) -> None:
    """Place an input or an output in a region."""
    message.parameters["shared_memory_region"].string_param = name
    message.parameters["shared_memory_byte_size"].int64_param = nbytes
    message.parameters["shared_memory_offset"].int64_param = offset


def test_tensors_in_shared_memory(caller: TritonClient, client: poolrpc.PoolClient, region: Path) -> None:
    """An input is read from a region, outputs are written to one, and the rest is in the message."""
    expected = client.pool(X, MaxPool2d(2, return_indices=True))
    data = bytearray(region.read_bytes())
    data[16 + 8 : 16 + 8 + X.nbytes] = X.tobytes()
    region.write_bytes(data)
    message = request(X, layer="MaxPool2d(2, return_indices=True)", outputs=["indices", "output"])
    del message.raw_input_contents[:]
    in_region(message.inputs[0], "it", X.nbytes, 8)
    in_region(message.outputs[1], "it", expected.output.nbytes + 1, 4096)
    answer = caller.infer(message)
    assert list(answer.raw_output_contents) == [expected.indices.tobytes(), b""]
    assert answer.outputs[1].parameters["shared_memory_byte_size"].int64_param == expected.output.nbytes
    start = 16 + 4096
    assert region.read_bytes()[start : start + expected.output.nbytes] == expected.output.tobytes()
    (streamed,) = caller.stream(iter([message]))
    assert list(streamed.infer_response.raw_output_contents) == [expected.indices.tobytes(), b""]
    status = caller.call("SystemSharedMemoryStatus").regions["it"]
    assert (status.name, status.key, status.offset) == ("it", f"/{region.name}", 16)


def test_a_region_whose_file_shrinks(caller: TritonClient, region: Path) -> None:
    """A file that shrinks makes a call INVALID_ARGUMENT, and the server goes on."""
    message = request(X, model="stem", outputs=["output"])
    del message.raw_input_contents[:]
    in_region(message.inputs[0], "it", X.nbytes)
    assert caller.infer(message).outputs
    os.truncate(region, 100)
    error = caller.fail(message)
    assert error.code == "INVALID_ARGUMENT"
    assert "got a file of 100 bytes" in str(error)
    message = request(X, model="stem", outputs=["output"])
    in_region(message.outputs[0], "it", 4096)
    error = caller.fail(message)
    assert (error.code, region.stat().st_size) == ("INVALID_ARGUMENT", 100)
    assert caller.infer(request(X, model="stem")).outputs


def test_invalid_uses_of_shared_memory_are_rejected(caller: TritonClient, region: Path) -> None:
    """An unknown region, a range too small for an output, and an input over the message limit are rejected."""
    message = request(X, model="stem", outputs=["output"])
    in_region(message.outputs[0], "other", 4096)
    assert caller.fail(message).code == "NOT_FOUND"
    in_region(message.outputs[0], "it", 8)
    assert "outputs.output.shared_memory_byte_size: expected at least" in str(caller.fail(message))
    in_region(message.outputs[0], "it", 2**20)
    assert "expected a range within the region's" in str(caller.fail(message))
    os.truncate(region, 2**23)
    caller.call("SystemSharedMemoryRegister", name="large", key=region.name, byte_size=2**23)
    message = request(np.zeros(0, np.uint8), layer="MaxPool2d(8)")
    message.inputs[0].shape[:] = [1, 2, 2048, 2048]
    del message.raw_input_contents[:]
    in_region(message.inputs[0], "large", 2**23)
    error = caller.fail(message)
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "TENSOR_TOO_LARGE")


def test_a_response_over_the_message_limit() -> None:
    """It is rejected before it is computed; a response of a little less is sent."""
    x, least = np.ones((1, 1, 8, 8), np.float32), 4 * 100 * 100
    message = request(x, layer="AdaptiveMaxPool2d(100)")
    with serving(max_message_bytes=least) as caller:
        error = caller.fail(message)
        assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
        (answer,) = caller.stream(iter([message]))
        assert answer.error_message.startswith("RESOURCE_EXHAUSTED: ")
    with serving(max_message_bytes=least + 400) as caller:
        assert arrays_of(caller.infer(message))["output"].shape == (1, 1, 100, 100)
        (answer,) = caller.stream(iter([message]))
        assert arrays_of(answer.infer_response)["output"].shape == (1, 1, 100, 100)


def test_shared_memory_is_off_by_default() -> None:
    """The server then opens no files of its clients, and does not list the extension."""
    with serving() as caller:
        path = SHM / f"poolrpc-test-{secrets.token_hex(8)}"
        path.write_bytes(bytes(16))
        try:
            with pytest.raises(grpc.RpcError) as raised:
                caller.call("SystemSharedMemoryRegister", name="it", key=path.name, byte_size=16)
        finally:
            path.unlink()
        assert error_of(raised.value).code == "UNIMPLEMENTED"
        assert not caller.call("SystemSharedMemoryStatus").regions
        assert "system_shared_memory" not in caller.call("ServerMetadata").extensions


def test_a_draining_server_is_live_and_not_ready() -> None:
    """While it drains, the server is not ready, like its health service says, and still answers."""
    server = poolrpc_server.Server(poolrpc_server.Config(listen=("127.0.0.1:0",)))
    server.start()
    caller = TritonClient(server.addresses[0])
    health = health_pb2_grpc.HealthStub(caller.channel)
    message = health_pb2.HealthCheckRequest(service=TRITON_SERVICE)
    assert health.Check(message).status == health_pb2.HealthCheckResponse.SERVING
    assert caller.call("ServerReady").ready
    server.drain()
    assert health.Check(message).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert not caller.call("ServerReady").ready
    assert not caller.call("ModelReady", name="pool").ready
    assert [each.state for each in caller.call("RepositoryIndex").models] == ["UNAVAILABLE"]
    assert not caller.call("RepositoryIndex", ready=True).models
    assert caller.call("ServerLive").live
    assert caller.infer(request(X, layer="MaxPool2d(2)")).outputs
    caller.channel.close()
    server.stop(grace=0)


def test_inexpensive_methods_need_no_call_thread(gate: Gate) -> None:
    """Probes and tools are answered while the only thread for calls is busy."""
    with serving(threads=1, call_threads=1) as caller:
        held = threading.Thread(target=caller.infer, args=[request(X, layer=repr(GlobalPool2d("max")))])
        held.start()
        assert gate.entered.wait(60)
        names = {"ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"}
        for method in CONTROL_METHODS:
            if method != "SystemSharedMemoryRegister":
                caller.call(method, **({"name": "pool"} if method in names else {}))
        assert caller.fail(request(X, layer="MaxPool2d(2)")).code == "UNAVAILABLE"
        gate.opened.set()
        held.join(60)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate], ids=["gzip", "deflate"])
def test_a_compressed_request_is_rejected_with_the_reason(caller: TritonClient, compression: grpc.Compression) -> None:
    """A call with compression_algorithm fails as the docs say, unary and on a stream; other calls go on."""
    sent = request(X, layer="MaxPool2d(2)")
    infer = caller.channel.unary_unary(f"/{TRITON_SERVICE}/ModelInfer", pb.ModelInferRequest.SerializeToString)
    stream = caller.channel.stream_stream(f"/{TRITON_SERVICE}/ModelStreamInfer", pb.ModelInferRequest.SerializeToString)
    for call in (
        lambda: infer(sent, timeout=60, compression=compression),
        lambda: next(stream(iter([sent]), timeout=60, compression=compression)),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            call()
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert f"'{compression.name.lower()}' is disabled" in raised.value.details()
    assert caller.infer(sent).outputs


def test_reflection_is_enough_to_call(caller: TritonClient, client: poolrpc.PoolClient) -> None:
    """From the address alone a client finds the services, their methods and messages, and makes a call."""
    database = ProtoReflectionDescriptorDatabase(caller.channel)
    assert TRITON_SERVICE in database.get_services()
    descriptors = DescriptorPool(database)  # type: ignore[arg-type]  # it has the methods that a pool calls
    (infer,) = [each for each in descriptors.FindServiceByName(TRITON_SERVICE).methods if each.name == "ModelInfer"]
    message = GetMessageClass(infer.input_type)(model_name="stem", raw_input_contents=[X.tobytes()])
    message.inputs.add(name="input", datatype="FP32", shape=X.shape)
    answer_of = GetMessageClass(infer.output_type)
    call = caller.channel.unary_unary(f"/{TRITON_SERVICE}/{infer.name}", None, answer_of.FromString)
    answer = call(message.SerializeToString(), timeout=60)
    assert_same(arrays_of(answer)["output"], client.pool(X, MaxPool2d(3, stride=2, padding=1)).output)
