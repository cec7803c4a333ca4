"""The packets of calls that are sent to the arena socket instead of through gRPC; both sides use them."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from google.protobuf.message import DecodeError

from poolrpc._wire.status import STATUS_NUMBERS, decode_error
from poolrpc.errors import InternalError, InvalidArgumentError
from poolrpc.v1 import pool_pb2, standard_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from poolrpc.tensors import Bytes

MAX_PACKET_BYTES = 128 * 2**10
"""The largest packet: the kernel's default for a socket's buffer, 208 KiB, has room for it with its own overhead."""

_PREFIX = struct.Struct("<HQ")
"""What a packet starts with: the length of its header, and the microseconds that are left until the deadline."""

_NO_DEADLINE = 2**64 - 1
_MAX_LENGTH = 2**16 - 1

_REMEMBERED_HEADER_BYTES = 1024
"""The largest header that is remembered: a client chooses its size, and what is kept is counted nowhere."""

_OK, _ERROR = b"\0", b"\1"
_CODES = {number: name for name, number in STATUS_NUMBERS.items() if name != "OK"}


class ReceivedCall(NamedTuple):
    """A call as its packet has it.

    Attributes:
        method: "/package.Service/Method".
        timeout: Seconds until the deadline; None for no deadline.
        metadata: Pairs of a key and a value: bytes if the key ends with "-bin", as in gRPC.
        message: The request.

    """

    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...]
    message: bytes


def encode_call(
    method: str, timeout: float | None, metadata: tuple[tuple[str, str | bytes], ...], message: Iterable[Bytes]
) -> list[Bytes] | None:
    """Return the parts of a call's packet, or None if it is larger than MAX_PACKET_BYTES.

    Args:
        method: "package.Service/Method".
        timeout: Seconds until the deadline; None for no deadline.
        metadata: Pairs of a key and a value.
        message: The parts of the request.

    """
    header = _encode_header(method, metadata)
    deadline = _NO_DEADLINE if timeout is None else max(0, round(timeout * 1e6))
    if len(header) > _MAX_LENGTH:
        return None
    parts: list[Bytes] = [_PREFIX.pack(len(header), deadline), header, *message]
    return parts if sum(map(len, parts)) <= MAX_PACKET_BYTES else None


@lru_cache(64)
def _encode_header(method: str, metadata: tuple[tuple[str, str | bytes], ...]) -> bytes:
    # Cached, since most calls of a client have the same.
    texts = [text if isinstance(text, bytes) else text.encode() for pair in metadata for text in pair]
    return pool_pb2.LocalCall(method=f"/{method}", metadata=texts).SerializeToString()


def decode_call(packet: memoryview) -> ReceivedCall:
    """Return the call that a packet describes.

    Raises:
        InvalidArgumentError: The packet is not a call.

    """
    try:
        length, deadline = _PREFIX.unpack_from(packet)
    except struct.error:
        raise InvalidArgumentError("expected the packet of a call, got another one") from None
    start = _PREFIX.size + length
    if start > len(packet):
        raise InvalidArgumentError(f"expected a header of {length} bytes, got {len(packet) - _PREFIX.size}")
    header = bytes(packet[_PREFIX.size : start])
    method, metadata = (_remembered_header if length <= _REMEMBERED_HEADER_BYTES else _decode_header)(header)
    timeout = None if deadline == _NO_DEADLINE else deadline / 1e6
    return ReceivedCall(method, timeout, metadata, bytes(packet[start:]))


def _decode_header(data: bytes) -> tuple[str, tuple[tuple[str, str | bytes], ...]]:
    try:
        header = pool_pb2.LocalCall.FromString(data)
    except DecodeError:
        raise InvalidArgumentError("expected the header of a call, got other bytes") from None
    texts = header.metadata
    if len(texts) % 2:
        raise InvalidArgumentError(f"expected keys and values, got {len(texts)} texts", field="metadata")
    return header.method, tuple(_pair(key, value) for key, value in zip(texts[::2], texts[1::2], strict=True))


_remembered_header = lru_cache(64)(_decode_header)  # for the same reason


def _pair(key: bytes, value: bytes) -> tuple[str, str | bytes]:
    try:
        name = key.decode("ascii")
        return name, value if name.endswith("-bin") else value.decode("ascii")
    except UnicodeDecodeError:
        raise InvalidArgumentError("expected keys and values in ASCII, got other bytes", field="metadata") from None


def encode_answer(response: bytes) -> list[bytes] | None:
    """Return the parts of the packet of a response, or None if it is larger than MAX_PACKET_BYTES."""
    return [_OK, response] if len(response) < MAX_PACKET_BYTES else None


def encode_failure(details: bytes) -> list[bytes]:
    """Return the parts of the packet of an error, given as an encoded google.rpc.Status."""
    return [_ERROR, details]


def decode_answer(packet: Bytes) -> bytes:
    """Return the response that a packet contains.

    Raises:
        PoolError: The call failed.
        InternalError: The packet is not an answer.

    """
    kind, content = packet[:1], bytes(packet[1:])
    if kind == _OK:
        return content
    try:
        status = standard_pb2.Status.FromString(content)
    except DecodeError:
        status = standard_pb2.Status()
    if kind != _ERROR or status.code not in _CODES:
        raise InternalError("expected an answer, got another packet", reason="ANSWER")
    raise decode_error(_CODES[status.code], status.message, content)
