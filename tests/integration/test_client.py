"""Both clients against a real server, with NumPy as the reference; runs without torch and the server package."""

from __future__ import annotations

import asyncio
import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import grpc
import numpy as np
import pytest

import poolrpc
from poolrpc import (
    AdaptiveAvgPool2d,
    AsyncPoolClient,
    GlobalPool2d,
    MaxPool1d,
    MaxPool2d,
    MaxUnpool2d,
    PoolClient,
)
from poolrpc.v1 import pool_pb2, pool_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integration.conftest import Connect

X = np.random.default_rng(7).standard_normal((2, 3, 8, 10), np.float32)


def halved(x: np.ndarray, reduce: Callable[..., np.ndarray] = np.max) -> np.ndarray:
    """Return a pool with windows of 2 x 2 of (..., H, W) with even H and W, by NumPy."""
    *lead, h, w = x.shape
    return reduce(x.reshape(*lead, h // 2, 2, w // 2, 2), axis=(-3, -1))


@pytest.fixture
def client(connect: Connect, address: str) -> PoolClient:
    """Return either client of the server."""
    return connect(address)


def test_a_result_has_the_output_and_its_shape(client: PoolClient) -> None:
    """A result has the output, its shape, and the shape after every step."""
    result = client.pool(X, MaxPool2d(2))
    np.testing.assert_array_equal(result.output, halved(X))
    assert result.shape == result.output.shape == (2, 3, 4, 5)
    assert result.shapes == ((2, 3, 4, 5),)
    assert result.indices is None
    assert repr(result) == "<PoolResult float32 (2, 3, 4, 5)>"


def test_an_output_is_writable_and_independent(client: PoolClient) -> None:
    """Changing an output does not change the other outputs of its call."""
    first, second = client.pool_each(X, [MaxPool2d(2), MaxPool2d(2)])
    first.output[...] += 1
    np.testing.assert_array_equal(second.output, halved(X))


def test_a_chain_is_one_call(client: PoolClient) -> None:
    """A chain returns the last layer's output and every step's shape."""
    result = client.pool(X, [MaxPool2d(2), AdaptiveAvgPool2d(1)])
    np.testing.assert_allclose(result.output[..., 0, 0], halved(X).mean((-2, -1)), rtol=1e-5)
    assert result.shapes == ((2, 3, 4, 5), (2, 3, 1, 1))


def test_indices_are_received_and_sent(client: PoolClient) -> None:
    """MaxUnpool2d puts the maxima back where MaxPool2d's indices say that they were."""
    result = client.pool(X, MaxPool2d(2, return_indices=True))
    assert result.indices.dtype == np.int64
    flat = X.reshape(2, 3, -1)
    np.testing.assert_array_equal(
        np.take_along_axis(flat, result.indices.reshape(2, 3, -1), 2), result.output.reshape(2, 3, -1)
    )
    back = client.pool(result.output, MaxUnpool2d(2), indices=result.indices).output
    np.testing.assert_array_equal(back, np.where(np.isin(X, result.output), X, 0))


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(X[0], id="unbatched"),
        pytest.param(X[:, :, ::2, ::-1], id="strides"),
        pytest.param(X.transpose(0, 1, 3, 2), id="transposed"),
        pytest.param(np.asfortranarray(X), id="fortran"),
        pytest.param(X.astype(">f4"), id="big-endian"),
        pytest.param(X.astype(np.float64), id="float64"),
        pytest.param((X * 100).astype(np.uint8), id="uint8"),
        pytest.param((X * 100).astype(">i2"), id="big-endian int16"),
        pytest.param(X[:0], id="empty batch"),
    ],
)
def test_any_array_is_an_input(client: PoolClient, x: np.ndarray) -> None:
    """An array may have any strides, byte order and dtype of the layer; the output has native byte order."""
    x.flags.writeable = False
    output = client.pool(x, MaxPool2d(2)).output
    np.testing.assert_array_equal(output, halved(x))
    assert output.dtype == x.dtype.newbyteorder("=")


def test_nested_lists_are_inputs(client: PoolClient) -> None:
    """A nested list of floats is a tensor."""
    assert client.pool([[[1.0, 2.0], [3.0, 4.0]]], MaxPool2d(2)).output.tolist() == [[[4.0]]]


