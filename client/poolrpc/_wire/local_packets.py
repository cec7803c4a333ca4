"""The packets of calls that are sent to the arena socket instead of through gRPC; both sides use them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from google.protobuf.message import DecodeError

from poolrpc._wire.status import STATUS_NUMBERS, decode_error
from poolrpc.errors import InternalError, InvalidArgumentError, PoolError
from poolrpc.v1 import pool_pb2, standard_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from poolrpc.tensors import Bytes

MAX_PACKET_BYTES = 128 * 2**10
"""The largest packet: the kernel's default for a socket's buffer, 208 KiB, has room for it with its own overhead."""

_LENGTH = struct.Struct("<H")
_OK, _ERROR = b"\0", b"\1"
_CODES = {number: name for name, number in STATUS_NUMBERS.items()}


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
    method: str, timeout: float | None, metadata: Sequence[tuple[str, str | bytes]], message: Iterable[Bytes]
) -> list[Bytes] | None:
    """Return the parts of a call's packet, or None if it is larger than MAX_PACKET_BYTES.

    Args:
        method: "package.Service/Method".
        timeout: Seconds until the deadline; None for no deadline.
        metadata: Pairs of a key and a value.
        message: The parts of the request.

    """
    texts = [text if isinstance(text, bytes) else text.encode() for pair in metadata for text in pair]
    call = pool_pb2.LocalCall(method=f"/{method}", metadata=texts)
    if timeout is not None:
        call.timeout = max(0, round(timeout * 1e6))
    header = call.SerializeToString()
    parts: list[Bytes] = [b"", header, *message]
    if sum(map(len, parts)) > MAX_PACKET_BYTES - _LENGTH.size or len(header) >= 2 ** (8 * _LENGTH.size):
        return None
    parts[0] = _LENGTH.pack(len(header))
    return parts


def decode_call(packet: memoryview) -> ReceivedCall:
    """Return the call that a packet describes.

    Raises:
        InvalidArgumentError: The packet is not a call.

    """
    try:
        (length,) = _LENGTH.unpack_from(packet)
        start = _LENGTH.size + length
        if start > len(packet):
            raise InvalidArgumentError(f"expected a header of {length} bytes, got {len(packet) - _LENGTH.size}")
        header = pool_pb2.LocalCall.FromString(bytes(packet[_LENGTH.size : start]))
    except (struct.error, DecodeError):
        raise InvalidArgumentError("expected the packet of a call, got another one") from None
    texts = header.metadata
    if len(texts) % 2:
        raise InvalidArgumentError(f"expected keys and values, got {len(texts)} texts", field="metadata")
    timeout = header.timeout / 1e6 if header.HasField("timeout") else None
    metadata = tuple(_pair(key, value) for key, value in zip(texts[::2], texts[1::2], strict=True))
    return ReceivedCall(header.method, timeout, metadata, bytes(packet[start:]))


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
    if packet[:1] == _OK:
        return bytes(packet[1:])
    raise _error(bytes(packet))


def _error(packet: bytes) -> PoolError:
    try:
        status = standard_pb2.Status.FromString(packet[1:])
        code = _CODES[status.code]
    except (DecodeError, KeyError):
        return InternalError("expected an answer, got another packet", reason="ANSWER")
    return decode_error(code, status.message, packet[1:])
