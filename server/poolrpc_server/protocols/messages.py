"""Protobuf messages of a call: parsing, and the error for bytes that are not a message."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import DecodeError

from poolrpc.errors import InternalError

if TYPE_CHECKING:
    from google.protobuf.message import Message

M = TypeVar("M", bound="Message")

NO_MESSAGE = "NO_MESSAGE"
"""Reason of the error of a call whose bytes are not a message of its method's type."""


def parse(cls: type[M], data: bytes) -> M:
    """Return the message that the bytes encode.

    Raises:
        InternalError: The bytes are not such a message. INTERNAL is the status that gRPC itself uses for this.

    """
    try:
        return cls.FromString(data)
    except DecodeError:
        raise not_a_message(cls) from None


def not_a_message(cls: type[Message]) -> InternalError:
    """Return the error of a call whose bytes are not a message of that class."""
    return InternalError(f"expected a {cls.DESCRIPTOR.full_name}, got bytes that are not one", reason=NO_MESSAGE)
