"""Calls through an arena: their steps, and what becomes of the arena if they fail."""

import asyncio

import numpy as np
import pytest

from poolrpc import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    LimitExceededError,
    MaxPool2d,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from poolrpc._transport.arena import arena_steps
from poolrpc._transport.arena_memory import AttachedArena, Span
from poolrpc._transport.local_connections import LostError, NotLocalError
from poolrpc._transport.options import CallOptions
from poolrpc._transport.steps import RunBlocking
from poolrpc._wire.codec import decode_ranges, encode_results
from poolrpc.v1 import pool_pb2
from tests.unit.client.transport.peer import make_transfer

X = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
EXPECTED = X.reshape(2, 3, 4, 2, 4, 2).max((3, 5))


class LocalArenas:
    """Arenas of this process, which record what is detached.

    Attributes:
        arena: The arena, if there is one.
        detached: "retire" or "forget", with the socket that is forgotten.
        rejection: Why there is none.

    """

    def __init__(self, *, socket="", attached=True):
        self.arena = AttachedArena(b"id", bytearray(2**16), socket)
        self.detached = []
        self.rejection = None
        self._attached = attached

    def find(self, array):
        """Find no array."""

    def allocate(self, nbytes, *, attach=True, same_arena_as=None):
        """Reserve memory, if an arena may be attached."""
        assert same_arena_as is None
        if not attach and not self._attached:
            return None
        self._attached = True
        reserved = -(-nbytes // 64) * 64
        offset = self.arena.reserve(reserved)
        return Span(self.arena, offset, nbytes, offset + reserved)

    def retire(self, span):
        """Record it."""
        assert span.arena is self.arena
        self.detached.append("retire")

    def forget(self, socket):
        """Record it."""
        self.detached.append(("forget", socket))


def steps_of(arenas, *, required=False):
    """Return the steps of a call and its transfer."""
    transfer = make_transfer(X, MaxPool2d(2))
    return arena_steps(transfer, arenas, CallOptions(None, ()), None, copy=True, required=required), transfer


def pool_in(arena, step, transfer):
    """Pool in the arena as a server would, and return the response."""
    ranges = decode_ranges(pool_pb2.PoolRequest.FromString(step.message))
    start, length = ranges.input
    x = np.asarray(arena.memory[start : start + length]).view(np.float32).reshape(X.shape)
    start, length = ranges.output
    arena.memory[start : start + length] = x.reshape(2, 3, 4, 2, 4, 2).max((3, 5)).ravel().view(np.uint8)
    return pool_pb2.PoolResponse(results=encode_results(transfer.prepared.results)).SerializeToString()


def finish(steps, response):
    """Return what the call returns."""
    with pytest.raises(StopIteration) as stop:
        steps.send(response)
    return stop.value.value


def test_the_tensors_are_in_the_arena():
    """The message has no payload, the input is in the arena, and the output is copied out of it."""
    arenas = LocalArenas(socket="pool.sock.2")
    steps, transfer = steps_of(arenas)
    step = next(steps)
    assert step.socket == "pool.sock.2"
    assert len(step.message) < 100
    (result,) = finish(steps, pool_in(arenas.arena, step, transfer))
    assert result.transport == "arena"
    assert np.array_equal(result.output, EXPECTED)
    assert not np.shares_memory(result.output, arenas.arena.memory)
    assert arenas.detached == []


def test_an_arena_is_attached_in_a_step_that_may_block():
    """Only if no attached arena has room does the call yield a blocking step."""
    arenas = LocalArenas(attached=False)
    steps, transfer = steps_of(arenas)
    blocking = next(steps)
    assert isinstance(blocking, RunBlocking)
    step = steps.send(blocking.function())
    assert np.array_equal(finish(steps, pool_in(arenas.arena, step, transfer))[0].output, EXPECTED)


def test_without_an_arena_the_call_returns_none_or_fails_if_one_is_required():
    """The error says why there is no arena."""
    with pytest.raises(StopIteration) as stop:
        next(steps_of(None)[0])
    assert stop.value.value is None
    with pytest.raises(UnavailableError, match="got none: the address is not a unix socket"):
        next(steps_of(None, required=True)[0])


@pytest.mark.parametrize(
    ("socket", "error"),
    [
        ("", NotFoundError("unknown arena")),
        ("pool.sock.2", NotFoundError("unknown arena")),
        ("pool.sock.2", UnavailableError("Connection refused")),
    ],
    ids=["restarted", "restarted worker", "worker is gone"],
)
@pytest.mark.parametrize("required", [False, True])
def test_the_arenas_of_a_process_that_is_gone_are_forgotten(socket, error, required):
    """The call returns None, so that its tensors are sent; or it fails, if an arena is required."""
    arenas = LocalArenas(socket=socket)
    steps, _ = steps_of(arenas, required=required)
    next(steps)
    with pytest.raises(type(error) if required else StopIteration) as raised:
        steps.throw(error)
    assert required or raised.value.value is None
    assert arenas.detached == [("forget", socket)]


def raised_for(error):
    """Return the class of what the steps raise for an error; without local calls they end, and the call goes on."""
    return StopIteration if isinstance(error, NotLocalError) else type(error)


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("Connection refused"),
        UnavailableError("ended by the server", reason="ENDED", retry_delay=0.1),
        LostError("the connection ended"),
        DeadlineExceededError("too late"),
        InternalError("failed"),
        asyncio.CancelledError(),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_arena_that_may_still_be_written_to_is_retired(error):
    """After a deadline, a cancellation or an unknown failure, the server may still write its output."""
    arenas = LocalArenas()
    steps, _ = steps_of(arenas)
    next(steps)
    with pytest.raises(raised_for(error)):
        steps.throw(error)
    assert arenas.detached == ["retire"]


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("x"),
        UnsupportedError("x"),
        LimitExceededError("x"),
        UnauthenticatedError("x"),
        PermissionDeniedError("x"),
        UnavailableError("full", retry_delay=0.1),
        UnavailableError("stops", reason="STOPPING"),
        NotLocalError("no local calls"),
    ],
    ids=lambda error: f"{type(error).__name__} {error.reason}",
)
def test_an_arena_stays_after_a_rejection(error):
    """A server that rejects a call, or never got it, does not write its output."""
    arenas = LocalArenas()
    steps, _ = steps_of(arenas)
    next(steps)
    with pytest.raises(raised_for(error)):
        steps.throw(error)
    assert arenas.detached == []
