"""PoolStream against real servers: the bits of the unary path, block by block, and what ends a stream early."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import threading
import time
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self

import grpc
import numpy as np
import psutil
import pytest

import poolrpc
import poolrpc_server
from poolrpc import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AsyncPoolClient,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    FractionalMaxPool2d,
    FractionalMaxPool3d,
    GlobalAvgPool,
    GlobalMaxPool,
    LPPool2d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool2d,
    PoolClient,
)
from poolrpc._wire import codec, framing
from poolrpc._wire.status import translate_rpc_error
from poolrpc.chains import as_chain
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import Gate
    from poolrpc.chains import Chain

MIB = 2**20
METHOD = "/poolrpc.v1.PoolService/PoolStream"
NO_RETRIES = {"grpc.enable_retries": 0}
RNG = np.random.default_rng(7)
X = RNG.standard_normal((3, 5, 11, 14), np.float32)
X[0, 1, 3:5] = np.nan
X[1, 2] = -np.inf
LARGE = RNG.standard_normal((64, 4, 128, 128), np.float32)
"""16 MiB, in planes of 64 KiB: more than a connection takes while nobody reads from it."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks of two or three of X's planes, in pieces of less than one."""
    monkeypatch.setattr("poolrpc._transport.stream.STREAM_BLOCK_BYTES", 1900)
    monkeypatch.setattr(framing, "chunks", partial(framing.chunks, chunk_bytes=500))


@pytest.fixture
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks of one of LARGE's planes."""
    monkeypatch.setattr("poolrpc._transport.stream.STREAM_BLOCK_BYTES", 65536)


@pytest.fixture(params=["sync", "async"])
def pool_each(request: pytest.FixtureRequest, address: str) -> Iterator[Callable[..., list[poolrpc.PoolResult]]]:
    """Give pool_each of either client."""
    if request.param == "sync":
        with PoolClient(address) as client:
            yield client.pool_each
        return

    def call(*arguments: Any, **options: Any) -> list[poolrpc.PoolResult]:
        async def run() -> list[poolrpc.PoolResult]:
            async with AsyncPoolClient(address) as client:
                return await client.pool_each(*arguments, **options)

        return asyncio.run(run())

    yield call


def bits(array: np.ndarray) -> bytes:
    """Give an array's bytes, with all NaNs as one: which of them an operation gives depends on how it is vectorised."""
    return np.where(array == array, array, np.array(np.nan if array.dtype.kind in "fV" else 0, array.dtype)).tobytes()  # noqa: PLR0124 - isnan, for every dtype


def sync_pool(address: str, *arguments: Any, **options: Any) -> poolrpc.PoolResult:
    """Call pool of a client of its own."""
    with PoolClient(address) as client:
        return client.pool(*arguments, **options)


def async_pool(address: str, *arguments: Any, **options: Any) -> poolrpc.PoolResult:
    """Call pool of an asyncio client of its own."""

    async def run() -> poolrpc.PoolResult:
        async with AsyncPoolClient(address) as client:
            return await client.pool(*arguments, **options)

    return asyncio.run(run())


POOL = {"sync": sync_pool, "async": async_pool}


def assert_same(streamed: list[poolrpc.PoolResult], expected: list[poolrpc.PoolResult]) -> None:
    """Check that results came by a stream, and are those of the other path, bit by bit."""
    assert len(streamed) == len(expected)
    for ours, theirs in zip(streamed, expected, strict=True):
        assert (ours.transport, theirs.transport) == ("stream", "unary")
        assert ours.shapes == theirs.shapes
        assert (ours.output.dtype, ours.output.shape) == (theirs.output.dtype, theirs.output.shape)
        assert bits(ours.output) == bits(theirs.output)
        assert (ours.indices is None) == (theirs.indices is None)
        if ours.indices is not None:
            np.testing.assert_array_equal(ours.indices, theirs.indices)


CHAINS = {
    "max": [MaxPool2d(3, 2, 1, return_indices=True)],
    "max dilated": [MaxPool2d(2, 1, dilation=3, ceil_mode=True)],
    "max with padding": [MaxPool2d((2, 5), stride=(3, 1), padding=(1, 2))],
    "average": [AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)],
    "average with divisor": [AvgPool2d(2, divisor_override=3)],
    "lp": [LPPool2d(2.0, 3, ceil_mode=True)],
    "adaptive max": [AdaptiveMaxPool2d((4, 3), return_indices=True)],
    "adaptive average": [AdaptiveAvgPool2d((None, 5))],
    "fractional": [FractionalMaxPool2d(2, output_size=5, return_indices=True, seed=11)],
    "fractional ratio": [FractionalMaxPool2d(3, output_ratio=0.6, seed=2**63)],
    "chain": [MaxPool2d(2), AvgPool2d(2, stride=1)],
    "chain with fractional": [AvgPool2d(2, 1), FractionalMaxPool2d(2, output_size=4, seed=3), MaxPool2d(2)],
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("case", CHAINS)
def test_a_stream_gives_the_bits_of_a_call(
    pool_each: Callable[..., list[poolrpc.PoolResult]], case: str, layout: str, *, batched: bool
) -> None:
    """Whatever the layer, layout and client: a stream of many blocks and pieces gives what one message gives."""
    x = X if layout == "NCHW" else np.ascontiguousarray(np.moveaxis(X, 1, -1))
    x = x if batched else x[1]
    chain = CHAINS[case]
    assert_same(
        pool_each(x, [chain], layout=layout, transport="stream"),
        pool_each(x, [chain], layout=layout, transport="unary"),
    )


