"""Invalid input of tensor servers: each case has its status in bounded time, and the server goes on.

The cases are from the issues and advisories of PyTorch, TensorFlow and Triton. Each is sent as a message, without the
client's own checks, to one server. A case that hangs ends with its deadline and is DEADLINE_EXCEEDED. A case's number,
such as B01, only serves to name it.
"""

from __future__ import annotations

import gzip
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import psutil
import pytest

import poolrpc
import poolrpc_server
from poolrpc._wire import codec, layer_codec
from poolrpc._wire.local_packets import MAX_PACKET_BYTES, encode_call
from poolrpc._wire.status import DETAILS_KEY, decode_error
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2, pool_pb2_grpc, standard_pb2
from scripts.server_process import ServerProcess, serving
from tests.integration.local_calls import packet_socket

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from google.protobuf.message import Message

IM, UM = 2**31 - 1, 2**32 - 1
SIZES = {1: (8,), 2: (8, 8), 3: (8, 8, 8)}


class LocalRpcError(grpc.RpcError):
    """The error of a local call, with the methods of gRPC's."""

    def __init__(self, packet: bytes) -> None:
        self._packet = packet
        self._status = standard_pb2.Status.FromString(packet)

    def code(self) -> grpc.StatusCode:
        """Return the status code."""
        return next(each for each in grpc.StatusCode if each.value[0] == self._status.code)

    def details(self) -> str:
        """Return the message."""
        return self._status.message

    def trailing_metadata(self) -> list[tuple[str, bytes]]:
        """Return the details, as gRPC has them."""
        return [(DETAILS_KEY, self._packet)]

    def __str__(self) -> str:
        """Return the message."""
        return self.details()


class LocalStub:
    """The methods of a stub, by packets on one connection, which lasts for as long as every packet is a call."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def Pool(self, request: pool_pb2.PoolRequest, timeout: float) -> pool_pb2.PoolResponse:  # noqa: N802 - the method's
        """Call Pool."""
        return pool_pb2.PoolResponse.FromString(self._call("Pool", request, timeout))

    def InferShape(self, request: pool_pb2.InferShapeRequest, timeout: float) -> pool_pb2.InferShapeResponse:  # noqa: N802 - as above
        """Call InferShape."""
        return pool_pb2.InferShapeResponse.FromString(self._call("InferShape", request, timeout))

    def _call(self, method: str, request: Message, timeout: float) -> bytes:
        packet = encode_call(f"poolrpc.v1.PoolService/{method}", timeout, (), (request.SerializeToString(),))
        if packet is None:
            pytest.skip("the request is larger than a packet")
        self._connection.sendmsg(packet)
        answer = self._connection.recv(MAX_PACKET_BYTES)
        assert answer, "the connection has ended"
        if answer[0]:
            raise LocalRpcError(answer[1:])
        return answer[1:]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Return a server process for all cases, on a port and on a socket, so that a crash fails every later case."""
    with serving("--listen", f"unix:{tmp_path_factory.mktemp('bad') / 'pool.sock'}") as made:
        yield made
        assert made.process.poll() is None


@pytest.fixture(scope="module")
def stubs(server: ServerProcess) -> Iterator[list[pool_pb2_grpc.PoolServiceStub]]:
    """Return the bare stub on each address, without retries."""
    options = [("grpc.enable_retries", 0), ("grpc.max_send_message_length", -1)]
    with ExitStack() as channels:
        yield [
            pool_pb2_grpc.PoolServiceStub(channels.enter_context(grpc.insecure_channel(address, options)))
            for address in server.start_line["addresses"]
        ]


@pytest.fixture(params=["tcp", "unix", "local"])
def stub(
    request: pytest.FixtureRequest, server: ServerProcess, stubs: list[pool_pb2_grpc.PoolServiceStub]
) -> Iterator[pool_pb2_grpc.PoolServiceStub | LocalStub]:
    """Return the stub on either address, or one that sends packets instead of gRPC's messages."""
    if request.param != "local":
        yield stubs[request.param == "unix"]
        return
    if sys.platform != "linux":
        pytest.skip("local calls need Linux")
    with packet_socket(server.start_line["addresses"][1]) as connection:
        yield LocalStub(connection)


@pytest.fixture(autouse=True)
def still_serving(stubs: list[pool_pb2_grpc.PoolServiceStub]) -> Iterator[None]:
    """Check after each case that a good call is answered."""
    yield
    good = message({"max_pool": {"spatial_dims": 2, "kernel_size": [2]}})
    assert np.frombuffer(stubs[0].Pool(good, timeout=60).payload, np.float32).size == 1 * 3 * 4 * 4


