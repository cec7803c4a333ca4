"""pool_steps: the outputs of several steps of a chain in one call, by each transport and either client."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import grpc
import numpy as np
import psutil
import pytest
import torch

import poolrpc
import poolrpc_server
from benchmarks.memmap import Peak
from poolrpc import AvgPool2d, GlobalPool2d, MaxPool2d, MaxUnpool2d, PoolClient, Round, ToDtype
from poolrpc._wire import codec, framing
from poolrpc._wire.status import translate_rpc_error
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2
from scripts.server_process import serving
from tests.parity.reference import as_torch, assert_same, reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from poolrpc import Layer
    from tests.integration.conftest import Connect, Gate

X = np.random.default_rng(7).standard_normal((2, 5, 32, 48), np.float32)
PYRAMID: list[Layer] = [AvgPool2d(2)] * 4
INDEXED = MaxPool2d(2, return_indices=True)
POOL = "/poolrpc.v1.PoolService/Pool"
STREAM = "/poolrpc.v1.PoolService/PoolStream"
INFER = "/poolrpc.v1.PoolService/InferShape"

CHAINS: dict[str, tuple[list[Layer], list[int] | None]] = {
    "pyramid": (PYRAMID, None),
    "some levels": (PYRAMID, [0, 2]),
    "the last level": (PYRAMID, [3]),
    "indices of every step": ([INDEXED, MaxPool2d(3, 1, 1, return_indices=True), INDEXED], None),
    "indices of some steps": ([INDEXED, AvgPool2d(2), INDEXED, GlobalPool2d("mean")], [0, 1, 2]),
    "kernels and torch's operators": ([poolrpc.LPPool2d(2.0, 2, 1), MaxPool2d(3, 2, 1), AvgPool2d((3, 2), 1)], None),
    "one layer": ([MaxPool2d(2)], None),
}


def expected_of(
    x: np.ndarray, chain: Sequence[Layer], steps: Sequence[int] | None = None
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Return torch's output and indices of each of these steps, computed one after the other."""
    results, output = [], as_torch(x)
    for layer in chain:
        results.append(reference(layer, output))
        output = results[-1][0]
    return results if steps is None else [results[step] for step in steps]


def assert_equal(
    results: Sequence[poolrpc.PoolResult], expected: Sequence[tuple[torch.Tensor, torch.Tensor | None]], layout: str
) -> None:
    """Compare results in a layout with torch's."""
    assert len(results) == len(expected)
    for result, (output, indices) in zip(results, expected, strict=True):
        assert_same(result.output, output.movedim(1, -1) if layout == "NHWC" else output, result)
        assert result.shape == result.output.shape
        assert (result.indices is None) == (indices is None)
        if result.indices is not None and indices is not None:
            assert_same(result.indices, indices.movedim(1, -1) if layout == "NHWC" else indices, result)


@pytest.fixture(params=["unary", "stream", "arena"])
def pool_steps(
    request: pytest.FixtureRequest, connect: Connect, addresses: list[str], stream_in: Callable[..., None]
) -> Callable[..., list[poolrpc.PoolResult]]:
    """Return pool_steps of either client, through each transport."""
    stream_in(20_000, 5000)  # three planes of X in a block, and less than a plane in a message
    client = connect(addresses[request.param == "arena"])

    def call(*arguments: Any, **options: Any) -> list[poolrpc.PoolResult]:
        results = client.pool_steps(*arguments, transport=request.param, **options)
        assert {result.transport for result in results} == {request.param}
        return results

    return call


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("case", CHAINS)
def test_each_step_has_torchs_bits(pool_steps: Callable[..., list[poolrpc.PoolResult]], case: str, layout: str) -> None:
    """Outputs and indices are torch's, doing one step after the other, and the shapes are those up to each step."""
    chain, steps = CHAINS[case]
    x = X if layout == "NCHW" else np.moveaxis(X, 1, -1)
    results = pool_steps(x, chain, steps, layout=layout)
    assert_equal(results, expected_of(X, chain, steps), layout)
    shapes = poolrpc.branch_shapes(x.shape, [chain], layout, [range(len(chain)) if steps is None else steps])[0]
    assert [result.shapes for result in results] == [
        shapes[: step + 1] for step in (range(len(chain)) if steps is None else steps)
    ]


