"""Framing of messages with a payload, without protobuf's copies.

Every message that carries tensors has them in one bytes field, `payload`, number 15; the rest of the message, its
header, is small. A message is sent as its header, serialized by protobuf, joined once with a tag, a length and the
bytes of the tensors. A received message is split at the same place, and the payload is a view of it. protobuf's own
serializer takes about ten times as long as the join, and copies a bytes field on each access. Input that this module
can't split is left to protobuf, which then decides between a result and an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from google.protobuf.message import Message

    from poolrpc.tensors import Bytes

PAYLOAD_TAG = 15 << 3 | 2
"""The tag of field 15, length-delimited."""

PADDING_TAG = 14 << 3 | 2
"""The tag of field 14, length-delimited: the padding of requests."""

PAYLOAD_ALIGNMENT = 16
"""Alignment of a payload within its message, in bytes: enough for every dtype, and how Python aligns bytes objects."""

UNFINISHED = bytes((2 << 3, 1))
"""The header of a stream's message whose block continues in the next one, in either direction: field 2, true."""

CHUNK_BYTES = 4 * 2**20
"""Payload bytes of one message of a stream. A larger block, which is a single large plane, is sent as several."""

MESSAGE_BYTES_KEY = "poolrpc-message-bytes"
"""Metadata key with which a client announces the size of a unary message, for admission before it is received."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
_MAX_PREFIX_BYTES = 6  # of a payload's tag and length in their shortest form; protobuf rejects some longer ones


def join(header: bytes, payload: Iterable[Bytes]) -> bytes:
    """Return the message with a header and a payload.

    Args:
        header: The serialized message without its payload.
        payload: The parts of the payload, in order; an empty payload is left out, as proto3 requires.

    """
    parts = tuple(payload)
    return b"".join((message_prefix(header, sum(map(len, parts))), *parts))


def message_prefix(header: bytes, length: int) -> bytes:
    """Return the bytes of a message that precede a payload of `length` bytes."""
    return b"".join((header, bytes((PAYLOAD_TAG,)), _varint(length))) if length else header


def field_prefix(number: int, length: int) -> bytes:
    """Return the tag and the length that precede the contents of a length-delimited field."""
    return _varint(number << 3 | _BYTES) + _varint(length)


def chunks(payload: Iterable[Bytes], *, padded: bool = False, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yield one block of a stream as messages, all but the last marked unfinished.

    Args:
        payload: The parts of the block, in order.
        padded: Whether to align each payload, as `pad` does.
        chunk_bytes: The most payload bytes in a message.

    """
    parts = tuple(payload)
    size = sum(map(len, parts))
    if size > chunk_bytes:
        whole = memoryview(b"".join(parts))
        for start in range(0, size, chunk_bytes):
            chunk = whole[start : start + chunk_bytes]
            header = UNFINISHED if start + chunk_bytes < size else b""
            yield join(pad(header, len(chunk)) if padded else header, [chunk])
    else:
        yield join(pad(b"", size) if padded else b"", parts)


def pad(header: bytes, length: int) -> bytes:
    """Return the header with a padding field if one is needed to align the payload that is joined to it.

    Args:
        header: The serialized message without its payload.
        length: The length of the payload in bytes.

    """
    start = len(header) + 1 + len(_varint(length))
    if not length or start % PAYLOAD_ALIGNMENT == 0:
        return header
    # The field takes a tag, a length and at least one zero: proto3 leaves out an empty field.
    zeros = (-start - 3) % PAYLOAD_ALIGNMENT + 1
    return b"".join((header, bytes((PADDING_TAG, zeros)), bytes(zeros)))


def split_payload(data: bytes, cls: type[Message]) -> tuple[bytes, memoryview]:
    """Split a message into its serialized header and its payload.

    Args:
        data: The message, from any protobuf encoder.
        cls: The message's class, for messages that are left to protobuf.

    Returns:
        The header, and a view of the payload. Errors inside the header show when the header is parsed.

    Raises:
        google.protobuf.message.DecodeError: The bytes are not a message.

    """
    spans = _find_payloads(data, PAYLOAD_TAG)
    view = memoryview(data)
    if spans is None:
        message: Any = cls.FromString(data)
        payload = message.payload
        message.ClearField("payload")
        return message.SerializeToString(), memoryview(payload)
    if not spans:
        return data, view[:0]
    # The last of several payloads counts, as with every field that isn't repeated.
    _, start, end = spans[-1]
    if len(spans) == 1:
        tag = spans[0][0]
        return (data[:tag] if end == len(data) else data[:tag] + data[end:]), view[start:end]
    return _without(view, spans), view[start:end]


def split_payloads(data: bytes, number: int) -> tuple[bytes, list[memoryview]] | None:
    """Split a message into its serialized header and the values of a repeated bytes field.

    Args:
        data: The message, from any protobuf encoder.
        number: The number of the repeated field.

    Returns:
        The header, and a view of each value; None if the message has to be left to protobuf.

    """
    spans = _find_payloads(data, number << 3 | _BYTES)
    if spans is None:
        return None
    view = memoryview(data)
    return _without(view, spans), [view[start:end] for _, start, end in spans]


def _without(view: memoryview, spans: list[tuple[int, int, int]]) -> bytes:
    parts, done = [], 0
    for tag, _, stop in spans:
        parts.append(view[done:tag])
        done = stop
    return b"".join((*parts, view[done:]))


def _varint(number: int) -> bytes:
    data = bytearray()
    while number > 0x7F:  # noqa: PLR2004 - seven bits a byte
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)


def _find_payloads(data: bytes, payload_tag: int) -> list[tuple[int, int, int]] | None:
    """Return the offsets of each payload's tag, contents and end, or None if protobuf has to read the message."""
    found: list[tuple[int, int, int]] = []
    offset, size = 0, len(data)
    while offset < size:
        tag_at = offset
        tag, offset = _read_varint(data, offset)
        kind = tag & 7
        if tag == payload_tag or kind == _BYTES:
            length, offset = _read_varint(data, offset)
            if length > size - offset:
                return None
            if tag == payload_tag:
                if offset - tag_at > _MAX_PREFIX_BYTES:
                    return None
                found.append((tag_at, offset, offset + length))
            offset += length
        elif tag >> 3 == payload_tag >> 3 or not tag >> 3:
            return None
        elif kind == _VARINT:
            _, offset = _read_varint(data, offset)
        elif kind in (_FIXED64, _FIXED32):
            offset += 8 if kind == _FIXED64 else 4
        else:
            return None  # a group, or an unknown wire type
        if offset < 0 or offset > size:
            return None
    return found


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """Return a varint and the offset after it, which is past the end of the data if there is no valid varint."""
    if offset < len(data) and data[offset] < 0x80:  # noqa: PLR2004 - the top bit says that another byte follows
        return data[offset], offset + 1
    number = 0
    for i, byte in enumerate(data[offset : offset + _MAX_VARINT_BYTES]):
        number |= (byte & 0x7F) << 7 * i
        if byte < 0x80:  # noqa: PLR2004 - as above
            return number, offset + i + 1
    return 0, len(data) + 1