def message(
    layer: dict[str, Any],
    shape: tuple[int, ...] | None = None,
    dtype: int = pool_pb2.DATA_TYPE_FLOAT32,
    payload: bytes | None = None,
) -> pool_pb2.PoolRequest:
    """Return a request of one layer, by default for zeros of a small batch of 3 channels."""
    (parameters,) = layer.values()
    if shape is None:
        shape = (1, 3, *SIZES[parameters.get("spatial_dims") if parameters.get("spatial_dims") in SIZES else 2])
    if payload is None:
        item = {pool_pb2.DATA_TYPE_FLOAT64: 8, pool_pb2.DATA_TYPE_INT64: 8, pool_pb2.DATA_TYPE_UINT8: 1}.get(dtype, 4)
        payload = bytes(item * int(np.prod(shape)))
    return pool_pb2.PoolRequest(
        input=pool_pb2.TensorSpec(dtype=dtype, shape=shape),
        branches=[pool_pb2.Branch(layers=[pool_pb2.Layer(**layer)])],
        payload=payload,
    )


def rejection(stub: pool_pb2_grpc.PoolServiceStub, request: pool_pb2.PoolRequest) -> poolrpc.PoolError:
    """Send a request that must be rejected, and return the error."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.Pool(request, timeout=60)
    details = dict(caught.value.trailing_metadata() or ()).get(DETAILS_KEY)
    return decode_error(caught.value.code().name, caught.value.details(), details)


def max2d(**parameters: Any) -> dict[str, Any]:
    """Return a MaxPool2d as a message has it."""
    return {"max_pool": {"spatial_dims": 2, "kernel_size": [2], **parameters}}


def layer_of(family: str, dims: int, **parameters: Any) -> dict[str, Any]:
    """Return a layer of any family as a message has it."""
    return {family: {"spatial_dims": dims, **parameters}}


def sizes(*cells: int | None) -> list[dict[str, int]]:
    """Return an adaptive output size as a message has it."""
    return [{} if each is None else {"cells": each} for each in cells]


F64, I64, U8 = pool_pb2.DATA_TYPE_FLOAT64, pool_pb2.DATA_TYPE_INT64, pool_pb2.DATA_TYPE_UINT8

# A value that does not fit into the message (negative numbers, 2**63) is represented by the largest one that fits; the
# layers' own tests have the rest.
INVALID = {
    "B01 stride 0": (message(max2d(stride=[0])), "stride"),
    "B02 avg stride 0": (message(layer_of("avg_pool", 2, kernel_size=[4], stride=[0]), (10, 3, 20, 20), F64), "stride"),
    "B03 max stride 0": (message(max2d(kernel_size=[3], stride=[0]), (2, 64, 32, 32)), "stride"),
    "B04 stride -1": (message(max2d(stride=[UM])), "stride"),
    "B05 kernel 0": (message(max2d(kernel_size=[0])), "kernel_size"),
    "B06 kernel -1": (message(max2d(kernel_size=[UM])), "kernel_size"),
    "B07 one kernel 0": (message(layer_of("max_pool", 3, kernel_size=[2, 2, 0]), (3, 4, 10, 11, 12)), "kernel_size"),
    "B08 avg kernel -1": (message(layer_of("avg_pool", 2, kernel_size=[UM])), "kernel_size"),
    "B09 dilation 0": (message(max2d(dilation=[0])), "dilation"),
    "B09 dilation -1": (message(max2d(dilation=[UM])), "dilation"),
    "B10 max padding": (message(max2d(padding=[2])), "padding"),
    "B10 avg padding": (message(layer_of("avg_pool", 2, kernel_size=[2], padding=[2])), "padding"),
    "B11 padding -1": (message(max2d(padding=[UM])), "padding"),
    "B12 kernel over input": (message(max2d(kernel_size=[9])), "kernel_size"),
    "B13 kernel 2^31": (message(max2d(kernel_size=[2**31])), "kernel_size"),
    "B15 dilation of a 1x1 kernel": (
        message(max2d(kernel_size=[1], dilation=[IM], ceil_mode=True), (5, 10, 24, 24)),
        "dilation",
    ),
    "B15 dilation in range, over the input": (
        message(max2d(kernel_size=[1], dilation=[65535], ceil_mode=True), (5, 10, 24, 24)),
        "dilation",
    ),
    "B16 3d dilation": (message(layer_of("max_pool", 3, kernel_size=[1], dilation=[IM])), "dilation"),
    "B19 segfault of max_pool1d": (
        message(layer_of("max_pool", 1, kernel_size=[UM], padding=[UM], dilation=[UM], ceil_mode=True), (1, 2, 3), F64),
        "kernel_size",
    ),
    "B20 overflow": (
        message(layer_of("max_pool", 1, kernel_size=[UM], stride=[UM], dilation=[UM], ceil_mode=True), (2, 10, 4), F64),
        "kernel_size",
    ),
    "B21 silent wrong result": (
        message(layer_of("max_pool", 1, kernel_size=[5], stride=[1], dilation=[2**30]), (1, 2, 8)),
        "dilation",
    ),
    "B22 wrong and slow": (
        message(layer_of("max_pool", 1, kernel_size=[65535], stride=[1], dilation=[65535]), (1, 2, 8)),
        "dilation",
    ),
    "B23 3d overflow": (
        message(
            layer_of("max_pool", 3, kernel_size=[536870912] * 3, stride=[1], dilation=[1879048192] * 3, ceil_mode=True),
            (1, 1, 1, 1, 1),
            F64,
        ),
        "kernel_size",
    ),
    "B25 SIGFPE": (
        message(
            layer_of(
                "avg_pool", 2, kernel_size=[UM, UM - 1], stride=[UM, 7], ceil_mode=True, divisor_override=33554427
            ),
            (8, 2, 1, 1),
            I64,
        ),
        "kernel_size",
    ),
    "B26 SIGFPE of avg1d": (
        message(layer_of("avg_pool", 1, kernel_size=[UM], stride=[UM], ceil_mode=True), (0, 1), F64),
        "kernel_size",
    ),
    "B27 divisor 0": (message(layer_of("avg_pool", 2, kernel_size=[2], divisor_override=0)), "divisor_override"),
    "B31 avg3d over the input": (
        message(layer_of("avg_pool", 3, kernel_size=[3], padding=[1]), (1, 1, 2, 2, 2)),
        "kernel_size",
    ),
    "B33 adaptive -2": (message(layer_of("adaptive_avg_pool", 2, output_size=sizes(UM - 1))), "output_size"),
    "B34 adaptive huge": (message(layer_of("adaptive_avg_pool", 2, output_size=sizes(2**31, UM))), "output_size"),
    "B35 adaptive 0": (message(layer_of("adaptive_max_pool", 2, output_size=sizes(0))), "output_size"),
    "B35 adaptive (0, 3)": (message(layer_of("adaptive_avg_pool", 2, output_size=sizes(0, 3))), "output_size"),
    "B37 adaptive overflow": (
        message(layer_of("adaptive_avg_pool", 2, output_size=sizes(UM)), (2, 2, 2, 2)),
        "output_size",
    ),
    "B39 adaptive": (
        message(layer_of("adaptive_avg_pool", 2, output_size=sizes(UM, UM - 1)), (2, 4, 4, 4)),
        "output_size",
    ),
    "B40 adaptive 3d": (
        message(layer_of("adaptive_avg_pool", 3, output_size=sizes(*[1879048192] * 3)), (2, 3, 5, 3, 7), F64),
        "output_size",
    ),
    "B45 output * input on an axis": (
        message(layer_of("adaptive_avg_pool", 2, output_size=sizes(1, IM // 8 + 1)), (1, 1, 1, 8)),
        "output_size",
    ),
    "B48 fractional 0": (
        message(layer_of("fractional_max_pool", 2, kernel_size=[2], output_size={"cells": [0, 1]}), (1, 5, 44, 31)),
        "output_size",
    ),
    "B49 fractional -1": (
        message(layer_of("fractional_max_pool", 2, kernel_size=[2], output_size={"cells": [UM]})),
        "output_size",
    ),
    "B50 fractional kernel 0": (
        message(layer_of("fractional_max_pool", 2, kernel_size=[0], output_size={"cells": [2]})),
        "kernel_size",
    ),
    "B50 fractional kernel -2": (
        message(layer_of("fractional_max_pool", 2, kernel_size=[UM - 1], output_size={"cells": [2]})),
        "kernel_size",
    ),
    "B52 fractional too large": (
        message(layer_of("fractional_max_pool", 2, kernel_size=[3], output_size={"cells": [4]}), (1, 1, 4, 4)),
        "kernel_size",
    ),
    "B53 fractional empty": (
        message(layer_of("fractional_max_pool", 2, kernel_size=[2], output_ratio={"ratios": [1e-9, 1e-9]})),
        "output_ratio",
    ),
    "B55 ratio over 1": (
        message(layer_of("fractional_max_pool", 2, kernel_size=[2], output_ratio={"ratios": [1.5]})),
        "output_ratio",
    ),
    "B55 ratio NaN": (
        message(layer_of("fractional_max_pool", 2, kernel_size=[2], output_ratio={"ratios": [float("nan")]})),
        "output_ratio",
    ),
    "fractional without a size": (message(layer_of("fractional_max_pool", 2, kernel_size=[2])), "output_size"),
    "B57 norm 0": (message(layer_of("lp_pool", 2, kernel_size=[2], norm_type=0.0)), "norm_type"),
    "B57 norm NaN": (message(layer_of("lp_pool", 2, kernel_size=[2], norm_type=float("nan"))), "norm_type"),
    "B57 norm -inf": (message(layer_of("lp_pool", 2, kernel_size=[2], norm_type=float("-inf"))), "norm_type"),
    "B65 C = 0": (message(max2d(), (1, 0, 8, 8)), "input.shape"),
    "B65 H = 0": (message(max2d(), (1, 3, 0, 8)), "input.shape"),
    "B65 N = 0 and H = 0": (message(max2d(), (0, 3, 0, 8)), "input.shape"),
    "negative N": (message(max2d(), (-1, 3, 8, 8), payload=b""), "input.shape"),
    "negative pair": (message(max2d(), (1, 3, -8, -8)), "input.shape"),
    "B67 rank 0": (message(max2d(), (), payload=b""), "input.shape"),
    "B67 rank 2": (message(max2d(), (8, 8)), "input.shape"),
    "B67 rank 6": (message(max2d(), (12, 2, 2, 2, 0, 4634247419717959497), payload=b""), "input.shape"),
    "B67 rank 6 with 0": (message(max2d(), (9, 15, 0, 2772747373535906632, 0, 14), payload=b""), "input.shape"),
    "rank 10000": (message(max2d(), (1,) * 10000), "input.shape"),
    "B68 product that wraps to 0": (message(max2d(), (2**32, 2**32, 1, 16), payload=b""), "input.shape"),
    "axis of 2^63-1": (message(max2d(), (1, 1, 2**63 - 1, 1), payload=b""), "input.shape"),
    "payload short": (message(max2d(), payload=bytes(8)), "payload"),
    "payload long": (message(max2d(), payload=bytes(4 * 192 + 1)), "payload"),
    "B70 unknown dtype": (message(max2d(), dtype=77), "input.dtype"),
    "B70 no dtype": (message(max2d(), dtype=0), "input.dtype"),
    "B71 kernel of length 0": (message(max2d(kernel_size=[])), "kernel_size"),
    "B71 kernel of length 3": (message(max2d(kernel_size=[2, 2, 2])), "kernel_size"),
    "a million kernel sizes": (message(max2d(kernel_size=[2] * 10**6)), "kernel_size"),
    "a million dims": (message(max2d(), (1,) * 10**6, payload=b""), "input.shape"),
    "B71 divisor of avg1d": (message(layer_of("avg_pool", 1, kernel_size=[2], divisor_override=3)), "divisor_override"),
    "spatial_dims 0": (message(max2d(spatial_dims=0)), "spatial_dims"),
    "spatial_dims 4": (message(max2d(spatial_dims=4)), "spatial_dims"),
    "no layer": (
        pool_pb2.PoolRequest(
            input=codec.encode_spec(TensorSpec("float32", (1, 1, 2, 2))),
            branches=[pool_pb2.Branch(layers=[pool_pb2.Layer()])],
            payload=bytes(16),
        ),
        "branches[0].layers[0]",
    ),
    "no branch": (
        pool_pb2.PoolRequest(input=codec.encode_spec(TensorSpec("float32", (1, 1, 2, 2))), payload=bytes(16)),
        "branches",
    ),
    "empty chain": (
        pool_pb2.PoolRequest(
            input=codec.encode_spec(TensorSpec("float32", (1, 1, 2, 2))),
            branches=[pool_pb2.Branch()],
            payload=bytes(16),
        ),
        "branches[0].layers",
    ),
    "an empty request": (pool_pb2.PoolRequest(), "branches"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_requests(stub: pool_pb2_grpc.PoolServiceStub, case: str) -> None:
    """A wrong parameter, shape or payload is INVALID_ARGUMENT, with the field's path and what was expected."""
    request, field = INVALID[case]
    error = rejection(stub, request)
    assert isinstance(error, poolrpc.InvalidArgumentError), error
    assert error.violations[0].field.endswith(field), error
    assert "expected" in error.violations[0].description
    assert "got" in error.violations[0].description


