"""The I/O of calls as generators of steps, which the blocking and the asyncio client both drive.

A call is written once, as a generator (Steps) that yields each step of its I/O, receives the step's result or has its
error raised at the `yield`, and returns the result of the call. A client drives it: it performs each step, blocking or
awaited, and translates gRPC's errors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import grpc

from poolrpc._wire.status import ATTEMPTS_KEY, translate_rpc_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from poolrpc._transport.options import CallOptions
    from poolrpc._transport.request import Transfer
    from poolrpc._transport.result import PoolResult, Progress
    from poolrpc.tensors import Bytes

T = TypeVar("T")

log = logging.getLogger("poolrpc")


class Send(NamedTuple):
    """A step that sends the message of a unary call; its result is the response.

    Attributes:
        method: The method, "package.Service/Method".
        message: The message, as the method takes it.
        options: The options of the call.
        socket: The name of the socket of the server process to call, in the directory of the client's own address;
            empty: any process.

    """

    method: str
    message: Any
    options: CallOptions
    socket: str = ""


class SendLocal(NamedTuple):
    """A step that sends a call as a packet to a server on the same machine; its result is the response.

    Attributes:
        packet: The parts of the packet.
        timeout: Seconds until the deadline; None for no deadline.
        process: The name of the socket of the server process to call; empty: any process.

    """

    packet: Sequence[Bytes]
    timeout: float | None
    process: str = ""


class SendStream(NamedTuple):
    """A step that streams the tensors of a call; its result is the call's results.

    Attributes:
        transfer: The tensors.
        options: The options of the call.
        progress: Called when planes are done.

    """

    transfer: Transfer
    options: CallOptions
    progress: Progress | None


class RunBlocking(NamedTuple):
    """A step that calls a function which may block for long; its result is what the function returns."""

    function: Callable[[], Any]


class Pause(NamedTuple):
    """A step that waits for some seconds, or until the client is closed."""

    seconds: float


Steps: TypeAlias = Generator[Send | SendLocal | SendStream | RunBlocking | Pause, Any, T]
"""The steps of a call that returns T."""


class NextGroup(NamedTuple):
    """A step that reads the tensors of the next group of a map; its result is the group, or None after the last."""


class Start(NamedTuple):
    """A step that starts a call in the background; its result is the call's future, which may be cancelled."""

    steps: Steps[Any]


class Wait(NamedTuple):
    """A step that waits for a call that was started; its result is what the call returned."""

    future: Any


class Deliver(NamedTuple):
    """A step that delivers results to the caller of the map, in order."""

    results: Iterable[PoolResult]


MapSteps: TypeAlias = Generator[NextGroup | Start | Wait | Deliver, Any, None]
"""The steps of a map."""


def translate(error: BaseException) -> BaseException:
    """Return the PoolError for an error of gRPC, and any other error unchanged."""
    if not isinstance(error, grpc.RpcError):
        return error
    translation = translate_rpc_error(error)
    translation.__cause__ = error
    return translation


def log_retries(metadata: Iterable[Any] | None) -> None:
    """Log at DEBUG how often gRPC tried a call, if it tried it more than once.

    Args:
        metadata: The metadata that the server sent with the status, as pairs.

    """
    for key, attempts in metadata or ():
        if key == ATTEMPTS_KEY:
            log.debug("gRPC tried a call again; attempts before the one with the answer: %s", attempts)
