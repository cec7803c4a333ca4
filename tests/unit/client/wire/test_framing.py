"""Framing of messages, compared with protobuf's own serializer and parser."""

import pytest
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
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
        pool_pb2.PoolRequest(operand=REQUEST.operand),
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
MIB = 2**20
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
    try:
        split = framing.split_payloads(data, 15, MIB)
    except DecodeError:
        assert by_protobuf(cls, data) is None
        return
    if split is None:
        return  # left to protobuf
    header, payloads = split
    assert all(view.obj is data for view in payloads)
    assert framing.split_payloads(header, 15, MIB) == (header, [])
    expected = by_protobuf(cls, data)
    if expected is not None:
        assert by_protobuf(cls, header) == (expected[0], b"")
        assert bytes(payloads[-1] if payloads else b"") == expected[1]


@given(PARTS, st.integers(1, 2000))
def test_field_prefix_precedes_the_values_of_a_repeated_field(parts, number):
    """Values joined with their prefixes are split into the same values, whatever the field's number."""
    data = b"".join(framing.field_prefix(number, len(part)) + part for part in parts)
    assert framing.split_payloads(data, number, 0) == (b"", parts)


EMPTY = varint(15 << 3 | BYTES) + b"\0"
SMALL = varint(16 << 3 | VARINT) + b"\1"


@pytest.mark.parametrize("field", [EMPTY, SMALL, varint(1 << 3 | BYTES) + b"\0"], ids=["payload", "unknown", "known"])
def test_a_message_has_a_limited_number_of_fields(field):
    """The fields of a message are scanned only up to a limit, whatever they are."""
    at_most = field * framing.MAX_FIELDS
    framing.split_payload(at_most, pool_pb2.PoolRequest)
    framing.split_payloads(at_most, 15, MIB)
    for data in (at_most + b"\x08\x01", at_most * 1000):
        with pytest.raises(framing.HeaderError, match=f"expected at most {framing.MAX_FIELDS} fields, got more"):
            framing.split_payload(data, pool_pb2.PoolRequest)
        with pytest.raises(framing.HeaderError, match=f"expected at most {framing.MAX_FIELDS} fields, got more"):
            framing.split_payloads(data, 15, MIB)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_header_has_a_limited_size(first, copies):
    """A message is limited without its payload, of which there may be any amount, before it and after it."""
    payload = framing.join(b"", [bytes(3 * MIB)]) * copies

    def sent(size):
        padding = framing.field_prefix(14, size - 4) + bytes(size - 4)
        assert len(padding) == size
        return payload + padding if first else padding + payload

    assert framing.MAX_HEADER_BYTES == MIB
    header, found = framing.split_payload(sent(MIB), pool_pb2.PoolRequest)
    assert (len(header), len(found)) == (MIB, 3 * MIB)
    header, payloads = framing.split_payloads(sent(MIB), 15, MIB)
    assert (len(header), len(payloads)) == (MIB, copies)
    words = f"expected at most {MIB} bytes without the payload, got {MIB + 1}"
    with pytest.raises(framing.HeaderError, match=words):
        framing.split_payload(sent(MIB + 1), pool_pb2.PoolRequest)
    with pytest.raises(framing.HeaderError, match=words):
        framing.split_payloads(sent(MIB + 1), 15, MIB)


UNUSUAL = {
    "group": varint(16 << 3 | GROUP) + varint(16 << 3 | END),
    "overlong": varint(15 << 3 | BYTES, 3) + varint(3, 3) + b"abc",
    "truncated": varint(15 << 3 | BYTES) + varint(5) + b"abc",
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_message_that_is_left_to_protobuf_is_small(kind):
    """Whatever is not read here, such as a group, is read by protobuf from a small message, and never from another."""
    largest = framing.MAX_UNUSUAL_BYTES

    def sent(size):
        length = size - len(UNUSUAL[kind]) - 4
        padding = varint(14 << 3 | BYTES) + varint(length, 3 - len(varint(length))) + bytes(length)
        return padding + UNUSUAL[kind]

    at_most = sent(largest)
    assert len(at_most) == largest
    assert by_framing(pool_pb2.PoolRequest, at_most) == by_protobuf(pool_pb2.PoolRequest, at_most)
    assert framing.split_payloads(at_most, 15, MIB) is None
    words = f"expected at most {largest} bytes without the payload, got {largest + 1}"
    with pytest.raises(framing.HeaderError, match=words):
        framing.split_payload(sent(largest + 1), pool_pb2.PoolRequest)
    with pytest.raises(framing.HeaderError, match=words):
        framing.split_payloads(sent(largest + 1), 15, MIB)


def fields_of(message):
    """Return the number of fields that protobuf writes for a message, those of the messages in it included."""
    count = len(UnknownFieldSet(message))
    for _, value in message.ListFields():
        values = [value] if isinstance(value, Message | bytes | str | int | float) else value
        packed = isinstance(values[0], int | float)
        count += 1 if packed else sum(1 + (fields_of(each) if isinstance(each, Message) else 0) for each in values)
    return count


@st.composite
def written(draw):
    """Draw a message as protobuf writes it, with known and unknown fields, but without groups."""
    cls = draw(CLASSES)
    known = st.sampled_from(FIELDS[cls]).map(lambda field: field.SerializeToString())
    data = b"".join(draw(st.lists(known | PAYLOADS | SCALARS, max_size=6)))
    return cls.FromString(data) if by_protobuf(cls, data) else cls()


@given(written())
@example(REQUEST)
@example(pool_pb2.PoolResponse(results=RESULTS))
@example(pool_pb2.PoolRequest())
def test_count_fields_counts_what_protobuf_writes(message):
    """Each field counts once, and the messages in it are counted too; packed numbers are one field."""
    data = message.SerializeToString()
    assert framing.count_fields(data, message.DESCRIPTOR, MIB) == fields_of(message)


@given(messages() | damaged(), st.integers(0, 30))
def test_counting_ends_above_the_limit(case, limit):
    """A count above the limit is one more than the limit, for any bytes."""
    cls, data = case
    count = framing.count_fields(data, cls.DESCRIPTOR, MIB)
    assert framing.count_fields(data, cls.DESCRIPTOR, limit) == min(count, limit + 1)


@given(messages() | damaged())
@example((pool_pb2.PoolRequest, UNUSUAL["group"] + IN_ARENA.SerializeToString()))
def test_protobuf_finds_no_more_fields_than_were_counted(case):
    """Whatever bytes protobuf accepts, groups and long varints included, the count bounds what it builds of them."""
    cls, data = case
    if by_protobuf(cls, data) is None:
        return
    message = cls.FromString(data)
    assert framing.count_fields(data, cls.DESCRIPTOR, MIB) >= fields_of(message)


@pytest.mark.parametrize("before", [b"", UNUSUAL["group"]], ids=["fields", "a group before them"])
def test_nested_fields_are_counted(before):
    """Fields are counted in the messages of a message, whatever is before them."""
    branches = pool_pb2.PoolRequest.DESCRIPTOR.fields_by_name["branches"]
    layers = branches.message_type.fields_by_name["layers"]
    nested = before + (varint(layers.number << 3 | BYTES) + b"\0") * 1000
    data = framing.field_prefix(branches.number, len(nested)) + nested
    assert len(pool_pb2.PoolRequest.FromString(data).branches[0].layers) == 1000
    assert framing.count_fields(data, pool_pb2.PoolRequest.DESCRIPTOR, MIB) > 1000