def test_bfloat16(client: PoolClient) -> None:
    """bfloat16 is the dtype of ml_dtypes."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs the extra of that name")
    x = X.astype(ml_dtypes.bfloat16)
    output = client.pool(x, MaxPool2d(2)).output
    assert output.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(output.astype(np.float32), halved(x.astype(np.float32)))


def test_channels_last(client: PoolClient) -> None:
    """With layout="NHWC" inputs, outputs and shapes have their channels last."""
    image = np.moveaxis(X[0], 0, -1)
    result = client.pool(image, MaxPool2d(2), layout="NHWC")
    np.testing.assert_array_equal(result.output, np.moveaxis(halved(X[0]), 0, -1))
    assert result.shape == (4, 5, 3)
    assert client.output_shape(image.shape, MaxPool2d(2), layout="NHWC") == (4, 5, 3)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_a_global_layer_pools_one_image_as_a_batch_of_one(client: PoolClient, reduce: Literal["max", "mean"]) -> None:
    """Without N, the spatial axes of an image are pooled as with it, in both layouts, and by the server's shapes."""
    layer = GlobalPool2d(reduce)
    expected = getattr(X[0].astype(np.float64), reduce)(axis=(1, 2))
    for image, layout, shape in ((X[0], "NCHW", (3, 1, 1)), (np.moveaxis(X[0], 0, -1), "NHWC", (1, 1, 3))):
        result = client.pool(image, layer, layout=layout)
        assert result.shape == result.output.shape == client.output_shape(image.shape, layer, layout=layout) == shape
        np.testing.assert_allclose(result.output.ravel(), expected, rtol=1e-6)
        batched = client.pool(image[None], layer, layout=layout)
        np.testing.assert_array_equal(batched.output[0], result.output)


def test_a_global_layer_rejects_another_rank(client: PoolClient) -> None:
    """A tensor of another rank is rejected with its field, and a dtype that the reduction lacks with those it has."""
    with pytest.raises(poolrpc.InvalidArgumentError, match=r"expected 4 dims .* or 3 dims .*, got shape") as caught:
        client.pool(X[0, 0], GlobalPool2d("mean"))
    assert caught.value.violations[0].field == "input.shape"
    with pytest.raises(
        poolrpc.UnsupportedError, match="GlobalPool2d takes float16, bfloat16, float32, float64, int64, got uint8"
    ):
        client.pool(X.astype(np.uint8), GlobalPool2d("mean"))
    assert client.pool(X.astype(np.uint8), GlobalPool2d("max")).output.dtype == np.uint8


def test_output_shape(client: PoolClient) -> None:
    """The server infers the shape that the layer infers offline."""
    chain = [MaxPool2d(3, stride=2, padding=1, ceil_mode=True), GlobalPool2d("max")]
    assert client.output_shape((8, 64, 57, 56), chain[:1]) == chain[0].output_shape((8, 64, 57, 56)) == (8, 64, 29, 29)
    assert client.output_shape((8, 64, 57, 56), chain) == (8, 64, 1, 1)


def test_server_info(client: PoolClient) -> None:
    """The server's description has every layer and step of this client with its dtypes, and limits with their units."""
    info = client.server_info()
    assert info.version == poolrpc.__version__
    assert info.layers == {name: layer.dtypes for name, layer in (poolrpc.LAYERS | poolrpc.STEPS).items()}
    assert info.limits["max_message_bytes"].unit == "bytes"
    assert 2**20 <= info.limits["max_message_bytes"].value <= 513 * 2**20
    assert str(info.limits["max_work"]).endswith(" cells")
    assert info.threads >= 1
    assert info.operands == {name: layer.operand for name, layer in poolrpc.LAYERS.items() if layer.operand}
    assert info.operands["MaxUnpool2d"] == "indices"


def test_health(client: PoolClient) -> None:
    """The server and its service are SERVING, and an unknown service is NOT_FOUND."""
    assert client.health() == client.health("poolrpc.v1.PoolService") == "SERVING"
    with pytest.raises(poolrpc.NotFoundError):
        client.health("no.such.Service")