@pytest.mark.parametrize("steps", [None, [3, 7], [0, 1, 2, 7]], ids=repr)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_pyramid_of_rounded_averages(
    pool_steps: Callable[..., list[poolrpc.PoolResult]], dtype: str, steps: list[int] | None
) -> None:
    """The outputs may have several dtypes, and levels of integers are averages of the level before, rounded."""
    x = (np.random.default_rng(3).random(X.shape) * 2 ** (8 * np.dtype(dtype).itemsize)).astype(dtype)
    chain = [ToDtype("float32"), AvgPool2d(2), Round(), ToDtype(dtype)] * 2
    assert_equal(pool_steps(x, chain, steps), expected_of(x, chain, steps), "NCHW")


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "float64"])
def test_the_steps_of_other_dtypes(pool_steps: Callable[..., list[poolrpc.PoolResult]], dtype: str) -> None:
    """Integers and other floats have torch's bits, too."""
    x = (X * 50).astype(dtype)
    chain = [INDEXED, MaxPool2d(3, 2, 1), INDEXED]
    assert_equal(pool_steps(x, chain), expected_of(x, chain), "NCHW")


def test_a_chain_may_begin_with_unpooling(pool_steps: Callable[..., list[poolrpc.PoolResult]]) -> None:
    """The input's indices are those of the first step, and the steps that follow may return their own."""
    pooled, indices = reference(INDEXED, torch.from_numpy(X))
    assert indices is not None
    first, _ = reference(MaxUnpool2d(2), pooled, indices)
    results = pool_steps(pooled.numpy(), [MaxUnpool2d(2), INDEXED, AvgPool2d(2)], indices=indices.numpy())
    assert_equal(results, [(first, None), *expected_of(first.numpy(), [INDEXED, AvgPool2d(2)])], "NCHW")


def test_a_tensor_without_images(pool_steps: Callable[..., list[poolrpc.PoolResult]]) -> None:
    """N may be 0: every step has an empty output."""
    if pool_steps(X[:1, :1], [MaxPool2d(2)])[0].transport == "arena":  # which has no memory of no bytes
        return
    results = pool_steps(X[:0], PYRAMID)
    assert [result.shape for result in results] == [(0, 5, 16, 24), (0, 5, 8, 12), (0, 5, 4, 6), (0, 5, 2, 3)]


def test_each_step_is_written_to_a_file(pool_steps: Callable[..., list[poolrpc.PoolResult]], tmp_path: Path) -> None:
    """The input and every output may be mapped files, indices too; None stands for a new array."""
    X.tofile(tmp_path / "x")
    x = np.memmap(tmp_path / "x", np.float32, "r", shape=X.shape)
    chain = [AvgPool2d(2), INDEXED, AvgPool2d(2), AvgPool2d(2)]
    shapes = poolrpc.branch_shapes(X.shape, [chain], outputs=[(0, 1, 2, 3)])[0]
    files = [np.memmap(tmp_path / f"y{i}", np.float32, "w+", shape=shape) for i, shape in enumerate(shapes)]
    indices = np.memmap(tmp_path / "indices", np.int64, "w+", shape=shapes[1])
    results = pool_steps(x, chain, out=[files[0], (files[1], indices), None, files[3]])
    for number in (0, 1, 3):
        assert results[number].output is files[number]
        files[number].flush()
    assert results[1].indices is indices
    expected = expected_of(X, chain)
    assert_equal(results, expected, "NCHW")
    assert (tmp_path / "y3").read_bytes() == expected[3][0].numpy().tobytes()


def test_an_out_per_step_is_checked(pool_steps: Callable[..., list[poolrpc.PoolResult]]) -> None:
    """An array that does not fit its step, a missing one, and one that shares another's memory are rejected."""
    one, two = np.empty((2, 5, 16, 24), np.float32), np.empty((2, 5, 8, 12), np.float32)
    for out, words in (
        ([one], "expected 2 arrays, for each result"),
        ([two, one], r"expected a writable, C-contiguous array of float32 \(2, 5, 16, 24\), got"),
        ([one, one.reshape(-1)[: two.size].reshape(two.shape)], "expected memory apart from the other arrays of out"),
    ):
        with pytest.raises(poolrpc.InvalidArgumentError, match=words) as caught:
            pool_steps(X, PYRAMID[:2], out=out)
        assert caught.value.violations[0].field == "out"


def test_progress_counts_planes_whose_steps_are_all_done(
    connect: Connect, address: str, stream_in: Callable[..., None]
) -> None:
    """A stream returns every step of a block before it returns the next block."""
    stream_in(20_000)
    out = [np.full((2, 5, 16, 24), np.nan, np.float32), np.full((2, 5, 8, 12), np.nan, np.float32)]
    seen: list[tuple[int, list[int]]] = []

    def progress(done: int, count: int) -> None:
        assert count == 10
        written = [int((~np.isnan(each.reshape(10, -1)).any(axis=1)).sum()) for each in out]
        seen.append((done, written))

    connect(address).pool_steps(X, PYRAMID[:2], out=out, transport="stream", progress=progress)
    assert seen == [(done, [done, done]) for done in (3, 6, 9, 10)]