@pytest.mark.usefixtures("small")
def test_powers_in_a_stream(pool_each: Callable[..., list[poolrpc.PoolResult]]) -> None:
    """Torch rounds a power by where its tensor ends, so other norms than 1, 2 and inf may differ by the last bit."""
    (streamed,) = pool_each(X, [LPPool2d(3.5, 2)], transport="stream")
    (expected,) = pool_each(X, [LPPool2d(3.5, 2)], transport="unary")
    np.testing.assert_allclose(streamed.output, expected.output, rtol=2.0**-22)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_branches_in_a_stream(pool_each: Callable[..., list[poolrpc.PoolResult]], layout: str) -> None:
    """The blocks of an answer hold every branch's part, indices too."""
    x = X if layout == "NCHW" else np.moveaxis(X, 1, -1)
    branches = [*CHAINS.values(), GlobalMaxPool(), [MaxPool2d(2), GlobalAvgPool()]]
    assert_same(
        pool_each(x, branches, layout=layout, transport="stream"),
        pool_each(x, branches, layout=layout, transport="unary"),
    )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_unpool_in_a_stream(pool_each: Callable[..., list[poolrpc.PoolResult]], layout: str) -> None:
    """Blocks of a MaxUnpool hold their planes' indices after those of the input."""
    x = np.nan_to_num(X if layout == "NCHW" else np.moveaxis(X, 1, -1))
    (pooled,) = pool_each(x, [MaxPool2d(2, return_indices=True)], layout=layout)
    branches = [MaxUnpool2d(2), [MaxUnpool2d(2, output_size=(11, 14)), AvgPool2d(2)]]
    options = {"indices": pooled.indices, "layout": layout}
    assert_same(
        pool_each(pooled.output, branches, transport="stream", **options),
        pool_each(pooled.output, branches, transport="unary", **options),
    )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64"]
)
def test_every_dtype_in_a_stream(pool_each: Callable[..., list[poolrpc.PoolResult]], dtype: str) -> None:
    """Elements of any size are cut at the same planes."""
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    x = (np.nan_to_num(X, neginf=-9) * 5).astype(kind)
    layers = [MaxPool2d(2, return_indices=True)]
    layers += [AvgPool2d(2), LPPool2d(2, 2)] if dtype.lstrip("b").startswith("float") else []
    assert_same(pool_each(x, layers, transport="stream"), pool_each(x, layers, transport="unary"))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("x", "layers"),
    [
        pytest.param(X.reshape(3, 5, -1), [MaxPool1d(3, return_indices=True), AvgPool1d(2)], id="1d"),
        pytest.param(X.reshape(1, 3, 5, 11, 14), [MaxPool3d(2, return_indices=True), AvgPool3d(3, 1)], id="3d"),
        pytest.param(
            X.reshape(3, 1, 5, 11, 14), [FractionalMaxPool3d(2, output_size=3, return_indices=True, seed=5)], id="3d f"
        ),
        pytest.param(X[:0], [MaxPool2d(2, return_indices=True), AvgPool2d(2)], id="empty batch"),
        pytest.param(X[:1, :1], [MaxPool2d(2)], id="one plane"),
        pytest.param(X[:, :, ::2, ::-1], [MaxPool2d(2)], id="strides"),
        pytest.param(X.astype(">f4"), [MaxPool2d(2)], id="big-endian"),
        pytest.param(LARGE[:1, :3], [MaxPool2d(2, return_indices=True)], id="planes larger than pieces"),
        pytest.param(LARGE[:1, :2], [MaxPool2d(127, 1)], id="outputs smaller than pieces"),
    ],
)
def test_other_tensors_in_a_stream(
    pool_each: Callable[..., list[poolrpc.PoolResult]], x: np.ndarray, layers: list[poolrpc.Layer]
) -> None:
    """Other ranks, no planes, one plane, strides, and planes that take many messages."""
    assert_same(pool_each(x, layers, transport="stream"), pool_each(x, layers, transport="unary"))


def test_a_large_tensor_streams_by_itself(pool_each: Callable[..., list[poolrpc.PoolResult]]) -> None:
    """From a size on, a tensor goes as a stream unless it is told otherwise."""
    (small,) = pool_each(X, [MaxPool2d(2)])
    (large,) = pool_each(LARGE, [MaxPool2d(2)])
    assert (small.transport, large.transport) == ("unary", "stream")
    assert_same([large], pool_each(LARGE, [MaxPool2d(2)], transport="unary"))


def test_an_unknown_transport_is_refused(pool_each: Callable[..., list[poolrpc.PoolResult]]) -> None:
    """A transport is one of three."""
    with pytest.raises(
        poolrpc.InvalidArgumentError, match="expected one of unary, stream, arena or None, got 'pigeon'"
    ):
        pool_each(X, [MaxPool2d(2)], transport="pigeon")


