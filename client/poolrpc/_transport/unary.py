"""Calls that send their tensors in one message and receive the results in one."""

from __future__ import annotations

import logging
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np
from google.protobuf.message import DecodeError

from poolrpc._transport.channel import POOL
from poolrpc._transport.request import not_an_answer
from poolrpc._transport.result import make_results
from poolrpc._transport.steps import Send
from poolrpc._wire import framing
from poolrpc._wire.status import RAISE_HINT
from poolrpc.errors import InternalError, LimitExceededError, UnavailableError
from poolrpc.tensors import array_bytes
from poolrpc.v1 import pool_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from poolrpc._transport.options import CallOptions, Transport
    from poolrpc._transport.request import PreparedRequest, Transfer
    from poolrpc._transport.result import PoolResult, Progress
    from poolrpc._transport.steps import Steps
    from poolrpc.tensors import Array, Bytes, TensorRange

log = logging.getLogger("poolrpc")

BROKEN_CONNECTION = ("Stream removed", "Socket closed", "Connection reset", "recvmsg")
"""The possible beginnings of gRPC's message if a connection broke during an answer. gRPC does not retry such a call."""


def unary_steps(
    transfer: Transfer, options: CallOptions, progress: Progress | None, *, max_message_bytes: int, retry: bool
) -> Steps[list[PoolResult]]:
    """Pool tensors that are sent in messages.

    Args:
        transfer: The tensors.
        options: The options of the call.
        progress: Called when all planes are done.
        max_message_bytes: The largest message to send, in bytes.
        retry: Whether to call once more if the connection breaks in the middle of the answer.

    """
    send = announced(encode_message(transfer, max_message_bytes), options)
    try:
        response = yield send
    except UnavailableError as error:
        if not (retry and error.message.startswith(BROKEN_CONNECTION)):
            raise
        log.debug("the connection broke during an answer (%s), the call is sent again", error.message)
        response = yield send
    return decode_message(transfer, response, progress)


def announced(message: bytes, options: CallOptions, socket: str = "") -> Send:
    """Return the step that sends a message of Pool and announces its size.

    A server without room rejects the call before the message is sent; for a message of unknown size it makes room as if
    it were large.
    """
    options.add_metadata({framing.MESSAGE_BYTES_KEY: str(len(message))})
    return Send(POOL, message, options, socket)


def encode_message(transfer: Transfer, max_message_bytes: int) -> bytes:
    """Return the message of a unary call.

    Raises:
        LimitExceededError: The tensors are larger than `max_message_bytes`.

    """
    nbytes = transfer.prepared.nbytes
    if nbytes > max_message_bytes:
        msg = f"expected tensors of at most {max_message_bytes} bytes in a message, got {nbytes}; {RAISE_HINT}"
        limits = {"limit": str(max_message_bytes), "actual": str(nbytes)}
        raise LimitExceededError(msg, reason="MESSAGE_TOO_LARGE", metadata=limits)
    return b"".join((transfer.prepared.head, *map(array_bytes, transfer.every)))


def decode_message(
    transfer: Transfer, message: bytes, progress: Progress | None = None, transport: Transport = "unary"
) -> list[PoolResult]:
    """Return the results in the response to a unary call, written to `transfer.out` or to new arrays.

    Raises:
        InternalError: The message is not an answer to the request.

    """
    prepared = transfer.prepared
    arrays = copy_tensors(prepared.payload_ranges, decode_response(prepared, message), transfer.out)
    transfer.report_done(progress)
    return make_results(prepared.results, arrays, transport)


def decode_response(prepared: PreparedRequest, message: bytes) -> memoryview:
    """Check that a PoolResponse answers a request and return its payload.

    Raises:
        InternalError: The message is not an answer to the request.

    """
    # Parsing takes a tenth of the client's CPU time in a small call, so the usual encoding is recognised by its bytes.
    prefix = prepared.response_prefix
    if message.startswith(prefix) and len(message) == len(prefix) + prepared.output_nbytes:
        return memoryview(message)[len(prefix) :]
    try:
        header, payload = framing.split_payload(message, pool_pb2.PoolResponse)
        prepared.check_results(pool_pb2.PoolResponse.FromString(header).results)
    except DecodeError:
        raise not_an_answer(pool_pb2.PoolResponse) from None
    return payload


def copy_tensors(ranges: Sequence[TensorRange], payload: Bytes, out: Sequence[Array | None]) -> list[Array]:
    """Copy the tensors of a payload to the arrays of `out`, or to a new array if there is none or None.

    Raises:
        InternalError: The payload has more or fewer bytes than the tensors.

    """
    if len(payload) != ranges[-1].end:
        raise InternalError(f"expected a payload of {ranges[-1].end} bytes, got {len(payload)}", reason="ANSWER")
    arrays = []
    for (dtype, shape, numel, start, _), array in zip(ranges, out or repeat(None), strict=False):
        view = np.ndarray(shape, dtype, payload, start) if numel else np.empty(shape, dtype)
        if array is None:
            arrays.append(view.copy())
        else:
            array[...] = view
            arrays.append(array)
    return arrays
