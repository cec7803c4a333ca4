"""The framing of messages with a payload: protobuf's own bytes, without protobuf's copies.

Every message that carries tensors has them in one bytes field, `payload`, number 15, and the rest, its header, is
small. So a message is the header as protobuf writes it, a tag, a length, and the tensors' bytes joined to it once; and
what arrives is cut the same way, the payload staying where it lies. (protobuf's serialiser takes some ten times as long
as the join does, and each access to a bytes field copies it.) Whatever isn't plainly cut is left to protobuf.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from google.protobuf.message import Message

    from poolrpc.tensors import Bytes

PAYLOAD_TAG = 15 << 3 | 2
"""Field 15, of a length and so many bytes."""

PADDING_TAG = 14 << 3 | 2
"""The same for field 14, of requests."""

ALIGNMENT = 16
"""Of a payload in its message, in bytes: as any dtype wants it, and as Python's bytes lie in memory."""

UNFINISHED = bytes((2 << 3, 1))
"""A header of a stream's message, in either direction: field 2, true."""

PIECE_BYTES = 4 * 2**20
"""Of a block in one message of a stream: a larger one, of a single large plane, takes several."""

MESSAGE_BYTES_KEY = "poolrpc-message-bytes"
"""The metadata by which a client announces how large a unary call's message is: a server counts it before it comes."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
_MAX_HEAD_BYTES = 6  # of a payload's tag and length, as encoders write them; of longer forms protobuf refuses some


def join(header: bytes, payload: Iterable[Bytes]) -> bytes:
    """Give the message of a header and a payload in parts.

    Args:
        header: The message without its payload, encoded.
        payload: The parts of the payload, in order; an empty one is left out, as proto3 has it.

    """
    parts = tuple(payload)
    return b"".join((head(header, sum(map(len, parts))), *parts))


def head(header: bytes, length: int) -> bytes:
    """Give the start of a message, to which a payload of that length is joined."""
    return b"".join((header, bytes((PAYLOAD_TAG,)), _varint(length))) if length else header


def lead(number: int, length: int) -> bytes:
    """Give what stands before the bytes of a field: of a text, of a message, or one of several payloads."""
    return _varint(number << 3 | _BYTES) + _varint(length)


def pieces(payload: Iterable[Bytes], *, padded: bool = False) -> Iterator[bytes]:
    """Give a block of a stream as messages of at most PIECE_BYTES of payload, all but the last marked unfinished.

    Args:
        payload: The parts of the block, in order.
        padded: Whether to align them, as pad does.

    """
    parts = tuple(payload)
    size = sum(map(len, parts))
    if size > PIECE_BYTES:
        whole = memoryview(b"".join(parts))
        for start in range(0, size, PIECE_BYTES):
            piece = whole[start : start + PIECE_BYTES]
            header = UNFINISHED if start + PIECE_BYTES < size else b""
            yield join(pad(header, len(piece)) if padded else header, [piece])
    else:
        yield join(pad(b"", size) if padded else b"", parts)


def pad(header: bytes, length: int) -> bytes:
    """Give a header with a field of padding, so that the payload that is joined to it is aligned in the message.

    Args:
        header: The message without its payload, encoded.
        length: The payload's.

    """
    start = len(header) + 1 + len(_varint(length))
    if not length or start % ALIGNMENT == 0:
        return header
    # A tag, a length, and at least one zero: proto3 leaves out what is empty.
    zeros = (-start - 3) % ALIGNMENT + 1
    return b"".join((header, bytes((PADDING_TAG, zeros)), bytes(zeros)))


def cut(data: bytes, cls: type[Message]) -> tuple[bytes, memoryview]:
    """Give the header, encoded, and the payload of a message.

    Args:
        data: The message, from any protobuf encoder.
        cls: What it is a message of, where the cutting is left to protobuf.

    Raises:
        google.protobuf.message.DecodeError: These bytes are no message. What is wrong inside of the header shows when
            that is parsed.

    """
    spans = _payloads(data, PAYLOAD_TAG)
    view = memoryview(data)
    if spans is None:
        message: Any = cls.FromString(data)
        payload = message.payload
        message.ClearField("payload")
        return message.SerializeToString(), memoryview(payload)
    if not spans:
        return data, view[:0]
    # The last of several payloads counts, as with any field that isn't repeated.
    _, start, end = spans[-1]
    if len(spans) == 1:
        tag = spans[0][0]
        return (data[:tag] if end == len(data) else data[:tag] + data[end:]), view[start:end]
    return _between(view, spans), view[start:end]


def cut_all(data: bytes, number: int) -> tuple[bytes, list[memoryview]] | None:
    """Give the header, encoded, and the payloads of a message that has any number of them.

    Args:
        data: The message, from any protobuf encoder.
        number: The repeated field that they are in.

    Returns:
        None where it is for protobuf to say what these bytes are.

    """
    spans = _payloads(data, number << 3 | _BYTES)
    if spans is None:
        return None
    view = memoryview(data)
    return _between(view, spans), [view[start:end] for _, start, end in spans]


def _between(view: memoryview, spans: list[tuple[int, int, int]]) -> bytes:
    pieces, done = [], 0
    for tag, _, stop in spans:
        pieces.append(view[done:tag])
        done = stop
    return b"".join((*pieces, view[done:]))


def _varint(number: int) -> bytes:
    data = bytearray()
    while number > 0x7F:  # noqa: PLR2004 - seven bits a byte
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)


def _payloads(data: bytes, payload_tag: int) -> list[tuple[int, int, int]] | None:
    """Give where each payload's tag, bytes and end are; None where it is for protobuf to say what the bytes are."""
    found: list[tuple[int, int, int]] = []
    place, size = 0, len(data)
    while place < size:
        tag_at = place
        tag, place = _read_varint(data, place)
        kind = tag & 7
        if tag == payload_tag or kind == _BYTES:
            length, place = _read_varint(data, place)
            if length > size - place:
                return None
            if tag == payload_tag:
                if place - tag_at > _MAX_HEAD_BYTES:
                    return None
                found.append((tag_at, place, place + length))
            place += length
        elif tag >> 3 == payload_tag >> 3 or not tag >> 3:
            return None
        elif kind == _VARINT:
            _, place = _read_varint(data, place)
        elif kind in (_FIXED64, _FIXED32):
            place += 8 if kind == _FIXED64 else 4
        else:
            return None  # a group, or no kind that there is
        if place < 0 or place > size:
            return None
    return found


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    """Give a varint and the place after it, which is past the end of any message where there is none."""
    if place < len(data) and data[place] < 0x80:  # noqa: PLR2004 - the top bit says that another byte follows
        return data[place], place + 1
    number = 0
    for i, byte in enumerate(data[place : place + _MAX_VARINT_BYTES]):
        number |= (byte & 0x7F) << 7 * i
        if byte < 0x80:  # noqa: PLR2004 - as above
            return number, place + i + 1
    return 0, len(data) + 1
