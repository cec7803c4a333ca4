"""Framing of messages, compared with protobuf's own serializer and parser."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from poolrpc import MaxPool2d
from poolrpc._wire import framing
from poolrpc._wire.codec import ArenaRanges, BranchResult, Request, encode_ranges, encode_request, encode_results
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2

SPEC = TensorSpec("float32", (1, 3, 8, 8))
REQUEST = encode_request(Request(SPEC, ((MaxPool2d(2),),), TensorSpec("int64", SPEC.shape)))
IN_ARENA = encode_request(Request(SPEC, ((MaxPool2d(2),), (MaxPool2d(3),))))
IN_ARENA.MergeFromString(encode_ranges(ArenaRanges(b"id", (0, 64), (64, 2**40))))
RESULTS = encode_results([BranchResult(((1, 3, 4, 4),), SPEC, TensorSpec("int64", SPEC.shape)), BranchResult((), SPEC)])

# Messages with one field each, to be concatenated in any order.
FIELDS = {
    pool_pb2.PoolRequest: [
        *(pool_pb2.PoolRequest(**{field.name: value}) for field, value in IN_ARENA.ListFields()),
        pool_pb2.PoolRequest(indices=REQUEST.indices),
        pool_pb2.PoolRequest(padding=bytes(5)),
    ],
    pool_pb2.PoolResponse: [pool_pb2.PoolResponse(results=RESULTS), pool_pb2.PoolResponse(results=RESULTS[:1])],
    pool_pb2.PoolStreamRequest: [
        pool_pb2.PoolStreamRequest(request=REQUEST),
        pool_pb2.PoolStreamRequest(unfinished=True),
        pool_pb2.PoolStreamRequest(padding=b"x"),
    ],
    pool_pb2.PoolStreamResponse: [
        pool_pb2.PoolStreamResponse(results=RESULTS),
        pool_pb2.PoolStreamResponse(unfinished=True),
    ],
}
CLASSES = st.sampled_from(list(FIELDS))
PARTS = st.lists(st.binary(max_size=300), max_size=4)
UINT64 = st.integers(0, 2**64 - 1)
VARINT, FIXED64, BYTES, GROUP, END, FIXED32 = range(6)
UNKNOWN = st.integers(16, 2**29 - 1)


def varint(number, more=0):
    """Return a number's varint, `more` bytes longer than necessary."""
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    for _ in range(more):
        data[-1] |= 0x80
        data.append(0)
    return bytes(data)


@st.composite
def varints(draw, numbers):
    """Draw a varint, sometimes longer than necessary or than allowed."""
    return varint(draw(numbers), draw(st.sampled_from([0] * 8 + [1, 3, 4, 5, 9])))


def tags(numbers, kind):
    """Draw the tag of one of `numbers`."""
    return varints(numbers.map(lambda number: number << 3 | kind))


@st.composite
def delimited(draw, number, contents):
    """Draw a length-delimited field."""
    data = draw(contents)
    return draw(tags(number, BYTES)) + draw(varints(st.just(len(data)))) + data


PAYLOADS = delimited(st.just(15), st.binary(max_size=40))
SCALARS = st.one_of(
    st.tuples(tags(UNKNOWN, VARINT), varints(UINT64)),
    st.tuples(tags(UNKNOWN, FIXED64), st.binary(min_size=8, max_size=8)),
    st.tuples(tags(UNKNOWN, FIXED32), st.binary(min_size=4, max_size=4)),
    st.tuples(delimited(UNKNOWN, st.binary(max_size=20))),
).map(b"".join)
GROUPS = st.tuples(UNKNOWN, st.lists(SCALARS | PAYLOADS, max_size=2)).map(
    lambda group: varint(group[0] << 3 | GROUP) + b"".join(group[1]) + varint(group[0] << 3 | END)
)


@st.composite
def messages(draw):
    """Draw a class and a message of it, mostly valid: its fields, payloads and unknown fields in any order."""
    cls = draw(CLASSES)
    known = st.sampled_from(FIELDS[cls]).map(lambda field: field.SerializeToString())
    return cls, b"".join(draw(st.lists(st.one_of(known, PAYLOADS, SCALARS, GROUPS), max_size=6)))


@st.composite
def damaged(draw):
    """Draw a class and a message of it that is truncated, changed in a byte, or has a wrong length."""
    cls, data = draw(messages())
    at = draw(st.integers(0, len(data)))
    damage = draw(st.sampled_from(["truncate", "change", "length"]))
    if damage == "truncate":
        return cls, data[:at]
    if damage == "change":
        return cls, data[:at] + draw(st.binary(min_size=1, max_size=1)) + data[at + 1 :]
    number = draw(st.sampled_from([15, 15, 1, 14, 16]))
    return cls, data[:at] + varint(number << 3 | BYTES) + varint(draw(UINT64)) + data[at:]


