"""The framing of messages against protobuf's own: what is joined, and what any bytes are cut into."""

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

# A field of each message at a time, so that they can be put in any order.
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
    """Give a number's varint, or one that is that many bytes longer than it need be."""
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
    """Draw a varint, now and then longer than it need be, or than it may be."""
    return varint(draw(numbers), draw(st.sampled_from([0] * 8 + [1, 3, 4, 5, 9])))


def tags(numbers, kind):
    """Draw the tag of one of these fields."""
    return varints(numbers.map(lambda number: number << 3 | kind))


@st.composite
def delimited(draw, number, contents):
    """Draw a field of a length and so many bytes."""
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
    """Draw a class, and bytes that mostly are a message of it: its fields, payloads and unknown fields in any order."""
    cls = draw(CLASSES)
    known = st.sampled_from(FIELDS[cls]).map(lambda field: field.SerializeToString())
    return cls, b"".join(draw(st.lists(st.one_of(known, PAYLOADS, SCALARS, GROUPS), max_size=6)))


@st.composite
def damaged(draw):
    """Draw a class, and a message of it that was cut off, changed in a byte, or told a length that it hasn't."""
    cls, data = draw(messages())
    at = draw(st.integers(0, len(data)))
    how = draw(st.sampled_from(["cut", "change", "length"]))
    if how == "cut":
        return cls, data[:at]
    if how == "change":
        return cls, data[:at] + draw(st.binary(min_size=1, max_size=1)) + data[at + 1 :]
    number = draw(st.sampled_from([15, 15, 1, 14, 16]))
    return cls, data[:at] + varint(number << 3 | BYTES) + varint(draw(UINT64)) + data[at:]


def by_protobuf(cls, data):
    """Give the rest and the payload of a message as protobuf reads it, or None where it refuses the bytes."""
    try:
        message = cls.FromString(data)
    except DecodeError:
        return None
    payload = message.payload
    message.ClearField("payload")
    return message.SerializeToString(deterministic=True), payload


def by_cutting(cls, data):
    """Give the same by framing.cut, which leaves no payload in the header."""
    try:
        header, payload = framing.cut(data, cls)
        message = cls.FromString(header)
    except DecodeError:
        return None
    assert not message.payload
    return message.SerializeToString(deterministic=True), bytes(payload)


@given(CLASSES.flatmap(lambda cls: st.sampled_from(FIELDS[cls])), PARTS)
def test_a_joined_message_is_protobufs(message, parts):
    """A header and the parts of a payload are byte by byte what protobuf writes, an empty payload included."""
    joined = framing.join(message.SerializeToString(), parts)
    message = type(message).FromString(message.SerializeToString())
    message.payload = b"".join(parts)
    assert joined == message.SerializeToString()


def test_a_payload_of_views_is_joined():
    """Parts may be anything with bytes, in a tuple or an iterator."""
    parts = (b"ab", bytearray(b"cd"), memoryview(b"xefx")[1:3])
    joined = framing.join(b"", iter(parts))
    assert joined == framing.join(b"", [b"abcdef"]) == pool_pb2.PoolResponse(payload=b"abcdef").SerializeToString()


@pytest.mark.parametrize("length", [1, 127, 128, 2**14 - 1, 2**14, 2**21 - 1, 2**21, 2**31 - 1])
def test_the_head_of_a_message_has_the_length(length):
    """A head is the header, the tag and the length, of as many bytes as that takes."""
    assert framing.head(b"header", length) == b"header" + bytes([15 << 3 | 2]) + varint(length)


def test_without_a_payload_the_head_is_the_header():
    """As proto3 has it, what is empty is left out."""
    assert framing.head(b"header", 0) == b"header"


@given(
    st.sampled_from([each for cls in FIELDS for each in FIELDS[cls] if "padding" in cls.DESCRIPTOR.fields_by_name]),
    st.integers(0, 40),
    st.integers(0, 400),
)
def test_a_padded_message_is_protobufs_and_its_payload_aligned(message, more, length):
    """Padding is the field of that name, of fewer bytes than the alignment and 1, and only where it is needed."""
    message = type(message).FromString(message.SerializeToString())
    message.ClearField("padding")
    if more and isinstance(message, pool_pb2.PoolRequest):
        message.arena.arena_id = bytes(more)  # a header of any length
    header, payload = message.SerializeToString(), bytes(range(256)) * 2
    padded = framing.pad(header, length)
    joined = framing.join(padded, [payload[:length]])
    message.payload = payload[:length]
    if padded != header:
        message.padding = bytes(framing.cut(joined, type(message))[0][len(header) + 2 :])
        assert 1 <= len(message.padding) <= framing.ALIGNMENT
    assert joined == message.SerializeToString()
    assert not length or (len(joined) - length) % framing.ALIGNMENT == 0
    if not length or len(framing.head(header, length)) % framing.ALIGNMENT == 0:
        assert padded == header


@given(messages())
@example((pool_pb2.PoolRequest, b""))
@example((pool_pb2.PoolResponse, varint(15 << 3 | BYTES) + b"\0"))
def test_a_message_is_cut_as_protobuf_reads_it(case):
    """Fields come in any order, unknown ones too; of several payloads the last counts; two messages are merged."""
    assert by_cutting(*case) == by_protobuf(*case)


