"""Cases and their mutation: a case is the messages of one call, and a mutation knows how protobuf lays bytes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poolrpc._wire import framing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

Case = tuple[bytes, ...]
Field = tuple[int, int, int | bytes]
"""Its number, its wire type, and its value."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
WIDTHS = {FIXED64: 8, FIXED32: 4}

INTERESTING = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 127, 128, 255, 256, 4095, 4096, 65535, 65536),
    *(2**k + d for k in (22, 23, 24, 31, 32, 33, 48, 53, 62, 63) for d in (-1, 0, 1)),
    *(2**64 - d for d in (1, 2, 3, 4, 16, 2**31, 2**31 + 1, 2**32)),
)
"""Numbers at the edges of what is allowed, of how numbers are held, and below zero."""

WORDS = (
    *("", "pool", "stem", "input", "indices", "output", "output_1", "layer", "priority", "timeout", "headers", "1"),
    *("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "region", "../x", "/", "."),
    *("FP32", "FP16", "BF16", "FP64", "BOOL", "UINT8", "INT8", "INT16", "INT32", "INT64", "UINT64", "BYTES"),
    *(
        "MaxPool2d",
        "(2)",
        "[[",
        "]]",
        "stride=",
        "padding=(1, 1)",
        "None",
        "True",
        "inf",
        "nan",
        "1e400",
        "GlobalMaxPool()",
    ),
)
"""Texts that mean something somewhere."""

CHARACTERS = "0123456789()[],=.-+*_#'\\ {}:\n\0\u00e9\U0001f600"

MOST_MESSAGES = 12
MOST_BYTES = 16384
"""Of a message: enough for every limit that counts fields, and quick to compute."""


def pack(case: Sequence[bytes]) -> bytes:
    """Give a case as one string, which libFuzzer keeps."""
    return b"".join(len(each).to_bytes(2, "little") + each for each in case)


def unpack(data: bytes) -> Case:
    """Give the case that any string is."""
    case = []
    while data and len(case) < MOST_MESSAGES:
        size = int.from_bytes(data[:2], "little")
        case.append(data[2 : 2 + size])
        data = data[2 + size :]
    return tuple(case)


def mutated(case: Case, others: Sequence[Case], rng: Random) -> Case:
    """Give a case that is like another one; now and then it has parts of a third, or is anything."""
    messages = list(case) or [b""]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(messages))
        other = rng.choice(rng.choice(others) or (b"",))
        step = rng.randrange(24)
        if step == 0:
            messages.insert(at, messages[at])
        elif step == 1:
            messages.insert(at, other)
        elif step == 2 and len(messages) > 1:
            del messages[at]
        elif step == 3:
            rng.shuffle(messages)
        elif step == 4:
            messages[at] = rng.randbytes(rng.randrange(64))
        elif step == 5:
            messages[at] += other  # two messages end to end are one of both's fields
        elif step < 9:
            messages[at] = _bytes_changed(messages[at], rng)
        else:
            messages[at] = _fields_changed(messages[at], other, rng)
    return tuple(each[:MOST_BYTES] for each in messages[:MOST_MESSAGES])