# Where it comes from and goes to


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_from_file_to_file(pool_each: Callable[..., list[poolrpc.PoolResult]], tmp_path: Path, transport: str) -> None:
    """A mapped file goes in, and an output and its indices into other mapped files, whose contents are the result."""
    np.nan_to_num(X).tofile(tmp_path / "x")
    x = np.memmap(tmp_path / "x", np.float32, "r", shape=X.shape)
    layer = MaxPool2d(3, 2, 1, return_indices=True)
    shape = layer.output_shape(X.shape)
    y = np.memmap(tmp_path / "y", np.float32, "w+", shape=shape)
    places = np.memmap(tmp_path / "places", np.int64, "w+", shape=shape)
    (result,) = pool_each(x, [layer], out=[(y, places)], transport=transport)
    assert result.output is y
    assert result.indices is places
    y.flush()
    places.flush()
    (expected,) = pool_each(np.nan_to_num(X), [layer], transport="unary")
    assert (tmp_path / "y").read_bytes() == expected.output.tobytes()
    assert (tmp_path / "places").read_bytes() == expected.indices.tobytes()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_out_for_some_branches(pool_each: Callable[..., list[poolrpc.PoolResult]], transport: str) -> None:
    """An `out` has an entry for each branch; None is a new array."""
    y = np.empty(GlobalAvgPool().output_shape(X.shape), np.float32)
    pair = (np.empty((3, 5, 5, 7), np.float32), np.empty((3, 5, 5, 7), np.int64))
    branches = [MaxPool2d(2), GlobalAvgPool(), MaxPool2d(2, return_indices=True)]
    results = pool_each(X, branches, out=[None, y, pair], transport=transport)
    assert results[1].output is y
    assert (results[2].output, results[2].indices) == pair or results[2].output is pair[0]
    for ours, theirs in zip(results, pool_each(X, branches, transport="unary"), strict=True):
        assert ours.output.tobytes() == theirs.output.tobytes()
    np.testing.assert_array_equal(pair[1], pool_each(X, branches[2:])[0].indices)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (np.empty((3, 5, 5, 6), np.float32), r"array of float32 \(3, 5, 5, 7\), got float32 \(3, 5, 5, 6\)"),
        (np.empty((3, 5, 5, 7), np.float64), r"got float64"),
        (np.empty((3, 5, 5, 14), np.float32)[..., ::2], "strided"),
        (np.broadcast_to(np.float32(), (3, 5, 5, 7)), "read-only"),
        ([[0.0]], "got 'list'"),
        ((np.empty((3, 5, 5, 7), np.float32), np.empty((3, 5, 5, 7), np.int64)), "expected 1 arrays"),
    ],
    ids=["shape", "dtype", "strides", "read-only", "list", "pair"],
)
@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_what_does_not_fit_is_refused_before_anything_is_sent(
    pool_each: Callable[..., list[poolrpc.PoolResult]], out: Any, words: str, transport: str
) -> None:
    """An `out` is checked here, and left as it is."""
    with pytest.raises(poolrpc.InvalidArgumentError, match=words) as caught:
        pool_each(X, [MaxPool2d(2)], out=[out], transport=transport)
    assert caught.value.violations[0].field == "out"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_progress_counts_planes(pool_each: Callable[..., list[poolrpc.PoolResult]], layout: str) -> None:
    """The callback hears how many planes are done as they come, up to all; with channels last an image is one."""
    seen: list[tuple[int, int]] = []
    x = X if layout == "NCHW" else np.moveaxis(X, 1, -1)
    pool_each(x, [MaxPool2d(2)], layout=layout, transport="stream", progress=lambda *at: seen.append(at))
    count = 15 if layout == "NCHW" else 3
    done = [at for at, _ in seen]
    assert {of for _, of in seen} == {count}
    assert done == sorted(set(done))
    assert done[-1] == count
    assert len(seen) == (5 if layout == "NCHW" else 3)
    seen.clear()
    pool_each(x, [MaxPool2d(2)], layout=layout, transport="unary", progress=lambda *at: seen.append(at))
    assert seen == [(count, count)]


# Messages as nobody should send them


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    """A bare channel to the server, without retries."""
    with grpc.insecure_channel(address, [*NO_RETRIES.items(), ("grpc.max_send_message_length", -1)]) as made:
        yield made


@pytest.fixture
def still_serving(client: PoolClient) -> Iterator[None]:
    """After the test, good calls of both kinds are answered."""
    yield
    expected = client.pool(X, MaxPool2d(2), transport="unary")
    assert_same([client.pool(X, MaxPool2d(2), transport="stream")], [expected])


def header(shape: tuple[int, ...] = (2, 3, 4, 4), *chain: poolrpc.Layer) -> bytes:
    """Give a stream's first message, for a tensor of float32."""
    branches: tuple[Chain, ...] = (as_chain(chain or [MaxPool2d(2)]),)
    request = codec.encode_request(codec.Request(TensorSpec("float32", shape), branches))
    return pool_pb2.PoolStreamRequest(request=request).SerializeToString()


