"""A bad input has the same error by every path, and none of it is sent: class, reason, fields and text."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

import poolrpc
from poolrpc import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    AvgPool3d,
    FractionalMaxPool2d,
    GlobalPool2d,
    MaxPool2d,
    MaxUnpool2d,
    PoolError,
)
from poolrpc._transport.channel import stream_method
from poolrpc._transport.options import CallOptions
from poolrpc._transport.request import Transfer, prepare_single
from poolrpc._transport.stream import StreamCall
from poolrpc.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.conftest import Connect

X = np.zeros((1, 3, 8, 8), np.float32)
INDICES = np.zeros(X.shape, np.int64)
TWICE = MaxPool2d(2)

# What is passed to pool, and the class and text of the error.
INVALID: dict[str, tuple[dict[str, Any], type[PoolError], str]] = {
    "rank": ({"x": X[0, 0]}, poolrpc.InvalidArgumentError, "input.shape: expected 4 dims (N, C, spatial...) or 3 dims"),
    "rank of a stream": (
        {"x": np.zeros((2**12, 2**10), np.float32)},
        poolrpc.InvalidArgumentError,
        "input.shape: expected 4 dims",
    ),
    "no channels": ({"x": X[:, :0]}, poolrpc.InvalidArgumentError, "input.shape: expected every dim to be 1 to"),
    "no rows": ({"x": X[:, :, :0]}, poolrpc.InvalidArgumentError, "input.shape: expected every dim to be 1 to"),
    "no channels, channels last": (
        {"x": X[..., :0], "layout": "NHWC"},
        poolrpc.InvalidArgumentError,
        "input.shape: expected every dim to be 1 to",
    ),
    "rank of a global layer": (
        {"x": X[0, 0], "layers": GlobalPool2d("max")},
        poolrpc.InvalidArgumentError,
        "input.shape: expected 4 dims",
    ),
    "kernel": (
        {"layers": [TWICE, MaxPool2d(9)]},
        poolrpc.InvalidArgumentError,
        "branches[0].layers[1].max_pool.kernel_size: expected an effective kernel of at most the padded input, 4",
    ),
    "dilation": (
        {"layers": MaxPool2d(1, dilation=9)},
        poolrpc.InvalidArgumentError,
        "branches[0].layers[0].max_pool.dilation: expected at most the padded input, 8, got 9",
    ),
    "numbers of axes": (
        {"layers": [TWICE, AvgPool3d(1)]},
        poolrpc.InvalidArgumentError,
        "branches[0].layers[1].avg_pool: expected a 2d layer like the ones before, got AvgPool3d",
    ),
    "window of a fractional layer": (
        {"layers": FractionalMaxPool2d(8, 2)},
        poolrpc.InvalidArgumentError,
        "branches[0].layers[0].fractional_max_pool.",
    ),
    "dtype": (
        {"x": X.astype(np.int32), "layers": AvgPool2d(2)},
        poolrpc.UnsupportedError,
        "branches[0].layers[0].avg_pool: AvgPool2d takes float16, bfloat16, float32, float64, int64, got int32; put ",
    ),
    "dtype of a later layer": (
        {"x": X.astype(np.uint8), "layers": [TWICE, AdaptiveAvgPool2d(1)]},
        poolrpc.UnsupportedError,
        "branches[0].layers[1].adaptive_avg_pool: AdaptiveAvgPool2d takes",
    ),
    "bool": ({"x": X.astype(bool)}, poolrpc.UnsupportedError, "branches[0].layers[0].max_pool: MaxPool2d takes"),
    "dtype of no layer": ({"x": X.astype(complex)}, poolrpc.UnsupportedError, "expected one of float16, "),
    "indices in the middle": (
        {"layers": [MaxPool2d(2, return_indices=True), TWICE]},
        poolrpc.InvalidArgumentError,
        "branches[0].layers[0].max_pool.return_indices: expected return_indices only on the last layer",
    ),
    "unpooling later": (
        {"layers": [TWICE, MaxUnpool2d(2)]},
        poolrpc.InvalidArgumentError,
        "branches[0].layers[1].max_unpool: expected MaxUnpool2d first in its chain",
    ),
    "unpooling without indices": (
        {"layers": MaxUnpool2d(2)},
        poolrpc.InvalidArgumentError,
        "indices: expected the indices for MaxUnpool2d, got none",
    ),
    "indices without unpooling": (
        {"indices": INDICES},
        poolrpc.InvalidArgumentError,
        "indices: expected no operand for MaxPool2d, got indices",
    ),
    "dtype of indices": (
        {"layers": MaxUnpool2d(2), "indices": INDICES.astype(np.int32)},
        poolrpc.InvalidArgumentError,
        "indices.dtype: expected int64, got int32",
    ),
    "shape of indices": (
        {"layers": MaxUnpool2d(2), "indices": INDICES[..., :4]},
        poolrpc.InvalidArgumentError,
        "indices.shape: expected the input's (1, 3, 8, 8) in NCHW, got (1, 3, 8, 4) in NCHW",
    ),
    "indices of another type": (
        {"layers": MaxUnpool2d(2), "indices": object()},
        poolrpc.InvalidArgumentError,
        "indices: expected an array, a tensor or a nested list of numbers, got 'object'",
    ),
    "too many layers": (
        {"layers": [MaxPool2d(1)] * 65},
        poolrpc.LimitExceededError,
        "branches[0].layers: expected at most 64, got 65",
    ),
    "no layers": ({"layers": []}, poolrpc.InvalidArgumentError, "layers: expected a layer or a sequence of layers"),
    "layout": ({"layout": "CHWN"}, poolrpc.InvalidArgumentError, "layout: expected one of NCHW, NHWC, got 'CHWN'"),
    "no array": ({"x": object()}, poolrpc.InvalidArgumentError, "input: expected an array, a tensor or a nested list"),
    "ragged list": ({"x": [[1.0], [2.0, 3.0]]}, poolrpc.InvalidArgumentError, "input: "),
    "masked": (
        {"x": np.ma.masked_equal(X, 0)},
        poolrpc.InvalidArgumentError,
        "input: expected an array without a mask",
    ),
}

PATHS = ("default", "unary", "stream", "arena", "local", "pool_each", "map")


def described(error: PoolError) -> tuple[object, ...]:
    """Return all that a program may look at."""
    return type(error), error.reason, getattr(error, "violations", ()), error.metadata, error.message


def call(client: Any, path: str, arguments: dict[str, Any]) -> object:
    """Make a call by a path."""
    options = {"x": X, "layers": TWICE, **arguments}
    x, layers = options.pop("x"), options.pop("layers")
    match path:
        case "map":
            return list(client.map([x], layers, **options))
        case "pool_each":
            return client.pool_each(x, [layers], **options)
        case "default":
            return client.pool(x, layers, **options)
        case _:
            return client.pool(x, layers, transport=path, **options)


def error_by(client: Any, path: str, arguments: dict[str, Any]) -> PoolError:
    """Return the error of a call by a path."""
    with pytest.raises(PoolError) as raised:
        call(client, path, arguments)
    return raised.value


@pytest.mark.parametrize("case", INVALID)
def test_a_bad_input_has_one_error_by_every_path(connect: Connect, unix_address: str, case: str) -> None:
    """Unary, stream, arena, local, map and asyncio raise the same error, whether there is a server or not."""
    arguments, cls, text = INVALID[case]
    errors = [
        described(error_by(client, path, arguments))
        for client in (connect(unix_address), connect("127.0.0.1:1", timeout=5))
        for path in PATHS
        if not (path == "map" and "indices" in arguments)
    ]
    assert set(map(repr, errors)) == {repr(errors[0])}
    assert errors[0][0] is cls
    assert str(errors[0][-1]).startswith(text)


@pytest.mark.parametrize(
    ("layers", "steps", "text"),
    [
        ([TWICE] * 2, [2], "steps: expected 0 to 1, got 2"),
        ([TWICE] * 2, [-1], "steps: expected 0 to 1, got -1"),
        ([TWICE] * 2, [0.0], "steps: expected an integer, got 0.0"),
        ([TWICE] * 2, [True], "steps: expected an integer, got True"),
        ([TWICE] * 2, "01", "steps: expected an integer, got '0'"),
        ([TWICE] * 2, 1, "steps: expected the numbers of layers, got 1"),
        ([TWICE] * 2, [], "steps: expected the number of at least one layer, got none"),
        ([TWICE] * 2, [1, 0], "branches[0].outputs: expected numbers of layers in ascending order, each in 0..1, got"),
        ([TWICE] * 2, [1, 1], "branches[0].outputs: expected numbers of layers in ascending order, each in 0..1, got"),
        (
            [MaxPool2d(2, return_indices=True), TWICE],
            [1],
            "branches[0].layers[0].max_pool.return_indices: expected return_indices only on layers (1,), whose outputs",
        ),
        ([TWICE, AvgPool3d(2)], None, "branches[0].layers[1].avg_pool: expected a 2d layer"),
        ([], None, "layers: expected a layer or a sequence of layers"),
    ],
    ids=repr,
)
def test_steps_are_checked_before_they_are_sent(
    connect: Connect, unix_address: str, layers: Any, steps: Any, text: str
) -> None:
    """pool_steps raises one error by every transport, with a server and without one."""
    errors = []
    for client in (connect(unix_address), connect("127.0.0.1:1", timeout=5)):
        for transport in (None, "unary", "stream", "arena"):
            with pytest.raises(poolrpc.InvalidArgumentError) as raised:
                client.pool_steps(X, layers, steps, transport=transport)
            errors.append(repr(described(raised.value)))
    assert len(set(errors)) == 1
    assert raised.value.message.startswith(text)


@pytest.mark.parametrize(
    "case", ["rank", "no channels", "kernel", "dtype", "bool", "indices in the middle", "numbers of axes"]
)
def test_the_command_has_the_same_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    """The command prints the text of the client's error in one line, also without a server."""
    arguments, _, text = INVALID[case]
    np.save(tmp_path / "x.npy", arguments.get("x", X))
    layers = repr(arguments.get("layers", TWICE))
    command = ["pool", str(tmp_path / "x.npy"), "--layer", layers, "--address", "127.0.0.1:1", "--timeout", "5"]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"poolrpc: {text}")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("shape", "layers", "text"),
    [
        ((8, 8), TWICE, "shape: expected 4 dims"),
        ((1, 0, 8, 8), TWICE, "shape: expected every dim"),
        ((1, 3, 8, 8), MaxPool2d(9), "branches[0].layers[0].max_pool.kernel_size: expected"),
        ((1, 3, 8, -8), TWICE, "shape: expected 0 to"),
        ((1, 3, 8, 8.0), TWICE, "shape: expected an integer, got 8.0"),
    ],
    ids=["rank", "no channels", "kernel", "negative", "float"],
)
def test_a_shape_is_checked_before_it_is_sent(
    connect: Connect, unix_address: str, shape: Any, layers: Any, text: str
) -> None:
    """output_shape raises the same error with a server and without one."""
    errors = []
    for address in (unix_address, "127.0.0.1:1"):
        with pytest.raises(poolrpc.InvalidArgumentError) as raised:
            connect(address, timeout=5).output_shape(shape, layers)
        errors.append(described(raised.value))
    assert errors[0] == errors[1]
    assert str(errors[0][-1]).startswith(text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"in_flight": 0}, "in_flight: expected 1 to 64, got 0"),
        ({"in_flight": 65}, "in_flight: expected 1 to 64, got 65"),
        ({"in_flight": 1.0}, "in_flight: expected an integer, got 1.0"),
        ({"in_flight": True}, "in_flight: expected an integer, got True"),
        ({"in_flight": "4"}, "in_flight: expected an integer, got '4'"),
        ({"timeout": 0}, "timeout: expected a number above 0, got 0"),
        ({"timeout": "5"}, "timeout: expected a number, got '5'"),
        ({"layout": "CHWN"}, "layout: expected one of NCHW, NHWC"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("cls", [poolrpc.PoolClient, poolrpc.AsyncPoolClient])
def test_a_map_is_checked_where_it_is_called(cls: Any, options: dict[str, Any], text: str) -> None:
    """The settings of a map are checked before its iterator is used, and not as the fault of a tensor."""
    client = cls("127.0.0.1:1")
    with pytest.raises(poolrpc.InvalidArgumentError) as raised:
        client.map([], TWICE, **options)
    assert raised.value.message.startswith(text)
    closed = client.close()
    if closed is not None:
        asyncio.run(closed)


def test_the_numbers_of_a_map_may_be_numpys(connect: Connect, unix_address: str) -> None:
    """Any integer and any number are taken."""
    results = connect(unix_address).map([X] * 3, TWICE, in_flight=np.int64(2), timeout=np.float32(60))
    assert len(list(results)) == 3


class Breaking(np.ndarray):
    """An array whose bytes cannot be read, as those of a file on a disk that fails."""

    def reshape(self, *_: Any, **__: Any) -> Any:
        """Fail."""
        raise OSError(5, "Input/output error")


def test_what_a_streams_messages_raise_is_raised(address: str) -> None:
    """An error while a stream's messages are made is not replaced by gRPC's."""
    x = np.zeros((2, 3, 8, 8), np.float32).view(Breaking)
    transfer = Transfer(prepare_single("float32", x.shape, "NCHW", ((TWICE,),)), [x])
    with grpc.insecure_channel(address) as channel, pytest.raises(OSError, match="Input/output error"):
        StreamCall(stream_method(channel), transfer, CallOptions(30, ()), lambda: False).run(None)
