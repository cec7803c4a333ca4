"""Calls that are sent as packets to a server on the same machine."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING

from poolrpc._transport.arena import arena_steps
from poolrpc._transport.channel import FIRST_BACKOFF, MAX_ATTEMPTS, MAX_BACKOFF, POOL
from poolrpc._transport.local_connections import LostError, NotLocalError
from poolrpc._transport.steps import Pause, SendLocal
from poolrpc._transport.unary import decode_message
from poolrpc._wire.local_packets import MAX_PACKET_BYTES, encode_call
from poolrpc.errors import DeadlineExceededError, UnavailableError
from poolrpc.tensors import array_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from poolrpc._transport.arena import SendSteps
    from poolrpc._transport.arena_memory import Arenas
    from poolrpc._transport.local_connections import LocalConnections
    from poolrpc._transport.options import CallOptions
    from poolrpc._transport.request import Transfer
    from poolrpc._transport.result import PoolResult, Progress
    from poolrpc._transport.steps import Steps
    from poolrpc.tensors import Bytes

log = logging.getLogger("poolrpc")

INLINE_BYTES = 64 * 2**10
"""The largest input, and the largest output, that are in the packets themselves; larger ones are in an arena.

Measured: up to 32 KiB an arena takes longer, from 48 KiB on both take the same time.
"""


def local_steps(  # noqa: PLR0913 - the call, and what its caller chose
    transfer: Transfer,
    arenas: Arenas | None,
    options: CallOptions,
    progress: Progress | None,
    send: SendSteps,
    *,
    copy: bool,
    required: bool,
) -> Steps[list[PoolResult] | None]:
    """Pool tensors by a packet, with large ones in an arena; return None if the server cannot be called in this way.

    Args:
        transfer: The tensors.
        arenas: The arenas of the client.
        options: The options of the call.
        progress: Called when all planes are done.
        send: The steps that send a message as a packet.
        copy: Whether the results are copied out of an arena.
        required: Whether to raise an error instead of returning None.

    """
    prepared = transfer.prepared
    if max(prepared.nbytes, prepared.output_nbytes) > INLINE_BYTES:
        return (
            yield from arena_steps(
                transfer, arenas, options, progress, copy=copy, required=required, send=send, transport="local"
            )
        )
    try:
        response = yield from send(POOL, (prepared.head, *map(array_bytes, transfer.every)), options, "")
    except NotLocalError as error:
        if required:
            msg = f"expected a server that takes local calls, got none: {error.message}"
            raise UnavailableError(msg, reason=error.reason) from error.__cause__
        return None
    return decode_message(transfer, response, progress, "local")


def send_steps(  # noqa: PLR0913 - the call, and how its client sends it
    connections: LocalConnections,
    method: str,
    message: Iterable[Bytes],
    options: CallOptions,
    process: str = "",
    *,
    retry: bool = True,
) -> Steps[bytes]:
    """Send a call as a packet and return the response; it is sent again when gRPC would send it again.

    Args:
        connections: The connections of the client.
        method: "package.Service/Method".
        message: The parts of the request.
        options: The options of the call.
        process: The name of the socket of the server process; empty: any process.
        retry: Whether the call may be sent again.

    Raises:
        NotLocalError: The server cannot be called in this way.

    """
    parts = tuple(message)
    attempts, lost, backoff = 0, False, FIRST_BACKOFF
    while True:
        remaining = options.time_remaining()
        if remaining is not None and remaining <= 0:
            raise DeadlineExceededError("the deadline passed")
        packet = encode_call(method, remaining, options.metadata, parts)
        if packet is None:
            raise NotLocalError(f"expected at most {MAX_PACKET_BYTES} bytes in a packet, got more")
        try:
            response: bytes = yield SendLocal(packet, remaining, process)
        except NotLocalError as error:
            # Once, on another connection. If that ends as well, the call goes through gRPC.
            if lost or not (isinstance(error, LostError) and retry and connections.may_retry()):
                raise
            lost = True
            log.debug("%s is sent again: %s", method, error)
        except UnavailableError as error:
            attempts += 1
            if attempts == MAX_ATTEMPTS or not (retry and connections.may_retry()):
                raise
            pause = random.uniform(0.8, 1.2) * backoff if error.retry_delay is None else error.retry_delay  # noqa: S311 - no secret
            if remaining is not None and pause >= remaining:
                raise
            log.debug("%s is sent again in %.2f s: %s", method, pause, error)
            yield Pause(pause)
            backoff = min(2 * backoff, MAX_BACKOFF)
        else:
            connections.succeeded()
            return response
