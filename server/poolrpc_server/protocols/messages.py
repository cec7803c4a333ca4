"""Protobuf messages of a call: parsing, large ones in turn, and the error for bytes that are not a message."""

from __future__ import annotations

from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import DecodeError

from poolrpc._wire.framing import count_fields
from poolrpc.errors import InternalError, LimitExceededError
from poolrpc_server.calls.method import NO_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

    from poolrpc_server.calls.call import CallContext

M = TypeVar("M", bound="Message")

MAX_FIELDS = 16_384
"""Maximum number of fields of a message, without those of its payload: parsing one can take 100 bytes and more."""

UNMEASURED_BYTES = 4096
"""Size up to which the fields of a message are not counted, and a header does not wait for its turn."""

DECODED_COPIES = 16
"""Memory of a decoded header as a multiple of its bytes: 617 KB for 2,560 layers in 38 KB."""

_turn = RLock()
"""Held while a large header is decoded, which takes the interpreter for up to 0.1 s: several at a time would end no
sooner, and the threads that receive all other calls would wait for each of them again and again."""


def parse(cls: type[M], data: bytes) -> M:
    """Return the message that the bytes encode.

    Raises:
        InternalError: The bytes are not such a message. INTERNAL is the status that gRPC itself uses for this.
        LimitExceededError: The message has too many fields.

    """
    if len(data) > UNMEASURED_BYTES:
        with _turn:
            count = count_fields(data, cls.DESCRIPTOR, MAX_FIELDS)
        if count > MAX_FIELDS:
            raise header_too_large(f"expected at most {MAX_FIELDS} fields, got more")
    try:
        return cls.FromString(data)
    except DecodeError:
        raise not_a_message(cls) from None


@contextmanager
def decoding(header: bytes, call: CallContext) -> Iterator[None]:
    """Decode and check a call's header in the context: large ones in turn, with the memory that they take reserved.

    Raises:
        PoolError: There is no room, or no caller waits for the answer any more.

    """
    if len(header) <= UNMEASURED_BYTES:
        yield
        return
    call.ticket.reserve(DECODED_COPIES * len(header))
    with _turn:
        call.raise_if_cancelled()
        yield


def header_too_large(message: str) -> LimitExceededError:
    """Return the error of a call whose message is too large without its payload, or has too many fields."""
    return LimitExceededError(message, reason="HEADER_TOO_LARGE")


def not_a_message(cls: type[Message]) -> InternalError:
    """Return the error of a call whose bytes are not a message of that class."""
    return InternalError(f"expected a {cls.DESCRIPTOR.full_name}, got bytes that are not one", reason=NO_MESSAGE)
