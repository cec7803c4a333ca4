"""Methods: what a protocol offers to the pipeline; and the observers of every call."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from poolrpc.errors import LimitExceededError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from poolrpc.errors import PoolError
    from poolrpc_server.calls.call import CallContext
    from poolrpc_server.telemetry.logs import CallLog
    from poolrpc_server.telemetry.metrics import Metrics
    from poolrpc_server.telemetry.traces import Spans

NO_MESSAGE = "NO_MESSAGE"
"""Reason of the error of a call whose bytes are not a message of its method's type."""

MAX_CONTROL_BYTES = 256 * 2**10
"""Maximum size of a message of a method that does not compute, in bytes."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method of a protocol, or one that a transport answers itself, which has neither handler.

    Attributes:
        name: "/package.Service/Method".
        unary: Answers a call of one message each way. None for a stream.
        stream: Answers a call of any number of messages each way. None for a unary method.
        computes: Whether a call needs the engine: it is admitted, or rejected, before its message is read.
        probe: Whether monitoring calls it frequently: its calls are logged at DEBUG, and not traced.
        public: Whether a call needs no token.
        short: Whether a call takes next to no time, unless it says so before (see CallContext.make_way).
        max_bytes: Maximum size of a message, in addition to the transport's limit.
        labels: Its kind ("unary" or "bidi_stream"), service and short name, as the metrics have them.

    """

    name: str
    unary: Callable[[bytes, CallContext], bytes] | None = None
    stream: Callable[[Iterator[bytes], CallContext], Iterator[bytes]] | None = None
    computes: bool = False
    probe: bool = False
    public: bool = False
    short: bool = False
    max_bytes: int = MAX_CONTROL_BYTES
    labels: tuple[str, str, str] = field(init=False)

    def __post_init__(self) -> None:
        service, _, name = self.name.removeprefix("/").partition("/")
        if self.computes:
            object.__setattr__(self, "max_bytes", sys.maxsize)
        object.__setattr__(self, "labels", ("bidi_stream" if self.stream else "unary", service, name))

    def check_size(self, message: bytes) -> None:
        """Check the size of a message.

        Raises:
            LimitExceededError: It is too large for this method.

        """
        nbytes = len(message)
        if nbytes > self.max_bytes:
            msg = f"expected a message of at most {self.max_bytes} bytes, got {nbytes}"
            limits = {"limit": str(self.max_bytes), "actual": str(nbytes)}
            raise LimitExceededError(msg, reason="MESSAGE_TOO_LARGE", metadata=limits)


UNKNOWN_METHOD = Method("/unknown/Unknown")
"""The method as which rejected calls of unknown methods are counted: callers cannot fill the metrics with names."""


@dataclass(frozen=True, slots=True)
class Observers:
    """Receivers of every call's record.

    Attributes:
        call_log: Writes its log line.
        metrics: Counts it.
        spans: Makes its spans. None: calls are not traced.
        translate: Returns the error to answer with in place of an unexpected exception, or None for InternalError.

    """

    call_log: CallLog
    metrics: Metrics
    spans: Spans | None = None
    translate: Callable[[Exception], PoolError | None] = lambda _: None