LIMITED = {
    "B41 adaptive 100000": (
        message(layer_of("adaptive_avg_pool", 2, output_size=sizes(100000)), (1, 1, 4, 4)),
        "OUTPUT_TOO_LARGE",
    ),
    "B42 adaptive 4000": (
        message(layer_of("adaptive_max_pool", 2, output_size=sizes(4000)), (1, 1, 4, 4)),
        "AMPLIFICATION",
    ),
    "B43 adaptive row": (
        message(layer_of("adaptive_avg_pool", 2, output_size=sizes(1, 45000000)), (1, 3, 1, 40)),
        "OUTPUT_TOO_LARGE",
    ),
    "B44 adaptive column": (
        message(layer_of("adaptive_max_pool", 2, output_size=sizes(262143, 1)), (8812, 1, 1, 2)),
        "OUTPUT_TOO_LARGE",
    ),
    "B47 190x64x64x2933": (message(max2d(), (190, 64, 64, 2933), payload=b""), "TENSOR_TOO_LARGE"),
    "B47 1024x64x228x228": (
        message(layer_of("avg_pool", 2, kernel_size=[2]), (1024, 64, 228, 228), payload=b""),
        "TENSOR_TOO_LARGE",
    ),
    "B47 74x32x30090x81": (message(max2d(), (74, 32, 30090, 81), payload=b""), "TENSOR_TOO_LARGE"),
    # The server's own kernel computes B64's max quickly; float64 with indices is left to torch.
    "B64 k=255 s=1 p=127": (
        message(max2d(kernel_size=[255], stride=[1], padding=[127], return_indices=True), (1, 64, 256, 256), F64),
        "WORK_BUDGET",
    ),
    "B64 of an average": (
        message(layer_of("avg_pool", 2, kernel_size=[255], stride=[1], padding=[127]), (1, 64, 256, 256)),
        "WORK_BUDGET",
    ),
    "many branches": (
        pool_pb2.PoolRequest(
            input=codec.encode_spec(TensorSpec("float32", (1, 1, 2, 2))),
            branches=[pool_pb2.Branch(layers=[pool_pb2.Layer(**max2d())])] * 65,
            payload=bytes(16),
        ),
        "TOO_MANY_LAYERS",
    ),
    "a long chain": (
        pool_pb2.PoolRequest(
            input=codec.encode_spec(TensorSpec("float32", (1, 1, 2, 2))),
            branches=[pool_pb2.Branch(layers=[pool_pb2.Layer(**max2d(kernel_size=[1]))] * 4000)],
            payload=bytes(16),
        ),
        "TOO_MANY_LAYERS",
    ),
}