def block(nbytes: int, *, unfinished: bool = False) -> bytes:
    """Give a message of a block of zeros."""
    return pool_pb2.PoolStreamRequest(payload=bytes(nbytes), unfinished=unfinished).SerializeToString()


def refusal(channel: grpc.Channel, *messages: bytes, timeout: float = 20) -> poolrpc.PoolError:
    """Send messages that must be refused, and give the error."""
    with pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(METHOD)(iter(messages), timeout=timeout))
    return translate_rpc_error(caught.value)


PLANE = 64  # bytes of a plane of 4 x 4
OVERSIZED = (1, 9, 512, 512), MIB
"""Nine planes of a megabyte: of which a block has at most eight."""

INVALID = {
    "fewer planes": ([header(), block(3 * PLANE)], "payload", "expected 6 planes, as the request says, got 3"),
    "none at all": ([header()], "payload", "expected 6 planes, as the request says, got 0"),
    "more planes": (
        [header(), block(4 * PLANE), block(3 * PLANE)],
        "payload",
        "expected 6 planes, as the request says, got 7",
    ),
    "a block too many": ([header(), block(6 * PLANE), block(PLANE)], "payload", "got 7"),
    "a block for an empty tensor": ([header((0, 3, 4, 4)), block(PLANE)], "payload", "expected 0 planes"),
    "cut inside a plane": (
        [header(), block(PLANE + 4)],
        "payload",
        "expected a block of 1 to 6 planes of 64 bytes, got 68 bytes",
    ),
    "cut inside an element": ([header(), block(2 * PLANE), block(1)], "payload", "got 1 bytes"),
    "an empty block": ([header(), block(0)], "payload", "expected a block of 1 to 6 planes of 64 bytes, got 0 bytes"),
    "header twice": ([header(), header()], "request", "expected the request in the first message alone"),
    "header after a block": ([header(), block(PLANE), header()], "request", "in the first message alone"),
    "header amid a block": ([header(), block(PLANE, unfinished=True), header()], "request", "first message alone"),
    "no header": ([block(6 * PLANE)], "request", "expected the request in the first message, got none"),
    "no message": ([], "request", "expected the request in the first message, got none"),
    "an empty message": ([b""], "request", "expected the request in the first message, got none"),
    "unfinished at the end": (
        [header(), block(2 * PLANE), block(4 * PLANE, unfinished=True)],
        "payload",
        "got the end of the stream after 256 bytes of it",
    ),
    "oversized": (
        [header(OVERSIZED[0]), block(9 * OVERSIZED[1])],
        "payload",
        f"expected a block of at most {8 * MIB} bytes, got {9 * MIB}",
    ),
    "oversized in pieces": (
        [header(OVERSIZED[0]), *[block(4 * MIB, unfinished=True)] * 2, block(1)],
        "payload",
        f"expected a block of at most {8 * MIB} bytes, got {8 * MIB + 1}",
    ),
    "oversized for the tensor": ([header(), block(7 * PLANE)], "payload", "at most 384 bytes, got 448"),
    "bad layer": ([header((2, 3, 4, 4), MaxPool2d(9)), block(6 * PLANE)], "kernel_size", "at most input"),
    "bad shape": ([header((2, 0, 4, 4)), block(6 * PLANE)], "shape", "expected"),
}


@pytest.mark.usefixtures("still_serving")
@pytest.mark.parametrize("case", INVALID)
def test_a_stream_that_breaks_its_word(channel: grpc.Channel, case: str) -> None:
    """P16: more or fewer planes than promised, blocks that are none, headers in the wrong place: INVALID_ARGUMENT."""
    messages, field, words = INVALID[case]
    error = refusal(channel, *messages)
    assert isinstance(error, poolrpc.InvalidArgumentError), error
    assert error.violations[0].field.endswith(field)
    assert words in str(error)


@pytest.mark.usefixtures("still_serving")
@pytest.mark.parametrize(
    "messages",
    [[b"\xff" * 100], [header(), b"\xff" * 100], [header(), block(PLANE), b"\xff"]],
    ids=["first", "second", "third"],
)
def test_garbage_in_a_stream(channel: grpc.Channel, messages: list[bytes]) -> None:
    """P03: bytes that are no message are INTERNAL, wherever they come, and nothing else is harmed."""
    error = refusal(channel, *messages)
    assert isinstance(error, poolrpc.InternalError)
    assert error.reason == "NO_MESSAGE"


class Held:
    """The messages of a stream, each sent when it is put; the stream stays open until the end is."""

    def __init__(self, *messages: bytes) -> None:
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        for each in messages:
            self._queue.put(each)

    def put(self, message: bytes | None) -> None:
        """Send a message, or None for the end."""
        self._queue.put(message)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        message = self._queue.get()
        if message is None:
            raise StopIteration
        return message


def failure(answers: Any) -> poolrpc.PoolError:
    """Read answers up to their end, which must be an error, and give that."""
    with pytest.raises(grpc.RpcError) as caught:
        list(answers)
    return translate_rpc_error(caught.value)


def readers() -> list[threading.Thread]:
    """Give the threads that read streams ahead, in servers of this process."""
    return [each for each in threading.enumerate() if each.name == "poolrpc-reader"]