def by_protobuf(cls, data):
    """Return the header and the payload of a message as protobuf reads them, or None if it rejects the bytes."""
    try:
        message = cls.FromString(data)
    except DecodeError:
        return None
    payload = message.payload
    message.ClearField("payload")
    return message.SerializeToString(deterministic=True), payload


def by_framing(cls, data):
    """Return the same from framing.split_payload, whose header has no payload."""
    try:
        header, payload = framing.split_payload(data, cls)
        message = cls.FromString(header)
    except DecodeError:
        return None
    assert not message.payload
    return message.SerializeToString(deterministic=True), bytes(payload)


@given(CLASSES.flatmap(lambda cls: st.sampled_from(FIELDS[cls])), PARTS)
def test_join_writes_what_protobuf_writes(message, parts):
    """A header joined to any parts of a payload has the bytes that protobuf writes, also for an empty payload."""
    joined = framing.join(message.SerializeToString(), parts)
    message = type(message).FromString(message.SerializeToString())
    message.payload = b"".join(parts)
    assert joined == message.SerializeToString()


def test_join_accepts_any_buffers_and_iterables():
    """The parts of a payload may be bytes, bytearrays or memoryviews, in any iterable."""
    parts = (b"ab", bytearray(b"cd"), memoryview(b"xefx")[1:3])
    joined = framing.join(b"", iter(parts))
    assert joined == framing.join(b"", [b"abcdef"]) == pool_pb2.PoolResponse(payload=b"abcdef").SerializeToString()


@pytest.mark.parametrize("length", [1, 127, 128, 2**14 - 1, 2**14, 2**21 - 1, 2**21, 2**31 - 1])
def test_message_prefix_ends_with_the_tag_and_the_length(length):
    """A prefix is the header, the payload's tag and its length as a varint."""
    assert framing.message_prefix(b"header", length) == b"header" + bytes([15 << 3 | 2]) + varint(length)


def test_message_prefix_of_an_empty_payload_is_the_header():
    """An empty payload is left out, as proto3 requires."""
    assert framing.message_prefix(b"header", 0) == b"header"


@given(
    st.sampled_from([each for cls in FIELDS for each in FIELDS[cls] if "padding" in cls.DESCRIPTOR.fields_by_name]),
    st.integers(0, 40),
    st.integers(0, 400),
)
def test_pad_aligns_the_payload_with_the_padding_field(message, more, length):
    """A padded message is the one that protobuf writes with its `padding` set, and has padding only if needed."""
    message = type(message).FromString(message.SerializeToString())
    message.ClearField("padding")
    if more and isinstance(message, pool_pb2.PoolRequest):
        message.arena.arena_id = bytes(more)  # a header of any length
    header, payload = message.SerializeToString(), bytes(range(256)) * 2
    padded = framing.pad(header, length)
    joined = framing.join(padded, [payload[:length]])
    message.payload = payload[:length]
    if padded != header:
        message.padding = bytes(framing.split_payload(joined, type(message))[0][len(header) + 2 :])
        assert 1 <= len(message.padding) <= framing.PAYLOAD_ALIGNMENT
    assert joined == message.SerializeToString()
    assert not length or (len(joined) - length) % framing.PAYLOAD_ALIGNMENT == 0
    if not length or len(framing.message_prefix(header, length)) % framing.PAYLOAD_ALIGNMENT == 0:
        assert padded == header


@given(messages())
@example((pool_pb2.PoolRequest, b""))
@example((pool_pb2.PoolResponse, varint(15 << 3 | BYTES) + b"\0"))
def test_split_payload_agrees_with_protobuf(case):
    """Fields may come in any order, known or not, and the last of several payloads counts."""
    assert by_framing(*case) == by_protobuf(*case)


@given(damaged())
def test_split_payload_rejects_the_damaged_messages_that_protobuf_rejects(case):
    """A truncated or changed message, or one with a length of up to 2**64 - 1, is read or rejected as by protobuf."""
    assert by_framing(*case) == by_protobuf(*case)


@given(CLASSES, st.binary(max_size=60))
def test_split_payload_rejects_the_bytes_that_protobuf_rejects(cls, data):
    """Arbitrary bytes are read or rejected as by protobuf."""
    assert by_framing(cls, data) == by_protobuf(cls, data)


