"""PoolStream's messages: what is rejected of them, and the limits of a stream's blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

import poolrpc
import poolrpc_server
from poolrpc import AvgPool2d, FractionalMaxPool2d, LPPool2d, MaxPool2d, MaxUnpool2d, PoolClient
from tests.integration.stream_messages import (
    LARGE,
    METHOD,
    MIB,
    NO_RETRIES,
    OpenStream,
    assert_no_reader_stays,
    block,
    error_of,
    header,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integration.conftest import Connect

RNG = np.random.default_rng(7)
X = RNG.standard_normal((3, 5, 11, 14), np.float32)


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    """Return a channel to the server, without retries."""
    with grpc.insecure_channel(address, [*NO_RETRIES.items(), ("grpc.max_send_message_length", -1)]) as made:
        yield made


@pytest.fixture
def still_serving(client: PoolClient) -> Iterator[None]:
    """Check after the test that the server answers calls and streams."""
    yield
    for transport in ("unary", "stream"):
        output = client.pool(X[:, :, :10], MaxPool2d(2), transport=transport).output
        np.testing.assert_array_equal(output, X[:, :, :10].reshape(3, 5, 5, 2, 7, 2).max((3, 5)))


def rejection(channel: grpc.Channel, *messages: bytes) -> poolrpc.PoolError:
    """Send messages that must be rejected, and return the error."""
    return error_of(channel.stream_stream(METHOD)(iter(messages), timeout=60))


PLANE = 64  # bytes of a plane of 4 x 4
OVERSIZED = (1, 9, 512, 512), MIB
"""Nine planes of a megabyte; a block has at most eight."""

INVALID = {
    "fewer planes": ([header(), block(3 * PLANE)], "payload", "expected 6 planes, as the request says, got 3"),
    "no planes": ([header()], "payload", "expected 6 planes, as the request says, got 0"),
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
    "header inside a block": ([header(), block(PLANE, unfinished=True), header()], "request", "first message alone"),
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
    "oversized in parts": (
        [header(OVERSIZED[0]), *[block(4 * MIB, unfinished=True)] * 2, block(1)],
        "payload",
        f"expected a block of at most {8 * MIB} bytes, got {8 * MIB + 1}",
    ),
    "oversized for the tensor": ([header(), block(7 * PLANE)], "payload", "at most 384 bytes, got 448"),
    "bad layer": ([header((2, 3, 4, 4), MaxPool2d(9)), block(6 * PLANE)], "kernel_size", "at most the padded input"),
    "bad shape": ([header((2, 0, 4, 4)), block(6 * PLANE)], "shape", "expected"),
}


@pytest.mark.usefixtures("still_serving")
@pytest.mark.parametrize("case", INVALID)
def test_blocks_must_match_the_header(channel: grpc.Channel, case: str) -> None:
    """A wrong number of planes, blocks that are cut wrongly and misplaced headers are INVALID_ARGUMENT."""
    messages, field, words = INVALID[case]
    error = rejection(channel, *messages)
    assert isinstance(error, poolrpc.InvalidArgumentError), error
    assert error.violations[0].field.endswith(field)
    assert words in str(error)


@pytest.mark.usefixtures("still_serving")
@pytest.mark.parametrize(
    "messages",
    [[b"\xff" * 100], [header(), b"\xff" * 100], [header(), block(PLANE), b"\xff"]],
    ids=["first", "second", "third"],
)
def test_bytes_that_are_not_a_message(channel: grpc.Channel, messages: list[bytes]) -> None:
    """Bytes that do not parse are INTERNAL at any position, and the server goes on."""
    error = rejection(channel, *messages)
    assert isinstance(error, poolrpc.InternalError)
    assert error.reason == "NO_MESSAGE"


@pytest.mark.usefixtures("still_serving")
@pytest.mark.parametrize(
    ("layer", "error"), [(MaxPool2d(9), poolrpc.InvalidArgumentError), (AvgPool2d(2), poolrpc.UnsupportedError)]
)
def test_a_bad_header_is_rejected_before_any_block(channel: grpc.Channel, layer: poolrpc.Layer, error: type) -> None:
    """A layer that cannot run is rejected by the header alone, while the stream is still open."""
    messages = OpenStream(header((2, 3, 4, 4), layer, dtype="int32"))
    assert isinstance(error_of(channel.stream_stream(METHOD)(messages, timeout=60)), error)
    messages.end()
    assert_no_reader_stays()


@pytest.mark.usefixtures("still_serving")
def test_a_compressed_stream_is_not_decompressed(address: str) -> None:
    """Compressed blocks are rejected, like compressed messages."""
    with grpc.insecure_channel(address, compression=grpc.Compression.Gzip) as channel:
        error = rejection(channel, header(), block(6 * PLANE))
    assert isinstance(error, poolrpc.UnsupportedError | poolrpc.LimitExceededError)


def test_indices_are_checked_block_by_block(connect: Connect, address: str, stream_in: Callable[..., None]) -> None:
    """An index outside of its plane, in the last block, ends the stream with INVALID_ARGUMENT."""
    stream_in(1900)
    indices = np.zeros(X.shape, np.int64)
    indices[-1, -1, 3, 3] = 22 * 28
    done: list[int] = []
    with pytest.raises(poolrpc.InvalidArgumentError, match=r"indices: expected indices in 0\.\.615") as caught:
        connect(address).pool(
            X, MaxUnpool2d(2), indices=indices, transport="stream", progress=lambda at, _: done.append(at)
        )
    assert caught.value.violations[0].field == "indices"
    assert max(done, default=0) < 15


def test_blocks_over_the_message_limit_say_how_to_raise_it() -> None:
    """A server whose message limit is below a block's size answers RESOURCE_EXHAUSTED with the flag's name."""
    with poolrpc_server.embedded(max_message_bytes=500_000) as client:
        with pytest.raises(poolrpc.LimitExceededError, match="--max-message-bytes") as caught:
            client.pool(LARGE, MaxPool2d(2), transport="stream")
        assert caught.value.reason == "MESSAGE_TOO_LARGE"
        assert client.pool(X, MaxPool2d(2), transport="stream").shape == (3, 5, 5, 7)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("bad", [MaxPool2d(500), FractionalMaxPool2d(2, output_size=128)])
def test_the_servers_error_arrives_while_blocks_are_sent(connect: Connect, address: str, bad: poolrpc.Layer) -> None:
    """The client raises the server's error, although it was still sending."""
    client = connect(address)
    for _ in range(5):
        with pytest.raises(poolrpc.InvalidArgumentError, match=r"branches\[0\]\.layers\[0\]"):
            client.pool(LARGE, bad, transport="stream")