@given(damaged())
def test_a_damaged_message_is_refused_where_protobuf_refuses_it(case):
    """Cut off, changed, or with a length of up to 2**64 - 1: it is cut and parsed as by protobuf, or refused."""
    assert by_cutting(*case) == by_protobuf(*case)


@given(CLASSES, st.binary(max_size=60))
def test_any_bytes_are_refused_where_protobuf_refuses_them(cls, data):
    """What a stranger sends in place of a message is cut and parsed as by protobuf, or refused as by protobuf."""
    assert by_cutting(cls, data) == by_protobuf(cls, data)


@pytest.mark.parametrize("longer", range(10))
@pytest.mark.parametrize("what", ["tag", "length"])
def test_a_varint_that_is_longer_than_need_be_is_protobufs_to_judge(what, longer):
    """A tag or a length of a payload may have zeros at its end, up to protobuf's own limit."""
    tag, length = (
        varint(number, longer * (what == name)) for number, name in ((15 << 3 | BYTES, "tag"), (3, "length"))
    )
    data = pool_pb2.PoolResponse(results=RESULTS).SerializeToString() + tag + length + b"abc"
    assert by_cutting(pool_pb2.PoolResponse, data) == by_protobuf(pool_pb2.PoolResponse, data)


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
def test_bytes_that_end_too_soon_are_refused(data):
    """A tag, a length or contents that the end cuts off are an error, and nothing behind the end is read."""
    with pytest.raises(DecodeError):
        framing.cut(data, pool_pb2.PoolRequest)


def test_a_payload_stays_where_it_lies():
    """A payload is not copied, whether its fields stand as encoders write them, in another order, or twice."""
    header = REQUEST.SerializeToString()
    joined = framing.join(header, [b"payload"])
    for data in (joined, framing.join(b"", [b"payload"]) + header, joined + joined):
        _, payload = framing.cut(data, pool_pb2.PoolRequest)
        assert payload == b"payload"
        assert payload.obj is data


@pytest.fixture(params=[1, 16, 100])
def piece_bytes(request, monkeypatch):
    """Make a stream's messages hold so few bytes."""
    monkeypatch.setattr(framing, "PIECE_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sizes", [[], [0], [1], [99, 1], [101], [16, 0, 17], [200, 300]], ids=repr)
def test_a_block_is_cut_into_messages(piece_bytes, sizes, padded):
    """Pieces hold the parts of a block in order, each at most so many bytes and all but the last marked unfinished."""
    parts = [bytes([i]) * size for i, size in enumerate(sizes, 1)]
    sent = list(framing.pieces(parts, padded=padded))
    messages = [pool_pb2.PoolStreamRequest.FromString(data) for data in sent]
    assert b"".join(each.payload for each in messages) == b"".join(parts)
    assert [each.unfinished for each in messages] == [True] * (len(messages) - 1) + [False]
    assert len(messages) == max(1, -(-sum(sizes) // piece_bytes))
    for message, data in zip(messages, sent, strict=True):
        length = len(message.payload)
        assert length <= piece_bytes
        assert not padded or not length or (len(data) - length) % framing.ALIGNMENT == 0
        assert padded or not message.padding


def test_a_block_that_fits_is_one_message_with_nothing_beside():
    """A block of the usual size has no header, so that nothing of it needs parsing; padding is all that it may have."""
    (sent,) = framing.pieces([b"ab", b"cd"])
    assert sent == pool_pb2.PoolStreamResponse(payload=b"abcd").SerializeToString()
    (sent,) = framing.pieces([b"ab", b"cd"], padded=True)
    assert sent == pool_pb2.PoolStreamRequest(payload=b"abcd", padding=bytes(12)).SerializeToString()


def test_unfinished_is_protobufs_field():
    """The header of a message that goes on is what protobuf writes for it, in either direction."""
    for cls in (pool_pb2.PoolStreamRequest, pool_pb2.PoolStreamResponse):
        assert cls(unfinished=True).SerializeToString() == framing.UNFINISHED


@given(messages() | damaged())
def test_all_payloads_are_cut_out(drawn):
    """Every payload of a message is a view of it, in order, and the rest is its header, which has none any more."""
    cls, data = drawn
    cut = framing.cut_all(data, 15)
    if cut is None:
        return  # protobuf's to say
    header, payloads = cut
    assert all(view.obj is data for view in payloads)
    assert framing.cut_all(header, 15) == (header, [])
    expected = by_protobuf(cls, data)
    if expected is not None:
        assert by_protobuf(cls, header) == (expected[0], b"")
        assert bytes(payloads[-1] if payloads else b"") == expected[1]


@given(PARTS, st.integers(1, 2000))
def test_payloads_are_led_as_protobuf_leads_them(parts, number):
    """What is put together of leads and payloads is cut into them again, whatever the field's number."""
    data = b"".join(framing.lead(number, len(part)) + part for part in parts)
    assert framing.cut_all(data, number) == (b"", parts)
