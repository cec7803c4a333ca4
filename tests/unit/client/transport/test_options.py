"""The options of a call, and the choice of its transport."""

import math
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from poolrpc import InvalidArgumentError, LPPool2d, MaxPool2d
from poolrpc._transport import options
from poolrpc._transport.options import (
    CallOptions,
    call_metadata,
    check_transport,
    default_transport,
    seconds,
    transport_by_size,
)
from tests.unit.client.transport.peer import make_transfer

X = np.zeros((2, 3, 8, 8), np.float32)
LIMIT = 10 * X.nbytes


def test_a_call_without_timeout_has_no_deadline():
    """None is no limit."""
    assert CallOptions(None, ()).time_remaining() is None


def test_the_deadline_is_fixed_at_the_start():
    """Each attempt has what remains of the timeout, and the metadata added before it."""
    call = CallOptions(10.0, (("a", "1"),))
    first = call.arguments()
    time.sleep(0.001)
    call.add_metadata({"b": "2"})
    second = call.arguments()
    assert 0 < second["timeout"] < first["timeout"] <= 10
    assert (first["metadata"], second["metadata"]) == ((("a", "1"),), (("a", "1"), ("b", "2")))


@pytest.mark.parametrize("transport", ["", "Unary", "grpc", 1, b"unary"])
def test_an_unknown_transport_is_rejected(transport):
    """A transport is one of three, or None for the fastest."""
    for known in ("unary", "stream", "arena", None):
        check_transport(known)
    with pytest.raises(
        InvalidArgumentError, match=r"^transport: expected one of unary, stream, arena, local or None, got"
    ):
        check_transport(transport)


def test_the_transport_is_chosen_by_size():
    """Large tensors are streamed and others sent in a message; unsplittable ones are streamed if a message can't be."""
    size = X.nbytes
    assert transport_by_size(make_transfer(X, MaxPool2d(2)), LIMIT, stream_min_bytes=size) == "stream"
    assert transport_by_size(make_transfer(X, LPPool2d(2, 2)), LIMIT, stream_min_bytes=size) == "stream"
    assert transport_by_size(make_transfer(X, LPPool2d(3, 2)), LIMIT, stream_min_bytes=size) == "unary"
    assert transport_by_size(make_transfer(X, LPPool2d(3, 2)), size - 1, stream_min_bytes=size) == "stream"
    assert transport_by_size(make_transfer(X, MaxPool2d(2)), LIMIT, stream_min_bytes=size + 1) == "unary"


@pytest.mark.parametrize(
    ("nbytes", "found", "chosen"),
    [
        (options.ARENA_MIN_BYTES - 4, False, "unary"),
        (options.ARENA_MIN_BYTES - 4, True, "unary"),
        (options.ARENA_MIN_BYTES, False, "arena"),
        (options.ARENA_MAX_BYTES, False, "arena"),
        (options.ARENA_MAX_BYTES + 4, False, "stream"),
        (options.ARENA_MAX_BYTES + 4, True, "arena"),
    ],
)
def test_an_arena_is_chosen_by_size_unless_the_tensor_is_in_one(nbytes, found, chosen):
    """On a unix socket, small tensors are sent, and very large ones are not copied to an arena."""
    x = np.broadcast_to(np.float32(0), (1, 1, 1, nbytes // 4))
    assert (
        default_transport(make_transfer(x, MaxPool2d(1)), SimpleNamespace(find=lambda _: found or None), 2**40)
        == chosen
    )
    without = default_transport(make_transfer(x, MaxPool2d(1)), None, 2**40)
    assert without == ("unary" if nbytes < options.STREAM_MIN_BYTES else "stream")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (60, 60.0),
        (0.5, 0.5),
        (np.float16(60), 60.0),
        (np.float32(60), 60.0),
        (np.int64(3), 3.0),
        (None, None),
        (math.inf, None),
        (1e10, None),
        (sys.maxsize, None),
    ],
)
def test_a_timeout_is_any_number_of_seconds(given: object, expected: float | None) -> None:
    """Every type of number is taken; gRPC would fail on some, and at once on one that is too long for its clock."""
    value = seconds("timeout", given)
    assert value == expected
    assert type(value) in {float, type(None)}


@pytest.mark.parametrize("given", [0, -1, math.nan, -math.inf, "5", b"5", True, [1.0], np.ones(2), object(), 10**400])
def test_what_is_no_time_is_rejected(given: object) -> None:
    """The error names the parameter and what was received."""
    with pytest.raises(InvalidArgumentError, match=r"^timeout: expected a number"):
        seconds("timeout", given)


OWN = (("a", "1"), ("b", "2"), ("b", "3"), ("priority", "1"), ("authorization", "Bearer secret"))


@pytest.mark.parametrize(
    ("priority", "metadata", "expected"),
    [
        (None, (), OWN),
        (None, {}, OWN),
        (None, iter([]), OWN),
        (0, (), (*OWN[:3], OWN[4], ("priority", "0"))),
        (np.int64(2), (), (*OWN[:3], OWN[4], ("priority", "2"))),
        (None, {"priority": "2"}, (*OWN[:3], OWN[4], ("priority", "2"))),
        (None, {"B": "4"}, (OWN[0], *OWN[3:], ("b", "4"))),
        (None, [("c", "4"), ["C", "5"]], (*OWN, ("c", "4"), ("c", "5"))),
        (1, iter([("b", "")]), (OWN[0], OWN[4], ("b", ""), ("priority", "1"))),
        (None, {"x-bin": b"\x00\xff"}, (*OWN, ("x-bin", b"\x00\xff"))),
    ],
)
def test_the_metadata_of_a_call(priority, metadata, expected):
    """A call's pairs are added to the client's, in place of those with the same keys; keys are in lower case."""
    assert call_metadata(OWN, priority, metadata) == expected


@pytest.mark.parametrize("priority", [-1, 3, "0", 1.0, True, math.nan])
def test_an_unknown_priority_is_rejected(priority):
    """A priority is 0, 1 or 2."""
    with pytest.raises(InvalidArgumentError, match=r"^priority: expected"):
        call_metadata(OWN, priority, ())


def test_two_priorities_are_rejected():
    """A call has one priority, as an argument or in the metadata."""
    with pytest.raises(InvalidArgumentError, match=r"^priority: expected a priority or one in the metadata, got both"):
        call_metadata(OWN, 1, {"Priority": "1"})


@pytest.mark.parametrize(
    "metadata",
    [
        "a",
        b"a",
        3,
        None,
        ["ab"],
        [("a",)],
        [("a", "secret", "c")],
        {"": "secret"},
        {1: "secret"},
        {"a b": "secret"},
        {"\xe4": "secret"},
        {"grpc-timeout": "secret"},
        {"GRPC-Timeout": "secret"},
        {"a": 1},
        {"a": b"secret"},
        {"a": "secret\n"},
        {"a": "secret\xe4"},
        {"a-bin": "secret"},
        {"Authorization": "Bearer secret"},
    ],
    ids=repr,
)
def test_metadata_that_cannot_be_sent_is_rejected(metadata):
    """The error comes before gRPC's, names the parameter, and has no value, which may be secret."""
    with pytest.raises(InvalidArgumentError, match=r"^metadata: expected") as raised:
        call_metadata(OWN, None, metadata)
    assert "secret" not in str(raised.value)