@pytest.mark.parametrize("case", LIMITED)
def test_over_a_limit(stub: pool_pb2_grpc.PoolServiceStub, case: str) -> None:
    """A request over a fixed limit is RESOURCE_EXHAUSTED with the limit and the actual value, and no retry delay."""
    request, reason = LIMITED[case]
    error = rejection(stub, request)
    assert isinstance(error, poolrpc.LimitExceededError), error
    assert error.reason == reason
    assert int(error.metadata["actual"]) > int(error.metadata["limit"])


UNREADABLE = {
    "a million bytes of dims": message(max2d(), (1,) * (2**20 + 1), payload=b""),
    "layers of many fields": pool_pb2.PoolRequest(
        input=codec.encode_spec(TensorSpec("float32", (1, 1, 2, 2))),
        branches=[pool_pb2.Branch(layers=[pool_pb2.Layer(**max2d(kernel_size=[1]))] * 5000)],
        payload=bytes(16),
    ),
    "thousands of branches": pool_pb2.PoolRequest(branches=[pool_pb2.Branch()] * 5000, payload=bytes(16)),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_header_that_is_too_large(stub: pool_pb2_grpc.PoolServiceStub, case: str) -> None:
    """A message with too many bytes or fields in addition to its payload is RESOURCE_EXHAUSTED, whatever they are."""
    error = rejection(stub, UNREADABLE[case])
    assert isinstance(error, poolrpc.LimitExceededError), error
    assert error.reason == "HEADER_TOO_LARGE"


@pytest.mark.parametrize("fields", ["\x7a\x00", "\x08\x01", "\xf8\x06\x01"], ids=["payloads", "input", "unknown"])
def test_a_message_of_nothing_but_fields(server: ServerProcess, fields: str) -> None:
    """Megabytes of the smallest fields are rejected before they are read: the server's memory does not grow with them.

    protobuf would build an object for each.
    """
    process = psutil.Process(server.process.pid)
    before, data = process.memory_info().rss, fields.encode("latin-1") * 2**22
    with grpc.insecure_channel(server.address, [("grpc.enable_retries", 0)]) as channel:
        for method in ("poolrpc.v1.PoolService/Pool", "inference.GRPCInferenceService/ModelInfer"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/{method}")(data, timeout=60)
            assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL), caught.value
    assert process.memory_info().rss < before + 8 * len(data)


@pytest.mark.parametrize("method", ["PoolService/InferShape", "PoolService/GetServerInfo"])
def test_a_large_message_of_a_method_that_does_not_compute(server: ServerProcess, method: str) -> None:
    """More than 256 KiB is RESOURCE_EXHAUSTED, with the limit."""
    with grpc.insecure_channel(server.address, [("grpc.enable_retries", 0)]) as channel:
        call = channel.unary_unary(f"/poolrpc.v1.{method}")
        error, _ = details_of(lambda: call(bytes(2**18 + 1), timeout=60))
    assert isinstance(error, poolrpc.LimitExceededError), error
    assert (error.reason, error.metadata["limit"]) == ("MESSAGE_TOO_LARGE", str(2**18))


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (max2d(), pool_pb2.DATA_TYPE_BOOL),
        (layer_of("avg_pool", 2, kernel_size=[2]), pool_pb2.DATA_TYPE_INT32),
        (layer_of("avg_pool", 2, kernel_size=[2]), U8),
        (layer_of("avg_pool", 3, kernel_size=[2]), pool_pb2.DATA_TYPE_FLOAT16),
        (layer_of("lp_pool", 2, kernel_size=[2], norm_type=2.0), pool_pb2.DATA_TYPE_INT16),
    ],
)
def test_a_dtype_that_the_layer_does_not_support(
    stub: pool_pb2_grpc.PoolServiceStub, layer: dict[str, Any], dtype: int
) -> None:
    """A known dtype that the layer does not support is UNIMPLEMENTED, with the dtypes that it supports."""
    error = rejection(stub, message(layer, dtype=dtype))
    assert isinstance(error, poolrpc.UnsupportedError), error
    assert error.reason == "DTYPE"
    assert "float32" in error.metadata["dtypes"]