@pytest.mark.parametrize("more", range(10))
@pytest.mark.parametrize("what", ["tag", "length"])
def test_an_overlong_varint_is_read_as_by_protobuf(what, more):
    """A payload's tag or length may be longer than necessary, up to protobuf's own limit."""
    tag, length = (varint(number, more * (what == name)) for number, name in ((15 << 3 | BYTES, "tag"), (3, "length")))
    data = pool_pb2.PoolResponse(results=RESULTS).SerializeToString() + tag + length + b"abc"
    assert by_framing(pool_pb2.PoolResponse, data) == by_protobuf(pool_pb2.PoolResponse, data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x7a",
        b"\x7a\x01",
        b"\x7a\xff",
        b"\x7a" + b"\xff" * 9 + b"\x01",
        b"\x7a" + b"\xff" * 20,
        b"\x7a\x05abc",
        b"\x7a\x01a\x7a\x7f",
        b"\xff" * 11,
        b"\x80\x80\x80",
        b"\x78\x01\x7a\x02a",
        b"\x7d\0\0\0",
        b"\x79\0\0\0\0\0\0\0",
    ],
    ids=repr,
)
def test_truncated_messages_are_rejected(data):
    """A truncated tag, length or payload is an error."""
    with pytest.raises(DecodeError):
        framing.split_payload(data, pool_pb2.PoolRequest)


def test_split_payload_does_not_copy_the_payload():
    """The payload is a view of the message, whatever the order of its fields, and if a field occurs twice."""
    header = REQUEST.SerializeToString()
    joined = framing.join(header, [b"payload"])
    for data in (joined, framing.join(b"", [b"payload"]) + header, joined + joined):
        _, payload = framing.split_payload(data, pool_pb2.PoolRequest)
        assert payload == b"payload"
        assert payload.obj is data


@pytest.mark.parametrize("chunk_bytes", [1, 16, 100])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sizes", [[], [0], [1], [99, 1], [101], [16, 0, 17], [200, 300]], ids=repr)
def test_chunks_divide_a_block_into_messages(chunk_bytes, sizes, padded):
    """Chunks hold a block's parts in order, each at most `chunk_bytes`, all but the last marked unfinished."""
    parts = [bytes([i]) * size for i, size in enumerate(sizes, 1)]
    sent = list(framing.chunks(parts, padded=padded, chunk_bytes=chunk_bytes))
    messages = [pool_pb2.PoolStreamRequest.FromString(data) for data in sent]
    assert b"".join(each.payload for each in messages) == b"".join(parts)
    assert [each.unfinished for each in messages] == [True] * (len(messages) - 1) + [False]
    assert len(messages) == max(1, -(-sum(sizes) // chunk_bytes))
    for message, data in zip(messages, sent, strict=True):
        length = len(message.payload)
        assert length <= chunk_bytes
        assert not padded or not length or (len(data) - length) % framing.PAYLOAD_ALIGNMENT == 0
        assert padded or not message.padding


def test_a_block_that_fits_is_one_message_without_a_header():
    """A block of the usual size is one message with its payload and, if asked for, padding."""
    (sent,) = framing.chunks([b"ab", b"cd"])
    assert sent == pool_pb2.PoolStreamResponse(payload=b"abcd").SerializeToString()
    (sent,) = framing.chunks([b"ab", b"cd"], padded=True)
    assert sent == pool_pb2.PoolStreamRequest(payload=b"abcd", padding=bytes(12)).SerializeToString()


def test_unfinished_is_the_proto_field():
    """UNFINISHED is how protobuf serializes `unfinished`, in either direction."""
    for cls in (pool_pb2.PoolStreamRequest, pool_pb2.PoolStreamResponse):
        assert cls(unfinished=True).SerializeToString() == framing.UNFINISHED


@given(messages() | damaged())
def test_split_payloads_finds_every_payload(drawn):
    """Each payload is a view of the message, in order, and the header has none left."""
    cls, data = drawn
    split = framing.split_payloads(data, 15)
    if split is None:
        return  # left to protobuf
    header, payloads = split
    assert all(view.obj is data for view in payloads)
    assert framing.split_payloads(header, 15) == (header, [])
    expected = by_protobuf(cls, data)
    if expected is not None:
        assert by_protobuf(cls, header) == (expected[0], b"")
        assert bytes(payloads[-1] if payloads else b"") == expected[1]


@given(PARTS, st.integers(1, 2000))
def test_field_prefix_precedes_the_values_of_a_repeated_field(parts, number):
    """Values joined with their prefixes are split into the same values, whatever the field's number."""
    data = b"".join(framing.field_prefix(number, len(part)) + part for part in parts)
    assert framing.split_payloads(data, number) == (b"", parts)
