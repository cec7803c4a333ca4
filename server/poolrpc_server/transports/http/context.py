"""Calls from HTTP requests."""

from __future__ import annotations

from time import monotonic_ns
from typing import TYPE_CHECKING

from poolrpc._shapes.rules import clip
from poolrpc._wire.framing import MESSAGE_BYTES_KEY
from poolrpc.errors import InvalidArgumentError
from poolrpc_server.calls.call import EndingContext

if TYPE_CHECKING:
    from collections.abc import Sequence

METADATA_HEADERS = (b"authorization", b"priority", b"traceparent", b"tracestate")
"""The headers of a request that are metadata of its call."""

TIMEOUT_HEADER = b"timeout"
"""The header with the seconds that a call may take."""

MAX_TIMEOUT = 86400.0


class HttpContext(EndingContext):
    """A call that came as an HTTP request."""

    transport = "http"

    def __init__(
        self, method: str, headers: Sequence[tuple[bytes, bytes]], peer: str, announced: int | None = None
    ) -> None:
        """Make a context.

        Args:
            method: "/package.Service/Method".
            headers: The request's headers, with lower-case names.
            peer: The client, in gRPC's notation.
            announced: Size of the request's body in bytes. None: it has none.

        Raises:
            InvalidArgumentError: The timeout is not a number of seconds.

        """
        metadata = [
            (name.decode("ascii"), value.decode("latin-1")) for name, value in headers if name in METADATA_HEADERS
        ]
        if announced is not None:
            metadata.append((MESSAGE_BYTES_KEY, str(announced)))
        timeouts = [_seconds(value) for name, value in headers if name == TIMEOUT_HEADER]
        super().__init__(method, metadata, peer, timeouts[-1] if timeouts else None)
        self.began = monotonic_ns()

    def server_timing(self) -> str:
        """Return the time of each stage until now, as the header Server-Timing has it, in milliseconds.

        receive is the time until the request had arrived and was decoded, send that in which its answer was encoded.
        """
        now, times = monotonic_ns(), self.record.latest
        if times is None or not times.computed:
            return f"receive;dur={(now - self.began) / 1e6:.3f}"
        stages = {
            "receive": times.queued - self.began,
            "queue": times.queue_ns,
            "compute": times.compute_ns,
            "send": now - times.computed,
        }
        return ", ".join(f"{name};dur={max(0, nanoseconds) / 1e6:.3f}" for name, nanoseconds in stages.items())


def _seconds(value: bytes) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_TIMEOUT:
        msg = f"expected seconds above 0, at most {MAX_TIMEOUT:g}, got {clip(value.decode('latin-1'))}"
        raise InvalidArgumentError(msg, field="metadata.timeout")
    return seconds