def unpool(indices: np.ndarray, shape: tuple[int, ...] = (1, 1, 2, 2), **parameters: Any) -> pool_pb2.PoolRequest:
    """Return a request to unpool zeros of a shape with indices."""
    request = message(layer_of("max_unpool", 2, kernel_size=[2], **parameters), shape)
    request.operand.CopyFrom(codec.encode_spec(TensorSpec(indices.dtype.name, indices.shape)))
    request.payload += indices.tobytes()
    return request


@pytest.mark.parametrize("index", [-1, 16, -(2**63), 2**32 + 3, 2**63 - 1])
def test_unpool_indices_out_of_range(stub: pool_pb2_grpc.PoolServiceStub, index: int) -> None:
    """An index outside of its output plane is INVALID_ARGUMENT, whatever it would wrap to."""
    error = rejection(stub, unpool(np.array([[[[0, 1], [2, index]]]])))
    assert isinstance(error, poolrpc.InvalidArgumentError)
    assert error.violations[0].field == "indices"
    assert "expected indices in 0..15" in str(error)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (unpool(np.zeros((1, 1, 2, 2), np.int32)), "indices.dtype"),
        (unpool(np.zeros((1, 1, 2, 3), np.int64)), "indices.shape"),
        (unpool(np.zeros((2, 2), np.int64)), "indices.shape"),
        (message(layer_of("max_unpool", 2, kernel_size=[2])), "indices"),
        (unpool(np.zeros((1, 1, 2, 2), np.int64), output_size=[100, 100]), "output_size"),
        (unpool(np.zeros((1, 1, 2, 2), np.int64), padding=[60000]), "padding"),
    ],
    ids=["int32", "other shape", "rank 2", "none", "output size", "padding"],
)
def test_unpool_mismatch(stub: pool_pb2_grpc.PoolServiceStub, request_: pool_pb2.PoolRequest, field: str) -> None:
    """Missing indices, and indices of another dtype, shape or rank, are INVALID_ARGUMENT."""
    error = rejection(stub, request_)
    assert isinstance(error, poolrpc.InvalidArgumentError)
    assert error.violations[0].field.endswith(field)


