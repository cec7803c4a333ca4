"""Errors as gRPC statuses: the code, the message, and google.rpc's details in the trailing metadata."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from poolrpc.errors import (
    BY_CODE,
    DOMAIN,
    CancelledError,
    FieldViolation,
    InvalidArgumentError,
    LimitExceededError,
    PoolError,
    UnavailableError,
)
from poolrpc.v1 import standard_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

STATUS_NUMBERS = {
    name: number
    for number, name in enumerate(
        (
            "OK",
            "CANCELLED",
            "UNKNOWN",
            "INVALID_ARGUMENT",
            "DEADLINE_EXCEEDED",
            "NOT_FOUND",
            "ALREADY_EXISTS",
            "PERMISSION_DENIED",
            "RESOURCE_EXHAUSTED",
            "FAILED_PRECONDITION",
            "ABORTED",
            "OUT_OF_RANGE",
            "UNIMPLEMENTED",
            "INTERNAL",
            "UNAVAILABLE",
            "DATA_LOSS",
            "UNAUTHENTICATED",
        )
    )
}
"""The number of each status code (google/rpc/code.proto)."""

ENDED_BY_SERVER = (
    "expected an answer, got the end of the call: the server stopped, or waited too long for this client; try again"
)
"""Message of the error of a call that the server has ended."""

ENDED_RETRY_DELAY = 0.1
"""Seconds to wait before a call that the server has ended is tried again."""

ATTEMPTS_KEY = "grpc-previous-rpc-attempts"
"""Metadata of gRPC's retries (gRFC A6): the attempts before this one. The server sends it back with the status, because
gRPC tells a client nothing of its own retries."""

DETAILS_KEY = "grpc-status-details-bin"
"""The metadata key of the details, which is the same for gRPC's clients in every language."""

# gRPC allows 16 KB of metadata in all. An error stays under 4 KB, whatever is in it.
MESSAGE_CHARS = 600
VIOLATIONS = 4
TEXT_CHARS = 300
RAISE_HINT = "raise it with --max-message-bytes on the server and max_message_bytes= on the client"
TYPE_URL = "type.googleapis.com/google.rpc."


def _truncate(text: str, limit: int = TEXT_CHARS) -> str:
    data = text.encode(errors="replace")
    return text if len(data) <= limit else data[: limit - 3].decode(errors="ignore") + "..."


def encode_error(error: PoolError) -> tuple[str, bytes]:
    """Return an error's status message and its encoded google.rpc.Status, both bounded in size."""
    text = _truncate(error.message, MESSAGE_CHARS)
    metadata = tuple((_truncate(key, 40), _truncate(value)) for key, value in list(error.metadata.items())[:4])
    violations: tuple[tuple[str, str], ...] = ()
    if isinstance(error, InvalidArgumentError):
        violations = tuple(
            (_truncate(each.field), _truncate(each.description)) for each in error.violations[:VIOLATIONS]
        )
    delay = error.retry_delay if isinstance(error, UnavailableError) else None
    return text, _details(STATUS_NUMBERS[error.code], text, error.reason, metadata, violations, delay)


@lru_cache(64)  # A full server repeats one error a hundred times a second, and this is most of the cost of a rejection.
def _details(  # noqa: PLR0913, PLR0917 - the contents of an error
    number: int,
    text: str,
    reason: str,
    metadata: tuple[tuple[str, str], ...],
    violations: tuple[tuple[str, str], ...],
    delay: float | None,
) -> bytes:
    status = standard_pb2.Status(code=number, message=text)
    _add(status, standard_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=dict(metadata)))
    if violations:
        violation = standard_pb2.BadRequest.FieldViolation
        bad = [violation(field=field, description=description) for field, description in violations]
        _add(status, standard_pb2.BadRequest(field_violations=bad))
    if delay is not None:
        retry = standard_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(delay * 1000))
        _add(status, retry)
    return status.SerializeToString()


def _add(status: standard_pb2.Status, detail: Message) -> None:
    status.details.add(type_url=TYPE_URL + detail.DESCRIPTOR.name, value=detail.SerializeToString())


def decode_error(code: str, message: str, details: bytes | None) -> PoolError:
    """Return the error that a status describes: the one that the server raised, if it is a poolrpc server.

    Args:
        code: The status code's name.
        message: The status message.
        details: The value of DETAILS_KEY; None if there is none.

    """
    cls = BY_CODE.get(code, PoolError)
    info = standard_pb2.ErrorInfo()
    violations: tuple[FieldViolation, ...] = ()
    delay: float | None = None
    try:
        for detail in standard_pb2.Status.FromString(details or b"").details:
            kind = detail.type_url.removeprefix(TYPE_URL)
            if kind == "ErrorInfo":
                info = standard_pb2.ErrorInfo.FromString(detail.value)
            elif kind == "BadRequest":
                bad = standard_pb2.BadRequest.FromString(detail.value)
                violations = tuple(FieldViolation(each.field, each.description) for each in bad.field_violations)
            elif kind == "RetryInfo":
                delay = standard_pb2.RetryInfo.FromString(detail.value).retry_delay.ToMilliseconds() / 1000
    except DecodeError:
        pass  # Without valid details, an error has only its code and its message.
    metadata = dict(info.metadata)
    if issubclass(cls, InvalidArgumentError):
        return cls(message, violations=violations)
    if issubclass(cls, UnavailableError):
        return cls(message, reason=info.reason, metadata=metadata, retry_delay=delay)
    if issubclass(cls, LimitExceededError) and not info.reason and "larger than max" in message:
        return cls(f"{message}; {RAISE_HINT}", reason="MESSAGE_TOO_LARGE")
    if not BY_CODE.get(code):
        message = f"{code}: {message}"
    return cls(message, reason=info.reason, metadata=metadata)


def translate_rpc_error(error: Any) -> PoolError:  # noqa: ANN401 - a grpc.RpcError that is a grpc.Call, or grpc.aio's
    """Return the PoolError for the error of a gRPC call."""
    if error.code().name == error.details() == CancelledError.code:
        # gRPC's message for a call that the other side reset without a status: the client's own have another one.
        return UnavailableError(ENDED_BY_SERVER, reason="ENDED", retry_delay=ENDED_RETRY_DELAY)
    details = None
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            details = value
    return decode_error(error.code().name, error.details() or "", details)