def test_a_copyless_result_of_each_step_stays_in_the_arena(unix_address: str) -> None:
    """With copy=False every step's output is in the arena, also if the input is there."""
    with PoolClient(unix_address) as client:
        x = client.empty(X.shape)
        x[...] = X
        results = client.pool_steps(x, PYRAMID, transport="arena", copy=False)
        assert_equal(results, expected_of(X, PYRAMID), "NCHW")
        assert not any(result.output.flags.owndata for result in results)


def test_pool_and_pool_each_are_the_same_message() -> None:
    """The last step alone, asked for by its number, has the output of pool; on the wire only a field differs."""
    chain = (AvgPool2d(2), MaxPool2d(2))
    spec = TensorSpec("float32", X.shape)
    plain, numbered = (codec.encode_request(codec.Request(spec, (chain,), None, out)) for out in ((), ((1,),)))
    assert list(numbered.branches[0].outputs) == [1]
    numbered.branches[0].ClearField("outputs")
    assert plain == numbered


def request_for(chain: Sequence[Layer], outputs: Sequence[int], shape: tuple[int, ...] = X.shape) -> Any:
    """Return the message of a request, whatever the outputs are."""
    message = codec.encode_request(codec.Request(TensorSpec("float32", shape), (tuple(chain),)))
    message.branches[0].outputs.extend(outputs)
    return message


@pytest.mark.parametrize(
    "outputs", [[4], [0, 1, 2, 3, 4], [1, 0], [0, 0], [3, 3], [0, 2**32 - 1], [0, 1, 1, 2]], ids=repr
)
@pytest.mark.parametrize("method", [POOL, STREAM, INFER])
def test_hostile_outputs_are_rejected(address: str, method: str, outputs: list[int]) -> None:
    """Repeated, unsorted and missing layers are an error of the field, for every method; and the server goes on."""
    error = rejection(address, method, request_for(PYRAMID, outputs))
    assert isinstance(error, poolrpc.InvalidArgumentError)
    assert [each.field for each in error.violations] == ["branches[0].outputs"]
    assert "in ascending order, each in 0..3, got" in error.message
    with PoolClient(address) as client:
        assert_equal(client.pool_steps(X, PYRAMID), expected_of(X, PYRAMID), "NCHW")


@pytest.mark.parametrize("method", [POOL, STREAM, INFER])
def test_millions_of_outputs_are_counted_first(address: str, method: str) -> None:
    """A list of outputs that is longer than any chain is rejected by its length."""
    error = rejection(address, method, request_for(PYRAMID, range(50_000)))
    assert isinstance(error, poolrpc.LimitExceededError)
    assert error.message == "branches[0].outputs: expected at most 64, got 50000"


def rejection(address: str, method: str, request: Any) -> poolrpc.PoolError:
    """Return the error with which the server rejects a request."""
    message = framing.join(request.SerializeToString(), [X.tobytes()])
    if method == STREAM:
        message = pool_pb2.PoolStreamRequest(request=request).SerializeToString()
    elif method == INFER:
        shape = pool_pb2.Shape(dims=request.input.shape)
        message = pool_pb2.InferShapeRequest(shape=shape, branches=request.branches).SerializeToString()
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        # The method of a stream takes any number of messages, and gRPC's server does not know which methods are one's.
        list(channel.unary_stream(method)(message))
    return translate_rpc_error(caught.value)


def test_shapes_are_inferred_of_every_layer(address: str) -> None:
    """InferShape returns the shape after every layer, and lets the layers whose outputs are returned return indices."""
    chain = [INDEXED, AvgPool2d(2), INDEXED]
    message = pool_pb2.InferShapeRequest(
        shape=pool_pb2.Shape(dims=X.shape), branches=request_for(chain, [0, 2]).branches
    )
    with grpc.insecure_channel(address) as channel:
        answer = channel.unary_unary(INFER)(message.SerializeToString())
    shapes = codec.decode_shape_response(pool_pb2.InferShapeResponse.FromString(answer))
    assert shapes == poolrpc.branch_shapes(X.shape, [chain], outputs=[(0, 2)])


def test_layers_after_the_last_output_are_checked_but_not_computed(connect: Connect, gate: Gate) -> None:
    """A step that was not asked for takes no time, but must fit."""
    with poolrpc_server.embedded() as own:
        client = connect(own.address)
        results = client.pool_steps(X, [AvgPool2d(2), AvgPool2d(2), MaxPool2d(2)], [0, 1])
        assert_equal(results, expected_of(X, [AvgPool2d(2)] * 2), "NCHW")
        assert gate.computed == 0
        with pytest.raises(poolrpc.InvalidArgumentError, match=r"^branches\[0\].layers\[1\].max_pool.kernel_size"):
            client.pool_steps(X, [AvgPool2d(2), MaxPool2d(99)], [0])