def assert_no_reader_stays() -> None:
    """Check that every thread that reads ahead ends by itself."""
    for each in readers():
        each.join(20)
    assert not readers()


@pytest.mark.usefixtures("still_serving")
@pytest.mark.parametrize(
    ("layer", "error"), [(MaxPool2d(9), poolrpc.InvalidArgumentError), (AvgPool2d(2), poolrpc.UnsupportedError)]
)
def test_a_bad_request_is_refused_before_its_blocks(channel: grpc.Channel, layer: poolrpc.Layer, error: type) -> None:
    """A layer that can't be run is refused on the header alone: no block is waited for."""
    request = codec.Request(TensorSpec("int32", (2, 3, 4, 4)), (as_chain(layer),))
    first = pool_pb2.PoolStreamRequest(request=codec.encode_request(request)).SerializeToString()
    messages = Held(first)
    assert isinstance(failure(channel.stream_stream(METHOD)(messages, timeout=20)), error)
    messages.put(None)
    assert_no_reader_stays()


@pytest.mark.usefixtures("small")
def test_a_bad_index_in_a_late_block(pool_each: Callable[..., list[poolrpc.PoolResult]]) -> None:
    """Indices are checked block by block: one out of its plane ends the stream when its turn comes."""
    indices = np.zeros(X.shape, np.int64)
    indices[-1, -1, 3, 3] = 22 * 28
    done: list[int] = []
    with pytest.raises(poolrpc.InvalidArgumentError, match=r"indices: expected indices in 0\.\.615") as caught:
        pool_each(X, [MaxUnpool2d(2)], indices=indices, transport="stream", progress=lambda at, _: done.append(at))
    assert caught.value.violations[0].field == "indices"
    assert max(done, default=0) < 15


@pytest.mark.usefixtures("still_serving")
def test_a_compressed_stream_is_not_inflated(address: str) -> None:
    """P02: blocks that are compressed are refused, as messages are."""
    with grpc.insecure_channel(address, compression=grpc.Compression.Gzip) as channel:
        error = refusal(channel, header(), block(6 * PLANE))
    assert isinstance(error, poolrpc.UnsupportedError | poolrpc.LimitExceededError)


def test_blocks_over_the_servers_message_limit_say_how_to_raise_it() -> None:
    """P01: a server that takes less in a message than a block has says RESOURCE_EXHAUSTED, and the limit's name."""
    with poolrpc_server.embedded(max_message_bytes=500_000) as client:
        with pytest.raises(poolrpc.LimitExceededError, match="--max-message-bytes") as caught:
            client.pool(LARGE, MaxPool2d(2), transport="stream")
        assert caught.value.reason == "MESSAGE_TOO_LARGE"
        assert client.pool(X, MaxPool2d(2), transport="stream").shape == (3, 5, 5, 7)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("bad", [MaxPool2d(500), FractionalMaxPool2d(2, output_size=128)])
def test_a_refused_stream_says_why_while_blocks_are_on_their_way(
    pool_each: Callable[..., list[poolrpc.PoolResult]], bad: poolrpc.Layer
) -> None:
    """The error of a large tensor is the server's, though the client was still sending."""
    for _ in range(10):
        with pytest.raises(poolrpc.InvalidArgumentError, match=r"branches\[0\]\.layers\[0\]"):
            pool_each(LARGE, [bad], transport="stream")


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("client_kind", ["sync", "async"])
def test_what_one_plane_exceeds_is_refused(client_kind: str) -> None:
    """Limits hold for a block, so one plane over them ends the stream, with the limit and the actual value."""
    x = np.zeros((40, 1, 256, 256), np.float32)
    with poolrpc_server.embedded(max_output_bytes=1000) as client, pytest.raises(poolrpc.LimitExceededError) as caught:
        POOL[client_kind](client.address, x, MaxPool2d(2), transport="stream")
    assert caught.value.reason == "OUTPUT_TOO_LARGE"
    assert caught.value.metadata["limit"] == "1000"


def test_a_tensor_over_a_calls_limits_streams() -> None:
    """A tensor, output and work over the limits of a call go through as a stream, whose blocks are under them."""
    layer = LPPool2d(2, 2)
    settings = {"max_message_bytes": 9 * MIB, "max_output_bytes": 3 * MIB, "max_work": layer.work((128, 128)) * 200}
    with poolrpc_server.embedded() as client:
        expected = client.pool(LARGE, layer, transport="unary")
    with poolrpc_server.embedded(**settings) as limited:
        for transport in ("unary", "arena"):
            with pytest.raises(poolrpc.LimitExceededError):
                limited.pool(LARGE, layer, transport=transport)
        assert_same([limited.pool(LARGE, layer, transport="stream")], [expected])


# Streams that stop