@pytest.mark.usefixtures("many_blocks")
def test_limits_hold_for_each_block(connect: Connect) -> None:
    """A plane whose output is over the limit ends the stream, with the limit and the actual value."""
    x = np.zeros((40, 1, 256, 256), np.float32)
    with (
        poolrpc_server.embedded(max_output_bytes=1000) as server,
        pytest.raises(poolrpc.LimitExceededError) as caught,
    ):
        connect(server.address).pool(x, MaxPool2d(2), transport="stream")
    assert caught.value.reason == "OUTPUT_TOO_LARGE"
    assert caught.value.metadata["limit"] == "1000"


def test_a_tensor_over_the_limits_of_a_call_can_be_streamed() -> None:
    """A tensor whose bytes, output and work are over the limits streams, because each of its blocks is under them."""
    layer = LPPool2d(2, 2)
    settings = {"max_message_bytes": 9 * MIB, "max_output_bytes": 3 * MIB, "max_work": layer.work((128, 128)) * 200}
    with poolrpc_server.embedded() as client:
        expected = client.pool(LARGE, layer, transport="unary").output
    with poolrpc_server.embedded(**settings) as limited:
        for transport in ("unary", "arena"):
            with pytest.raises(poolrpc.LimitExceededError):
                limited.pool(LARGE, layer, transport=transport)
        np.testing.assert_array_equal(limited.pool(LARGE, layer, transport="stream").output, expected)
