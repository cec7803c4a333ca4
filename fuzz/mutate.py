"""Cases and their mutation: a case is the messages of one call, and mutations know protobuf's encoding."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from poolrpc._wire import framing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from random import Random

Case = tuple[bytes, ...]
Field = tuple[int, int, int | bytes]
"""The number, the wire type and the value."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
WIDTHS = {FIXED64: 8, FIXED32: 4}

INTERESTING = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 127, 128, 255, 256, 4095, 4096, 65535, 65536),
    *(2**k + d for k in (22, 23, 24, 31, 32, 33, 48, 53, 62, 63) for d in (-1, 0, 1)),
    *(2**64 - d for d in (1, 2, 3, 4, 16, 2**31, 2**31 + 1, 2**32)),
)
"""Numbers at the limits of parameters and of integer types, and negative numbers."""

WORDS = (
    *(
        "",
        "pool",
        "stem",
        "input",
        "indices",
        "weights",
        "offsets",
        "boxes",
        "output",
        "output_1",
        "layer",
        "priority",
        "timeout",
        "headers",
        "1",
    ),
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
        "GlobalPool2d('max')",
    ),
)
"""Texts that have a meaning in some field."""

JSON_VALUES = (True, False, -1, 0.5, 2.0, 1e308, "NaN", "Infinity", [], {}, [[]], "float16", "int64", "base64", "NHWC")
"""Values of JSON that some field takes, or should not take."""

CHARACTERS = "0123456789()[],=.-+*_#'\\ {}:\n\0\u00e9\U0001f600"

MAX_MESSAGES = 12
MAX_BYTES = 16384
"""The size of a message: enough for every limit on the number of fields, and quick to compute."""


def pack(case: Sequence[bytes]) -> bytes:
    """Return a case as one string, which libFuzzer can keep."""
    return b"".join(len(each).to_bytes(2, "little") + each for each in case)


def unpack(data: bytes) -> Case:
    """Return the case of any string."""
    case = []
    while data and len(case) < MAX_MESSAGES:
        size = int.from_bytes(data[:2], "little")
        case.append(data[2 : 2 + size])
        data = data[2 + size :]
    return tuple(case)


def mutated(case: Case, others: Sequence[Case], rng: Random) -> Case:
    """Return a mutation of a case, sometimes with parts of another one, sometimes of random bytes."""
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
            messages[at] += other  # two messages in a row are one with the fields of both
        elif step < 9:
            messages[at] = _bytes_changed(messages[at], rng)
        elif messages[at].startswith(b"{"):
            messages[at] = _json_changed(messages[at], other, rng)
        else:
            messages[at] = _fields_changed(messages[at], other, rng)
    return tuple(each[:MAX_BYTES] for each in messages[:MAX_MESSAGES])


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
        out[at : at + 1] = bytes((out[at] | 0x80, rng.choice((0, 1, 0x80, 0xFF))))  # makes a varint longer
    return bytes(out)


def _json_changed(data: bytes, other: bytes, rng: Random) -> bytes:
    try:
        value, others = json.loads(data), json.loads(other if other.startswith(b"{") else b"{}")
    except (ValueError, RecursionError):
        return _bytes_changed(data, rng)
    places = [*_places(value)]
    for _ in range(rng.choice((1, 1, 2))):
        parent, key = rng.choice(places)
        step = rng.randrange(8)
        if step == 0:
            parent[key] = rng.choice(INTERESTING) * rng.choice((1, -1))
        elif step == 1:
            parent[key] = rng.choice(JSON_VALUES)
        elif step == 2:
            parent[key] = rng.choice(WORDS)
        elif step == 3:
            parent[key] = [parent[key]] * rng.randrange(3)
        elif step == 4 and others:
            parent[key] = rng.choice([each[at] for each, at in _places(others)])
        elif step == 5 and isinstance(parent, dict):
            parent[rng.choice((*WORDS, *others))] = parent[key]
        elif step == 6 and isinstance(parent, list):
            parent.append(parent[key])
        else:
            parent[key] = None
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401 - JSON
    """Yield every place in a value of JSON: the dict or the list, and the key or the number."""
    keys = [*value] if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


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
        fields[at:at] = [fields[at]] * min(times, MAX_BYTES // (len(encode_fields(fields[at : at + 1])) or 1))
    elif step == 6:
        return _with_wrong_length(fields, at, rng)
    else:
        fields[at] = _value_changed(fields[at], other, rng)
    return encode_fields(fields)


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
    # The ends of zero, one, infinity, NaN, the smallest and the largest number, for either width.
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


def _with_wrong_length(fields: list[Field], at: int, rng: Random) -> bytes:
    number, kind, value = fields[at]
    body = value if isinstance(value, bytes) else varint(value)
    length = varint(rng.choice((len(body) + rng.choice((-1, 1, 7)), rng.choice(INTERESTING))) % 2**64)
    tag = varint(number << 3 | rng.choice((BYTES, BYTES, 3, 4, 6, 7, kind)))
    return encode_fields(fields[:at]) + tag + length + body + encode_fields(fields[at + 1 :])


def fields_of(data: bytes) -> list[Field] | None:
    """Return the fields of a message; None if the bytes are not a message."""
    fields: list[Field] = []
    position, size = 0, len(data)
    while position < size:
        tag, position = _read(data, position)
        number, kind = tag >> 3, tag & 7
        if not number or kind not in (VARINT, FIXED64, BYTES, FIXED32):
            return None
        value: int | bytes
        if kind == VARINT:
            value, position = _read(data, position)
        else:
            length = WIDTHS.get(kind)
            if length is None:
                length, position = _read(data, position)
            value, position = data[position : position + length], position + length
        if position > size:
            return None
        fields.append((number, kind, value))
    return fields


def encode_fields(fields: Sequence[Field]) -> bytes:
    """Return the message of fields."""
    parts = []
    for number, kind, value in fields:
        if isinstance(value, int):
            parts += (varint(number << 3 | kind), varint(value))
        else:
            parts += (framing.field_prefix(number, len(value)) if kind == BYTES else varint(number << 3 | kind), value)
    return b"".join(parts)


def varint(number: int) -> bytes:
    """Return a number as protobuf encodes it."""
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)


def _read(data: bytes, position: int) -> tuple[int, int]:
    number = 0
    for i, byte in enumerate(data[position : position + 10]):
        number |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return number, position + i + 1
    return 0, len(data) + 1
