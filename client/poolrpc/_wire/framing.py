"""Framing of messages with a payload, without protobuf's copies.

Every message that carries tensors has them in one bytes field, `payload`, number 15; the rest of the message, its
header, is small. A message is sent as its header, serialized by protobuf, joined once with a tag, a length and the
bytes of the tensors. A received message is split at the same place, and the payload is a view of it. protobuf's own
serializer takes about ten times as long as the join, and copies a bytes field on each access. Input that this module
can't split is left to protobuf, which then decides between a result and an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

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

MAX_HEADER_BYTES = 2**20
"""Maximum size of a message without its payload, in bytes."""

MAX_FIELDS = 4096
"""Maximum number of fields of a message with a payload, without those of the messages in it."""

MAX_UNUSUAL_BYTES = 64 * 2**10
"""Maximum size of a message that is left to protobuf, in bytes."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_GROUPS = 3, 4
_MAX_VARINT_BYTES = 10
_MAX_PREFIX_BYTES = 6  # of a payload's tag and length in their shortest form; protobuf rejects some longer ones


class HeaderError(DecodeError):
    """A message is too large without its payload, or has too many fields, to be read at a reasonable cost."""


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
        HeaderError: The header is too large, or has too many fields.
        google.protobuf.message.DecodeError: The bytes are not a message.

    """
    spans = _find_payloads(data, PAYLOAD_TAG)
    view = memoryview(data)
    if spans is None:
        _check_size(len(data), MAX_UNUSUAL_BYTES)
        message: Any = cls.FromString(data)
        payload = message.payload
        message.ClearField("payload")
        return message.SerializeToString(), memoryview(payload)
    _check_header(data, spans, MAX_HEADER_BYTES)
    if not spans:
        return data, view[:0]
    # The last of several payloads counts, as with every field that isn't repeated.
    _, start, end = spans[-1]
    if len(spans) == 1:
        tag = spans[0][0]
        return (data[:tag] if end == len(data) else data[:tag] + data[end:]), view[start:end]
    return _without(view, spans), view[start:end]


def split_payloads(data: bytes, number: int, max_header_bytes: int) -> tuple[bytes, list[memoryview]] | None:
    """Split a message into its serialized header and the values of a repeated bytes field.

    Args:
        data: The message, from any protobuf encoder.
        number: The number of the repeated field.
        max_header_bytes: Maximum size of the header, in bytes.

    Returns:
        The header, and a view of each value; None if the message has to be left to protobuf.

    Raises:
        HeaderError: The header is too large, or has too many fields.
        google.protobuf.message.DecodeError: The bytes are not a message.

    """
    spans = _find_payloads(data, number << 3 | _BYTES)
    if spans is None:
        _check_size(len(data), MAX_UNUSUAL_BYTES)
        return None
    _check_header(data, spans, max_header_bytes)
    view = memoryview(data)
    return _without(view, spans), [view[start:end] for _, start, end in spans]


def count_fields(data: Bytes, descriptor: Any, limit: int) -> int:  # noqa: ANN401 - protobuf has two classes of it
    """Return the number of fields of a serialized message and of the messages in it; counting ends above the limit.

    Bytes that are not a message end the count, too: they are left to protobuf.
    """
    count = 0
    messages = [(memoryview(data), descriptor)]
    while messages:
        view, descriptor = messages.pop()
        offset, size = 0, len(view)
        while offset < size:
            count += 1
            if count > limit:
                return count
            tag, offset = _read_varint(view, offset)
            if tag & 7 in _GROUPS:
                continue  # the fields of a group count as the message's own
            start, offset = _skip(view, offset, tag & 7)
            if offset > size:
                break
            field = descriptor.fields_by_number.get(tag >> 3)
            if field is not None and field.message_type is not None and tag & 7 == _BYTES:
                messages.append((view[start:offset], field.message_type))
    return count


def _skip(data: Bytes, offset: int, kind: int) -> tuple[int, int]:
    """Return where a field's contents begin and end, which is past the end of the data if it is not a valid field."""
    if kind == _VARINT:
        return offset, _read_varint(data, offset)[1]
    if kind == _BYTES:
        length, offset = _read_varint(data, offset)
        return offset, offset + length
    if kind in (_FIXED64, _FIXED32):
        return offset, offset + (8 if kind == _FIXED64 else 4)
    return offset, len(data) + 1  # a group, or an unknown wire type


def _check_header(data: bytes, spans: list[tuple[int, int, int]], limit: int) -> None:
    _check_size(len(data) - sum(end - tag for tag, _, end in spans), limit)


def _check_size(nbytes: int, limit: int) -> None:
    if nbytes > limit:
        raise HeaderError(f"expected at most {limit} bytes without the payload, got {nbytes}")


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
    offset, size, count = 0, len(data), 0
    while offset < size:
        count += 1
        if count > MAX_FIELDS:
            raise HeaderError(f"expected at most {MAX_FIELDS} fields, got more")
        tag_at = offset
        tag, offset = _read_varint(data, offset)
        if not tag >> 3 and offset <= size:
            raise DecodeError("expected fields with numbers from 1 on, got 0")
        start, offset = _skip(data, offset, tag & 7)
        if offset > size:
            return None
        if tag == payload_tag:
            if start - tag_at > _MAX_PREFIX_BYTES:
                return None
            found.append((tag_at, start, offset))
        elif tag & 7 != _BYTES and tag >> 3 == payload_tag >> 3:
            return None
    return found


def _read_varint(data: Bytes, offset: int) -> tuple[int, int]:
    """Return a varint and the offset after it, which is past the end of the data if there is no valid varint."""
    if offset < len(data) and data[offset] < 0x80:  # noqa: PLR2004 - the top bit says that another byte follows
        return data[offset], offset + 1
    number = 0
    for i, byte in enumerate(data[offset : offset + _MAX_VARINT_BYTES]):
        number |= (byte & 0x7F) << 7 * i
        if byte < 0x80:  # noqa: PLR2004 - as above
            return number, offset + i + 1
    return 0, len(data) + 1