def test_a_stream_that_sends_nothing_ends() -> None:
    """P13: by --stream-idle-seconds, with DEADLINE_EXCEEDED; what it held is free and no thread stays."""
    shape = (1, 1, 64, 64)
    x = np.ones(shape, np.float32)
    with (
        poolrpc_server.embedded(stream_idle_seconds=1, max_inflight_bytes=65536) as client,
        PoolClient(client.address, options=NO_RETRIES) as hasty,
        grpc.insecure_channel(client.address) as channel,
    ):
        for sent in ([header(shape)], [header((2, *shape[1:])), block(x.nbytes)]):
            messages = Held(*sent)
            answers = channel.stream_stream(METHOD)(messages, timeout=60)
            for _ in sent:
                next(answers)
            with pytest.raises(poolrpc.UnavailableError) as full:
                hasty.pool(x, MaxPool2d(2), transport="unary")
            assert full.value.reason == "IN_FLIGHT_BYTES"
            error = failure(answers)
            assert isinstance(error, poolrpc.DeadlineExceededError)
            assert error.reason == "STREAM_IDLE"
            assert "expected the next message of the stream within 1 seconds" in str(error)
            messages.put(None)
            assert hasty.pool(x, MaxPool2d(2), transport="unary").output.all()
            assert hasty.pool(x, MaxPool2d(2), transport="stream").output.all()
        assert_no_reader_stays()


def test_a_stream_without_a_header_ends_too() -> None:
    """P13: a caller that opens a stream and says nothing is ended by the idle limit."""
    with poolrpc_server.embedded(stream_idle_seconds=1) as client, grpc.insecure_channel(client.address) as channel:
        messages = Held()
        error = failure(channel.stream_stream(METHOD)(messages, timeout=60))
        messages.put(None)
    assert isinstance(error, poolrpc.DeadlineExceededError)
    assert error.reason == "STREAM_IDLE"
    assert_no_reader_stays()


def test_a_stream_ends_by_its_deadline(caplog: pytest.LogCaptureFixture) -> None:
    """P13: by the caller's deadline; what it held is free, no thread stays, and no error of the server's is logged."""
    shape = (1, 1, 64, 64)
    with (
        caplog.at_level(logging.INFO, "poolrpc_server"),
        poolrpc_server.embedded(max_inflight_bytes=65536) as client,
        grpc.insecure_channel(client.address) as channel,
    ):
        messages = Held(header(shape))
        answers = channel.stream_stream(METHOD)(messages, timeout=0.3)
        next(answers)
        error = failure(answers)
        assert isinstance(error, poolrpc.DeadlineExceededError)
        messages.put(None)
        assert client.pool(np.ones(shape, np.float32), MaxPool2d(2), transport="unary").output.all()
        assert_no_reader_stays()
    (line,) = streams_in(caplog)
    assert line.status in ("CANCELLED", "DEADLINE_EXCEEDED")
    assert "unexpected error" not in caplog.text


def streams_in(caplog: pytest.LogCaptureFixture) -> list[Any]:
    """Give the log's lines of streams."""
    return [each for each in caplog.records if each.getMessage() == "call" and each.method == METHOD]


def test_streams_at_a_time_are_bounded() -> None:
    """One stream more than --max-streams is UNAVAILABLE, with the time to wait; calls are served beside them."""
    with (
        poolrpc_server.embedded(max_streams=2) as client,
        PoolClient(client.address, options=NO_RETRIES) as hasty,
        grpc.insecure_channel(client.address) as channel,
    ):
        held = [Held(header()) for _ in range(2)]
        calls = [channel.stream_stream(METHOD)(each, timeout=60) for each in held]
        for answers in calls:
            next(answers)
        with pytest.raises(poolrpc.UnavailableError, match="at most 2 streams at a time") as caught:
            hasty.pool(X, MaxPool2d(2), transport="stream")
        assert caught.value.reason == "STREAMS"
        assert caught.value.retry_delay > 0
        assert hasty.pool(X, MaxPool2d(2), transport="unary").shape == (3, 5, 5, 7)
        for messages, answers in zip(held, calls, strict=True):
            messages.put(None)
            assert "got 0" in str(failure(answers))
    assert_no_reader_stays()


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("client_kind", ["sync", "async"])
@pytest.mark.parametrize("setting", ["max_streams", "max_inflight_bytes"])
def test_a_stream_that_finds_the_server_full_is_tried_again(setting: str, client_kind: str) -> None:
    """A stream waits until another ends, and then comes whole: no block is lost between the tries."""
    expected = [poolrpc.PoolResult(LARGE.reshape(64, 4, 64, 2, 64, 2).max((3, 5)), ((64, 4, 64, 64),))]
    for _ in range(4):
        with (
            poolrpc_server.embedded(**{setting: 1}) as client,
            grpc.insecure_channel(client.address) as channel,
        ):
            messages = Held(header())
            held = channel.stream_stream(METHOD)(messages, timeout=60)
            next(held)
            # The first try is refused, for nothing but time lets the other stream end.
            release = threading.Timer(0.05, messages.put, [None])
            release.start()
            result = POOL[client_kind](client.address, LARGE, MaxPool2d(2), transport="stream")
            release.join()
            assert_same([result], expected)


# Callers that leave, servers that go


class LeftError(Exception):
    """What a caller's own code raises amid a stream."""