def test_indices_without_an_unpool(stub: pool_pb2_grpc.PoolServiceStub) -> None:
    """Indices for layers that take none are INVALID_ARGUMENT."""
    request = message(max2d(), (1, 1, 2, 2))
    request.operand.CopyFrom(codec.encode_spec(TensorSpec("int64", (1, 1, 2, 2))))
    request.payload += bytes(32)
    assert "operand: expected none, since no layer" in str(rejection(stub, request))


def test_unpool_after_another_layer(stub: pool_pb2_grpc.PoolServiceStub) -> None:
    """A MaxUnpool that is not the first layer of its chain is INVALID_ARGUMENT."""
    request = unpool(np.zeros((1, 1, 2, 2), np.int64))
    request.branches[0].layers.insert(0, layer_codec.encode_layer(poolrpc.MaxPool2d(1)))
    assert rejection(stub, request).violations[0].field == "branches[0].layers[1].max_unpool"


def test_unusual_requests_that_are_valid(server: ServerProcess) -> None:
    """Odd windows, an empty batch, NaN, infinities and large halves are answered."""
    with poolrpc.PoolClient(server.address) as client:
        result = client.pool(
            np.ones((1, 16, 4, 4), np.float32), poolrpc.AvgPool2d((1, 2), stride=2, padding=(0, 1), ceil_mode=True)
        )
        assert result.shape == (1, 16, 2, 3)
        assert np.isfinite(result.output).all()
        assert client.pool(np.ones((2, 3, 5), np.float32), poolrpc.AvgPool1d(2, stride=3, ceil_mode=True)).shape == (
            2,
            3,
            2,
        )
        assert client.pool(np.ones((0, 3, 8, 8), np.float32), poolrpc.MaxPool2d(2)).shape == (0, 3, 4, 4)
        assert client.pool(np.ones((1, 64, 256, 256), np.float32), poolrpc.MaxPool2d(255, 1, 127)).output.all()
        padded = poolrpc.MaxPool2d(3, stride=2, padding=1)
        assert np.isnan(client.pool(np.full((1, 1, 4, 4), np.nan, np.float32), padded).output).all()
        assert np.isneginf(client.pool(np.full((1, 1, 4, 4), -np.inf, np.float32), padded).output).all()
        assert (client.pool(np.full((1, 1, 4, 4), 60000, np.float16), poolrpc.AvgPool2d(2)).output == 60000).all()