def test_limits_count_every_output(connect: Connect) -> None:
    """The limit on outputs is that of all of them; a chain whose last output alone is returned stays within it."""
    chain: list[Layer] = [MaxPool2d(1), MaxPool2d(1), MaxPool2d(1)]
    with poolrpc_server.embedded(max_output_bytes=2 * X.nbytes) as own:
        client = connect(own.address)
        for transport in ("unary", "arena"):
            assert client.pool(X, chain, transport=transport).shape == X.shape
            assert len(client.pool_steps(X, chain, [0, 2], transport=transport)) == 2
            with pytest.raises(poolrpc.LimitExceededError, match=f"bytes of all outputs, got {3 * X.nbytes}") as caught:
                client.pool_steps(X, chain, transport=transport)
            assert caught.value.reason == "OUTPUT_TOO_LARGE"


def test_the_growth_limit_counts_every_output(connect: Connect) -> None:
    """Sixty-four copies of an input are more than a request may return, if they are large."""
    x = np.zeros((1, 1, 256, 256), np.float32)
    with poolrpc_server.embedded(max_output_growth=16) as own:
        client = connect(own.address)
        assert len(client.pool_steps(x, [MaxPool2d(1)] * 64, range(16))) == 16
        with pytest.raises(poolrpc.LimitExceededError) as caught:
            client.pool_steps(x, [MaxPool2d(1)] * 64)
        assert caught.value.reason == "AMPLIFICATION"


def test_small_requests_share_a_batch_and_one_fails_alone(address: str) -> None:
    """Concurrent small calls with steps have their own outputs; one with wrong indices fails without the others."""
    xs = [X[:1, :1, :8, :8] + i for i in range(40)]
    good = np.arange(64).reshape(1, 1, 8, 8) * 4  # torch does not say which one of equal indices counts
    chain: list[Layer] = [MaxUnpool2d(2), INDEXED, AvgPool2d(2)]

    def call(i: int) -> object:
        try:
            return client.pool_steps(xs[i], chain, indices=good - (i % 10 == 3))
        except poolrpc.InvalidArgumentError as error:
            return error

    with PoolClient(address) as client, ThreadPoolExecutor(8) as executor:
        answers = list(executor.map(call, range(len(xs))))
        pyramids = list(executor.map(lambda x: client.pool_steps(x, [AvgPool2d(2)] * 2), xs))
    for i, (x, answer) in enumerate(zip(xs, answers, strict=True)):
        if i % 10 == 3:
            assert "expected indices in 0..255" in str(answer)
            continue
        first, _ = reference(MaxUnpool2d(2), torch.from_numpy(x), torch.from_numpy(good))
        results = cast("list[poolrpc.PoolResult]", answer)
        assert_equal(results, [(first, None), *expected_of(first.numpy(), chain[1:])], "NCHW")
    for x, results in zip(xs, pyramids, strict=True):
        assert_equal(results, expected_of(x, [AvgPool2d(2)] * 2), "NCHW")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory without the pages of files is measured by /proc")
def test_a_pyramid_of_a_file_takes_little_memory(tmp_path: Path) -> None:
    """From one file of 768 MiB to three by a stream, client and server grow by less than 200 MB each."""
    shape = (3, 64, 1024, 2048)
    x = np.memmap(tmp_path / "x", np.uint16, "w+", shape=shape)
    plane = np.random.default_rng(0).integers(0, 2**15, shape[2:], np.uint16)
    for i, each in enumerate(x.reshape(-1, *shape[2:])):
        each[...] = plane + i
    chain: list[Layer] = [ToDtype("float32"), AvgPool2d(2), Round(), ToDtype("uint16")] * 3
    shapes, ends = poolrpc.branch_shapes(shape, [chain])[0], (3, 7, 11)
    out = [np.memmap(tmp_path / f"y{i}", np.uint16, "w+", shape=shapes[i]) for i in ends]
    with serving("--threads", "1") as server, PoolClient(server.address) as client:
        client.pool_steps(x[:1, :8], chain, ends, transport="stream")
        peaks = [Peak(psutil.Process().pid), Peak(server.process.pid)]
        results = client.pool_steps(x, chain, ends, out=out)
        grown = [peak.growth() for peak in peaks]
    assert results[0].transport == "stream"
    assert max(grown) < 200_000_000
    for number in (0, 100, 191):
        source = x.reshape(-1, *shape[2:])[number][None, None]
        expected = expected_of(source, chain, ends)
        for (level, _), written in zip(expected, out, strict=True):
            assert_same(written.reshape(-1, *written.shape[2:])[number], level[0, 0], number)
