"""The options of a call, and the choice of the transport that carries its tensors."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from poolrpc._shapes.parameters import integer, real
from poolrpc._shapes.rules import clip
from poolrpc.credentials import check_metadata, has_token
from poolrpc.errors import InvalidArgumentError

if TYPE_CHECKING:
    from poolrpc._transport.arena_memory import Arenas
    from poolrpc._transport.request import Transfer

Transport: TypeAlias = Literal["unary", "stream", "arena", "local"]
"""How tensors are sent: in one message each way, as a stream of blocks, through memory shared with the server, or as
packets to a server on the same machine, which share memory with it if they are large."""

TRANSPORTS: tuple[Transport, ...] = get_args(Transport)

STREAM_MIN_BYTES = 16 * 2**20
"""The input size, in bytes, from which a stream is the default: measured with `python -m benchmarks transport`."""

ARENA_MIN_BYTES = 256 * 2**10
"""The input size, in bytes, from which an arena is the default on a unix socket: measured in the same way."""

ARENA_MAX_BYTES = 256 * 2**20
"""The input size, in bytes, up to which tensors are copied to an arena by default: its memory stays reserved."""


MAX_SECONDS = 10.0**9
"""Longer timeouts are no limit: gRPC's clock ends, and a call that had one of 10^10 seconds failed at once."""


class Unset(Enum):
    """The type of UNSET."""

    UNSET = "unset"

    def __repr__(self) -> str:
        """Show what a signature means."""
        return "UNSET"


UNSET = Unset.UNSET
"""A call's timeout that is not given: the client's is used, since None is no limit."""

Timeout: TypeAlias = float | Unset | None


def seconds(name: str, value: object) -> float | None:
    """Return a timeout in seconds as a float; None for no limit.

    Raises:
        InvalidArgumentError: It is neither None nor a number above 0.

    """
    number = None if value is None else real(name, value)
    return None if number is None or number >= MAX_SECONDS else number


PRIORITY = "priority"
"""The metadata key of a call's priority."""

LAST_PRIORITY = 2
"""The priority of calls that go after all others; 0 is that of calls that go first."""

Pair: TypeAlias = tuple[str, str | bytes]
Pairs: TypeAlias = Mapping[str, str | bytes] | Iterable[Pair]
"""Metadata of a call; the value of a key that ends with -bin is bytes."""


def call_metadata(own: tuple[Pair, ...], priority: object, metadata: object) -> tuple[Pair, ...]:
    """Return the metadata of a call: that of its client, with the call's own in place of pairs with the same keys.

    Args:
        own: The metadata of the client.
        priority: 0, 1 or 2; None: that of the metadata, if it has one.
        metadata: A mapping or pairs.

    Raises:
        InvalidArgumentError: The priority or the metadata is not valid, or the metadata has a priority too.

    """
    if priority is None and metadata == ():
        return own
    added = () if metadata == () else pairs(metadata)
    keys = {key for key, _ in added}
    if priority is not None:
        if PRIORITY in keys:
            raise InvalidArgumentError("expected a priority or one in the metadata, got both", field="priority")
        keys.add(PRIORITY)
        added = (*added, (PRIORITY, str(integer("priority", priority, 0, LAST_PRIORITY))))
    return (*(pair for pair in own if pair[0] not in keys), *added) if added else own


def pairs(metadata: object) -> tuple[Pair, ...]:
    """Return the metadata of a call as pairs that gRPC can send, with keys in lower case.

    Raises:
        InvalidArgumentError: It is neither a mapping nor pairs, gRPC could not send a pair, or a pair is a token, which
            belongs to the client. No message has a value, which may be secret.

    """
    checked = check_metadata(metadata)
    if has_token(checked):
        raise InvalidArgumentError("expected a token only of the client, got one of a call", field="metadata")
    return checked


class CallOptions:
    """The deadline and the metadata of one call, which all its attempts share.

    Args:
        timeout: Seconds from now to the deadline, as `seconds` returns it. None: no deadline.
        metadata: Pairs sent with every attempt.

    Attributes:
        timeout: The timeout, in seconds. None: there is none.

    """

    __slots__ = ("_deadline", "_metadata", "timeout")

    def __init__(self, timeout: float | None, metadata: tuple[Pair, ...]) -> None:
        self.timeout = timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._metadata = metadata

    def add_metadata(self, metadata: Mapping[str, str]) -> None:
        """Send further pairs with the attempts that follow, in place of those with the same keys."""
        self._metadata = (*(pair for pair in self._metadata if pair[0] not in metadata), *metadata.items())

    @property
    def metadata(self) -> tuple[Pair, ...]:
        """Pairs sent with every attempt."""
        return self._metadata

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline, or None if there is no deadline."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of a gRPC method for an attempt that starts now."""
        return {"timeout": self.time_remaining(), "metadata": self._metadata}


def check_transport(transport: str | None) -> None:
    """Check that `transport` is None or one of TRANSPORTS."""
    if transport not in (None, *TRANSPORTS):
        msg = f"expected one of {', '.join(TRANSPORTS)} or None, got {clip(transport)}"
        raise InvalidArgumentError(msg, field="transport")


def default_transport(
    transfer: Transfer, arenas: Arenas | None, max_message_bytes: int, *, local: bool = False
) -> Transport:
    """Return the transport of a call that does not specify one.

    Args:
        transfer: The tensors of the call.
        arenas: The arenas of the client; None if its address is not a unix socket.
        max_message_bytes: The largest message that the client sends, in bytes.
        local: Whether the server may be called by packets.

    """
    nbytes = transfer.prepared.nbytes
    if arenas is None or (nbytes < ARENA_MIN_BYTES and not local):
        return transport_by_size(transfer, max_message_bytes)
    # A tensor that is already in an arena needs no copy, however large it is.
    fits = nbytes <= ARENA_MAX_BYTES or arenas.find(transfer.arrays[0]) is not None
    return ("local" if local else "arena") if fits else transport_by_size(transfer, max_message_bytes)


def transport_by_size(
    transfer: Transfer, max_message_bytes: int, *, stream_min_bytes: int = STREAM_MIN_BYTES
) -> Literal["unary", "stream"]:
    """Return the transport for tensors that do not go through an arena.

    Args:
        transfer: The tensors of the call.
        max_message_bytes: The largest message that the client sends, in bytes.
        stream_min_bytes: The input size, in bytes, from which tensors are streamed.

    """
    prepared = transfer.prepared
    if prepared.nbytes < stream_min_bytes:
        return "unary"
    splits = all(layer.splittable for chain in prepared.request.branches for layer in chain)
    return "stream" if splits or prepared.nbytes > max_message_bytes else "unary"