@pytest.fixture
def leaving(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., None]]:
    """Give the way to leave a stream in its middle; then other calls are served, and the log says CANCELLED."""
    with caplog.at_level(logging.INFO, "poolrpc_server"):
        with poolrpc_server.embedded(max_inflight_bytes=2 * MIB) as client:

            def leave(by: Callable[[PoolClient], None]) -> None:
                with PoolClient(client.address) as another:
                    by(another)

            yield leave
            x = LARGE[:4]
            assert_same(
                [client.pool(x, MaxPool2d(2), transport="stream")], [client.pool(x, MaxPool2d(2), transport="unary")]
            )
            assert_no_reader_stays()
            for each in [each for each in threading.enumerate() if each.name.startswith("poolrpc-stream")]:
                each.join(20)
                assert not each.is_alive()
        # The other streams may have been refused before the one that was left had ended.
        statuses = [each.status for each in streams_in(caplog)]
        assert statuses.count("CANCELLED") == 1
        assert set(statuses) <= {"CANCELLED", "OK", "UNAVAILABLE"}
        assert "unexpected error" not in caplog.text


@pytest.mark.usefixtures("many_blocks")
def test_progress_may_raise(leaving: Callable[..., None]) -> None:
    """P08: what progress raises is the caller's to catch, and ends the stream."""

    def leave(client: PoolClient) -> None:
        def progress(*_: int) -> None:
            raise LeftError

        with pytest.raises(LeftError):
            client.pool(LARGE, MaxPool2d(2), transport="stream", progress=progress)

    leaving(leave)


@pytest.mark.usefixtures("many_blocks")
def test_a_client_may_be_closed_amid_a_stream(leaving: Callable[..., None]) -> None:
    """P08: closing the client ends its streams, with a CancelledError of poolrpc's."""

    def leave(client: PoolClient) -> None:
        with pytest.raises(poolrpc.CancelledError):
            client.pool(LARGE, MaxPool2d(2), transport="stream", progress=lambda *_: client.close())

    leaving(leave)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("how", ["raise", "cancel", "close"])
def test_an_async_caller_may_leave(leaving: Callable[..., None], how: str) -> None:
    """P08: a task that is cancelled, or whose progress raises, or whose client is closed, ends its stream."""

    async def run(address: str) -> None:
        client = AsyncPoolClient(address)
        closing: list[asyncio.Task[None]] = []

        def progress(*_: int) -> None:
            if how == "raise":
                raise LeftError
            if how == "cancel":
                task.cancel()
            elif not closing:
                closing.append(asyncio.create_task(client.close()))

        task = asyncio.create_task(client.pool(LARGE, MaxPool2d(2), transport="stream", progress=progress))
        errors = {
            "raise": LeftError,
            "cancel": asyncio.CancelledError,
            "close": (poolrpc.CancelledError, asyncio.CancelledError),
        }
        with pytest.raises(errors[how]):
            await task
        await asyncio.gather(*closing)
        await client.close()

    leaving(lambda client: asyncio.run(run(client.address)))


@pytest.mark.slow
@pytest.mark.usefixtures("many_blocks")
def test_streams_opened_and_reset_leave_nothing() -> None:
    """P09: the server's memory and threads are where they were after 1000 streams that were reset in their middle."""

    def streamed(line: dict[str, Any]) -> bool:
        return line["event"] == "call" and line["method"] == METHOD

    class Reset:
        def __init__(self) -> None:
            self.count = 0

        def __call__(self, *_: int) -> None:
            self.count += 1
            raise LeftError

    with serving("--max-streams", "64", "--call-threads", "96") as server, PoolClient(server.address) as client:
        process, reset, x = psutil.Process(server.process.pid), Reset(), LARGE[:48]

        def measure(times: int) -> tuple[int, int]:
            for _ in range(times):
                with pytest.raises(LeftError):
                    client.pool(x, MaxPool2d(2), transport="stream", progress=reset)
            # Each call takes its time; when as many streams have their line in the log as were reset, all have ended.
            for _ in range(10_000):
                client.server_info()
                if sum(streamed(each) for each in server.log) >= reset.count:
                    break
            return process.memory_info().rss, process.num_threads()

        rss, threads = measure(20)
        after = measure(1000)
    lines = [each for each in server.log if streamed(each)]
    assert reset.count == len(lines) == 1020
    # gRPC may tell of the end of the messages before it tells that the call was reset: then some are missing.
    assert {each["status"] for each in lines} <= {"CANCELLED", "INVALID_ARGUMENT"}
    assert after[0] < rss + 24 * MIB
    assert after[1] <= threads + 4
    assert not [each for each in server.log if each["event"] == "unexpected error"]


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("client_kind", ["sync", "async"])
def test_a_server_that_dies_amid_a_stream(client_kind: str) -> None:
    """A server that is killed in mid-stream is an UnavailableError, at once."""
    with serving() as server:
        killed: list[float] = []

        def kill(*_: int) -> None:
            if not killed:
                server.process.send_signal(signal.SIGKILL)
                server.process.wait()
                killed.append(time.monotonic())

        options = {"transport": "stream", "progress": kill}
        with pytest.raises(poolrpc.UnavailableError):
            POOL[client_kind](server.address, LARGE, MaxPool2d(2), **options)
        assert time.monotonic() - killed[0] < 10