def test_a_message_over_the_servers_limit() -> None:
    """A message over the server's limit is RESOURCE_EXHAUSTED, and the error says how to raise the limit."""
    with serving("--max-message-bytes", "100000") as server, poolrpc.PoolClient(server.address) as client:
        with pytest.raises(poolrpc.LimitExceededError, match="--max-message-bytes") as caught:
            client.pool(np.zeros((1, 1, 256, 256), np.float32), poolrpc.MaxPool2d(2))
        assert caught.value.reason == "MESSAGE_TOO_LARGE"
        assert client.health() == "SERVING"


def test_a_response_over_the_servers_limit() -> None:
    """It is rejected before it is computed, like any limit; the arena has room for it."""
    layer = poolrpc.AdaptiveMaxPool2d(200)
    x = np.ones((1, 1, 8, 8), np.float32)
    with poolrpc_server.embedded(max_message_bytes=100_000) as client:
        with pytest.raises(poolrpc.LimitExceededError, match="--max-message-bytes") as caught:
            client.pool(x, layer, transport="unary")
        assert caught.value.reason == "MESSAGE_TOO_LARGE"
        assert caught.value.metadata["limit"] == "100000"
        assert int(caught.value.metadata["actual"]) > 4 * 200 * 200
        assert client.pool(x, layer, transport="arena").output.all()


