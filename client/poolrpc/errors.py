"""What can go wrong, as one tree; each class names its gRPC status, and both sides raise the same class.

PoolError
├── InvalidArgumentError (ValueError)     INVALID_ARGUMENT    a parameter, shape or payload is wrong; see .violations
│   └── ExpressionError                   INVALID_ARGUMENT    a layer expression does not parse; see .column
├── UnsupportedError (TypeError)          UNIMPLEMENTED       a dtype that the layer lacks, an unknown method
├── LimitExceededError                    RESOURCE_EXHAUSTED  over a fixed limit: final; see .metadata
├── UnavailableError (ConnectionError)    UNAVAILABLE         not reachable, full or draining; see .retry_delay
├── DeadlineExceededError (TimeoutError)  DEADLINE_EXCEEDED   no answer within the timeout
├── CancelledError                        CANCELLED           the call was cancelled
├── UnauthenticatedError                  UNAUTHENTICATED     no token, or a wrong one
├── PermissionDeniedError                 PERMISSION_DENIED   the token does not allow this
├── NotFoundError (LookupError)           NOT_FOUND           what is named does not exist
└── InternalError                         INTERNAL            a fault of the server's; see .error_id
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DOMAIN = "poolrpc"
"""The domain of every ErrorInfo that the server sends."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field at fault and what was expected of it.

    Attributes:
        field: The field's path: "kernel_size" in a layer, "branches[0].layers[0].max_pool.kernel_size" in a request.
        description: What was expected and what was received.

    """

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}" if self.field else self.description


class PoolError(Exception):
    """The base of every error of poolrpc.

    Attributes:
        code: The gRPC status code's name.
        message: What happened.
        reason: Why, in UPPER_SNAKE_CASE; stable, for programs.
        metadata: What the reason is about, such as a limit and the actual value.
        tensor: In a map, the number of the tensor that failed, counted from 0.

    """

    code: ClassVar[str] = "UNKNOWN"
    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(self, message: str, *, reason: str = "", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})
        self.tensor: int | None = None

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle what the error is, not the arguments that it was made with."""
        return _restored, (type(self), self.args), self.__dict__


def _restored(cls: type[PoolError], args: tuple[object, ...]) -> PoolError:
    error = cls.__new__(cls, *args)
    error.args = args
    return error


class InvalidArgumentError(PoolError, ValueError):
    """A parameter, a shape or a payload is wrong.

    Attributes:
        violations: The fields at fault, each with what was expected and what was received.

    """

    code = "INVALID_ARGUMENT"
    default_reason = "INVALID_ARGUMENT"

    def __init__(self, description: str, *, field: str = "", violations: Iterable[FieldViolation] = ()) -> None:
        self.violations = tuple(violations) or (FieldViolation(field, description),)
        super().__init__("; ".join(map(str, self.violations)))

    def with_prefix(self, path: str) -> InvalidArgumentError:
        """Give the same error for the whole of which `path` is the part that raised it."""
        return InvalidArgumentError(
            self.message,
            violations=[
                FieldViolation(f"{path}.{each.field}" if each.field else path, each.description)
                for each in self.violations
            ],
        )


class ExpressionError(InvalidArgumentError):
    """A layer expression does not parse.

    Attributes:
        column: Where, counted from 1.

    """

    default_reason = "EXPRESSION"

    def __init__(self, description: str, *, column: int = 1) -> None:
        super().__init__(f"column {column}: {description}")
        self.column = column


class UnsupportedError(PoolError, TypeError):
    """The layer lacks the dtype, or the server lacks the method."""

    code = "UNIMPLEMENTED"
    default_reason = "UNSUPPORTED"


class LimitExceededError(PoolError):
    """The call is over a fixed limit, and would be again: `metadata` has "limit", "actual" and the limit's name."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = "LIMIT_EXCEEDED"


class UnavailableError(PoolError, ConnectionError):
    """The server can't be reached, is full, or is draining; the call may be tried again.

    Attributes:
        retry_delay: Seconds that the server asks to wait, or None where it said nothing.

    """

    code = "UNAVAILABLE"
    default_reason = "UNAVAILABLE"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_delay: float | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.retry_delay = retry_delay


class DeadlineExceededError(PoolError, TimeoutError):
    """There was no answer within the timeout."""

    code = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"


class CancelledError(PoolError):
    """The call was cancelled."""

    code = "CANCELLED"
    default_reason = "CANCELLED"


class UnauthenticatedError(PoolError):
    """The call carried no token, or a wrong one."""

    code = "UNAUTHENTICATED"
    default_reason = "UNAUTHENTICATED"


class PermissionDeniedError(PoolError):
    """The token does not allow the call."""

    code = "PERMISSION_DENIED"
    default_reason = "PERMISSION_DENIED"


class NotFoundError(PoolError, LookupError):
    """What the call names does not exist."""

    code = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class InternalError(PoolError):
    """The server failed on a call that it should have answered.

    Attributes:
        error_id: The id under which the server's log explains it; empty where it gave none.

    """

    code = "INTERNAL"
    default_reason = "INTERNAL"

    @property
    def error_id(self) -> str:
        """The id under which the server's log explains it; empty where it gave none."""
        return self.metadata.get("error_id", "")


BY_CODE: dict[str, type[PoolError]] = {
    cls.code: cls
    for cls in (
        InvalidArgumentError,
        UnsupportedError,
        LimitExceededError,
        UnavailableError,
        DeadlineExceededError,
        CancelledError,
        UnauthenticatedError,
        PermissionDeniedError,
        NotFoundError,
        InternalError,
    )
}
"""The status table: the class for each gRPC status code that has one; any other code is a plain PoolError."""
