"""How the clients drive the steps of calls and maps, without a server."""

import asyncio
import gc
import threading
import weakref
from functools import partial

import grpc
import numpy as np
import pytest

from poolrpc import AsyncPoolClient, CancelledError, MaxPool2d, PoolClient, PoolError, UnavailableError
from poolrpc._transport.channel import GET_SERVER_INFO, POOL
from poolrpc._transport.options import CallOptions
from poolrpc._transport.steps import RunBlocking, Send, translate

X = np.zeros((1, 1, 4, 4), np.float32)


class RpcError(grpc.RpcError):
    """An error of gRPC, as a call raises it."""

    def __init__(self, code=grpc.StatusCode.UNAVAILABLE, details="Connection refused"):
        super().__init__()
        self._code, self._details = code, details

    def code(self):
        """Return the status code."""
        return self._code

    def details(self):
        """Return the message."""
        return self._details

    def trailing_metadata(self):
        """Return no metadata."""
        return ()


class BlockingMethod:
    """A method of grpc that a function answers."""

    def __init__(self, answer):
        self._answer = answer

    def with_call(self, message, **arguments):
        """Return the answer and an object with the metadata of the call: the error has the same as a call."""
        return self._answer(message, **arguments), RpcError()


class AsyncCall:
    """A call of grpc.aio that a function answers."""

    def __init__(self, answer, message, **arguments):
        self._answer = lambda: answer(message, **arguments)

    def __await__(self):
        """Return the answer."""
        yield from asyncio.sleep(0).__await__()
        return self._answer()

    async def trailing_metadata(self):
        """Return no metadata."""
        return ()


def run_blocking(steps, methods=()):
    """Drive steps with a PoolClient that has other methods."""
    with PoolClient("localhost:1") as client:
        client._methods.update((name, BlockingMethod(method)) for name, method in dict(methods).items())  # noqa: SLF001 - in place of a server
        return client._run(steps(client))  # noqa: SLF001 - what is tested


def run_async(steps, methods=()):
    """Drive steps with an AsyncPoolClient that has other methods."""

    async def run():
        async with AsyncPoolClient("localhost:1") as client:
            client._methods.update((name, partial(AsyncCall, method)) for name, method in dict(methods).items())  # noqa: SLF001 - as above
            return await client._run(steps(client))  # noqa: SLF001 - as above

    return asyncio.run(run())


@pytest.fixture(params=[run_blocking, run_async], ids=["sync", "async"])
def run(request):
    """Return a function that drives steps."""
    return request.param


def test_a_step_receives_its_result(run):
    """A client sends each message by its method with the options of the call, and returns what the steps return."""

    def steps(_):
        options = CallOptions(None, (("a", "b"),))
        first = yield Send(POOL, b"1", options)
        second = yield RunBlocking(lambda: 2)
        return first, second

    def pool(message, *, timeout, metadata):
        return message, timeout, metadata

    assert run(steps, {POOL: pool}) == ((b"1", None, (("a", "b"),)), 2)


def test_an_error_of_grpc_is_translated_and_raised_at_the_step(run):
    """The steps may handle the PoolError and continue."""
    failures = [RpcError(), RpcError()]

    def steps(_):
        options = CallOptions(None, ())
        try:
            yield Send(POOL, b"", options)
        except UnavailableError as error:
            caught = error.__cause__, str(error)
        return caught, (yield RunBlocking(lambda: "next"))

    def fail(_, **__):
        raise failures[0]

    (cause, text), result = run(steps, {POOL: fail})
    assert cause is failures[0]
    assert (text, result) == ("Connection refused", "next")


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), asyncio.CancelledError()], ids=repr)
def test_any_other_error_is_raised_unchanged(error):
    """The steps see it at the `yield`, so that they can release what they hold."""
    seen = []

    def steps(_):
        try:
            yield RunBlocking(fail)
        except BaseException as raised:
            seen.append(raised)
            raise

    def fail():
        raise error

    with pytest.raises(type(error)) as raised:
        run_blocking(steps)
    assert seen == [raised.value] == [error]


def test_a_failed_call_leaves_no_cycle(run):
    """What the steps held, such as memory of an arena, is freed with the error, without the garbage collector."""

    class Held:
        pass

    held = []

    def steps(_):
        local = Held()
        held.append(weakref.ref(local))
        yield RunBlocking(lambda: 1 / 0)
        del local

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError) as raised:
            run(steps)
        raised.value.__traceback__ = None
        del raised
        assert held[0]() is None
    finally:
        gc.enable()


def test_translate_names_the_error():
    """An error of gRPC becomes that of its code, with the original as its cause."""
    original = RpcError(grpc.StatusCode.CANCELLED, "by the server")
    translated = translate(original)
    assert type(translated) is CancelledError
    assert translated.__cause__ is original
    other = ValueError("x")
    assert translate(other) is other


async def test_a_cancelled_call_raises_at_its_step():
    """Cancelling the task raises CancelledError in the steps, which end the call."""
    seen = []
    sent = asyncio.Event()

    async def hang(_, **__):
        sent.set()
        await asyncio.Event().wait()

    async with AsyncPoolClient("localhost:1") as client:
        client._methods[GET_SERVER_INFO] = hang  # noqa: SLF001 - in place of a server

        def steps():
            try:
                yield Send(GET_SERVER_INFO, b"", CallOptions(None, ()))
            except BaseException as error:
                seen.append(type(error))
                raise

        task = asyncio.create_task(client._run(steps()))  # noqa: SLF001 - what is tested
        await sent.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert seen == [asyncio.CancelledError]


def test_a_map_keeps_its_requests_in_flight():
    """With n requests in flight, the request n + 2 starts after the first result has been delivered."""
    started, release = [], threading.Event()

    def pool(message, **_):
        started.append(message)
        assert release.wait(30)
        raise RpcError

    with PoolClient("localhost:1") as client:
        client._methods[POOL] = BlockingMethod(pool)  # noqa: SLF001 - in place of a server
        shapes = [(1, 1, 4, 4 + i) for i in range(5)]  # of different plane sizes, so that none are grouped
        results = client.map((np.zeros(shape) for shape in shapes), MaxPool2d(2), in_flight=2, return_exceptions=True)
        threading.Timer(0.05, release.set).start()
        first = next(results)
        assert isinstance(first, UnavailableError)
        assert len(started) <= 3
        rest = list(results)
    assert [each.tensor for each in (first, *rest)] == [0, 1, 2, 3, 4]
    assert all(isinstance(each, PoolError) for each in rest)
    assert len(started) == 5


def test_a_call_that_the_server_ended_may_be_tried_again():
    """Both are CANCELLED by gRPC, but the message tells the server's end from the client's own."""
    cancelled = grpc.StatusCode.CANCELLED
    ended = translate(RpcError(cancelled, "CANCELLED"))
    assert isinstance(ended, UnavailableError)
    assert (ended.reason, ended.retry_delay) == ("ENDED", 0.1)
    for message in ("Locally cancelled by application!", "Channel closed!"):
        assert type(translate(RpcError(cancelled, message))) is CancelledError