def test_a_compressed_message_is_not_decompressed(server: ServerProcess) -> None:
    """Compressed requests are rejected, so that none needs the server's memory."""
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    request = message(max2d(), (1, 32, 1024, 1024))
    assert len(gzip.compress(request.SerializeToString(), 1)) < 2**21
    options = [("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)]
    with (
        grpc.insecure_channel(server.address, options, compression=grpc.Compression.Gzip) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        pool_pb2_grpc.PoolServiceStub(channel).Pool(request, timeout=60)
    assert caught.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert process.memory_info().rss < before + 64 * 2**20


def test_bytes_that_are_not_a_message(server: ServerProcess) -> None:
    """Bytes that do not parse are INTERNAL."""
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/poolrpc.v1.PoolService/Pool")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff" * 100, timeout=60)
    assert caught.value.code() == grpc.StatusCode.INTERNAL


def test_an_unknown_method(server: ServerProcess) -> None:
    """An unknown method is UNIMPLEMENTED."""
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/poolrpc.v1.PoolService/Nothing")(b"", timeout=60)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_short_deadline(server: ServerProcess) -> None:
    """A deadline that cannot be met is DEADLINE_EXCEEDED."""
    with poolrpc.PoolClient(server.address) as client, pytest.raises(poolrpc.DeadlineExceededError):
        client.pool(np.zeros((1, 64, 512, 512), np.float32), poolrpc.MaxPool2d(2), timeout=0.001)


@pytest.mark.parametrize("nbytes", [20_000, 200_000])
def test_too_much_metadata(server: ServerProcess, nbytes: int) -> None:
    """20 KB of metadata, and far more, is RESOURCE_EXHAUSTED."""
    metadata = [("padding", "x" * nbytes)]
    with (
        poolrpc.PoolClient(server.address, metadata=metadata) as client,
        pytest.raises(poolrpc.LimitExceededError),
    ):
        client.server_info()


def details_of(call: Callable[[], object]) -> tuple[poolrpc.PoolError, int]:
    """Return the error of a call, and the size of its details."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    text, details = caught.value.details(), dict(caught.value.trailing_metadata() or ())[DETAILS_KEY]
    return decode_error(caught.value.code().name, text, details), len(text.encode()) + len(details)


@pytest.mark.parametrize(
    "layer",
    [
        max2d(kernel_size=[0] * 10_000),
        max2d(kernel_size=[2, 2], stride=[UM] * 10_000, padding=[UM] * 10_000, dilation=[0] * 10_000),
        layer_of("adaptive_avg_pool", 2, output_size=sizes(*[0] * 1_000)),
    ],
    ids=["kernel size", "all", "output size"],
)
def test_thousands_of_mistakes(stub: pool_pb2_grpc.PoolServiceStub, layer: dict[str, Any]) -> None:
    """The details of a request with thousands of mistakes stay under 4 KB."""
    request = message(layer, (1, 1, 8, 8))
    request.branches.extend([request.branches[0]] * 7)
    error, nbytes = details_of(lambda: stub.Pool(request, timeout=60))
    assert isinstance(error, poolrpc.InvalidArgumentError)
    assert error.violations
    assert nbytes < 4096


def test_an_error_of_ten_thousand_violations(patch_operation: Callable[..., None]) -> None:
    """The details of an error with 10,000 long violations stay under 4 KB."""
    violations = [poolrpc.FieldViolation(f"branches[{i}]" * 100, "expected 1, got 2" * 100) for i in range(10_000)]

    def fail(_: Any) -> Any:
        def failing(*_: Any) -> Any:
            raise poolrpc.InvalidArgumentError("", violations=violations)

        return failing

    patch_operation("fractional_max_pool", fail)
    request = message(layer_of("fractional_max_pool", 2, kernel_size=[2], output_size={"cells": [3]}), (1, 1, 8, 8))
    with poolrpc_server.embedded() as client, grpc.insecure_channel(client.address) as channel:
        error, nbytes = details_of(lambda: pool_pb2_grpc.PoolServiceStub(channel).Pool(request, timeout=60))
        assert isinstance(error, poolrpc.InvalidArgumentError)
        assert error.violations[0].field.startswith("branches[0]")
        assert nbytes < 4096
        assert client.health() == "SERVING"


def test_infer_shape_is_validated(stub: pool_pb2_grpc.PoolServiceStub) -> None:
    """InferShape rejects what Pool would, without a tensor."""
    branches = [pool_pb2.Branch(layers=[pool_pb2.Layer(**max2d(kernel_size=[9]))])]
    request = pool_pb2.InferShapeRequest(shape=pool_pb2.Shape(dims=(1, 3, 8, 8)), branches=branches)
    with pytest.raises(grpc.RpcError, match="kernel_size"):
        stub.InferShape(request, timeout=60)
    request.shape.dims[:] = (1024, 64, 228, 228)
    with pytest.raises(grpc.RpcError) as caught:
        stub.InferShape(request, timeout=60)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
