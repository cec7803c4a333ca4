"""Errors to gRPC's status and back, and the messages of standard.proto."""

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2
from hypothesis import example, given
from hypothesis import strategies as st

from poolrpc._wire.codec import decode_health
from poolrpc._wire.status import decode_error, encode_error
from poolrpc.errors import (
    BY_CODE,
    DOMAIN,
    FieldViolation,
    InvalidArgumentError,
    LimitExceededError,
    PoolError,
    UnavailableError,
)
from poolrpc.v1 import standard_pb2

SHORT = st.text(max_size=30)
DETAILS_BYTES = 4096


def round_trip(error):
    """Return the client's error for an error that the server raised."""
    message, details = encode_error(error)
    return decode_error(error.code, message, details)


@st.composite
def errors(draw):
    """Draw an error of any class with a status, small enough to be sent in full."""
    cls = draw(st.sampled_from(list(BY_CODE.values())))
    if cls is InvalidArgumentError:
        violations = draw(st.lists(st.builds(FieldViolation, SHORT, SHORT), min_size=1, max_size=4))
        return cls("", violations=violations)
    metadata = draw(st.dictionaries(st.text(max_size=9), SHORT, max_size=4))
    arguments = {"reason": draw(SHORT), "metadata": metadata}
    if cls is UnavailableError:
        arguments["retry_delay"] = draw(st.none() | st.integers(0, 10**7).map(lambda milliseconds: milliseconds / 1000))
    return cls(draw(SHORT), **arguments)


@given(errors())
@example(InvalidArgumentError("", violations=[FieldViolation(field, "expected 1") for field in "abcd"]))
@example(UnavailableError("full", reason="IN_FLIGHT_BYTES", metadata=dict.fromkeys("abcd", "1"), retry_delay=0.123))
def test_an_error_round_trips(error):
    """An error's class, code, text, reason, metadata, violations and delay are the same on the client."""
    seen = round_trip(error)
    assert type(seen) is type(error)
    assert str(seen) == str(error)
    assert vars(seen) == vars(error)


def test_a_status_without_a_class_is_a_pool_error():
    """A code that has no class becomes a PoolError whose text begins with the code."""
    error = decode_error("DATA_LOSS", "gone", None)
    assert (type(error), str(error)) == (PoolError, "DATA_LOSS: gone")


@given(st.sampled_from([*BY_CODE, "UNKNOWN", "DATA_LOSS"]), SHORT, st.none() | st.binary())
def test_invalid_details_are_ignored(code, message, details):
    """Without details, and with arbitrary bytes as details, the error has the code's class and the message."""
    error = decode_error(code, message, details)
    assert type(error) is BY_CODE.get(code, PoolError)
    assert message in str(error)


@pytest.mark.parametrize("kind", ["ErrorInfo", "BadRequest", "RetryInfo", "DebugInfo", ""])
@pytest.mark.parametrize(
    "value", [b"\xff\xff\xff", b"\x0a\xff", bytes(1000), Duration(seconds=2**62).SerializeToString()]
)
def test_an_invalid_detail_is_ignored(kind, value):
    """A detail whose bytes don't match its type is ignored."""
    detail = AnyMessage(type_url=f"type.googleapis.com/google.rpc.{kind}", value=value)
    details = standard_pb2.Status(details=[detail]).SerializeToString()
    for code in BY_CODE:
        assert "what happened" in str(decode_error(code, "what happened", details))


def test_an_unknown_detail_is_ignored():
    """A detail of another type doesn't affect the known ones."""
    message, details = encode_error(LimitExceededError("m", reason="R", metadata={"a": "b"}))
    status = standard_pb2.Status.FromString(details)
    status.details.insert(0, AnyMessage(type_url="type.googleapis.com/google.rpc.Help", value=b"\x01"))
    seen = decode_error("RESOURCE_EXHAUSTED", message, status.SerializeToString())
    assert (seen.reason, seen.metadata) == ("R", {"a": "b"})


