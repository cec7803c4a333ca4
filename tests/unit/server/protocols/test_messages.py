"""Parsing of protobuf messages: what is not one, and limits on what protobuf may build of one."""

from threading import Thread

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import CancelledError, InternalError, LimitExceededError
from poolrpc._wire.framing import count_fields, field_prefix
from poolrpc.v1 import pool_pb2, standard_pb2
from poolrpc_server.protocols.messages import DECODED_COPIES, MAX_FIELDS, UNMEASURED_BYTES, decoding, parse
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from tests.unit.server.context import Context

PATIENCE = 60
LARGE, SMALL = bytes(UNMEASURED_BYTES + 1), bytes(UNMEASURED_BYTES)
SHAPES = pool_pb2.InferShapeRequest
GROUP = b"\x83\x01\x84\x01"  # an empty one, of the unknown number 16


def test_a_message_is_parsed():
    """The result is protobuf's own."""
    message = standard_pb2.HealthCheckRequest(service="x")
    assert parse(standard_pb2.HealthCheckRequest, message.SerializeToString()) == message
    assert parse(SHAPES, b"") == SHAPES()


@pytest.mark.parametrize("size", [1, UNMEASURED_BYTES + 1])
def test_bytes_that_are_not_a_message_are_an_internal_error(size):
    """INTERNAL is gRPC's own status for them; the reason tells it from a fault of the server."""
    with pytest.raises(InternalError, match=r"^expected a poolrpc\.v1\.InferShapeRequest, got bytes") as raised:
        parse(SHAPES, b"\xff" * size)
    assert raised.value.reason == "NO_MESSAGE"


@given(st.binary(max_size=60))
def test_parsing_agrees_with_protobuf(data):
    """Any bytes are parsed as protobuf parses them, or rejected if protobuf rejects them."""
    try:
        expected = SHAPES.FromString(data)
    except DecodeError:
        with pytest.raises(InternalError):
            parse(SHAPES, data)
    else:
        assert parse(SHAPES, data) == expected


def empty_branches(count):
    """Return as many fields, each of which protobuf makes an object of."""
    return field_prefix(SHAPES.DESCRIPTOR.fields_by_name["branches"].number, 0) * count


def nested_layers(count, before=b""):
    """Return a branch with as many empty layers, and other fields before them."""
    branches = SHAPES.DESCRIPTOR.fields_by_name["branches"]
    layers = before + field_prefix(branches.message_type.fields_by_name["layers"].number, 0) * count
    return field_prefix(branches.number, len(layers)) + layers


@pytest.mark.parametrize(
    "make",
    [
        empty_branches,
        lambda count: nested_layers(count - 1),
        lambda count: b"\x80\x7d\x01" * count,  # unknown numbers
        lambda count: field_prefix(2000, 0) * count,
    ],
    ids=["messages", "nested messages", "unknown numbers", "unknown bytes"],
)
def test_a_message_has_a_limited_number_of_fields(make):
    """One field too many is rejected before anything is built of the message, as the caller's fault."""
    assert parse(SHAPES, make(MAX_FIELDS))
    for count in (MAX_FIELDS + 1, 100 * MAX_FIELDS):
        with pytest.raises(LimitExceededError, match=f"^expected at most {MAX_FIELDS} fields, got more$") as raised:
            parse(SHAPES, make(count))
        assert raised.value.reason == "HEADER_TOO_LARGE"


@pytest.mark.parametrize(
    "data",
    [GROUP + empty_branches(MAX_FIELDS + 1), nested_layers(MAX_FIELDS + 1, GROUP)],
    ids=["around", "nested"],
)
def test_a_group_does_not_end_the_limit(data):
    """Protobuf accepts groups, so the fields after one count too."""
    assert SHAPES.FromString(data)
    with pytest.raises(LimitExceededError):
        parse(SHAPES, data)


@given(
    st.dictionaries(st.text(max_size=3), st.integers(-(2**63), 2**63 - 1), max_size=5),
    st.lists(st.lists(st.integers(0, 2**40), max_size=5), max_size=4),
    st.lists(st.binary(max_size=9), max_size=5),
)
def test_the_entries_of_maps_are_counted(parameters, shapes, raws):
    """Each entry of a map counts as a field with a key and a value, and packed numbers as one field."""
    tensor = pb.ModelInferRequest.InferInputTensor
    message = pb.ModelInferRequest(inputs=[tensor(name="x", shape=shape) for shape in shapes], raw_input_contents=raws)
    for name, value in parameters.items():
        message.parameters[name].int64_param = value
    # An entry, its key, its value, and the number in that; an input, its name, and its shape unless it is empty.
    expected = 4 * len(parameters) + sum(2 + bool(shape) for shape in shapes) + len(raws)
    assert count_fields(message.SerializeToString(), message.DESCRIPTOR, MAX_FIELDS) == expected


def test_large_headers_are_decoded_in_turn():
    """While one is decoded, another one waits, and a small one does not."""
    order = []

    def decode(header, name):
        with decoding(header, Context()):
            order.append(name)

    with decoding(LARGE, Context()):
        large, small = Thread(target=decode, args=(LARGE, "large")), Thread(target=decode, args=(SMALL, "small"))
        large.start()
        small.start()
        small.join(PATIENCE)
        assert order == ["small"]
    large.join(PATIENCE)
    assert order == ["small", "large"]


def test_a_header_is_not_decoded_for_a_caller_that_has_left():
    """A caller that leaves while another header is decoded costs nothing more."""
    context, errors = Context(), []

    def decode():
        try:
            with decoding(LARGE, context):
                errors.append(None)
        except CancelledError as error:
            errors.append(error)

    with decoding(LARGE, Context()):
        thread = Thread(target=decode)
        thread.start()
        context.cancel()
    thread.join(PATIENCE)
    assert [type(error) for error in errors] == [CancelledError]


def test_the_memory_of_a_decoded_header_is_reserved():
    """A large one counts as a multiple of its bytes until the call has ended; a small one is not counted."""
    for header, expected in ((SMALL, 0), (LARGE, DECODED_COPIES * len(LARGE))):
        context = Context()
        with decoding(header, context):
            pass
        assert context.ticket.nbytes == expected