def _bytes_changed(data: bytes, rng: Random) -> bytes:
    out = bytearray(data or b"\0")
    at = rng.randrange(len(out))
    step = rng.randrange(7)
    if step == 0:
        out[at] ^= 1 << rng.randrange(8)
    elif step == 1:
        out[at] = rng.randrange(256)
    elif step == 2:
        del out[at:]
    elif step == 3:
        del out[at : at + rng.randrange(1, 9)]
    elif step == 4:
        out[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif step == 5:
        out[at:at] = varint(rng.choice(INTERESTING))
    else:
        out[at : at + 1] = bytes((out[at] | 0x80, rng.choice((0, 1, 0x80, 0xFF))))  # a varint grows
    return bytes(out)


def _fields_changed(data: bytes, other: bytes, rng: Random) -> bytes:
    fields = fields_of(data)
    if not fields:
        return _bytes_changed(data, rng)
    at = rng.randrange(len(fields))
    _, kind, value = fields[at]
    step = rng.randrange(16)
    if step == 0:
        fields.insert(rng.randrange(len(fields) + 1), fields[at])
    elif step == 1:
        del fields[at]
    elif step == 2:
        fields[at] = rng.choice((rng.randrange(1, 17), rng.choice(INTERESTING) % 2**29)), kind, value
    elif step == 3:
        rng.shuffle(fields)
    elif step == 4 and (more := fields_of(other)):
        fields.insert(at, rng.choice(more))
    elif step == 5:
        times = rng.choice((2, 5, 64, 65, 300))
        fields[at:at] = [fields[at]] * min(times, MOST_BYTES // (len(written(fields[at : at + 1])) or 1))
    elif step == 6:
        return _lying(fields, at, rng)
    else:
        fields[at] = _value_changed(fields[at], other, rng)
    return written(fields)


def _value_changed(field: Field, other: bytes, rng: Random) -> Field:
    number, kind, value = field
    if rng.randrange(9) == 0:
        kind = rng.choice((VARINT, FIXED64, BYTES, FIXED32))
        return number, kind, rng.randrange(300) if kind == VARINT else rng.randbytes(WIDTHS.get(kind, 3))
    if isinstance(value, int):
        near = (value + rng.choice((-1, 1, 2, -2))) % 2**64
        return number, kind, rng.choice((rng.choice(INTERESTING), rng.randrange(9), near))
    return number, kind, _text_changed(value, other, rng) if kind == BYTES else _edge_of_floats(kind, rng)


def _edge_of_floats(kind: int, rng: Random) -> bytes:
    # Zero, one, infinity, a NaN, the least and the largest; as a float is twice as wide, other values in place of them.
    tops = (b"\0\0", b"\xf0\x3f", b"\xf0\x7f", b"\xf8\x7f", b"\xf0\xff", b"\x80\x3f", b"\x80\x7f", b"\xe0\x40")
    return rng.choice((b"\0", b"\xff")) * (WIDTHS[kind] - 2) + rng.choice(tops)


def _text_changed(value: bytes, other: bytes, rng: Random) -> bytes:
    step = rng.randrange(10)
    if step < 6 and fields_of(value):
        return _fields_changed(value, other, rng)
    if step == 7:
        return b"".join(varint(rng.choice(INTERESTING)) for _ in range(rng.choice((1, 2, 3, 4, 5, 6))))
    text = value.decode(errors="ignore")
    if step == 8 or len(text.encode()) < len(value):
        return _bytes_changed(value, rng)
    piece = rng.choice((rng.choice(WORDS), rng.choice(CHARACTERS), str(rng.choice(INTERESTING))))
    at = rng.choice((0, rng.randrange(len(text) + 1)))
    return (text[:at] + piece + text[at + rng.choice((0, 1, len(piece), len(text))) :]).encode()


def _lying(fields: list[Field], at: int, rng: Random) -> bytes:
    number, kind, value = fields[at]
    body = value if isinstance(value, bytes) else varint(value)
    length = varint(rng.choice((len(body) + rng.choice((-1, 1, 7)), rng.choice(INTERESTING))) % 2**64)
    lead = varint(number << 3 | rng.choice((BYTES, BYTES, 3, 4, 6, 7, kind)))
    return written(fields[:at]) + lead + length + body + written(fields[at + 1 :])


def fields_of(data: bytes) -> list[Field] | None:
    """Give the fields that a message has, if it is one."""
    fields: list[Field] = []
    place, size = 0, len(data)
    while place < size:
        tag, place = _read(data, place)
        number, kind = tag >> 3, tag & 7
        if not number or kind not in (VARINT, FIXED64, BYTES, FIXED32):
            return None
        value: int | bytes
        if kind == VARINT:
            value, place = _read(data, place)
        else:
            length = WIDTHS.get(kind)
            if length is None:
                length, place = _read(data, place)
            value, place = data[place : place + length], place + length
        if place > size:
            return None
        fields.append((number, kind, value))
    return fields


def written(fields: Sequence[Field]) -> bytes:
    """Give the message of fields."""
    parts = []
    for number, kind, value in fields:
        if isinstance(value, int):
            parts += (varint(number << 3 | kind), varint(value))
        else:
            parts += (framing.field_prefix(number, len(value)) if kind == BYTES else varint(number << 3 | kind), value)
    return b"".join(parts)


def varint(number: int) -> bytes:
    """Give a number as protobuf has it."""
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)


def _read(data: bytes, place: int) -> tuple[int, int]:
    number = 0
    for i, byte in enumerate(data[place : place + 10]):
        number |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return number, place + i + 1
    return 0, len(data) + 1