def test_the_client_raises_the_servers_errors(client: PoolClient) -> None:
    """A limit and a value that only the server checks raise its class of error, with its text and gRPC's error."""
    with pytest.raises(poolrpc.LimitExceededError) as limited:
        client.pool(np.zeros((1, 1, 1), np.float32), AdaptiveAvgPool2d(4096))
    assert limited.value.metadata.keys() == {"limit", "actual"}
    assert isinstance(limited.value.__cause__, grpc.RpcError)
    with pytest.raises(poolrpc.InvalidArgumentError) as caught:
        client.pool(X[..., :2, :2], MaxUnpool2d(2), indices=np.full((2, 3, 2, 2), 99))
    assert caught.value.violations[0].field == "indices"
    assert isinstance(caught.value.__cause__, grpc.RpcError)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((X, []), poolrpc.InvalidArgumentError, "expected a layer"),
        ((X, MaxPool2d), poolrpc.InvalidArgumentError, "expected a layer"),
        ((X.astype(complex), MaxPool2d(2)), poolrpc.UnsupportedError, "got 'complex128'"),
        ((np.array(["a"]), MaxPool1d(2)), poolrpc.UnsupportedError, "expected one of"),
        ((object(), MaxPool2d(2)), poolrpc.InvalidArgumentError, "expected an array"),
    ],
)
def test_inputs_that_cannot_be_sent_are_rejected(client: PoolClient, arguments: Any, error: type, words: str) -> None:
    """The client raises an error before it sends anything if no message can hold the request."""
    with pytest.raises(error, match=words):
        client.pool(*arguments)


def test_an_unknown_layout_is_rejected(client: PoolClient) -> None:
    """A layout is NCHW or NHWC."""
    with pytest.raises(poolrpc.InvalidArgumentError, match="expected one of NCHW, NHWC, got 'CHWN'"):
        client.pool(X, MaxPool2d(2), layout="CHWN")


def test_a_message_over_the_clients_limit_says_how_to_raise_it(connect: Connect, address: str) -> None:
    """A tensor over the client's limit is not sent, and the error names both limits to raise."""
    with pytest.raises(poolrpc.LimitExceededError) as caught:
        connect(address, max_message_bytes=1000).pool(X, MaxPool2d(2))
    assert caught.value.metadata == {"limit": "1000", "actual": str(X.nbytes)}
    assert "--max-message-bytes" in str(caught.value)
    assert "max_message_bytes=" in str(caught.value)


def test_an_address_without_a_server(connect: Connect) -> None:
    """An address without a server is an UnavailableError, which is a ConnectionError."""
    with pytest.raises(ConnectionError) as caught:
        connect("127.0.0.1:1", timeout=5).pool(X, MaxPool2d(2))
    assert isinstance(caught.value, poolrpc.UnavailableError)


def test_a_closed_client(client: PoolClient) -> None:
    """Calls after close raise PoolError."""
    client.close()
    with pytest.raises(poolrpc.PoolError, match=r"PoolClient\('.*'\) is closed"):
        client.server_info()


def test_repr_has_no_secrets() -> None:
    """A client's repr has its address alone."""
    with PoolClient("127.0.0.1:1", metadata=[("authorization", "Bearer secret")]) as client:
        assert repr(client) == "PoolClient('127.0.0.1:1')"


def test_threads_share_a_client(address: str) -> None:
    """Calls from many threads at once each receive their own result."""
    tensors = [np.full((1, 1, 4, 4), i, np.float32) for i in range(64)]
    with PoolClient(address) as client, ThreadPoolExecutor(16) as threads:
        results = list(threads.map(lambda x: client.pool(x, MaxPool2d(2)).output, tensors))
    assert [float(each.min()) for each in results] == [float(each.max()) for each in results] == list(range(64))


async def test_tasks_share_a_client(address: str) -> None:
    """Calls of an asyncio client may overlap, and each receives its own result."""
    async with AsyncPoolClient(address) as client:
        results = await asyncio.gather(*(client.pool(X + i, MaxPool2d(2)) for i in range(8)))
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result.output, halved(X + i))


def test_a_timeout_that_is_too_short(client: PoolClient) -> None:
    """A call that is not answered within its timeout raises DeadlineExceededError."""
    with pytest.raises(poolrpc.DeadlineExceededError):
        client.pool(np.zeros((1, 16, 512, 512), np.float32), MaxPool2d(2), timeout=0.001)


def test_both_clients_have_the_same_public_methods() -> None:
    """The public methods of the clients differ in nothing but await."""

    def public(cls: type) -> set[str]:
        return {name for name in dir(cls) if not name.startswith("_")}

    assert public(PoolClient) == public(AsyncPoolClient)