LONG = "x" * 5_000
WIDE = "\N{GRINNING FACE}" * 5_000


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError(
            "", violations=[FieldViolation(f"layers[{i}].stride", "expected 1") for i in range(10_000)]
        ),
        InvalidArgumentError("", violations=[FieldViolation(LONG, LONG)] * 20),
        InvalidArgumentError("", violations=[FieldViolation(WIDE, WIDE)] * 20),
        PoolError(LONG, metadata={f"{i}{LONG}": LONG for i in range(100)}),
        LimitExceededError(WIDE, metadata={f"{i}{WIDE}": WIDE for i in range(100)}),
        UnavailableError(WIDE, metadata={WIDE: WIDE}, retry_delay=1.0),
    ],
    ids=["violations", "long violations", "wide violations", "long", "wide", "unavailable"],
)
def test_a_large_error_is_limited_to_4_kb(error):
    """The message and the details fit in gRPC's metadata, whatever the error holds, in any script."""
    message, details = encode_error(error)
    assert len(message.encode()) + len(details) < DETAILS_BYTES
    assert type(decode_error(error.code, message, details)) is type(error)


def test_a_message_above_grpcs_limit_names_the_settings():
    """The rejection of a large message by grpcio gets a reason and the names of both settings."""
    error = decode_error("RESOURCE_EXHAUSTED", "CLIENT: Sent message larger than max (9 vs. 4)", None)
    assert type(error) is LimitExceededError
    assert error.reason == "MESSAGE_TOO_LARGE"
    assert "--max-message-bytes" in str(error)
    assert "max_message_bytes=" in str(error)
    assert "(9 vs. 4)" in str(error)


def filled(rpc):
    """Return a serialized Status with each of our details, built from a package with google.rpc's messages."""
    status = rpc.Status(code=3, message="m")
    violations = [{"field": "a", "description": "b"}, {"field": "c", "description": "d"}]
    for detail in (
        rpc.ErrorInfo(reason="R", domain=DOMAIN, metadata={"k": "v"}),
        rpc.BadRequest(field_violations=violations),
        rpc.RetryInfo(retry_delay=Duration(seconds=1, nanos=5 * 10**8)),
    ):
        status.details.add(
            type_url=f"type.googleapis.com/google.rpc.{detail.DESCRIPTOR.name}"
        ).value = detail.SerializeToString()
    return status.SerializeToString(deterministic=True)


def test_the_details_are_those_of_googleapis():
    """A Status with its details has the same bytes as in googleapis' messages."""
    reason = "googleapis-common-protos is optional, and not installed"
    status_pb2 = pytest.importorskip("google.rpc.status_pb2", reason=reason, exc_type=ImportError)
    details_pb2 = pytest.importorskip("google.rpc.error_details_pb2", reason=reason, exc_type=ImportError)

    class Rpc:
        Status = status_pb2.Status
        ErrorInfo = details_pb2.ErrorInfo
        BadRequest = details_pb2.BadRequest
        RetryInfo = details_pb2.RetryInfo

    assert filled(standard_pb2) == filled(Rpc)


def test_the_details_have_the_public_field_numbers():
    """A Status has the bytes that google.rpc's published field numbers define."""

    def field(tag, value):
        return bytes([tag << 3 | 2, len(value)]) + value

    def detail(name, value):
        return field(3, field(1, b"type.googleapis.com/google.rpc." + name) + field(2, value))

    info = field(1, b"R") + field(2, b"poolrpc") + field(3, field(1, b"k") + field(2, b"v"))
    bad = field(1, field(1, b"a") + field(2, b"b")) + field(1, field(1, b"c") + field(2, b"d"))
    retry = field(1, b"\x08\x01\x10\x80\xca\xb5\xee\x01")
    expected = b"\x08\x03" + field(2, b"m")
    expected += detail(b"ErrorInfo", info) + detail(b"BadRequest", bad) + detail(b"RetryInfo", retry)
    assert filled(standard_pb2) == expected


def test_health_messages_are_those_of_grpc():
    """The health messages are those of grpc.health.v1 on the wire, with every status."""
    request = standard_pb2.HealthCheckRequest(service="poolrpc.v1.PoolService").SerializeToString()
    assert health_pb2.HealthCheckRequest.FromString(request).service == "poolrpc.v1.PoolService"
    for name, value in health_pb2.HealthCheckResponse.ServingStatus.items():
        data = health_pb2.HealthCheckResponse(status=value).SerializeToString()
        seen = decode_health(standard_pb2.HealthCheckResponse.FromString(data))
        assert seen == (name if value else "UNSPECIFIED")


def test_an_unknown_health_status():
    """A status that this client doesn't know is UNKNOWN, as grpc.health.v1 calls one that isn't set."""
    assert decode_health(standard_pb2.HealthCheckResponse(status=99)) == "UNKNOWN"
