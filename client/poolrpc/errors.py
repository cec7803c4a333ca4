"""The errors that poolrpc raises; each class names its gRPC status, and the client and the server raise the same.

PoolError
├── InvalidArgumentError (ValueError)     INVALID_ARGUMENT    a parameter, shape or payload is wrong; see .violations
│   └── ExpressionError                   INVALID_ARGUMENT    a layer expression does not parse; see .column
├── UnsupportedError (TypeError)          UNIMPLEMENTED       the layer lacks the dtype, or the server the method
├── LimitExceededError                    RESOURCE_EXHAUSTED  over a fixed limit: final; see .metadata
├── UnavailableError (ConnectionError)    UNAVAILABLE         unreachable, full or draining; see .retry_delay
├── FailedPreconditionError (ConnectionError)  FAILED_PRECONDITION  a server that the settings do not fit: final
├── DeadlineExceededError (TimeoutError)  DEADLINE_EXCEEDED   no result within the timeout
├── CancelledError                        CANCELLED           the call was cancelled
├── UnauthenticatedError                  UNAUTHENTICATED     no token, or a wrong one
├── PermissionDeniedError                 PERMISSION_DENIED   the token does not allow the call
├── NotFoundError (LookupError)           NOT_FOUND           a named object does not exist
└── InternalError                         INTERNAL            a fault of the server; see .error_id
"""

import copyreg
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

DOMAIN = "poolrpc"
"""The domain of every ErrorInfo that the server sends."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """An invalid field of a call.

    Attributes:
        field: The field's path: "kernel_size" in a layer, "branches[0].layers[0].max_pool.kernel_size" in a request.
        description: What was expected and what was received.

    Examples:
        >>> from poolrpc import FieldViolation
        >>> str(FieldViolation("kernel_size", "expected 1 to 65535, got 0"))
        'kernel_size: expected 1 to 65535, got 0'

    """

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}" if self.field else self.description


class PoolError(Exception):
    """The base class of every error that poolrpc raises.

    Args:
        message: What happened.
        reason: The cause, in UPPER_SNAKE_CASE. Default: the class's `default_reason`.
        metadata: Details of the cause. Default: none.

    Attributes:
        code: The name of the gRPC status code.
        message: What happened, for people to read.
        reason: The cause, in UPPER_SNAKE_CASE, for programs; stable between versions.
        metadata: Details of the cause, such as a limit and the actual value.
        tensor: The index of the tensor that failed in a `map`, counted from 0; None for other calls.

    Examples:
        >>> import poolrpc
        >>> try:
        ...     poolrpc.MaxPool2d(0)
        ... except poolrpc.PoolError as error:
        ...     print(error.code, error.message)
        INVALID_ARGUMENT kernel_size: expected 1 to 65535, got 0

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
        """Pickle the attributes, since `__init__` takes other arguments than those in `args`."""
        new = copyreg.__newobj__  # type: ignore[attr-defined]  # typeshed lacks it
        return new, (type(self),), {"args": self.args} | self.__dict__


class InvalidArgumentError(PoolError, ValueError):
    """A parameter, a shape or a payload is wrong.

    Args:
        description: What was expected and what was received.
        field: The path of the invalid field. Default: none.
        violations: Several invalid fields, in place of `description` and `field`.

    Attributes:
        violations: The invalid fields, each with what was expected and what was received.

    """

    code = "INVALID_ARGUMENT"
    default_reason = "INVALID_ARGUMENT"

    def __init__(self, description: str, *, field: str = "", violations: Iterable[FieldViolation] = ()) -> None:
        self.violations = tuple(violations) or (FieldViolation(field, description),)
        super().__init__("; ".join(map(str, self.violations)))

    def with_prefix(self, path: str) -> "InvalidArgumentError":
        """Return the same error with `path` before the path of every field."""
        return InvalidArgumentError(
            self.message,
            violations=[
                FieldViolation(f"{path}.{each.field}" if each.field else path, each.description)
                for each in self.violations
            ],
        )


class ExpressionError(InvalidArgumentError):
    """A layer expression does not parse.

    Args:
        description: What was expected and what was received.
        column: The column of the error, counted from 1. Default: 1.

    Attributes:
        column: The column of the error, counted from 1.

    """

    default_reason = "EXPRESSION"

    def __init__(self, description: str, *, column: int = 1) -> None:
        super().__init__(f"column {column}: {description}")
        self.column = column


class UnsupportedError(PoolError, TypeError):
    """The layer does not take the dtype, or the server does not have the method."""

    code = "UNIMPLEMENTED"
    default_reason = "UNSUPPORTED"


class LimitExceededError(PoolError):
    """The call exceeds a fixed limit, and would again; `metadata` has "limit" and "actual"."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = "LIMIT_EXCEEDED"


class UnavailableError(PoolError, ConnectionError):
    """The server is unreachable, full or draining; a later attempt may succeed.

    Args:
        message: What happened.
        reason: The cause, in UPPER_SNAKE_CASE. Default: the class's `default_reason`.
        metadata: Details of the cause. Default: none.
        retry_delay: Seconds that the server asks to wait. Default: None.

    Attributes:
        retry_delay: Seconds that the server asks to wait before the next attempt; None if it names no delay.

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


class FailedPreconditionError(PoolError, ConnectionError):
    """The address has a server that the client's settings do not fit, such as TLS on one side only: final."""

    code = "FAILED_PRECONDITION"
    default_reason = "FAILED_PRECONDITION"


class DeadlineExceededError(PoolError, TimeoutError):
    """No result arrived within the timeout."""

    code = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"


class CancelledError(PoolError):
    """The call was cancelled."""

    code = "CANCELLED"
    default_reason = "CANCELLED"


class UnauthenticatedError(PoolError):
    """The call has no token, or a wrong one."""

    code = "UNAUTHENTICATED"
    default_reason = "UNAUTHENTICATED"


class PermissionDeniedError(PoolError):
    """The token does not allow the call."""

    code = "PERMISSION_DENIED"
    default_reason = "PERMISSION_DENIED"


class NotFoundError(PoolError, LookupError):
    """An object that the call names does not exist."""

    code = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class InternalError(PoolError):
    """The server failed on a valid call."""

    code = "INTERNAL"
    default_reason = "INTERNAL"

    @property
    def error_id(self) -> str:
        """The id under which the server's log explains the error; empty if the server sent none."""
        return self.metadata.get("error_id", "")


BY_CODE: dict[str, type[PoolError]] = {
    cls.code: cls
    for cls in (
        InvalidArgumentError,
        UnsupportedError,
        LimitExceededError,
        UnavailableError,
        FailedPreconditionError,
        DeadlineExceededError,
        CancelledError,
        UnauthenticatedError,
        PermissionDeniedError,
        NotFoundError,
        InternalError,
    )
}
"""The error class of each gRPC status code that has one; other codes raise PoolError itself."""