class Flaky(pool_pb2_grpc.PoolServiceServicer):
    """A service that is UNAVAILABLE a number of times, then answers, and keeps the metadata of each call."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls: list[dict[str, str]] = []

    def Pool(self, request: pool_pb2.PoolRequest, context: grpc.ServicerContext) -> pool_pb2.PoolResponse:  # noqa: N802
        """Fail, or return the input."""
        self.calls.append(dict(context.invocation_metadata()))
        if len(self.calls) <= self.failures:
            context.abort(grpc.StatusCode.UNAVAILABLE, "full")
        result = pool_pb2.BranchResult(shapes=[pool_pb2.Shape(dims=request.input.shape)], output=request.input)
        return pool_pb2.PoolResponse(results=[result], payload=request.payload)

    def PoolStream(  # noqa: N802
        self, messages: Iterator[pool_pb2.PoolStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pool_pb2.PoolStreamResponse]:
        """Fail, or return each block."""
        self.calls.append(dict(context.invocation_metadata()))
        if len(self.calls) <= self.failures:
            context.abort(grpc.StatusCode.UNAVAILABLE, "full")
        spec = next(messages).request.input
        result = pool_pb2.BranchResult(shapes=[pool_pb2.Shape(dims=spec.shape)], output=spec)
        yield pool_pb2.PoolStreamResponse(results=[result])
        for message in messages:
            yield pool_pb2.PoolStreamResponse(payload=message.payload)

    def GetServerInfo(  # noqa: N802
        self, _: pool_pb2.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pool_pb2.GetServerInfoResponse:
        """Keep the metadata."""
        self.calls.append(dict(context.invocation_metadata()))
        return pool_pb2.GetServerInfoResponse()


@contextlib.contextmanager
def serving(servicer: Flaky) -> Iterator[str]:
    """Serve it on a free port of 127.0.0.1, and return the address."""
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", -1)])
    pool_pb2_grpc.add_PoolServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("size", [16, 1024], ids=["1 KB", "4 MB"])
def test_an_unavailable_call_is_tried_again(connect: Connect, size: int) -> None:
    """GRPC tries a call again, with a large message too, if the server is full, and the caller sees no error."""
    flaky = Flaky(failures=2)
    with serving(flaky) as address:
        x = np.zeros((1, 1, size, size), np.float32)
        assert np.array_equal(connect(address).pool(x, MaxPool2d(1), transport="unary").output, x)
    assert [each.get("grpc-previous-rpc-attempts") for each in flaky.calls] == [None, "1", "2"]


def test_an_unavailable_stream_is_tried_again(connect: Connect) -> None:
    """A stream that finds the server full is tried again from its start, and is complete."""
    flaky = Flaky(failures=2)
    x = np.random.default_rng(7).standard_normal((1, 4, 1024, 1024), np.float32)
    with serving(flaky) as address:
        result = connect(address).pool(x, MaxPool2d(1))
    assert result.transport == "stream"
    np.testing.assert_array_equal(result.output, x)
    assert len(flaky.calls) == 3
    assert [each.get("grpc-previous-rpc-attempts") for each in flaky.calls] == [None] * 3


def test_retries_are_bounded(connect: Connect) -> None:
    """After five attempts at a server that stays full the error is raised."""
    flaky = Flaky(failures=100)
    with serving(flaky) as address, pytest.raises(poolrpc.UnavailableError, match="full"):
        connect(address).pool(X, MaxPool2d(2))
    assert len(flaky.calls) == 5


def test_options_replace_the_clients_own(connect: Connect) -> None:
    """options= replaces a channel argument of the client's, here that of retries."""
    flaky = Flaky(failures=1)
    options = {"grpc.service_config": json.dumps({}), "grpc.enable_retries": 0}
    with serving(flaky) as address, pytest.raises(ConnectionError):
        connect(address, options=options).pool(X, MaxPool2d(2))
    assert len(flaky.calls) == 1


def test_metadata_is_sent_with_every_call(connect: Connect) -> None:
    """The server receives the client's metadata, and its name as the user agent."""
    flaky = Flaky(failures=0)
    with serving(flaky) as address:
        client = connect(address, metadata=[("tenant", "a")])
        client.pool(X, MaxPool2d(1))
        client.server_info()
    assert [each["tenant"] for each in flaky.calls] == ["a", "a"]
    assert flaky.calls[0]["user-agent"].startswith(f"poolrpc/{poolrpc.__version__} ")


def test_calls_are_distributed_over_the_addresses_of_a_name() -> None:
    """If a name has several addresses, each of its servers is called."""
    first, second = Flaky(failures=0), Flaky(failures=0)
    with serving(first) as one, serving(second) as other, PoolClient(f"ipv4:{one},{other}") as client:
        for _ in range(64):
            client.server_info()
            if first.calls and second.calls:
                break
    assert first.calls
    assert second.calls


def test_a_dns_name_is_resolved(address: str) -> None:
    """dns:///name:port is resolved to the server's address."""
    with PoolClient(f"dns:///localhost:{address.rpartition(':')[2]}") as client:
        assert client.health() == "SERVING"