@pytest.mark.usefixtures("many_blocks")
def test_a_server_that_stops_finishes_its_streams() -> None:
    """A stream under way at SIGTERM comes whole within the grace."""
    with serving("--drain-seconds", "0") as server, PoolClient(server.address) as client:
        signals: list[int] = []

        def stop(*_: int) -> None:
            if not signals:
                server.process.send_signal(signal.SIGTERM)
                signals.append(signal.SIGTERM)

        result = client.pool(LARGE, MaxPool2d(2), transport="stream", progress=stop)
        np.testing.assert_array_equal(result.output, LARGE.reshape(64, 4, 64, 2, 64, 2).max((3, 5)))
        assert server.wait() == 0


def test_a_stream_does_not_keep_a_server_that_stops() -> None:
    """A stream that says nothing ends with the grace, and then the server does, by itself and without an error."""
    flags = ["--drain-seconds", "0", "--shutdown-grace", "1"]
    with serving(*flags) as server, grpc.insecure_channel(server.address) as channel:
        messages = Held(header())
        answers = channel.stream_stream(METHOD)(messages, timeout=60)
        next(answers)
        server.process.send_signal(signal.SIGTERM)
        assert isinstance(failure(answers), poolrpc.UnavailableError | poolrpc.CancelledError)
        messages.put(None)
        assert server.wait(20) == 0
    assert not [each for each in server.log if each["event"] == "unexpected error"]


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("client_kind", ["sync", "async"])
def test_a_deadline_amid_a_stream(gate: Gate, client_kind: str) -> None:
    """A stream whose blocks aren't computed in time is a DeadlineExceededError, while the client still has some."""
    with poolrpc_server.embedded(threads=1) as client:
        for timeout in (0.001, 0.01, 0.3):
            options = {"transport": "stream", "timeout": timeout}
            with pytest.raises(poolrpc.DeadlineExceededError):
                POOL[client_kind](client.address, LARGE, FractionalMaxPool2d(2, output_size=8), **options)
        gate.opened.set()
        assert client.pool(LARGE, MaxPool2d(2), transport="stream").shape == (64, 4, 64, 64)
    assert_no_reader_stays()


async def test_a_timeout_counts_while_other_streams_are_under_way(gate: Gate) -> None:
    """However many streams an asyncio client has, a further one ends by its own timeout."""
    with poolrpc_server.embedded(threads=1, max_streams=64, call_threads=96) as embedded:
        async with AsyncPoolClient(embedded.address) as client:
            x = LARGE[:1]
            held = [
                asyncio.create_task(client.pool(x, FractionalMaxPool2d(2, output_size=8), transport="stream"))
                for _ in range(40)
            ]
            assert await asyncio.to_thread(gate.entered.wait, 20)
            try:
                with pytest.raises(poolrpc.DeadlineExceededError):
                    await asyncio.wait_for(client.pool(x, MaxPool2d(2), transport="stream", timeout=0.5), 10)
            finally:
                gate.opened.set()
            assert {each.shape for each in await asyncio.gather(*held)} == {(1, 4, 8, 8)}


def test_a_caller_that_never_reads_is_ended() -> None:
    """P13: a caller that sends blocks and reads none of the answers is ended by the idle limit, and others served."""
    shape = (4096, 1, 64, 64)
    with (
        poolrpc_server.embedded(stream_idle_seconds=1, max_streams=1) as client,
        grpc.insecure_channel(client.address, [*NO_RETRIES.items()]) as channel,
    ):
        blocks = itertools.repeat(block(64 * 64 * 64 * 4), 64)
        answers = channel.stream_stream(METHOD)(itertools.chain([header(shape, MaxPool2d(1))], blocks), timeout=60)
        next(answers)
        (reader,) = readers()
        reader.join(10)
        assert not reader.is_alive()
        assert client.pool(X, MaxPool2d(2), transport="stream", timeout=20).shape == (3, 5, 5, 7)
        answers.cancel()


def test_memory_is_bounded_by_the_blocks(tmp_path: Path) -> None:
    """A file of 64 MiB goes to another file while neither process grows by as much as the tensor."""
    shape = (1024, 4, 64, 64)
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=shape)
    x[...] = RNG.standard_normal(shape[1:], np.float32)
    y = np.memmap(tmp_path / "y", np.float32, "w+", shape=(1024, 4, 32, 32))
    with serving("--threads", "1") as server, PoolClient(server.address) as client:
        client.pool(x[:64], MaxPool2d(2), transport="stream")
        processes = [psutil.Process(server.process.pid), psutil.Process()]

        def own() -> list[int]:
            return [each.memory_info().rss - each.memory_info().shared for each in processes]

        before, peaks = own(), [own()]
        result = client.pool(x, MaxPool2d(2), out=y, progress=lambda *_: peaks.append(own()))
    assert result.transport == "stream"
    assert len(peaks) > 30
    grown = [max(each) - start for each, start in zip(zip(*peaks, strict=True), before, strict=True)]
    assert max(grown) < x.nbytes, grown
    np.testing.assert_array_equal(y[::100], x[::100].reshape(-1, 4, 32, 2, 32, 2).max((3, 5)))
